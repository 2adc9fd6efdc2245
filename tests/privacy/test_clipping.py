"""Clipped sums against a loop over units in float64, and what no unit may do to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipping_problems import (
    PRESENT,
    ROWS,
    assert_same,
    difference,
    expected,
    median_norm,
    norm,
    problem,
    program,
    run,
    spec_of,
    spoilt,
)

from rlhf_jax.distributed import make_mesh, place_batch, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.roles import weight_axes
from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.privacy.clipping import ROUNDING_MARGIN, clipped_sum, sensitivity

EACH = pytest.mark.parametrize(
    ("name", "backend"),
    [("reward", "adapters"), ("sft_full", "vmap"), ("sft_full", "bookkeeping"), ("sft_full", "ghost")],
)


@pytest.mark.parametrize(
    ("name", "backend", "accumulation", "rows"),
    [
        ("sft", "vmap", 1, 1),
        ("sft", "adapters", 4, 2),
        ("sft_full", "vmap", 2, 1),
        pytest.param("reward", "vmap", 4, 1, marks=pytest.mark.slow),
        ("reward", "adapters", 2, 1),
        ("dpo", "adapters", 1, 1),
    ],
)
def test_the_sum_is_that_of_a_loop_over_units(name, backend, accumulation, rows):
    present, clip_norm = PRESENT[: ROWS // rows], median_norm(name, rows)
    batch = spoilt(problem(name)[3], ~present, rows)
    total, norms = run(name, batch, present, backend, accumulation=accumulation, rows=rows)
    truth, true_norms = expected(name, present, clip_norm, rows)
    assert 0 < np.sum(true_norms > clip_norm) < present.sum()
    assert difference(total, truth) < 1e-6
    assert difference(norms, true_norms) < 1e-6


@EACH
def test_no_unit_adds_more_than_the_clip_norm(name, backend):
    batch, clip_norm = problem(name)[3], median_norm(name)
    for unit in range(ROWS):
        alone = np.arange(ROWS) == unit
        total, norms = run(name, batch, alone, backend, accumulation=2)
        assert norm(total) <= clip_norm
        assert norm(total) > min(norms[unit], clip_norm) * (1 - 2 * ROUNDING_MARGIN)


@EACH
def test_a_unit_that_is_not_finite_counts_zero(name, backend):
    batch, everyone = problem(name)[3], np.ones(ROWS, bool)
    bad = np.isin(np.arange(ROWS), [3, 8])
    total, norms = run(name, spoilt(batch, bad), everyone, backend, accumulation=2)
    without, sound_norms = run(name, batch, ~bad, backend, accumulation=2)
    assert_same(total, without)
    np.testing.assert_array_equal(norms, np.where(bad, np.inf, sound_norms))


@EACH
def test_what_one_record_holds_does_not_change_another_s_share(name, backend):
    batch = problem(name)[3]
    changed = {field: x.copy() for field, x in batch.items()}
    for x in changed.values():
        x[5] = x[6]
    everyone, others = np.ones(ROWS, bool), np.arange(ROWS) != 5
    (total, norms), (other, other_norms) = (
        run(name, rows, everyone, backend, accumulation=2) for rows in (batch, changed)
    )
    np.testing.assert_array_equal(norms[others], other_norms[others])
    assert norms[5] != other_norms[5] and difference(total, other) > 1e-3
    shares = [run(name, rows, others, backend, accumulation=2)[0] for rows in (batch, changed)]
    assert_same(*shares)


def linear(trainable, frozen, batch):
    """The gradient of a row is the row over the unit's weight."""
    losses = batch["x"] @ trainable["adapters"] + batch["y"] @ trainable["head"]
    return RecordLosses(losses, batch["weight"], {})


def linear_run(x, y, weight, present, clip_norm=1.0, dtype=jnp.float32, **options):
    batch = {"x": np.float32(x), "y": np.float32(y), "weight": np.float32(weight)}
    trainable = {"adapters": jnp.zeros(len(x[0]), dtype), "head": jnp.zeros(len(y[0]), dtype)}
    total, norms, _ = clipped_sum(linear, clip_norm, **options)(trainable, {}, batch, np.array(present))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(total))
    return total["adapters"], total["head"], norms


def test_all_trainable_weights_are_one_vector():
    a, b, norms = linear_run([[3.0], [0.3]], [[4.0], [0.4]], [1, 1], [True, True])
    np.testing.assert_allclose(norms, [5.0, 0.5])
    np.testing.assert_allclose([a[0], b[0]], [0.6 + 0.3, 0.8 + 0.4], rtol=2e-6)


def test_each_part_of_the_weights_may_have_a_bound_of_its_own():
    bounds = {"adapters": 1.0, "head": 2.0}
    a, b, norms = linear_run([[3.0], [0.3]], [[4.0], [0.4]], [1, 1], [True, True], bounds)
    np.testing.assert_allclose(norms, [5.0, 0.5])
    np.testing.assert_allclose([a[0], b[0]], [1.0 + 0.3, 2.0 + 0.4], rtol=2e-6)
    assert sensitivity(bounds) == pytest.approx(np.sqrt(5.0)) and sensitivity(0.7) == 0.7


