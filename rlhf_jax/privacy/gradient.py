"""The private gradient, in the place of the plain one: units' gradients clipped and summed, and noise added once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.objectives.records import Objective
from rlhf_jax.privacy.canaries import Coordinates, choose_coordinates, projections, with_canaries
from rlhf_jax.privacy.clipping import Bounds, clipped_sum, sensitivity
from rlhf_jax.privacy.noise import add_noise, privatized

Array = jax.Array
Tree = Any

CANARY_SCALE = 100.0  # a canary's gradient over the clip norm


class PrivateBatch(NamedTuple):
    """What one noisy step reads.

    Attributes:
      rows: the objective's batch, `units_rows` rows a unit.
      present: (units,) bool, False for padding.
      key: of this step's noise. An argument, never a constant of a program, as compiled programs are kept on disk.
      figures: {name: (units,) float} of each unit, to be released beside the gradient.
    """

    rows: Tree
    present: Array
    key: Array
    figures: dict[str, Array] = {}


@dataclass(frozen=True)
class Canaries:
    """Which coordinates of what trains an audit watches: those of its canaries, and idle ones that show noise alone."""

    number: int
    idle: int
    seed: int

    def coordinates(self, trainable: Tree, backend: str) -> tuple[Coordinates, Coordinates]:
        """Of the canaries, and the idle ones.

        Raises:
          UserError: fewer numbers train than are to be watched.
        """
        size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        if self.number + self.idle > size // 2:
            raise UserError(
                f"an audit of {self.number} canaries and {self.idle} idle coordinates needs twice as many trained "
                f"numbers, and {size} train: take fewer canaries"
            )
        chosen = choose_coordinates(trainable, self.number + self.idle, np.random.default_rng(self.seed), backend)
        return Coordinates(*(x[: self.number] for x in chosen)), Coordinates(*(x[self.number :] for x in chosen))


@dataclass(frozen=True)
class PrivateStep:
    """The numbers of a private step; static in jitted functions.

    Attributes:
      clip_norm: one bound, or one for each top-level part of what trains.
      noise_multiplier: sigma, over the sensitivity; that of gradient and released figures together.
      expected_batch: sampling rate times units, the public constant that a sum is divided by.
      backend, accumulation, units_rows: as `clipped_sum` takes them.
      released: {name: bound} of the figures that are released with noise, each clipped to [-bound, bound]. "loss/train"
        is the units' own loss; others come with the batch.
      released_share: the part of the budget that goes to them, in 1 / sigma^2.
    """

    clip_norm: Bounds
    noise_multiplier: float
    expected_batch: float
    backend: str = "vmap"
    accumulation: int = 1
    units_rows: int = 1
    released: tuple[tuple[str, float], ...] = ()
    released_share: float = 0.0

    @property
    def gradient_noise(self) -> float:
        """Noise multiplier of the gradient alone.

        Gradient over sigma_g and figures over sigma_s are one Gaussian vector whose sigma is given by 1 / sigma^2 =
        1 / sigma_g^2 + 1 / sigma_s^2.
        """
        return self.noise_multiplier / math.sqrt(1.0 - self.released_share)

    @property
    def figure_noise(self) -> float:
        """Noise multiplier of the figures, over the norm of all of them at their bounds."""
        return self.noise_multiplier / math.sqrt(self.released_share)


def private_gradient(
    objective: Objective, step: PrivateStep, canaries: Canaries | None = None
) -> Callable[[Tree, Tree, PrivateBatch], tuple[Tree, dict[str, Array]]]:
    """The function (trainable, frozen, `PrivateBatch`) -> (gradient, metrics), both safe to show.

    The gradient is (sum of clipped gradients + sigma C N(0, I)) / expected batch. Metrics are the released figures
    alone: whatever else an objective measures is a raw statistic of the records, and is dropped.

    With `canaries`, batches are {"rows", "canary"} as `canaries.with_canaries` reads them, and the metrics also have
    "audit/canaries" and "audit/idle": the noisy sum along the canaries' coordinates and the noise along the idle ones,
    both over the sensitivity. They are for an audit alone.
    """
    bound = sensitivity(step.clip_norm)

    def gradient(trainable: Tree, frozen: Tree, batch: PrivateBatch) -> tuple[Tree, dict[str, Array]]:
        watched = canaries and canaries.coordinates(trainable, step.backend)
        total = clipped_sum(
            with_canaries(objective, trainable, watched[0], CANARY_SCALE * bound) if watched else objective,
            step.clip_norm,
            backend=step.backend,
            accumulation=step.accumulation,
            units_rows=step.units_rows,
        )
        summed = total(trainable, frozen, batch.rows, batch.present)
        figures = {"loss/train": summed.losses, **batch.figures}
        grads = privatized(
            summed.total,
            batch.key,
            noise_multiplier=step.gradient_noise,
            clip_norm=bound,
            expected_batch=step.expected_batch,
        )
        metrics = _released(step, figures, batch)
        if watched:
            seen, noise = watched[0], jax.tree.map(lambda g, s: g * step.expected_batch - s, grads, summed.total)
            metrics["audit/canaries"] = projections(grads, seen) * (step.expected_batch / bound)
            metrics["audit/idle"] = projections(noise, watched[1]) / bound
        return grads, metrics

    return gradient


def _released(step: PrivateStep, figures: dict[str, Array], batch: PrivateBatch) -> dict[str, Array]:
    """Means over the expected batch of figures clipped to their bounds, with noise."""
    if not step.released:
        return {}
    sums = {}
    for name, bound in step.released:
        x = figures[name]
        counts = batch.present & jnp.isfinite(x)
        sums[name] = jnp.sum(jnp.where(counts, jnp.clip(x, -bound, bound) / bound, 0.0), dtype=jnp.float32)
    if step.noise_multiplier:
        norm = math.sqrt(len(step.released))  # of a unit with every figure at its bound
        sums = add_noise(sums, jax.random.fold_in(batch.key, 1), step.figure_noise * norm)
    return {name: sums[name] * bound / step.expected_batch for name, bound in step.released}
