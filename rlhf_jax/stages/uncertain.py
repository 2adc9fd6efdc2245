"""Sources that know their uncertainty: what a laplace stage or an ensemble says of answers, and what that is worth."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_folder, knows_uncertainty
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec, Weights, over_members
from rlhf_jax.objectives.adjustment import Moments, mixture
from rlhf_jax.rollout.scoring import member_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.posteriors import load_posterior
from rlhf_jax.training.artifacts import Role
from rlhf_jax.uncertainty import relative_moments, score_moments

Array = jax.Array


class Scorer(NamedTuple):
    """A role that scores, and a posterior over its weights where a laplace stage has fitted one."""

    role: Role
    posterior: Any = None


def load_scorer(context: Context, source: str, mesh: Mesh) -> Scorer:
    """The model that a source names: a stage or a folder.

    Raises:
      UserError: files are missing, or a posterior of other weights than the subject's.
    """
    stages = context.experiment.stages
    if is_folder(stages, source) or stages[source].kind != "laplace":
        return Scorer(context.load(source, mesh))
    role = context.load(stages[source].subject, mesh)
    return Scorer(role, load_posterior(context.workdir, source, role))


def adjustment_of(context: Context, field: str, sources: list[str]) -> tuple[str, np.ndarray]:
    """What uncertainty costs a field's sources: the kind (`objectives.adjustment.KINDS`) and each source's k, float32.

    Raises:
      UserError: the stage that chose k has not tried this source, or this kind of adjustment of it.
    """
    config = context.config
    constraint = config.get("constraint", {}).get("adjustment")
    fields = {"reward": config.get("reward_adjustment"), "constraint.cost": constraint}.get(field)
    if fields is None or fields.kind == "none":
        return "none", np.zeros(len(sources), np.float32)
    if not fields.get("chosen_by"):
        return fields.kind, np.full(len(sources), fields.k, np.float32)
    uncertain = [knows_uncertainty(context.experiment.stages, source) for source in sources]
    chosen = json.loads((context.workdir / fields.chosen_by / "chosen.json").read_text())
    for source, known in zip(sources, uncertain, strict=True):
        if known and fields.kind not in chosen.get(source, {}):
            raise UserError(
                f'stages.{context.name}.reward_adjustment.chosen_by: "{fields.chosen_by}" has chosen no k of kind '
                f'"{fields.kind}" for "{source}": add it to its proxies and adjustments, or set k'
            )
    ks = [chosen[source][fields.kind] if known else 0.0 for source, known in zip(sources, uncertain, strict=True)]
    return fields.kind, np.asarray(ks, np.float32)


def reference_of(context: Context, field: str) -> str:
    """The field of the prompts' records whose answer a field's scores are uncertain against; "" where there is none."""
    config = context.config
    if field.startswith("proxies."):
        return config.against
    return config.get("reward_adjustment", {}).get("against", "") if field == "reward" else ""


def moments(
    spec: RoleSpec,
    weights: Weights,
    posterior: Any,
    tokens: Array,
    lengths: Array,
    reference: tuple[Array, Array] | None = None,
) -> Moments:
    """What a scorer says at the last real token of rows; jitted by its callers.

    Args:
      tokens: (B, T) int32; lengths: (B,).
      reference: tokens (B, T) and lengths (B,) of other rows, or one row for all: the variance is then that of the
        difference to them.
    """

    def of_posterior(one: RoleSpec, mine: Weights, own_posterior: Any) -> tuple[Array, Array]:
        if reference is None:
            return score_moments(one, mine, own_posterior, tokens, lengths)
        return relative_moments(one, mine, own_posterior, tokens, lengths, reference)

    if spec.members == 1 and posterior is None:
        return Moments(member_scores(spec, weights, tokens, lengths)[0])
    if spec.members == 1:
        return Moments(*of_posterior(spec, weights, posterior))
    offsets = None if reference is None else member_scores(spec, weights, *reference)
    if posterior is None:
        return mixture(member_scores(spec, weights, tokens, lengths), offsets=offsets)
    means, variances = over_members(of_posterior, spec, weights, posterior)
    return mixture(means, variances, offsets)
