"""What a private stage will spend: its noise, how many steps its budget allows, and epsilon as it grows."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.privacy.accounting import Mechanism, check_delta, composed_epsilon, noise_multiplier, rdp_epsilon

POINTS = 25  # of the curve of epsilon over steps; between two of them the later one is told


@dataclass(frozen=True)
class Plan:
    """A stage's noisy steps and what they are worth.

    Attributes:
      mechanism: all minibatches of the stage; its noise is 0 where the budget is infinite.
      target: the epsilon that the stage may spend.
    """

    units: int
    mechanism: Mechanism
    target: float
    delta: float
    adjacency: str

    def spent(self, minibatches: int) -> float:
        """Epsilon after so many minibatches, never below the truth: that of the next of `POINTS` points, roughly."""
        if not self.mechanism.noise_multiplier:
            return math.inf
        every = max(1, math.ceil(self.mechanism.steps / POINTS))
        steps = min(self.mechanism.steps, math.ceil(minibatches / every) * every)
        whole = composed_epsilon([self.mechanism], self.delta, self.adjacency)
        if steps == self.mechanism.steps:
            return whole
        so_far = [replace(self.mechanism, steps=steps)]
        return min(whole, composed_epsilon(so_far, self.delta, self.adjacency, coarser=10.0))

    def figures(self) -> dict[str, Any]:
        """The claim in numbers, both adjacencies and the looser Renyi bound beside it."""
        m = self.mechanism
        figures = {
            "epsilon": self.spent(m.steps),
            "delta": self.delta,
            "adjacency": self.adjacency,
            "target": self.target,
            "noise_multiplier": m.noise_multiplier,
            "sampling_rate": m.sampling_rate,
            "minibatches": m.steps,
            "uses": m.uses,
            "physical_batch": m.physical_batch,
            "units": self.units,
        }
        if not m.noise_multiplier:
            return figures
        other = "replace_one" if self.adjacency == "add_or_remove" else "add_or_remove"
        return figures | {
            f"epsilon_{other}": composed_epsilon([m], self.delta, other),
            "epsilon_renyi": rdp_epsilon(**asdict(m), delta=self.delta, adjacency=self.adjacency),
        }


def plan_of(figures: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.figures` wrote."""
    mechanism = Mechanism(
        sampling_rate=figures["sampling_rate"],
        noise_multiplier=figures["noise_multiplier"],
        steps=figures["minibatches"],
        uses=figures["uses"],
        physical_batch=figures["physical_batch"],
        records=figures["units"],
    )
    return Plan(figures["units"], mechanism, figures["target"], figures["delta"], figures["adjacency"])


def make_plan(
    where: str,
    *,
    units: int,
    expected_batch: float,
    minibatches: int,
    uses: int,
    physical_batch: int,
    target: float,
    delta: float,
    noise: float = 0.0,
    adjacency: str = "add_or_remove",
    together: int = 1,
) -> Plan:
    """The plan of a stage.

    Args:
      where: the stage's privacy field, for messages.
      units: how many there are; public.
      minibatches: how many are asked for; with `noise` given, as many multiples of `together` as `target` allows.
      uses: noisy steps on each minibatch.
      noise: the noise multiplier; 0 takes the least with which all minibatches stay within `target`.

    Raises:
      UserError: a batch above the units, delta not below 1 / units, a target that no noise or no step meets.
    """
    if expected_batch > units:
        raise UserError(f"{where}: a minibatch of {expected_batch:g} is asked of {units} units: lower batch_size")
    rate = expected_batch / units
    mechanism = Mechanism(rate, noise, minibatches, uses, physical_batch, units)
    if target == math.inf:
        return Plan(units, mechanism, target, delta, adjacency)
    check_delta(delta, units, f"{where}.delta")
    if not noise:
        try:
            noise = noise_multiplier(
                epsilon=target,
                sampling_rate=rate,
                steps=minibatches,
                delta=delta,
                adjacency=adjacency,
                uses=uses,
                physical_batch=physical_batch,
                records=units,
            )
        except UserError as error:
            raise UserError(f"{where}.epsilon {target:g} over {minibatches} minibatches: {error}") from None
        return Plan(units, replace(mechanism, noise_multiplier=noise), target, delta, adjacency)
    plan = Plan(
        units, replace(mechanism, steps=_affordable(mechanism, target, delta, adjacency)), target, delta, adjacency
    )
    kept = plan.mechanism.steps // together * together
    if not kept:
        raise UserError(
            f"{where}: noise_multiplier {noise:g} spends more than epsilon {target:g} in the first {together} "
            "minibatch(es): raise it, or set it to 0 to have it calibrated"
        )
    return replace(plan, mechanism=replace(mechanism, steps=kept))


def _affordable(mechanism: Mechanism, target: float, delta: float, adjacency: str) -> int:
    """The most minibatches, up to the mechanism's own, whose epsilon does not exceed the target."""

    def spent(steps: int) -> float:
        return composed_epsilon([replace(mechanism, steps=steps)], delta, adjacency)

    low, high = 0, mechanism.steps
    if spent(high) <= target:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= target else (low, middle)
    return low
