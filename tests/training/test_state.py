from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlhf_jax.distributed import make_mesh, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import base_axes, init_base
from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.gradient import plain_gradient
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
    with_float32_master,
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


def test_decay_spares_stacked_norms_and_biases_whatever_their_prefix():
    names = ("q_bias", "ffn_norm", "post_attention_norm", "norm_bias", "up")
    marks = decays({name: jax.ShapeDtypeStruct((2, 8), jnp.float32) for name in names})
    assert marks == {name: name == "up" for name in names}


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


def test_the_first_moment_in_bfloat16_is_the_only_change():
    params = {"kernel": np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    moved = {}
    for moment_dtype in ("", "bfloat16"):
        optimizer = make_optimizer(settings(moment_dtype=moment_dtype), 3)
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        for _ in range(2):
            state, _ = apply_gradient(state, grads, optimizer)
        adam = optax.tree_utils.tree_get(state.opt_state, "ScaleByAdamState")
        assert adam.mu["kernel"].dtype == (moment_dtype or "float32") and adam.nu["kernel"].dtype == "float32"
        moved[moment_dtype] = state.params["kernel"]
    np.testing.assert_allclose(moved["bfloat16"], moved[""], atol=2 * 0.1 * 2**-7)  # two steps of 0.1, each 8 bits
    assert (moved["bfloat16"] != moved[""]).any()


def adafactor(param, gradients, config, decay):
    """Shazeer and Stern, arXiv 1804.04235, algorithm 4 with absolute steps, in float64; vectors are not factored."""
    p, row, column, v = param.astype(np.float64), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        b2 = min(1 - t**-0.8, config.b2)
        squares = g**2 + 1e-30
        if p.ndim == 2:
            row = b2 * row + (1 - b2) * squares.mean(1)
            column = b2 * column + (1 - b2) * squares.mean(0)
            v = np.outer(row, column) / row.mean()
        else:
            v = b2 * v + (1 - b2) * squares
        step = g / np.sqrt(v)
        step /= max(1.0, np.sqrt(np.mean(step**2)))
        p = p - config.learning_rate * (step + (config.weight_decay * p if decay else 0.0))
    return p


def test_adafactor_equals_the_formulas():
    """Six steps: b2 = 0.7 is reached by its schedule at the fifth."""
    config = settings(name="adafactor", clip_norm=0.0, b2=0.7)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(128, 130)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    gradients = [jax.tree.map(lambda p, t=t: t * rng.normal(size=p.shape), params) for t in range(1, 7)]
    optimizer = make_optimizer(config, 6)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    for g in gradients:
        state, _ = apply_gradient(state, jax.tree.map(jnp.float32, g), optimizer)
    for name, decay in (("kernel", True), ("bias", False)):
        expected = adafactor(params[name], [g[name] for g in gradients], config, decay)
        np.testing.assert_allclose(state.params[name], expected, rtol=1e-4, atol=1e-5)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 0.02 * params["kernel"].size  # a row and a column instead of a matrix


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_schedule_clip_and_decay_are_the_same_for_every_optimizer(name):
    """Without a gradient only the decay moves a matrix: by the schedule's rate, and nothing else moves."""
    config = settings(name=name, schedule="linear", final=0.0)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(config, 4)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    for rate in (0.1, 0.075):
        before = state.params["kernel"]
        state, _ = apply_gradient(state, jax.tree.map(jnp.zeros_like, params), optimizer)
        np.testing.assert_allclose(state.params["kernel"], before * (1 - rate * 0.3), rtol=1e-6)
        np.testing.assert_array_equal(state.params["bias"], params["bias"])


@pytest.mark.parametrize("name, param_dtype", [("adamw", "float32"), ("adafactor", "bfloat16")])
def test_the_peak_is_the_states_and_not_the_optimizers(name, param_dtype):
    """So a step by one optimizer is one by another of any other peak; `init_state` takes it as an argument too."""
    params = {"kernel": jnp.ones((3, 2), param_dtype), "bias": jnp.ones(2, param_dtype)}
    axes = {"kernel": (None, None), "bias": (None,)}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    mesh = make_mesh(devices=jax.devices()[:1])
    slow, fast = (
        make_optimizer(settings(name=name, learning_rate=rate, warmup=0.5), 8, param_dtype) for rate in (0.1, 0.4)
    )
    moved = []
    for step_of, begun_by, rate in ((fast, fast, None), (slow, fast, None), (slow, slow, 0.4)):
        state = init_state(params, axes, begun_by, mesh, learning_rate=rate)
        for _ in range(2):
            state, _ = apply_gradient(state, grads, step_of)
        moved.append(state)
    jax.tree.map(np.testing.assert_array_equal, moved[1], moved[0])
    jax.tree.map(np.testing.assert_array_equal, moved[2], moved[0])
    assert float(jnp.abs(moved[0].params["kernel"] - 1).max()) > 0.2  # 0.1 and 0.2 of the peak 0.4, each a whole step


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(name="adam8bit"), '"adamw" or "adafactor"'),
        (dict(moment_dtype="int8"), '"" .float32. or "bfloat16"'),
        (dict(name="adafactor", moment_dtype="bfloat16"), "no first moment"),
    ],
)
def test_an_unknown_optimizer_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        make_optimizer(settings(**changes), 3)


