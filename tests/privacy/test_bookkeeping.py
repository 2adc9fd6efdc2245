"""Norms and clipped sums of full training from one backward pass, against a loop over units in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_problems import (
    PRESENT,
    PROBLEMS,
    ROWS,
    difference,
    expected,
    median_norm,
    norm,
    problem,
    program,
    run,
    spec_of,
    spoilt,
    unit_gradients,
)

from rlhf_jax.bench.workloads import LLAMA_1B
from rlhf_jax.distributed import make_mesh, place_batch, tree_shardings
from rlhf_jax.models.dense import tapped_matmul
from rlhf_jax.models.roles import init_base, weight_axes
from rlhf_jax.objectives import language_model
from rlhf_jax.objectives.language_model import output_gradient, tied_products, token_logprobs
from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.objectives.taps import (
    Factors,
    KernelTap,
    LookupTap,
    OutputTap,
    Tapped,
    factors_are_smaller,
    kernel_tap,
    look_up,
    lookup_squares,
)
from rlhf_jax.privacy.clipping import ROUNDING_MARGIN, book_parts, choose_backend, clipped_sum

FULL = [name for name in PROBLEMS if name.endswith("full")]
BACKENDS = ("bookkeeping", "ghost")


def assert_as_a_loop(name, backend, accumulation, rows):
    present, clip_norm = PRESENT[: ROWS // rows], median_norm(name, rows)
    batch = spoilt(problem(name)[3], ~present, rows)
    total, norms = run(name, batch, present, backend, accumulation=accumulation, rows=rows)
    truth, true_norms = expected(name, present, clip_norm, rows)
    assert 0 < np.sum(true_norms > clip_norm) < present.sum()
    assert difference(total, truth) < 1e-6
    assert difference(norms, true_norms) < 1e-6


@pytest.mark.parametrize(
    ("name", "backend", "accumulation", "rows"),
    [
        ("sft_full", "bookkeeping", 1, 2),
        ("switches_full", "ghost", 1, 1),
        ("reward_full", "bookkeeping", 4, 1),
        ("dpo_full", "ghost", 2, 1),
    ],
)
def test_the_sum_is_that_of_a_loop_over_units(name, backend, accumulation, rows):
    assert_as_a_loop(name, backend, accumulation, rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("backend", [*BACKENDS, "vmap"])
@pytest.mark.parametrize("name", FULL)
def test_every_sum_is_that_of_a_loop_over_units(name, backend, accumulation, rows):
    assert_as_a_loop(name, backend, accumulation, rows)


@pytest.mark.parametrize("backend", ["ghost", pytest.param("bookkeeping", marks=pytest.mark.slow)])
def test_policy_and_critic_may_have_a_bound_each(backend):
    objective, trainable, frozen, batch = problem("ppo_full")
    grads = unit_gradients("ppo_full")
    norms = {name: np.array([norm(g[name]) for g in grads]) for name in ("policy", "value")}
    bounds = {name: float(np.median(each)) for name, each in norms.items()}
    summed = jax.jit(clipped_sum(objective, bounds, backend=backend, accumulation=2))
    out = jax.device_get(summed(trainable, frozen, spoilt(batch, ~PRESENT), PRESENT))
    for name, bound in bounds.items():
        factors = PRESENT * np.minimum(1.0, bound * (1 - ROUNDING_MARGIN) / np.maximum(norms[name], 1e-30))
        assert len(np.unique(factors)) > 4
        truth = jax.tree.map(
            lambda *g, f=factors: sum(a * x for a, x in zip(f, g, strict=True)), *[g[name] for g in grads]
        )
        assert difference(out.total[name], truth) < 1e-6
    whole = np.hypot(norms["policy"], norms["value"]) * PRESENT
    assert difference(out.norms, whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "shape"), [("sft_full", (2, 2, 2)), ("switches_full", (2, 2, 2)), ("ppo_full", (4, 2, 1))]
)
def test_the_sum_is_the_same_on_every_mesh(name, backend, shape):
    _, trainable, frozen, batch = problem(name)
    spec, mesh = spec_of(name), make_mesh(*shape)

    def axes(weights):
        if "policy" in weights:
            return {role: {} if role == "kl_coef" else weight_axes(spec, parts) for role, parts in weights.items()}
        return weight_axes(spec, weights)

    alone, norms = run(name, batch, PRESENT, backend, accumulation=2)
    with jax.set_mesh(mesh):
        here = jax.device_put(trainable, tree_shardings(trainable, axes(trainable), mesh))
        rows = place_batch(ROWS, lambda mine: {f: x[mine] for f, x in (batch | {"present": PRESENT}).items()}, mesh)
        present = rows.pop("present")
        spread, spread_norms, _ = program(name, backend, accumulation=2)(here, frozen, rows, present)
    assert difference(jax.device_get(spread), alone) < 1e-6
    assert difference(spread_norms, norms) < 1e-6


# What a tap shows of one use, against a gradient for each unit.


def squares(x):
    return np.square(np.asarray(x, np.float64)).reshape(len(x), -1).sum(-1)


@pytest.mark.parametrize("d_out", [7, 40])
def test_a_kernel_s_tap_shows_each_unit_s_gradient(d_out):
    """Units of two rows, ten positions each: 10 (20 + 7) > 20 * 7, 10 (20 + 40) < 20 * 40."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=s).astype(np.float32) for s in ((6, 5, 20), (20, d_out), (6, 5, d_out)))
    gradients = np.einsum("utd,uto->udo", x.reshape(3, 10, 20), g.reshape(3, 10, d_out), dtype=np.float64)
    assert factors_are_smaller(10, 20, d_out) == (d_out == 40)
    kept = Factors(np.zeros_like(x), np.zeros_like(g)) if d_out == 40 else np.zeros((3, 20, d_out), np.float32)
    for keep in (None, kept):
        tap = KernelTap(np.zeros(3, np.float32), keep)
        y, backward = jax.vjp(lambda x, w, tap: tapped_matmul(x, Tapped(w, tap)), x, w, tap)
        dx, dw, shown = backward(g)
        np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dw, gradients.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(shown.squares, squares(gradients), rtol=1e-6)
    if d_out == 40:
        np.testing.assert_array_equal(shown.kept.inputs, x)
        np.testing.assert_array_equal(shown.kept.gradients, g)
    else:
        np.testing.assert_allclose(shown.kept, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [9, 40])
