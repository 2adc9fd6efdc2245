"""The private gradient beside the plain one: equal to it without noise and clip, else noise of the stated scale."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_problems import ROWS, difference, problem
from scipy import stats

from rlhf_jax.distributed import make_mesh, place_batch
from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.privacy.gradient import PrivateBatch, PrivateStep, private_gradient
from rlhf_jax.privacy.noise import root_key, step_key
from rlhf_jax.training.gradient import plain_gradient

UNITS, SIDE = 16, 64
SIGMA, CLIP, EXPECTED = 1.7, 0.3, 12.0
NO_NOISE = PrivateStep(math.inf, 0.0, float(UNITS))
NOISY = PrivateStep(CLIP, SIGMA, EXPECTED)
RELEASED = PrivateStep(CLIP, SIGMA, EXPECTED, released=(("loss/train", 2.0), ("score", 5.0)), released_share=0.2)


def key_of(run="run", stage="sft", step=0):
    return step_key(root_key((1, 2)), run, stage, "gradient", step)


def quadratic(trainable, frozen, batch):
    """0.5 |w x - y|^2 of each record, and what a private step may not show."""
    left = batch["x"] @ trainable["w"] + trainable["b"] - batch["y"]
    losses = 0.5 * jnp.sum(jnp.square(left), -1)
    return RecordLosses(losses, jnp.ones_like(losses), {"secret": (losses.sum(), jnp.float32(1.0))})


def weights():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(SIDE, SIDE)), jnp.float32), "b": jnp.ones(SIDE)}


def data(units=UNITS):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(units, SIDE)).astype(np.float32) for name in ("x", "y")}


def batch_of(present=(True,) * UNITS, key=None, **figures):
    key = key_of() if key is None else key
    return PrivateBatch(
        data(len(present)), np.array(present), key, {name: np.float32(x) for name, x in figures.items()}
    )


NOBODY = (False,) * UNITS


@partial(jax.jit, static_argnums=0)
def run(step, batch):
    return private_gradient(quadratic, step)(weights(), {}, batch)


def noise_of(step, present=(True,) * UNITS, key=None):
    """The gradient less what it is without noise, every leaf one after the other."""
    without = PrivateStep(step.clip_norm, 0.0, step.expected_batch, accumulation=step.accumulation)
    leaves = [jax.tree.leaves(run(s, batch_of(present, key))[0]) for s in (step, without)]
    return np.concatenate([np.ravel(a - b) for a, b in zip(*leaves, strict=True)]).astype(np.float64)


# --- without noise ----------------------------------------------------------------------------------------------------


def test_without_noise_and_clip_it_is_the_plain_gradient():
    plain, _ = plain_gradient(quadratic)(weights(), {}, data())
    for accumulation in (1, 4):
        private, _ = run(PrivateStep(math.inf, 0.0, float(UNITS), accumulation=accumulation), batch_of())
        assert difference(private, plain) < 1e-6


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("reward", "adapters"),
        pytest.param("dpo", "adapters", marks=pytest.mark.slow),
        pytest.param("label_full", "vmap", marks=pytest.mark.slow),
    ],
)
def test_of_a_model_too_it_is_the_plain_gradient(name, backend):
    """Records of weight 1, an expected batch that is the batch."""
    objective, trainable, frozen, rows = problem(name)
    batch = PrivateBatch(rows, np.ones(ROWS, bool), key_of())
    private = jax.jit(private_gradient(objective, PrivateStep(math.inf, 0.0, float(ROWS), backend)))
    plain = jax.jit(plain_gradient(objective))(trainable, frozen, rows)[0]
    assert difference(jax.device_get(private(trainable, frozen, batch)[0]), jax.device_get(plain)) < 1e-6


def test_a_sum_is_divided_by_what_is_expected_and_not_by_who_came():
    few = np.arange(UNITS) < 3
    whole, _ = plain_gradient(quadratic)(weights(), {}, jax.tree.map(lambda x: x[few], data()))
    for expected in (4.0, 16.0):
        here, _ = run(PrivateStep(math.inf, 0.0, expected), batch_of(tuple(few)))
        back = jax.tree.map(lambda x, over=expected: x * over / 3, here)
        assert difference(back, whole) < 1e-6


# --- noise ------------------------------------------------------------------------------------------------------------


def test_an_empty_batch_gives_noise_of_the_stated_scale_and_nothing_else():
    for step in (NOISY, PrivateStep(CLIP, SIGMA, EXPECTED, accumulation=4)):
        grads, _ = run(step, batch_of(NOBODY))
        noise = np.ravel(grads["w"]).astype(np.float64) / (SIGMA * CLIP / EXPECTED)
        assert noise.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * noise.size))
        assert stats.kstest(noise, "norm").pvalue > 0.01


def test_who_is_in_a_batch_does_not_change_its_noise():
    np.testing.assert_allclose(noise_of(NOISY), noise_of(NOISY, NOBODY), atol=1e-7)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_noise_is_drawn_once_whatever_the_microbatches(accumulation):
    step = PrivateStep(CLIP, SIGMA, EXPECTED, accumulation=accumulation)
    np.testing.assert_array_equal(run(step, batch_of(NOBODY))[0]["w"], run(NOISY, batch_of(NOBODY))[0]["w"])
    np.testing.assert_allclose(noise_of(step), noise_of(NOISY), atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
def test_noise_is_the_same_on_every_mesh(shape):
    alone = run(RELEASED, batch_of(score=np.ones(UNITS)))
    mesh = make_mesh(*shape)
    host = {**data(), "present": np.ones(UNITS, bool), "score": np.ones(UNITS, np.float32)}
    with jax.set_mesh(mesh):
        rows = place_batch(UNITS, lambda mine: {name: x[mine] for name, x in host.items()}, mesh)
        present, score = rows.pop("present"), rows.pop("score")
        spread = run(RELEASED, PrivateBatch(rows, present, key_of(), {"score": score}))
    assert difference(jax.device_get(spread), jax.device_get(alone)) < 1e-6


def test_every_step_stage_and_run_has_noise_of_its_own():
    keys = [key_of(), key_of(step=1), key_of(step=2), key_of(stage="ppo"), key_of(run="run 2")]
    draws = np.stack([noise_of(NOISY, NOBODY, key) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 4 / np.sqrt(draws.shape[1])


def test_noise_covers_the_bounds_of_all_parts():
    """Of bounds 0.3 and 0.4 a unit moves the sum by 0.5."""
    bounds = {"w": 0.3, "b": 0.4}

    @jax.jit
    def gradient(batch):
        return private_gradient(quadratic, PrivateStep(bounds, SIGMA, EXPECTED))(weights(), {}, batch)[0]

    parts, whole = gradient(batch_of(NOBODY)), run(PrivateStep(0.5, SIGMA, EXPECTED), batch_of(NOBODY))[0]
    assert difference(parts, whole) < 1e-6


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_of_what_an_objective_measures_nothing_is_shown_but_what_is_released():
    assert run(NOISY, batch_of(score=np.ones(UNITS)))[1] == {}
    assert set(run(RELEASED, batch_of(score=np.ones(UNITS)))[1]) == {"loss/train", "score"}


def test_released_figures_are_clipped_means_over_the_expected_batch():
    step = PrivateStep(CLIP, 0.0, EXPECTED, released=(("score", 5.0),), released_share=0.2)
    score = np.array([1, -2, 3, 700, -9, np.nan, np.inf, 4.5, *[2.5] * (UNITS - 8)])
    present = np.arange(UNITS) != 0
    counted = -2 + 3 + 5 - 5 + 0 + 0 + 4.5 + 2.5 * (UNITS - 8)
    shown = run(step, batch_of(tuple(present), score=score))[1]["score"]
    assert float(shown) == pytest.approx(counted / EXPECTED, rel=1e-6)


def test_gradient_and_figures_share_one_budget():
    step = RELEASED
    assert 1 / step.gradient_noise**2 + 1 / step.figure_noise**2 == pytest.approx(1 / SIGMA**2)
    assert (1 / step.figure_noise**2) * SIGMA**2 == pytest.approx(step.released_share)
    assert PrivateStep(CLIP, SIGMA, EXPECTED).gradient_noise == SIGMA


def test_the_budget_is_shared_as_it_is_told():
    """Noise of gradient and of both figures, measured over 3000 steps on nobody's data."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key_of(), i))(jnp.arange(3000))

    def small(trainable, frozen, batch):
        return RecordLosses(batch["x"] * trainable["w"], jnp.ones_like(batch["x"]), {})

    @jax.jit
    @jax.vmap
    def both(key):
        batch = PrivateBatch({"x": jnp.ones(2)}, jnp.zeros(2, bool), key, {"score": jnp.ones(2)})
        return private_gradient(small, RELEASED)({"w": jnp.float32(1.0)}, {}, batch)

    grads, figures = both(keys)
    gradient = np.std(grads["w"]) * EXPECTED / CLIP
    bounds = dict(RELEASED.released)
    each = [np.std(figures[name]) * EXPECTED / bounds[name] for name in bounds]
    near = 4 / np.sqrt(2 * 3000)
    assert gradient == pytest.approx(RELEASED.gradient_noise, rel=near)
    for figure in each:  # a unit may move both: by the root of 2 together
        assert figure / math.sqrt(2) == pytest.approx(RELEASED.figure_noise, rel=near)
    assert np.abs(np.corrcoef([grads["w"], *figures.values()]) - np.eye(3)).max() < 4 / np.sqrt(3000)