# Parameters in bfloat16.


def tiny_steps(optimizer, dtype, jit=lambda f: f, steps=200):
    """Steps of 1e-4 on weights near 1, along gradients that do not depend on them: (first parameters, last state).

    Operation by operation by default: compiled as a whole, two programs need not agree in their last bit.
    """
    rng = np.random.default_rng(0)
    params = {"kernel": rng.uniform(0.5, 2, (16, 8)), "head_norm": rng.uniform(0.5, 2, 8), "tiny": 1e-3 * np.ones(5)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16).astype(dtype), params)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16).astype(dtype), params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = jit(lambda state, grads: apply_gradient(state, grads, optimizer))
    for t in range(steps):
        state, _ = step(state, jax.tree.map(lambda g, t=t: g * 2 ** (t % 3), gradient))
    return params, state


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_float32_master_trains_bfloat16_parameters_as_float32_ones(name):
    config = settings(name=name, learning_rate=1e-4, weight_decay=0.01, eps=1e-8)
    start, mastered = tiny_steps(make_optimizer(config, 200, param_dtype="bfloat16"), jnp.bfloat16)
    _, wide = tiny_steps(make_optimizer(config, 200), jnp.float32)
    _, stalled = tiny_steps(make_optimizer(config, 200), jnp.bfloat16, jax.jit)
    for leaf in mastered.params:
        assert mastered.params[leaf].dtype == jnp.bfloat16
        np.testing.assert_array_equal(mastered.params[leaf], wide.params[leaf].astype(jnp.bfloat16))
        np.testing.assert_array_equal(mastered.opt_state.master[leaf], wide.params[leaf])
    np.testing.assert_array_equal(stalled.params["kernel"], start["kernel"])
    assert (mastered.params["kernel"] != start["kernel"]).mean() > 0.8
    assert {leaf.dtype for leaf in jax.tree.leaves(mastered.opt_state) if leaf.ndim} == {np.dtype("float32")}


def test_a_compiled_update_lands_on_the_rounded_master():
    """XLA may leave out a cast to bfloat16 and back; the update must carry the rounding all the same."""
    optimizer = make_optimizer(settings(learning_rate=3e-3), 200, param_dtype="bfloat16")
    for steps in (1, 2, 50):
        _, state = tiny_steps(optimizer, jnp.bfloat16, jax.jit, steps)
        rounded = jax.tree.map(lambda m: m.astype(jnp.bfloat16), state.opt_state.master)
        jax.tree.map(np.testing.assert_array_equal, state.params, rounded)
        update, after = jax.jit(optimizer.update)(state.params, state.opt_state, state.params)
        for p, u, m in zip(*map(jax.tree.leaves, (state.params, update, after.master)), strict=True):
            np.testing.assert_array_equal(np.float32(p) + np.asarray(u), np.float32(m.astype(jnp.bfloat16)))


def test_float32_leaves_need_no_master():
    params = {"base": jnp.ones((4, 3), jnp.bfloat16), "head": jnp.ones((3, 2))}
    optimizer = with_float32_master(optax.sgd(0.3))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    assert jax.tree.leaves(state.opt_state.master)[0].shape == (4, 3) and len(jax.tree.leaves(state.opt_state)) == 1
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        state, _ = apply_gradient(state, grads, optimizer)
    expected = optax.apply_updates(params["head"], jnp.full((3, 2), -0.3))
    for _ in range(2):
        expected = optax.apply_updates(expected, jnp.full((3, 2), -0.3))
    np.testing.assert_array_equal(state.params["head"], expected)
    np.testing.assert_array_equal(state.params["base"], expected[0, 0].astype(jnp.bfloat16))


