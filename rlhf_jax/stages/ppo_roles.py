"""The roles of policy optimization: who trains, who is frozen, what they share, and how they read a rollout."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.data.schemas import Record
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, Weights, split, training_passes, without_heads
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge, Pending
from rlhf_jax.training.artifacts import Role, continue_role, role_memory
from rlhf_jax.training.experience import PPOConfig
from rlhf_jax.training.ppo import score_logprobs, score_shared, score_together, score_values

_no_values = jax.jit(jnp.zeros_like)  # jitted: eagerly it would move a scalar to the device in every iteration


class Judged(NamedTuple):
    """What the sources say of a rollout; (B,) float32 on the mesh."""

    scores: jax.Array
    sources: dict[str, jax.Array]
    costs: jax.Array | None  # under a constraint


@dataclasses.dataclass
class Roles:
    """Policy and critics train; the reference and what the judges read are frozen.

    Attributes:
      policy: carries the value heads where the critics are shared.
      value, cost_value: None without a critic of its own, the second one without a constraint too.
      reference: the policy's starting weights; training works on a copy (`init_state`).
      cost_judge: of `constraint.cost`; None without a constraint.
      trainable, frozen: both parts of each trained role's weights, by role.
    """

    settings: PPOConfig
    policy: Role
    value: Role | None
    reference: Weights
    judge: Judge
    cost_value: Role | None = None
    cost_judge: Judge | None = None
    trainable: dict[str, Weights] = dataclasses.field(init=False)
    frozen: dict[str, Weights] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        halves = {name: split(role.spec, role.weights) for name, role in self.trained().items()}
        self.trainable = {name: half[0] for name, half in halves.items()}
        self.frozen = {name: half[1] for name, half in halves.items()}

    def trained(self) -> dict[str, Role]:
        critics = {"value": self.value, "cost_value": self.cost_value}
        return {"policy": self.policy} | {name: role for name, role in critics.items() if role is not None}

    @property
    def critic_specs(self) -> tuple[RoleSpec | None, RoleSpec | None]:
        """What the critics of rewards and of costs are, where they are their own."""
        value, cost_value = (role.spec if role else None for role in (self.value, self.cost_value))
        return value, cost_value

    def judges(self) -> dict[str, Judge]:
        return {"reward": self.judge} | ({} if self.cost_judge is None else {"cost": self.cost_judge})

    def begin(self, rollout: Rollout, records: Sequence[Record]) -> list[Pending]:
        """Starts all scoring of a rollout; `records` are of its rows."""
        return [judge.begin(rollout, records) for judge in self.judges().values()]

    def finish(self, pending: Sequence[list[Pending]]) -> Judged:
        """Waits for the scores of rollouts that were begun, rows of all one after the other."""
        judges = self.judges().values()
        done = [judge.finish(mine) for judge, mine in zip(judges, zip(*pending, strict=True), strict=True)]
        return Judged(*done[0], done[1][0] if self.cost_judge else None)

    def acting(self, params: dict[str, Weights]) -> dict[str, Weights]:
        """The whole weights of the trained roles from what trains."""
        return {name: {**self.frozen[name], **params[name]} for name in params}

    @property
    def together(self) -> bool:
        """Whether policy, reference and critics are adapters of one shape on one base, so that one pass scores all."""
        policy, critics = self.policy, list(self.trained().values())[1:]
        if not critics or policy.spec.lora is None:
            return False
        return all(
            critic.weights["base"] is policy.weights["base"] and critic.spec == policy.spec for critic in critics
        )

    def score(self, acting: dict[str, Weights], rollout: Rollout, parts: int) -> RoleScores:
        """Policy, reference and critic on a rollout, in pieces of the update's minibatch shape."""
        spec, policy = self.policy.spec, acting["policy"]
        if self.together:
            adapters = {name: acting[name]["adapters"] for name in acting}
            adapters["reference"] = self.reference["adapters"]
            base, head = self.policy.weights["base"], acting["value"]["head"]
            cost_head = acting["cost_value"]["head"] if self.cost_value else None
            return score_together(spec, base, adapters, head, rollout, parts, cost_head)
        ref_logprobs, _ = score_logprobs(spec, self.reference, rollout, parts)
        if self.settings.shares_critic:
            logprobs, entropy, *values = score_shared(spec, policy, rollout, parts)
            return RoleScores(logprobs, ref_logprobs, entropy, *values)
        logprobs, entropy = score_logprobs(spec, policy, rollout, parts)
        if self.value is None:
            return RoleScores(logprobs, ref_logprobs, entropy, _no_values(logprobs))
        critics = {name: role for name, role in self.trained().items() if name != "policy"}
        values = [score_values(role.spec, acting[name], rollout, parts) for name, role in critics.items()]
        return RoleScores(logprobs, ref_logprobs, entropy, *values)

    def forward_passes(self, epochs: int) -> float:
        """Cost of an iteration in forward passes over all its tokens: decoding, scoring, and every epoch's training."""
        readers = 1 + sum(judge.forward_passes() for judge in self.judges().values()) + len(self.trained())
        return 1 + readers + epochs * sum(training_passes(role.spec) for role in self.trained().values())

    def memory(self, params: dict[str, Weights], opt_state: Any) -> dict[str, dict[str, Any]]:
        """`role_memory` of all roles as they stand in training, and the optimizer's share."""
        roles = {**self.acting(params), "reference": self.reference}
        for what, judge in self.judges().items():  # named as the plan names them
            several = len(judge.roles) > 1
            for name, role in judge.roles.items():
                posterior = {"posterior": judge.posteriors[name]} if name in judge.posteriors else {}
                roles[name if several else what] = {**role.weights, **posterior}
        moments = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        return role_memory(roles) | {"optimizer": {"base_of": "optimizer", "optimizer": moments}}


