"""Truths of a private step: how far a unit moves it, what noise it meets, and what it shows.

Steps are compiled anew in every truth, so a patch is seen wherever it is put.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives.records import RecordLosses
from rlhf_jax.privacy import gradient as gradients
from rlhf_jax.privacy import noise
from rlhf_jax.privacy.gradient import PrivateBatch, PrivateStep

# --- a step on linear losses: a row's gradient is the row ------------------------------------------------------------

UNITS, ROWS, SIDE = 6, 2, 3  # two rows a unit
CLIP, EXPECTED = 0.5, 4.0
TREE = {"adapters": {"embedding": SIDE, "kernel": SIDE}, "head": SIDE}


def linear(trainable: Any, frozen: Any, batch: dict[str, Any]) -> RecordLosses:
    """Of weights as they are, or of a copy for each unit."""
    leaves = jax.tree.leaves(trainable)
    copies = [jnp.repeat(w, len(batch["x"]) // len(w), 0) if w.ndim == 2 else w for w in leaves]
    losses = jnp.sum(batch["x"] * jnp.concatenate([c + 0 * batch["x"][:, :SIDE] for c in copies], -1), -1)
    return RecordLosses(losses, batch["weight"], {"secret": (losses.sum(), jnp.float32(1.0))})


def zeros(side: int = SIDE) -> Any:
    return jax.tree.map(lambda _: jnp.zeros(side), TREE)


def linear_step(step: PrivateStep) -> Any:
    """The compiled (rows (UNITS, ROWS, 3 * SIDE), present, key, weights) -> (gradient (3 * SIDE,), metrics)."""
    made = jax.jit(gradients.private_gradient(linear, step))

    def run(x: Any, present: Any, key: Any = None, weight: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        weight = np.ones((UNITS, ROWS), np.float32) if weight is None else weight
        rows = {"x": np.float32(x).reshape(UNITS * ROWS, -1), "weight": np.float32(weight).reshape(-1)}
        key = noise.root_key((1, 2)) if key is None else key
        grads, metrics = made(zeros(), {}, PrivateBatch(rows, np.array(present), key, {}))
        return np.concatenate(jax.tree.leaves(jax.device_get(grads))).astype(np.float64), metrics

    return run


def plain_step(**changes: Any) -> PrivateStep:
    """Without noise, not divided."""
    return PrivateStep(
        **{"clip_norm": CLIP, "noise_multiplier": 0.0, "expected_batch": 1.0, "units_rows": ROWS, **changes}
    )


EVERYBODY = np.ones(UNITS, bool)


def linear_data() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    yield rng.normal(size=(UNITS, ROWS, 3 * SIDE))
    yield 1e4 * rng.normal(size=(UNITS, ROWS, 3 * SIDE))
    along = rng.normal(size=3 * SIDE) * np.ones((UNITS, ROWS, 1))
    yield along * np.where(np.arange(UNITS) == 0, -1e6, 1.0)[:, None, None]  # one against all
    apart = np.zeros((UNITS, ROWS, 3 * SIDE))
    apart[0, 0], apart[0, 1, :SIDE] = 1e3, 1e5  # rows of one unit that point elsewhere
    yield apart


def unit_moves_the_sum_by_its_bound() -> None:
    run, moved = linear_step(plain_step()), []
    for x in linear_data():
        whole, _ = run(x, EVERYBODY)
        moved += [np.linalg.norm(whole - run(x, np.arange(UNITS) != i)[0]) / CLIP for i in range(UNITS)]
    assert max(moved) < 1 + 1e-6, f"a unit moves the sum by {max(moved):.2f} C"
    assert max(moved) > 0.99, "no unit comes near the bound: this shows nothing"


def share_is_a_unit_s_own() -> None:
    """By the back end that reads all units at once."""
    run, x = linear_step(plain_step(backend="adapters", clip_norm=100.0)), next(linear_data())
    weight = np.ones((UNITS, ROWS))
    heavy = np.where(np.arange(UNITS)[:, None] == 0, 50.0, weight)
    alone = np.arange(UNITS) == 3
    same_share = np.array_equal(run(x, alone, weight=weight)[0], run(x, alone, weight=heavy)[0])
    assert same_share, "a unit's share depends on another one's length"


def absent_is_not_counted() -> None:
    run, x, here = linear_step(plain_step()), next(linear_data()), np.arange(UNITS) == 0
    alone = run(np.where(here[:, None, None], x, 0.0), here)[0]
    assert np.array_equal(run(x, here)[0], alone), "units that are not there are in the sum"


def unit_that_is_not_finite_is_left_out() -> None:
    run, x = linear_step(plain_step()), next(linear_data())
    x[2, 0, 0] = np.nan
    without = run(x, np.arange(UNITS) != 2)[0]
    assert np.array_equal(run(x, EVERYBODY)[0], without), "one unit's NaN is in everybody's sum"


def divisor_is_public() -> None:
    run, x = linear_step(plain_step(expected_batch=EXPECTED)), next(linear_data())
    each = [run(x, np.arange(UNITS) == i)[0] for i in range(3)]
    together = run(x, np.arange(UNITS) < 3)[0]
    assert np.allclose(together, sum(each), atol=1e-6), "a sum is divided by how many were drawn"


# --- noise ------------------------------------------------------------------------------------------------------------

SIGMA, DRAWS = 1.5, 3000


def empty_step() -> dict[str, Any]:
    """The gradient of nobody: {"adapters": ..., "head": ...} with leaves of `DRAWS` numbers."""
    step = plain_step(noise_multiplier=SIGMA, expected_batch=EXPECTED, units_rows=1)
    rows = {"x": np.zeros((UNITS, DRAWS), np.float32), "weight": np.ones(UNITS, np.float32)}

    def objective(trainable: Any, frozen: Any, batch: dict[str, Any]) -> RecordLosses:
        return RecordLosses(batch["x"] @ sum(jax.tree.leaves(trainable)), batch["weight"], {})

    batch = PrivateBatch(rows, ~EVERYBODY, noise.root_key((1, 2)), {})
    return jax.device_get(jax.jit(gradients.private_gradient(objective, step))(zeros(DRAWS), {}, batch)[0])


def empty_batch_is_noise_of_its_scale() -> None:
    """sigma C / expected batch, of two leaves each within four standard deviations."""
    for leaf in jax.tree.leaves(empty_step()):
        ratio = leaf.std() / (SIGMA * CLIP / EXPECTED)
        assert abs(ratio - 1) < 4 / math.sqrt(2 * DRAWS), f"an empty batch gives {ratio:.2f} of its noise"


def leaves_have_noise_of_their_own() -> None:
    a, b, c = jax.tree.leaves(empty_step())
    correlation = np.abs(np.corrcoef([a, b, c]) - np.eye(3)).max()
    assert correlation < 5 / math.sqrt(DRAWS), "two leaves have one noise"


def noise_is_fine_grained() -> None:
    leaf = jax.tree.leaves(empty_step())[0]
    assert len(np.unique(leaf)) > 0.99 * DRAWS, f"noise has {len(np.unique(leaf))} values"


def keys_are_threefry() -> None:
    kind = str(jax.random.key_impl(noise.root_key((1, 2))))
    assert kind == "threefry2x32", f"noise is drawn with {kind} keys"


def roots_are_entropy() -> None:
    words = np.array([noise.new_root() for _ in range(16)])
    assert len(np.unique(words[:, 0])) > 8 and len(np.unique(words[:, 1])) > 8, "a root has fewer than 64 random bits"


def root_is_its_owner_s() -> None:
    with tempfile.TemporaryDirectory() as folder:
        noise.load_or_make_root(Path(folder) / "root")


# --- what is shown ----------------------------------------------------------------------------------------------------

RELEASED = dict(released=(("loss/train", 2.0),), released_share=0.25)


def released_alone_is_shown() -> None:
    _, metrics = linear_step(plain_step())(next(linear_data()), EVERYBODY)
    assert not metrics, f"raw {', '.join(metrics)} is shown"


def released_figures_have_their_part_of_the_budget() -> None:
    step = plain_step(noise_multiplier=SIGMA, **RELEASED)
    spent = 1 / step.gradient_noise**2 + 1 / step.figure_noise**2
    assert abs(spent * SIGMA**2 - 1) < 1e-9, f"gradient and figures spend {spent * SIGMA**2:.2f} of the budget"


def released_figures_are_of_those_present() -> None:
    """The smallest figure shown is bound / expected batch times a unit's own, of the units that are there."""
    _, shown = linear_step(plain_step(**RELEASED))(next(linear_data()), ~EVERYBODY)
    step = plain_step(released=(("score", 1.0),), released_share=0.25)
    batch = PrivateBatch({}, np.arange(UNITS) < 2, noise.root_key((1, 2)), {"score": jnp.full(UNITS, 9.0)})
    score = float(gradients._released(step, batch.figures, batch)["score"])
    assert score == 2.0 and float(shown["loss/train"]) == 0.0, f"two figures of 9 clipped to 1 add up to {score:g}"