# Where the state lives.


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


WIDE = {"square": (2, 128, 128), "wide": (128, 256), "norm": (2, 128)}
WIDE_AXES = {"square": ("layers", "embed", "heads"), "wide": ("embed", "mlp"), "norm": ("layers", None)}


def wide_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in WIDE.items()}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_factored_moments_and_masters_live_where_their_axes_do(param_dtype):
    """`embed` lies over fsdp and the other axis over tensor; of a square matrix, too, the row moment keeps `embed`."""
    mesh = make_mesh(2, 2, 2)
    optimizer = make_optimizer(settings(name="adafactor"), 3, param_dtype)
    state = init_state(wide_params(param_dtype), WIDE_AXES, optimizer, mesh)
    whole = PartitionSpec()
    expected = {
        "v_row": {"square": PartitionSpec(None, "fsdp"), "wide": PartitionSpec("fsdp"), "norm": whole},
        "v_col": {"square": PartitionSpec(None, "tensor"), "wide": PartitionSpec("tensor"), "norm": whole},
        "v": {"square": whole, "wide": whole, "norm": whole},
    }
    factored = optax.tree_utils.tree_get(state.opt_state, "FactoredState")
    for field, specs in expected.items():
        for name, spec in specs.items():
            leaf = getattr(factored, field)[name]
            assert leaf.dtype == jnp.float32
            _same_place(leaf.sharding, NamedSharding(mesh, spec), leaf.ndim)
    _same_place(factored.count.sharding, NamedSharding(mesh, whole), 0)
    if param_dtype == "bfloat16":
        jax.tree.map(lambda m, p: _same_place(m.sharding, p.sharding, p.ndim), state.opt_state.master, state.params)
    assert state.params["square"].addressable_shards[0].data.shape == (2, 64, 64)


def test_a_factored_state_with_masters_survives_a_checkpoint(tmp_path):
    """Also where a parameter has no master because it is float32."""
    params = {**wide_params(jnp.bfloat16), "norm": jnp.ones(WIDE["norm"])}
    optimizer = make_optimizer(settings(name="adafactor"), 3, "bfloat16")
    state = init_state(params, WIDE_AXES, optimizer, make_mesh(2, 2, 2))
    checkpoints = Checkpoints(tmp_path / "stage" / "checkpoints", 1, "identity")
    checkpoints.save(1, state, {})
    checkpoints.wait()
    index, restored, _ = checkpoints.restore(init_state(params, WIDE_AXES, optimizer, make_mesh(1, 8, 1)))
    checkpoints.close()
    assert index == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), restored, state)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_sharded_step_equals_one_on_a_single_device(name, param_dtype):
    optimizer = make_optimizer(settings(name=name), 3, param_dtype)

    def gradient(trainable, frozen, batch):
        return jax.tree.map(lambda p: 0.1 * p.astype(jnp.float32), trainable), {}

    ends = []
    for mesh in (make_mesh(2, 2, 2), make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        shardings = state_shardings(wide_params(param_dtype), WIDE_AXES, optimizer, mesh)
        state = init_state(wide_params(param_dtype), WIDE_AXES, optimizer, mesh)
        state, _ = make_step(gradient, optimizer, shardings)(state, {}, {})
        jax.tree.map(lambda leaf, at: _same_place(leaf.sharding, at, leaf.ndim), state, shardings)
        ends.append(jax.device_get(state.opt_state.master if param_dtype == "bfloat16" else state.params))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


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
    assert step.programs() == 1


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


def test_fingerprint_is_of_values_and_not_of_dtypes():
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree())
    assert fingerprint(rounded) == fingerprint(jax.tree.map(jnp.float32, rounded)) != fingerprint(tree())


def test_fingerprint_of_float32_weights_stays_what_it_was():
    """Stored results name models by it."""
    assert fingerprint({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}) == "a492572215e05364"


def test_fingerprint_is_the_same_on_any_mesh():
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    expected = fingerprint(jax.device_get(params))
    for shape in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        placed = jax.device_put(params, tree_shardings(params, base_axes(CONFIG), mesh))
        assert fingerprint(placed) == expected
    everywhere = NamedSharding(make_mesh(2, 2, 2), PartitionSpec())
    assert fingerprint(jax.device_put(params, everywhere)) == expected