def load_roles(context: Context, settings: PPOConfig, start: Role, mesh: Mesh) -> Roles:
    """Loads or makes every role of a ppo stage that begins with `start`."""
    config = context.config

    def continued(role: Role, key: jax.Array) -> Role:
        return continue_role(role, context.lora(), config.compute, key=key)

    policy = continued(start, context.key("adapters"))
    parts = settings.minibatches * settings.accumulation
    fields = ["reward"] + (["constraint.cost"] if settings.constraint else [])
    judges = [
        Judge(context, policy.tokenizer, mesh, parts=parts, stop_strings=bool(config.stop_strings), field=field)
        for field in fields
    ]
    return assemble(context, settings, start, policy, judges, continued)


def assemble(
    context: Context,
    settings: PPOConfig,
    start: Role,
    policy: Role,
    judges: Sequence[Any],
    continued: Callable[[Role, jax.Array], Role],
    new_head: Callable[..., Any] = init_head,
) -> Roles:
    """The roles of a policy that continues `start`, with the judges of rewards and (under a constraint) of costs.

    A critic of its own starts from the reward model's weights (that of costs from the cost model's), but its head from
    0: the reward head is trained at the last token alone, and what it says in the middle of an answer is off by more
    than the scores' spread. Where no such model reads the policy's tokens, the critic starts from the policy's weights.

    Args:
      continued: (role, key of fresh adapters) -> what the stage makes of it; new_head: as `init_head`.
    """
    config = context.config
    policy.weights = without_heads(policy.weights)
    reference, critics = policy.weights, dict[str, Role]()
    for name, judge in zip(("value", "cost_value"), judges, strict=False):
        key = context.key("value head")  # at scale 0 every head is 0
        if settings.shares_critic:
            head = new_head(policy.spec.config.width, 0.0, key=key)
            policy.weights = {**policy.weights, "head" if name == "value" else "cost_head": head}
        elif settings.has_critic:
            readers = [role for source, role in judge.roles.items() if not judge.foreign[source]]
            origin = readers[0] if readers and config.critic == "reward" else start
            adapters = context.key(f"{name.replace('_', ' ')} adapters")
            critic = critics[name] = continued(origin, adapters)
            critic.weights = {**critic.weights, "head": new_head(critic.spec.config.width, 0.0, key=key)}
    own, costs = critics.get("value"), critics.get("cost_value")
    return Roles(settings, policy, own, reference, judges[0], costs, judges[1] if settings.constraint else None)
