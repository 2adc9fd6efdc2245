"""A ppo stage's constraint: its numbers, a threshold that is calibrated, and what became of it."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import score_sources, scoring_model
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.safety import binding_share
from rlhf_jax.stages.context import Context
from rlhf_jax.training.constraint import ConstraintConfig, Lagrangian


def constraint_config(config: ConfigDict) -> ConstraintConfig | None:
    """The numbers of a ppo stage's `constraint`, or None where it names no cost."""
    fields = config.constraint
    if not fields.cost:
        return None
    names = [name for name in ConstraintConfig.__dataclass_fields__ if name in fields]
    return ConstraintConfig(**{name: fields[name] for name in names}, **fields.pid)


def calibrated(context: Context, constraint: ConstraintConfig) -> tuple[ConstraintConfig, float | None]:
    """The constraint with its threshold, and the share of unsafe answers at which that binds.

    A cost model's scale is its own: E[C] = threshold may hold at any share of unsafe answers. With the mean costs of
    held-out safe and unsafe answers, which a cost stage reports, the share is
    (threshold - cost_safe) / (cost_unsafe - cost_safe), and `unsafe_share` asks for the threshold of that share. It
    holds for answers like those held-out ones: the trained policy's own is in the evaluation's figures.

    Raises:
      UserError: `unsafe_share` is given and the cost stage has not measured both means.
    """
    asked, source = context.config.constraint.unsafe_share, context.config.constraint.cost
    means = _class_means(context, source)
    if asked:
        if means is None:
            raise UserError(
                f'stages.{context.name}.constraint.unsafe_share is {asked:g}, but "{source}" has no mean costs of '
                "held-out safe and unsafe answers: give the cost stage evaluation.data with safety labels, or set "
                "constraint.threshold"
            )
        safe, unsafe = means
        constraint = dataclasses.replace(constraint, threshold=safe + asked * (unsafe - safe))
    return constraint, None if means is None else binding_share(constraint.threshold, *means)


def _class_means(context: Context, source: str) -> tuple[float, float] | None:
    """Mean costs of held-out safe and unsafe answers, as the cost stage measured them."""
    source = scoring_model(context.experiment.stages, source)
    if source not in context.experiment.stages:
        return None
    figures = json.loads((context.workdir / source / "result.json").read_text())["figures"]
    if "cost_safe" not in figures or "cost_unsafe" not in figures:
        return None
    return figures["cost_safe"], figures["cost_unsafe"]


def constraint_figures(constraint: ConstraintConfig, share: float | None, state: Lagrangian) -> dict[str, Any]:
    """How the constraint ended; `share` is that of unsafe answers at which it binds on the cost model's own data."""
    iterations = max(float(state.iterations), 1.0)
    figures = {"threshold": constraint.threshold}
    if share is not None:
        figures["threshold_unsafe_share"] = share
    figures |= {
        "lambda": float(state.multiplier),
        "lambda_max_reached": float(state.saturated) / iterations,
        "violated_share": float(state.violated) / iterations,
    }
    filled = int(state.filled)
    if filled:  # a private stage keeps no window of raw costs
        figures |= {"window_cost": float(state.costs[-filled:].mean()), "lowest_cost": float(state.lowest)}
    return figures


def out_of_reach(constraint: ConstraintConfig, state: Lagrangian) -> list[str]:
    """What to say where no iteration's mean cost came down to the threshold; [] where one did."""
    lowest = float(state.lowest)
    if not constraint.threshold < lowest < float("inf"):
        return []
    return [
        f"threshold: {constraint.threshold:.4g} was out of reach: the lowest mean cost of an iteration was "
        f"{lowest:.4g}; raise the threshold, or give lambda and the policy more iterations"
    ]


def check_constraint(context: Context) -> None:
    """Refuses a constraint whose source cannot say what `unsafe_share` asks."""
    constraint, stages = context.config.constraint, context.experiment.stages
    if not constraint.unsafe_share:
        return
    where = f"stages.{context.name}.constraint.unsafe_share is {constraint.unsafe_share:g}"
    for source in (scoring_model(stages, source) for source in score_sources(context.config, "constraint.cost")):
        if source not in stages or stages[source].kind != "cost":
            raise UserError(
                f'{where}, but "{source}" is no cost stage, which alone measures what that means: set '
                "constraint.threshold instead"
            )
        if not stages[source].evaluation.data:
            raise UserError(
                f"{where}, which is measured on held-out answers: give stages.{source}.evaluation.data, with safety "
                "labels, or set constraint.threshold instead"
            )
