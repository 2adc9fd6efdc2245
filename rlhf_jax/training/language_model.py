"""The language-model objective of fine-tuning, and of the pretraining loss mixed into policy optimization."""

from typing import Any

import jax

from rlhf_jax.models.roles import RoleSpec, hidden_states
from rlhf_jax.models.transformer import output_kernel
from rlhf_jax.objectives.language_model import segment_totals, token_logprobs
from rlhf_jax.objectives.records import Objective, RecordLosses


def sft_objective(spec: RoleSpec, segments: int) -> Objective:
    """Negative log-likelihood of the counted targets, one loss a packed record: losses and weights (B, segments)."""

    def objective(trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> RecordLosses:
        weights = {**frozen, **trainable}
        where = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
        hidden = hidden_states(spec, weights, batch["tokens"], **where)
        kernel = output_kernel(spec.config, weights["base"])
        logprobs, _ = token_logprobs(hidden, kernel, batch["targets"], softcap=spec.config.logit_softcap)
        losses = segment_totals(-logprobs * batch["loss_mask"], batch["segment_ids"], segments)
        counts = segment_totals(batch["loss_mask"], batch["segment_ids"], segments)
        return RecordLosses(losses, counts, {"loss/train": (losses.sum(), counts.sum())})

    return objective
