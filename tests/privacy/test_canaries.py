"""Canaries in the clipped sum, and whole audits of runs that are correct and of runs that are broken."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.poisson import PoissonBatches, recommended_batch
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, init_base, split
from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.privacy.accounting import Mechanism
from rlhf_jax.privacy.auditing import audit_report
from rlhf_jax.privacy.canaries import Coordinates, choose_coordinates, projections, with_canaries
from rlhf_jax.privacy.clipping import clipped_sum
from rlhf_jax.privacy.noise import privatized, root_key, step_key
from rlhf_jax.training.language_model import sft_objective

WEIGHTS = {"adapters": {"a": np.zeros((4, 5), np.float32)}, "head": np.zeros(6, np.float32)}


def entries(tree, coordinates):
    """Entries one by one, by a loop."""
    leaves = jax.tree.leaves(tree)
    pairs = zip(coordinates.leaf, coordinates.offset, strict=True)
    return np.array([np.ravel(leaves[leaf])[offset] for leaf, offset in pairs])


def test_coordinates_are_distinct_keyed_and_spread_by_size():
    tree = {"a": np.zeros((30, 10)), "b": jax.ShapeDtypeStruct((), jnp.float32), "c": np.zeros((7, 100))}
    chosen = choose_coordinates(tree, 500, np.random.default_rng(3))
    assert len(set(zip(*chosen, strict=True))) == 500
    counts = np.bincount(chosen.leaf, minlength=3)
    assert abs(counts[2] - 350) < 40 and counts[1] <= 1
    again, other = (choose_coordinates(tree, 500, np.random.default_rng(seed)) for seed in (3, 4))
    np.testing.assert_array_equal(chosen, again)
    assert (np.array(chosen) != other).any()
    everything = choose_coordinates(tree, 1001, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(everything.leaf), [300, 1, 700])
    with pytest.raises(ValueError):
        choose_coordinates(tree, 1002, np.random.default_rng(0))


def test_projections_read_entries_in_their_order():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(4, 5, 2)).astype(np.float32), "b": np.float32(3), "c": np.arange(6, dtype=np.float32)}
    coordinates = choose_coordinates(tree, 47, rng)
    read = jax.jit(lambda tree: projections(tree, coordinates))(tree)
    np.testing.assert_array_equal(read, entries(tree, coordinates))


def linear(trainable, frozen, batch):
    """A row's loss at every position is the row times the weights; they may be a unit's own."""
    x, rows = batch["x"], len(batch["x"])
    flat = jnp.concatenate(
        [trainable["adapters"]["a"].reshape(*trainable["head"].shape[:-1], -1), trainable["head"]], -1
    )
    own = jnp.repeat(flat, rows // len(flat), 0) if flat.ndim == 2 else flat
    losses = jnp.stack([(x * own).sum(-1), 2 * (x * own).sum(-1)], -1)
    weights = jnp.broadcast_to(batch["weight"][:, None], losses.shape)
    return RecordLosses(losses, weights, {"rows": (batch["weight"].sum(), jnp.float32(1))})


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("backend", ["vmap", "adapters"])
def test_a_present_canary_adds_the_clip_norm_along_its_coordinate(backend, rows):
    clip_norm, units, rng = 0.7, 8, np.random.default_rng(0)
    coordinates = choose_coordinates(WEIGHTS, 5, rng)
    canary = np.array([-1, 2, -1, -1, 0, 4, -1, 1])
    present = np.array([True, True, True, False, False, True, True, True])
    real = np.repeat(canary < 0, rows)
    batch = {"x": rng.normal(size=(units * rows, 26)).astype(np.float32), "weight": real.astype(np.float32)}
    batch["x"][~real] = 0
    batch["x"][:rows] *= 0.01  # one below the clip norm
    extended = {"rows": batch, "canary": np.repeat(canary, rows).astype(np.int32)}
    options = {"backend": backend, "accumulation": 2, "units_rows": rows}

    def total(present):
        objective = with_canaries(linear, WEIGHTS, coordinates, 100.0)
        out = jax.jit(clipped_sum(objective, clip_norm, **options))(WEIGHTS, {}, extended, present)
        return flat(out.total), out.norms

    others = flat(clipped_sum(linear, clip_norm, **options)(WEIGHTS, {}, batch, present & (canary < 0)).total)
    expected = others.copy()
    for number in (2, 4, 1):
        place = [0, 20][coordinates.leaf[number]] + coordinates.offset[number]
        expected[place] += clip_norm
    found, norms = total(present)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(norms[(canary >= 0) & present], 100.0, rtol=1e-6)
    np.testing.assert_array_equal(total(present & (canary < 0))[0], others)


MODEL = TransformerConfig(vocab_size=13, layers=2, width=8, heads=2, kv_heads=2, head_dim=4, ffn=12, context=16)


@functools.cache
def decoder():
    """(objective, weights) of full training."""
    spec = RoleSpec(MODEL, None)
    base = jax.jit(functools.partial(init_base, MODEL))(key=jax.random.key(0))
    return sft_objective(spec, 1), split(spec, {"base": base})[0]


@pytest.mark.parametrize(("backend", "entries"), [("vmap", 500), ("bookkeeping", 24), ("ghost", 24)])
def test_canaries_enter_full_training(backend, entries):
    """Of the decoder's leaves; those of `entries` that are no matrices are norms, 5 of width 8."""
    objective, weights = decoder()
    coordinates = choose_coordinates(weights, entries, np.random.default_rng(1), backend)
    tokens = np.random.default_rng(2).integers(0, 13, (6, 10)).astype(np.int32)
    canary = np.int32([-1, 3, -1, 20, -1, 7])
    rows = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": np.tile(np.arange(10, dtype=np.int32), (6, 1)),
    }
    rows["segment_ids"] = np.where(canary < 0, 1, 0)[:, None] * np.ones_like(tokens)
    rows["loss_mask"] = rows["segment_ids"].astype(np.float32)
    present = np.array([True] * 5 + [False])
    total = jax.jit(clipped_sum(with_canaries(objective, weights, coordinates, 30.0), 0.3, backend=backend))
    batch = {"rows": rows, "canary": canary}
    out, without = (total(weights, {}, batch, here) for here in (present, present & (canary < 0)))
    moved = jax.tree.map(jnp.subtract, out.total, without.total)
    added = np.where(np.isin(np.arange(entries), canary[[1, 3]]), 0.3, 0.0)
    np.testing.assert_allclose(projections(moved, coordinates), added, atol=1e-5)
    assert np.linalg.norm(flat(moved)) == pytest.approx(0.3 * np.sqrt(2), rel=1e-5)
    np.testing.assert_allclose(out.norms[np.array([1, 3])], 30.0, rtol=1e-6)