def test_a_tied_embedding_s_taps_show_each_unit_s_gradient(width, monkeypatch):
    """Vocabulary of 53 in chunks of at most 10 with one that is padded, twelve positions a unit, tokens that repeat."""
    rng, units, shape = np.random.default_rng(1), 3, (6, 6)
    assert factors_are_smaller(12, width, 53) == (width == 40)
    table = (0.3 * rng.normal(size=(53, width))).astype(np.float32)
    ids, targets = (rng.integers(0, 53 // 4, shape).astype(np.int32) for _ in range(2))
    mix, weights = (rng.normal(size=s).astype(np.float32) for s in ((width, width), (2, *shape)))
    temperature, softcap = 0.7, 3.0

    def loss(table, kernel, ids, targets, weights):
        hidden = jnp.tanh(look_up(table, ids) @ mix)
        logprobs, entropy = token_logprobs(hidden, kernel, targets, temperature, softcap)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    cut = [slice(i, i + 2) for i in range(0, 6, 2)]
    alone = [gradient(table, table.T, ids[unit], targets[unit], weights[:, unit]) for unit in cut]
    each = [lookup + kernel.T for lookup, kernel in alone]
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 36 * 10)
    zeros = [np.zeros(shape, np.float32)] * 5
    taps = {
        "lookup": LookupTap(np.zeros(shape, np.float32), np.zeros((*shape, width), np.float32)),
        "output": OutputTap(np.zeros(units, np.float32), np.zeros((*shape, width), np.float32), *zeros),
    }

    def tapped_loss(table, taps):
        return loss(Tapped(table, taps), Tapped(table.T, taps), ids, targets, weights)

    whole, shown = jax.jit(jax.grad(tapped_loss, argnums=(0, 1)))(table, taps)
    assert difference(whole, np.sum(each, 0)) < 1e-6
    products = tied_products(table, ids, shown["lookup"].gradients, shown["output"], temperature, softcap)
    summed = lookup_squares(shown["lookup"], units) + shown["output"].squares + 2 * products
    np.testing.assert_allclose(summed, squares(each), rtol=2e-6)
    assert np.abs(products).max() > 0.01 * summed.max()
    factors = np.float32([0.5, 0.0, 2.0])
    output = output_gradient(table.T, shown["output"], factors, temperature, softcap)
    assert difference(output, 0.5 * alone[0][1] + 2.0 * alone[2][1]) < 1e-6


@pytest.mark.parametrize("away", [1.0, 1e2, 1e4])
def test_a_norm_is_never_told_much_too_small_where_gradients_cancel(away):
    """Sixteen positions that read the same, whose gradients are `away` times as long as their sum and cancel to it."""
    rng, units = np.random.default_rng(2), 200
    x = np.repeat(rng.normal(size=(units, 1, 64)), 16, axis=1)
    pairs = away * rng.normal(size=(units, 8, 80))
    g = np.concatenate([pairs, -pairs], axis=1) + rng.normal(size=(units, 1, 80)) / 16
    x, g = x.astype(np.float32), g.astype(np.float32)
    assert factors_are_smaller(16, 64, 80)
    told = np.asarray(kernel_tap(x, g, units, keep=False).squares)
    true = squares(np.einsum("utd,uto->udo", x, g, dtype=np.float64))
    assert np.sqrt(true / told).max() < 1.01
    if away == 1.0:
        np.testing.assert_allclose(told, true, rtol=1e-4)


def test_a_weight_used_twice_is_refused():
    """The norm of a sum is not that of its parts."""
    objective, trainable, frozen, batch = problem("sft_full")

    def twice(trainable, frozen, batch):
        a, b = (objective(trainable, frozen, batch) for _ in range(2))
        return RecordLosses(a.losses + b.losses, a.weights, {})

    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"\['base'\]\['embedding'\] is used more than once"):
            clipped_sum(twice, 1.0, backend=backend)(trainable, frozen, batch, PRESENT)


