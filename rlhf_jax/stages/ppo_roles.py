"""The roles of policy optimization: who trains, who is frozen, what they share, and how they read a rollout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import Weights, split, training_passes
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge
from rlhf_jax.training.artifacts import Role, continue_role, role_memory
from rlhf_jax.training.experience import PPOConfig
from rlhf_jax.training.ppo import score_logprobs, score_shared, score_together, score_values

_no_values = jax.jit(jnp.zeros_like)  # jitted: eagerly it would move a scalar to the device in every iteration


@dataclasses.dataclass
class Roles:
    """Policy and critic train; the reference and what the judge reads are frozen.

    Attributes:
      policy: carries the value head where the critic is shared.
      value: None without a critic of its own.
      reference: the policy's starting weights; training works on a copy (`init_state`).
      trainable, frozen: both parts of each trained role's weights, by role.
    """

    settings: PPOConfig
    policy: Role
    value: Role | None
    reference: Weights
    judge: Judge
    trainable: dict[str, Weights] = dataclasses.field(init=False)
    frozen: dict[str, Weights] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        halves = {name: split(role.spec, role.weights) for name, role in self.trained().items()}
        self.trainable = {name: half[0] for name, half in halves.items()}
        self.frozen = {name: half[1] for name, half in halves.items()}

    def trained(self) -> dict[str, Role]:
        return {"policy": self.policy} | ({} if self.value is None else {"value": self.value})

    def acting(self, params: dict[str, Weights]) -> dict[str, Weights]:
        """The whole weights of the trained roles from what trains."""
        return {name: {**self.frozen[name], **params[name]} for name in params}

    @property
    def together(self) -> bool:
        """Whether policy, reference and value are adapters of one shape on one base, and so are scored in one pass."""
        policy, value = self.policy, self.value
        if value is None or policy.spec.lora is None:
            return False
        return value.weights["base"] is policy.weights["base"] and value.spec == policy.spec

    def score(self, acting: dict[str, Weights], rollout: Rollout, parts: int) -> RoleScores:
        """Policy, reference and critic on a rollout, in pieces of the update's minibatch shape."""
        spec, policy = self.policy.spec, acting["policy"]
        if self.together:
            adapters = {name: acting[name]["adapters"] for name in acting}
            adapters["reference"] = self.reference["adapters"]
            base, head = self.policy.weights["base"], acting["value"]["head"]
            return score_together(spec, base, adapters, head, rollout, parts)
        ref_logprobs, _ = score_logprobs(spec, self.reference, rollout, parts)
        if self.settings.shares_critic:
            logprobs, entropy, values = score_shared(spec, policy, rollout, parts)
            return RoleScores(logprobs, ref_logprobs, entropy, values)
        logprobs, entropy = score_logprobs(spec, policy, rollout, parts)
        if self.value is None:
            return RoleScores(logprobs, ref_logprobs, entropy, _no_values(logprobs))
        return RoleScores(
            logprobs, ref_logprobs, entropy, score_values(self.value.spec, acting["value"], rollout, parts)
        )

    def forward_passes(self, epochs: int) -> float:
        """Cost of an iteration in forward passes over all its tokens: decoding, scoring, and every epoch's training."""
        readers = 2 + len(self.judge.roles) + (self.value is not None)
        return 1 + readers + epochs * sum(training_passes(role.spec) for role in self.trained().values())

    def memory(self, params: dict[str, Weights], opt_state: Any) -> dict[str, dict[str, Any]]:
        """`role_memory` of all roles as they stand in training, and the optimizer's share."""
        judges = {name if len(self.judge.roles) > 1 else "reward": role for name, role in self.judge.roles.items()}
        roles = {**self.acting(params), "reference": self.reference}
        roles |= {name: role.weights for name, role in judges.items()}
        moments = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        return role_memory(roles) | {"optimizer": {"base_of": "optimizer", "optimizer": moments}}


def load_roles(context: Context, settings: PPOConfig, start: Role, mesh: Mesh) -> Roles:
    """Loads or makes every role of a ppo stage that begins with `start`.

    A critic of its own starts from the reward model's weights, but its head from 0: the reward head is trained at the
    last token alone, and what it says in the middle of an answer is off by more than the scores' spread. Where no
    reward model reads the policy's tokens, the critic starts from the policy's weights.
    """
    config = context.config
    policy = continue_role(start, context.lora(), config.compute, key=context.key("adapters"))
    policy.weights = {name: part for name, part in policy.weights.items() if name != "head"}
    parts = settings.minibatches * settings.accumulation
    judge = Judge(context, policy.tokenizer, mesh, parts=parts, stop_strings=bool(config.stop_strings))
    reference, value = policy.weights, None
    if settings.has_critic:
        key = context.key("value head")
        if settings.shares_critic:
            head = init_head(policy.spec.config.width, 0.0, key=key)
            policy.weights = {**policy.weights, "head": head}
        else:
            readers = [role for name, role in judge.roles.items() if not judge.foreign[name]]
            critic = readers[0] if readers and config.critic == "reward" else start
            value = continue_role(critic, context.lora(), config.compute, key=context.key("value adapters"))
            head = init_head(value.spec.config.width, 0.0, key=key)
            value.weights = {**value.weights, "head": head}
    return Roles(settings, policy, value, reference, judge)