def test_a_back_end_that_cannot_see_a_canary_refuses_it():
    objective, weights = decoder()
    everywhere = choose_coordinates(weights, 500, np.random.default_rng(1))
    tokens = np.ones((2, 4), np.int32)
    rows = {"tokens": tokens, "targets": tokens, "positions": tokens, "segment_ids": tokens, "loss_mask": 1.0 * tokens}
    objective = with_canaries(objective, weights, everywhere, 30.0)
    batch = {"rows": rows, "canary": np.int32([-1, 0])}
    with pytest.raises(ValueError, match="this back end takes no canary in .*base"):
        clipped_sum(objective, 0.3, backend="ghost")(weights, {}, batch, np.ones(2, bool))


def test_metrics_are_the_objective_s():
    batch = {"x": np.zeros((3, 26), np.float32), "weight": np.float32([1, 0, 1])}
    objective = with_canaries(linear, WEIGHTS, choose_coordinates(WEIGHTS, 2, np.random.default_rng(0)), 100.0)
    out = objective(WEIGHTS, {}, {"rows": batch, "canary": np.int32([-1, 0, -1])})
    assert out.metrics["rows"][0] == 2
    np.testing.assert_array_equal(out.weights, np.ones((3, 2)))


# A small regression, half of whose records are canaries.
RECORDS, CANARIES, IDLE, STEPS, RATE, NOISE, CLIP = 150, 300, 64, 150, 0.1, 2.0, 0.5
SHAPE = {"w": np.zeros(700, np.float32), "v": np.zeros((20, 40), np.float32)}
MECHANISM = Mechanism(RATE, NOISE, STEPS)
BROKEN = {
    "half the noise": {"noise_multiplier": NOISE / 2},
    "no clipping": {"clip_norm": float("inf")},
    "noise reused": {"fresh": False},
}


def regression(trainable, frozen, batch):
    guess = batch["x"] @ jnp.concatenate([trainable["v"].ravel(), trainable["w"]])
    return RecordLosses(jnp.square(guess - batch["y"]) * batch["weight"], batch["weight"], {})