def test_a_leaf_that_is_no_decoder_s_is_refused():
    with pytest.raises(ValueError, match=r"decoders, adapters and heads can be kept apart, not of \['other'\]"):
        clipped_sum(lambda *_: None, 1.0, backend="ghost")({"other": jnp.zeros(3)}, {}, {"x": PRESENT}, PRESENT)


# The choice.


def test_a_microbatch_runs_in_parts_that_divide_a_device_s_units():
    assert [book_parts(units) for units in (1, 2, 3, 4, 6, 8, 10, 35)] == [1, 2, 3, 4, 3, 4, 5, 5]
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert [book_parts(units) for units in (4, 16, 6)] == [1, 4, 1]


def test_the_cheapest_back_end_is_chosen():
    trainable, spec = problem("switches_full")[1], spec_of("switches_full")
    adapters = {"policy": {"adapters": {"q": jnp.zeros((2, 3))}}, "value": {"head": jnp.zeros(3)}}
    plain = dataclasses.replace(spec.config, remat="none")
    assert choose_backend(adapters, plain, 8) == "adapters"
    assert choose_backend(trainable, spec.config, 8) == "ghost"
    assert choose_backend(trainable, plain, 8) == "bookkeeping"
    assert choose_backend(trainable, plain, 4096) == "vmap"  # 23 thousand weights beside 4096 positions
    assert choose_backend({"other": jnp.zeros(9)}, plain, 8) == "vmap"
    weights = jax.eval_shape(partial(init_base, LLAMA_1B), key=jax.random.key(0))
    assert choose_backend({"base": weights}, LLAMA_1B, 2048) == "bookkeeping"
