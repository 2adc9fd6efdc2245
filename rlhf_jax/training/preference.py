"""Learning from preferences directly: one objective for every loss, with a reference or without one.

A batch holds B records of two rows each, the prompt with the chosen and with the rejected answer: {"tokens": (B, 2, T)
and "answers": (B, 2, N) int32, "lengths": (B, 2) int32 of the answers, "prompt_lengths": (B,) int32, "weight": (B,)
float32, 0 for padding}. KTO's records have one answer each, with "desirable" (B,) bool; their second row is the prompt
with another record's answer. Reference log-probabilities known before stand in "reference" (B, 2) float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.objectives import dpo_loss, hinge_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_jax.objectives.records import Objective, RecordLosses, microbatches
from rlhf_jax.rollout.scoring import row_logprobs
from rlhf_jax.training.gradient import GradientFunction, plain_gradient
from rlhf_jax.validation import REFERENCE_FREE

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Which loss, and its numbers."""

    loss: str = "dpo"  # "dpo" | "hinge" | "ipo" | "kto" | "orpo" | "simpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False
    margin: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def coefficients(self) -> dict[str, np.ndarray]:
        """The numbers that the jitted functions read from `frozen`: programs that differ in them alone are one."""
        names = ("beta", "margin", "desirable_weight", "undesirable_weight")
        return {name: np.asarray(getattr(self, name), np.float32) for name in names}

    @property
    def has_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    @property
    def per_token(self) -> bool:
        """Whether an answer counts by the mean over its tokens, not by their sum."""
        return not self.has_reference or (self.loss == "ipo" and self.length_normalized)


def summed_logprobs(spec: RoleSpec, weights: Weights, batch: Batch) -> Array:
    """Log-probability of each answer, summed over its tokens, at temperature 1: (B, A) float32 nats.

    Args:
      batch: rows with A answers a record; all of them run in one pass.
    """
    tokens, answers = batch["tokens"], batch["answers"]
    records, count, width = tokens.shape
    prompt_lengths = jnp.repeat(batch["prompt_lengths"], count)
    flat = (answers.reshape(records * count, -1), batch["lengths"].reshape(-1))
    logprobs, _ = row_logprobs(spec, weights, tokens.reshape(-1, width), prompt_lengths, *flat, temperature=1.0)
    return logprobs.sum(axis=-1).reshape(records, count)


def _column(batch: Batch, number: int) -> Batch:
    """The batch with one of its two rows a record."""
    pick = slice(number, number + 1)
    split = ("tokens", "answers", "lengths", "reference")
    return {name: x[:, pick] if name in split else x for name, x in batch.items()}


def _reference_logprobs(reference: RoleSpec | None, frozen: Any, batch: Batch) -> Array:
    """The reference's `summed_logprobs`: those of the batch, else scored now."""
    if "reference" in batch:
        return batch["reference"]
    assert reference is not None, "a loss with a reference needs its log-probabilities or its weights"
    return jax.lax.stop_gradient(summed_logprobs(reference, frozen["reference"], batch))


def _losses(config: PreferenceConfig, numbers: dict[str, Any], scores: Array, batch: Batch) -> Array:
    """(B,) losses of answers' scores (B, A): log-ratios, or log-probabilities where there is no reference."""
    chosen, rejected, beta = scores[:, 0], scores[:, -1], numbers["beta"]
    match config.loss:
        case "dpo":
            return dpo_loss(chosen, rejected, beta, config.label_smoothing)
        case "hinge":
            return hinge_loss(chosen, rejected, beta)
        case "ipo":
            return ipo_loss(chosen, rejected, beta)
        case "orpo":
            return orpo_loss(chosen, rejected, -chosen, beta)
        case "simpo":
            return simpo_loss(chosen, rejected, beta, numbers["margin"])
        case "kto":
            weights = (numbers["desirable_weight"], numbers["undesirable_weight"])
            return kto_loss(chosen, batch["desirable"], batch["kl"], beta, *weights)
    raise ValueError(f'unknown preference loss "{config.loss}"')