@functools.cache
def trained(noise_multiplier, clip_norm):
    """A jitted run: (weights, keys, batches, present, coordinates' values) -> noisy canaries and noise, each step's."""
    chosen = choose_coordinates(SHAPE, CANARIES + IDLE, np.random.default_rng(9))
    canaries, idle = (
        Coordinates(*(x[part] for x in chosen)) for part in np.split(np.arange(CANARIES + IDLE), [CANARIES])
    )
    summed = clipped_sum(with_canaries(regression, SHAPE, canaries, 100 * CLIP), clip_norm)
    expected = RATE * (RECORDS + CANARIES / 2)

    @jax.jit
    def run(records, keys, rows, present):
        def step(weights, inputs):
            key, rows, present = inputs
            batch = {name: records[name][rows] for name in ("x", "y", "weight")}
            out = summed(weights, {}, {"rows": batch, "canary": records["canary"][rows]}, present)
            mean = privatized(
                out.total, key, noise_multiplier=noise_multiplier, clip_norm=CLIP, expected_batch=expected
            )
            noisy = jax.tree.map(lambda g: g * expected / CLIP, mean)
            noise = jax.tree.map(lambda g, clean: g - clean / CLIP, noisy, out.total)
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, mean)
            return weights, (projections(noisy, canaries), projections(noise, idle))

        return jax.lax.scan(step, SHAPE, (keys, rows, present))[1]

    return run


def audit(seed, noise_multiplier=NOISE, clip_norm=CLIP, fresh=True):
    rng = np.random.default_rng(seed)
    included = rng.random(CANARIES) < 0.5
    count = RECORDS + included.sum()
    x = rng.normal(size=(RECORDS, 1500)) / 30
    padding = np.zeros(CANARIES)
    # Of a fixed shape, so that one program runs all seeds: canaries that are out stand last and are never drawn.
    records = {
        "x": np.concatenate([x, np.zeros((CANARIES, 1500))]).astype(np.float32),
        "y": np.concatenate([x @ rng.normal(size=1500), padding]).astype(np.float32),
        "weight": np.concatenate([np.ones(RECORDS), padding]).astype(np.float32),
        "canary": np.concatenate([-np.ones(RECORDS), np.argsort(~included, kind="stable")]).astype(np.int32),
    }
    physical = recommended_batch(RECORDS + CANARIES, RATE)
    sampler = PoissonBatches(count, RATE, physical, rng.integers(1 << 32, size=2))
    rows, present = (np.stack(x) for x in zip(*(sampler.batch(step) for step in range(STEPS)), strict=True))
    root = root_key(tuple(rng.integers(1 << 32, size=2, dtype=np.uint32)))
    keys = jax.vmap(lambda step: step_key(root, "run", "audit", "gradient", step))(np.arange(STEPS) * fresh)
    canaries, noise = jax.device_get(trained(noise_multiplier, clip_norm)(records, keys, rows, present))
    return audit_report(canaries, included, noise, mechanism=MECHANISM, delta=1e-5, rng=rng)


def test_an_audit_passes_a_correct_run():
    report = audit(0)
    assert report.flags == ()
    assert 0 < report.lower_bound <= report.epsilon
    assert report.noise.stddev == pytest.approx(NOISE, rel=0.03)


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("half the noise", ["the estimate of epsilon", "standard deviation of"]),
        ("no clipping", ["at least", "the estimate of epsilon"]),
        ("noise reused", ["two steps", "that of the step before", "does not add up"]),
    ],
)
def test_an_audit_flags_a_broken_run(name, sentences):
    flags = audit(0, **BROKEN[name]).flags
    for sentence in sentences:
        assert any(sentence in flag for flag in flags), flags


@pytest.mark.slow
def test_how_often_audits_flag_runs():
    """Every broken run, and of 30 correct ones no more than chance has it: 5 or more have a chance of 0.001 at most."""
    flagged = {name: sum(bool(audit(seed, **how).flags) for seed in range(10)) for name, how in BROKEN.items()}
    assert flagged == dict.fromkeys(BROKEN, 10)
    reports = [audit(seed) for seed in range(30)]
    assert sum(bool(report.flags) for report in reports) < 5, Counter(f for r in reports for f in r.flags)
    assert all(report.lower_bound <= report.epsilon for report in reports)
