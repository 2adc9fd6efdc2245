from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlhf_jax.distributed import make_mesh, tree_shardings
from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import base_axes, init_base
from rlhf_jax.training.gradient import RecordLosses, plain_gradient
from rlhf_jax.training.state import (
    TrainState,
    apply_gradient,
    decays,
    fingerprint,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    state_shardings,
)

CONFIG = TransformerConfig(vocab_size=16, layers=2, width=8, heads=4, kv_heads=2, head_dim=4, ffn=12, context=16)


def settings(**changes):
    fields = dict(
        learning_rate=0.1,
        schedule="constant",
        warmup=0.0,
        final=0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.3,
        clip_norm=1.0,
    )
    return ConfigDict({**fields, **changes})


# The schedule.


@pytest.mark.parametrize(
    "schedule, middle, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedule_by_hand(schedule, middle, end):
    """20 steps, a fifth of them warm-up, to a tenth of the peak."""
    rate = make_schedule(settings(learning_rate=2.0, schedule=schedule, warmup=0.2), 20)
    assert [float(rate(step)) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert float(rate(12)) == pytest.approx(2.0 * middle)  # halfway from 4 to 20
    assert float(rate(20)) == float(rate(30)) == pytest.approx(2.0 * end)


def test_cosine_by_its_formula():
    rate = make_schedule(settings(schedule="cosine", final=0.2), 10)
    expected = [0.1 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * step / 10))) for step in range(11)]
    np.testing.assert_allclose([float(rate(step)) for step in range(11)], expected, rtol=1e-5)


def test_one_step_of_warm_up_is_a_whole_step():
    rate = make_schedule(settings(schedule="linear", warmup=0.1, final=0.0), 10)
    assert [float(rate(step)) for step in (0, 1, 10)] == pytest.approx([0.1, 0.1, 0.0])


# The optimizer.


def test_decay_spares_norms_biases_and_scalars():
    key = jax.random.key(0)
    shapes = {
        "base": jax.eval_shape(partial(init_base, CONFIG), key=key),
        "adapters": jax.eval_shape(partial(init_adapters, CONFIG, LoraConfig(rank=2)), key=key),
        "head": jax.eval_shape(partial(init_head, 8, 1.0), key=key),
        "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    }
    flat = {jax.tree_util.keystr(path): mark for path, mark in jax.tree_util.tree_leaves_with_path(decays(shapes))}
    spared = {name for name, mark in flat.items() if not mark}
    assert spared == {
        "['base']['final_norm']",
        "['base']['layers']['attention_norm']",
        "['base']['layers']['ffn_norm']",
        "['head']['bias']",
        "['scalar']",
    }
    assert len(flat) == 11 + 14 + 2 + 1


def adamw(param, gradients, config, decay):
    """Loshchilov and Hutter, arXiv 1711.05101, with bias correction, in float64."""
    p, m, v = param.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        step = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        p = p - config.learning_rate * (step + (config.weight_decay * p if decay else 0.0))
    return p


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_and_clipping_equal_the_formulas(clip_norm):
    config = settings(clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    gradients = []  # of global norm 5, 0.5 and 2: the first and last are clipped to 1
    for norm in (5.0, 0.5, 2.0):
        g = {name: rng.normal(size=leaf.shape) for name, leaf in params.items()}
        length = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
        gradients.append({name: leaf * norm / length for name, leaf in g.items()})
    optimizer = make_optimizer(config, 3)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    for g, norm in zip(gradients, (5.0, 0.5, 2.0), strict=True):
        before = state.params
        state, norms = apply_gradient(state, jax.tree.map(jnp.float32, g), optimizer)
        moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, before)
        np.testing.assert_allclose(norms["optimizer/gradient_norm"], norm, rtol=1e-5)  # before clipping
        np.testing.assert_allclose(norms["optimizer/update_norm"], optax.tree_utils.tree_norm(moved), rtol=1e-4)
        np.testing.assert_allclose(norms["optimizer/parameter_norm"], optax.tree_utils.tree_norm(state.params))
    factors = [min(1.0, clip_norm / norm) if clip_norm else 1.0 for norm in (5.0, 0.5, 2.0)]
    for name, decay in (("kernel", True), ("bias", False)):
        clipped = [factor * g[name] for factor, g in zip(factors, gradients, strict=True)]
        np.testing.assert_allclose(state.params[name], adamw(params[name], clipped, config, decay), rtol=1e-5)
    assert int(state.step) == 3


def test_moments_live_where_their_parameters_do():
    mesh = make_mesh(2, 2, 2)
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    optimizer = make_optimizer(settings(), 3)
    at = state_shardings(params, base_axes(CONFIG), optimizer, mesh)
    state = init_state(params, base_axes(CONFIG), optimizer, mesh)
    jax.tree.map(lambda leaf, sharding: _same_place(leaf.sharding, sharding, leaf.ndim), state, at)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda m, p: _same_place(m.sharding, p.sharding, p.ndim), moments, state.params)
    assert not state.params["layers"]["q"].sharding.is_fully_replicated
    assert state.params["layers"]["q"].addressable_shards[0].data.shape == (2, 4, 8)  # embed / fsdp, heads / tensor
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