def preference_objective(config: PreferenceConfig, spec: RoleSpec, reference: RoleSpec | None) -> Objective:
    """The loss of each record: losses and weights (B,). KTO also reads its batch's "kl" (B,), one number repeated.

    frozen: {"policy": parts of its weights, "reference": weights where the batch lacks its log-probabilities,
    "coefficients": `PreferenceConfig.coefficients`}.

    Metrics are means over records. An answer's implicit reward is beta times its log pi - log pi_ref, summed over its
    tokens (their mean with length_normalized); without a reference beta times its mean log pi. `rewards/chosen`,
    `rewards/rejected`: of either answer; with kto of desirable and undesirable answers, 0 where a batch has none.
    `rewards/accuracies`: pairs whose chosen answer has the larger reward; with kto answers whose log-ratio lies on
    their label's side of the KL. `logps/chosen`, `logps/rejected`: log pi, nats an answer. `objective/kl`: kto's KL.
    """

    def objective(trainable: Any, frozen: Any, batch: Batch) -> RecordLosses:
        kto, weight = config.loss == "kto", batch["weight"]
        rows = _column(batch, 0) if kto else batch
        logprobs = summed_logprobs(spec, {**frozen["policy"], **trainable}, rows)  # (B, A)
        scores = logprobs
        if config.has_reference:
            scores = logprobs - _reference_logprobs(reference, frozen, rows)
        if config.per_token:
            scores = scores / rows["lengths"]
        numbers = frozen["coefficients"]
        losses = _losses(config, numbers, scores, batch) * weight
        count, rewards = weight.sum(), numbers["beta"] * scores
        sides = (weight, weight)
        right = rewards[:, 0] > rewards[:, -1]
        if kto:
            good = batch["desirable"]
            sides = (weight * good, weight * ~good)
            right = jnp.where(good, scores[:, 0] > batch["kl"], scores[:, 0] < batch["kl"])
        metrics = {"loss/train": (losses.sum(), count), "rewards/accuracies": (jnp.sum(right * weight), count)}
        for name, column, side in (("chosen", 0, sides[0]), ("rejected", -1, sides[1])):
            metrics[f"rewards/{name}"] = (jnp.sum(rewards[:, column] * side), side.sum())
            metrics[f"logps/{name}"] = (jnp.sum(logprobs[:, column] * side), side.sum())
        if kto:
            metrics["objective/kl"] = (jnp.sum(batch["kl"] * weight), count)
        return RecordLosses(losses, weight, metrics)

    return objective


def with_kl(
    spec: RoleSpec, reference: RoleSpec | None, trainable: Any, frozen: Any, batch: Batch, parts: int = 1
) -> Batch:
    """KTO's batch with its estimate of KL(pi || pi_ref) in "kl": (B,), one number repeated.

    max(0, mean of log pi - log pi_ref over the mismatched rows) of the whole batch, read before it is cut into
    microbatches: the loss does not depend on their number. Rows are scored `parts` pieces at a time.
    """
    weights = {**frozen["policy"], **trainable}

    def total(rows: Batch) -> Array:
        other = _column(rows, 1)
        ratios = summed_logprobs(spec, weights, other) - _reference_logprobs(reference, frozen, other)
        return jnp.sum(ratios[:, 0] * rows["weight"])

    summed = total(batch) if parts == 1 else jax.lax.map(total, microbatches(batch, parts)).sum()
    kl = jnp.maximum(summed / jnp.maximum(batch["weight"].sum(), 1.0), 0.0)
    return {**batch, "kl": jnp.broadcast_to(jax.lax.stop_gradient(kl), batch["weight"].shape)}


def with_margins(metrics: Metrics) -> Metrics:
    """Metrics with `rewards/margins`, rewards/chosen - rewards/rejected."""
    return {**metrics, "rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}


def preference_gradient(
    config: PreferenceConfig, spec: RoleSpec, reference: RoleSpec | None, accumulation: int = 1
) -> GradientFunction:
    """The gradient of the records' mean loss over the whole batch, and the metrics of `preference_objective`."""
    plain = plain_gradient(preference_objective(config, spec, reference), accumulation)

    def gradient(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Metrics]:
        if config.loss == "kto":
            batch = with_kl(spec, reference, trainable, frozen, batch, accumulation)
        grads, metrics = plain(trainable, frozen, batch)
        return grads, with_margins(metrics)

    return gradient
