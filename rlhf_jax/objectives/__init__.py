"""Pure mathematics on arrays: every loss is per token, per record or per pair; none knows of a batch's layout."""

from rlhf_jax.objectives.bradley_terry import bradley_terry_loss
from rlhf_jax.objectives.language_model import segment_totals, token_logprobs
from rlhf_jax.objectives.ppo import gae, kl_penalized_rewards, ppo_policy_loss, ppo_value_loss, whiten

__all__ = [
    "bradley_terry_loss",
    "gae",
    "kl_penalized_rewards",
    "ppo_policy_loss",
    "ppo_value_loss",
    "segment_totals",
    "token_logprobs",
    "whiten",
]