def _same_place(a, b, ndim):
    assert a.is_equivalent_to(b, ndim)


def test_a_step_donates_its_state_and_not_where_it_came_from():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params, axes = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, {"kernel": (None, None), "bias": (None,)}
    optimizer = make_optimizer(settings(), 3)

    def objective(trainable, frozen, batch):
        losses = jnp.sum(jnp.square(batch["x"] @ trainable["kernel"] + trainable["bias"]), -1)
        return RecordLosses(losses, jnp.ones_like(losses), {"loss": (jnp.sum(losses), jnp.float32(len(losses)))})

    step = make_step(plain_gradient(objective), optimizer, state_shardings(params, axes, optimizer, mesh))
    first = init_state(params, axes, optimizer, mesh)
    state, metrics = step(first, {}, {"x": jnp.ones((4, 3))})
    assert float(metrics["loss"]) == 18.0 and metrics["optimizer/gradient_norm"] > 0
    assert int(state.step) == 1
    assert first.params["kernel"].is_deleted() and not params["kernel"].is_deleted()
    state, metrics = step(state, {}, {"x": jnp.ones((4, 3))})
    assert float(metrics["loss"]) < 18.0 and int(state.step) == 2
    assert step._cache_size() == 1


# The fingerprint.


def tree(seed=0):
    return {"a": np.random.default_rng(seed).normal(size=(8, 16)).astype(np.float32), "b": np.zeros(3, np.float32)}


def test_fingerprint_is_a_function_of_the_bits():
    assert fingerprint(tree()) == fingerprint(jax.tree.map(jnp.asarray, tree()))
    assert len(fingerprint(tree())) == 16 and int(fingerprint(tree()), 16) >= 0


@pytest.mark.parametrize("bit", [0, 1, 15, 16, 22, 23, 30, 31])
def test_one_flipped_bit_shows(bit):
    before = fingerprint(tree())
    for at in (0, 1, 77, 127):
        changed = tree()
        changed["a"].reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
        assert fingerprint(changed) != before
    changed = tree()
    changed["b"].view(np.uint32)[2] ^= np.uint32(1 << bit)
    assert fingerprint(changed) != before


def test_swapped_elements_show():
    seen = {fingerprint(tree())}
    rng = np.random.default_rng(1)
    pairs = {tuple(sorted(rng.choice(128, 2, replace=False))) for _ in range(40)}
    for i, j in pairs:
        changed = tree()
        flat = changed["a"].reshape(-1)
        flat[i], flat[j] = flat[j], flat[i]
        seen.add(fingerprint(changed))
    assert len(seen) == 1 + len(pairs)


def test_two_flipped_signs_show():
    """Two changes of the topmost bit must not cancel in the sum."""
    seen = {fingerprint(tree())}
    rng = np.random.default_rng(2)
    pairs = {tuple(sorted(rng.choice(128, 2, replace=False))) for _ in range(40)}
    for i, j in pairs:
        changed = tree()
        changed["a"].reshape(-1)[[i, j]] *= -1
        seen.add(fingerprint(changed))
    assert len(seen) == 1 + len(pairs)


def test_name_and_shape_are_part_of_the_fingerprint():
    one = tree()
    renamed = {"c": one["a"], "b": one["b"]}
    turned = {**one, "a": one["a"].reshape(16, 8)}
    assert len({fingerprint(one), fingerprint(renamed), fingerprint(turned)}) == 3


def test_fingerprint_is_the_same_on_any_mesh():
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    expected = fingerprint(jax.device_get(params))
    for shape in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        placed = jax.device_put(params, tree_shardings(params, base_axes(CONFIG), mesh))
        assert fingerprint(placed) == expected
    everywhere = NamedSharding(make_mesh(2, 2, 2), PartitionSpec())
    assert fingerprint(jax.device_put(params, everywhere)) == expected
