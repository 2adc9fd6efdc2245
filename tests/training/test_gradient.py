import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.records import RecordLosses, microbatches
from rlhf_jax.training.gradient import plain_gradient

ROWS, LENGTH, WIDTH, VOCAB = 8, 16, 4, 6
TOKENS = np.array([1, 9, 2, 16, 3, 5, 0, 8])  # of each record; one is padding


def problem(seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "inputs": rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "mask": np.arange(LENGTH) < TOKENS[:, None],
    }
    trainable = {"kernel": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32), "bias": np.zeros(VOCAB, np.float32)}
    return trainable, {"scale": np.float32(1.5)}, batch


def token_losses(trainable, frozen, batch):
    logits = frozen["scale"] * (batch["inputs"] @ trainable["kernel"] + trainable["bias"])
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]


def objective(trainable, frozen, batch):
    losses, mask = token_losses(trainable, frozen, batch), batch["mask"]
    count = jnp.sum(mask, dtype=jnp.float32)
    metrics = {
        "loss": (jnp.sum(jnp.where(mask, losses, 0.0)), count),
        "records": (jnp.sum(jnp.any(mask, -1), dtype=jnp.float32), jnp.float32(len(mask))),
    }
    return RecordLosses(jnp.sum(jnp.where(mask, losses, 0.0), -1), jnp.sum(mask, -1, dtype=jnp.float32), metrics)


def mean_over(rows):
    """The gradient of the mean over all tokens of the given rows, by jax.grad."""
    trainable, frozen, batch = problem()
    batch = {name: field[rows] for name, field in batch.items()}

    def mean(trainable, batch):
        losses = jnp.where(batch["mask"], token_losses(trainable, frozen, batch), 0.0)
        return jnp.sum(losses) / jnp.maximum(1, batch["mask"].sum())

    return jax.jit(jax.value_and_grad(mean))(trainable, batch)


def difference(a, b):
    """Largest difference over the largest entry."""
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max(float(np.abs(x - y).max()) for x, y in leaves) / max(float(np.abs(y).max()) for _, y in leaves)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_gradient_is_of_the_global_mean_whatever_the_microbatch(accumulation):
    loss, expected = mean_over(np.arange(ROWS))
    gradient, metrics = jax.jit(plain_gradient(objective, accumulation))(*problem())
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    assert difference(gradient, expected) < 1e-6
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["records"], 7 / 8)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_the_mean_of_microbatch_means_would_be_another_gradient(accumulation):
    parts = [mean_over(np.arange(ROWS)[i::accumulation])[1] for i in range(accumulation)]
    of_means = jax.tree.map(lambda *leaves: sum(leaves) / accumulation, *parts)
    assert difference(of_means, mean_over(np.arange(ROWS))[1]) > 1e-2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_padding_records_weigh_nothing(accumulation):
    trainable, frozen, batch = problem()
    real = {name: field[TOKENS > 0] for name, field in batch.items()}
    padded = {name: np.concatenate([field, field[:2]]) for name, field in batch.items()}
    padded["mask"][-2:] = False
    with_padding, _ = jax.jit(plain_gradient(objective, accumulation))(trainable, frozen, padded)
    without, _ = jax.jit(plain_gradient(objective))(trainable, frozen, real)
    assert difference(with_padding, without) < 1e-6


def test_a_batch_of_padding_gives_zero_and_not_nan():
    trainable, frozen, batch = problem()
    batch["mask"][:] = False
    gradient, metrics = jax.jit(plain_gradient(objective, 2))(trainable, frozen, batch)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    assert float(metrics["loss"]) == 0


def test_microbatches_take_every_nth_row():
    parts = microbatches({"x": np.arange(12).reshape(6, 2)}, 3)["x"]
    np.testing.assert_array_equal(parts[:, :, 0] // 2, [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("accumulation", [1, 64])
def test_bfloat16_parameters_accumulate_in_float32(accumulation):
    """64 microbatches of gradients near 1: a bfloat16 sum would lose 1/256 of itself at every addition past 2^7."""
    rng = np.random.default_rng(0)
    records = jnp.asarray(1 + 0.1 * rng.normal(size=(256, 3)), jnp.bfloat16)

    def linear(trainable, frozen, batch):
        losses = jnp.sum(batch["x"].astype(jnp.float32) * trainable["w"], -1)
        return RecordLosses(losses, jnp.ones_like(losses), {})

    gradient, _ = jax.jit(plain_gradient(linear, accumulation))({"w": jnp.ones(3, jnp.bfloat16)}, {}, {"x": records})
    assert gradient["w"].dtype == jnp.float32
    np.testing.assert_allclose(gradient["w"], np.asarray(records, np.float64).mean(0), rtol=2**-8)
