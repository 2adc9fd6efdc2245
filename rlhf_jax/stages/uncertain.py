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


def moments(spec: RoleSpec, weights: Weights, posterior: Any, tokens: Array, lengths: Array) -> Moments:
    """What a scorer says at the last real token of rows; jitted by its callers.

    Args:
      tokens: (B, T) int32, or (B, 2, T): then the variance is that of the difference to the second row.
      lengths: (B,), or (B, 2).
    """
    if posterior is None:
        return _of_members(spec, weights, tokens, lengths)
    posterior_moments = score_moments if tokens.ndim == 2 else relative_moments
    if spec.members == 1:
        return Moments(*posterior_moments(spec, weights, posterior, tokens, lengths))

    def of_member(one: RoleSpec, mine: Weights, own_posterior: Any) -> tuple[Array, Array]:
        return posterior_moments(one, mine, own_posterior, tokens, lengths)

    means, variances = over_members(of_member, spec, weights, posterior)
    offsets = None if tokens.ndim == 2 else member_scores(spec, weights, tokens[:, 1], lengths[:, 1])
    return mixture(means, variances, offsets)


def _of_members(spec: RoleSpec, weights: Weights, tokens: Array, lengths: Array) -> Moments:
    """`moments` of a model alone, or of an ensemble."""
    if tokens.ndim == 2:
        scores = member_scores(spec, weights, tokens, lengths)
        return Moments(scores[0]) if spec.members == 1 else mixture(scores)
    scores = member_scores(spec, weights, tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    scores = scores.reshape(spec.members, -1, 2)
    return Moments(scores[0, :, 0]) if spec.members == 1 else mixture(scores[..., 0], offsets=scores[..., 1])