def test_losses_are_each_unit_s_own_and_none_of_the_absent():
    batch = {"x": np.float32([[3], [5], [8]]), "y": np.zeros((3, 1), np.float32), "weight": np.float32([1, 1, 2])}
    trainable = {"adapters": jnp.ones(1), "head": jnp.ones(1)}
    out = clipped_sum(linear, 1.0, accumulation=3)(trainable, {}, batch, np.array([True, False, True]))
    np.testing.assert_allclose(out.losses, [3.0, 0.0, 4.0])


def test_an_infinite_norm_clips_nothing():
    a, b, norms = linear_run([[3e9], [0.0], [0.0]], [[0.0], [4e5], [0.0]], [1, 1, 1], [True] * 3, float("inf"))
    np.testing.assert_array_equal(norms, np.float32([3e9, 4e5, 0.0]))
    np.testing.assert_array_equal([a[0], b[0]], np.float32([3e9, 4e5]))


def test_a_unit_divides_by_its_own_weight():
    """Units of two rows: (1 + 2) / 4 and (8 + 0) / 2; one of no weight has no loss and no gradient."""
    a, _, norms = linear_run(
        [[1.0], [2.0], [8.0], [0.0], [0.0], [0.0]], np.zeros((6, 1)), [1, 3, 1, 1, 0, 0], [True] * 3, 10.0, units_rows=2
    )
    np.testing.assert_allclose(norms, [0.75, 4.0, 0.0])
    np.testing.assert_allclose(a, [4.75])


def test_sums_are_float32_where_weights_are_bfloat16():
    x = np.full((1024, 1), 1e-3)
    a, _, _ = linear_run(x, np.zeros((1024, 1)), np.ones(1024), [True] * 1024, dtype=jnp.bfloat16, accumulation=256)
    np.testing.assert_allclose(a, [1.024], rtol=2**-8)


def test_a_gradient_too_large_for_float32_counts_zero():
    a, _, norms = linear_run([[1e30], [0.5]], np.zeros((2, 1)), [1, 1], [True, True])
    np.testing.assert_array_equal(norms, [np.inf, 0.5])
    np.testing.assert_array_equal(a, [0.5])


@pytest.mark.parametrize("backend", ["vmap", "adapters"])
def test_microbatches_without_a_present_unit_are_skipped(backend):
    ran = []

    def counted(trainable, frozen, batch):
        jax.debug.callback(lambda: ran.append(1))
        weights = batch["x"] * 0 + 1
        return RecordLosses(jnp.sum(trainable["head"] * batch["x"][:, None], -1), weights, {})

    total = jax.jit(clipped_sum(counted, 100.0, backend=backend, accumulation=4))
    x, units = np.arange(1.0, 9.0, dtype=np.float32), np.arange(8)
    for parts in ([], [2], [0, 3]):
        ran.clear()
        present = np.isin(units % 4, parts) & (units > 2)
        summed, norms, _ = total({"head": jnp.zeros(1)}, {}, {"x": x}, present)
        jax.effects_barrier()
        assert len(ran) == len(parts)
        np.testing.assert_allclose(summed["head"], [x[present].sum()])
        np.testing.assert_allclose(norms, x * present)


@pytest.mark.parametrize(
    ("name", "backend", "shape"),
    [("reward", "adapters", (2, 2, 2)), pytest.param("sft_full", "vmap", (4, 2, 1), marks=pytest.mark.slow)],
)
def test_the_sum_is_the_same_on_every_mesh(name, backend, shape):
    _, trainable, frozen, batch = problem(name)
    spec, mesh = spec_of(name), make_mesh(*shape)
    alone, norms = run(name, batch, PRESENT, backend, accumulation=2)
    with jax.set_mesh(mesh):
        here = [jax.device_put(w, tree_shardings(w, weight_axes(spec, w), mesh)) for w in (trainable, frozen)]
        rows = place_batch(ROWS, lambda mine: {f: x[mine] for f, x in (batch | {"present": PRESENT}).items()}, mesh)
        present = rows.pop("present")
        spread, spread_norms, _ = program(name, backend, accumulation=2)(*here, rows, present)
    assert difference(jax.device_get(spread), alone) < 1e-6
    np.testing.assert_allclose(spread_norms, norms, rtol=1e-6)


def test_a_head_for_each_group_of_rows():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(6, 5, 4)).astype(np.float32)
    heads = {
        "kernel": rng.normal(size=(3, 4, 1)).astype(np.float32),
        "bias": rng.normal(size=(3, 1)).astype(np.float32),
    }
    each = [apply_head({k: x[i] for k, x in heads.items()}, hidden[2 * i : 2 * i + 2]) for i in range(3)]
    np.testing.assert_allclose(apply_head(heads, hidden), np.concatenate(each), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_clipped_is_refused():
    for clip_norm in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="clip_norm is .*: give a norm above 0"):
            clipped_sum(linear, clip_norm)
    with pytest.raises(ValueError, match='unknown back end "plain"'):
        clipped_sum(linear, 1.0, backend="plain")
    with pytest.raises(ValueError, match="3 units do not divide over 2 microbatches"):
        linear_run(np.ones((3, 1)), np.ones((3, 1)), np.ones(3), [True] * 3, accumulation=2)
    objective, trainable, frozen, batch = problem("sft_full")
    with pytest.raises(ValueError, match=r"adapters and heads alone, not of \['base'\]\['embedding'\]"):
        clipped_sum(objective, 1.0, backend="adapters")(trainable, frozen, batch, np.ones(ROWS, bool))
