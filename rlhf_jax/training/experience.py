"""From a scored rollout to what PPO's update reads: scores, rewards, advantages, and the controllers they steer."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.errors import UserError
from rlhf_jax.objectives import (
    adaptive_kl_step,
    gae,
    grpo_advantages,
    kl_penalized_rewards,
    reinforce_returns,
    rloo_advantages,
    whiten,
)
from rlhf_jax.rollout.generate import Rollout
from rlhf_jax.rollout.sampling import Sampling
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.training.constraint import (
    ConstraintConfig,
    Lagrangian,
    combined,
    constrained_costs,
    init_lagrangian,
    observe,
)
from rlhf_jax.validation import GROUP_ESTIMATORS, UPDATE_METRICS

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The numbers of policy optimization, as the config's ppo stage names them; hashable, static in jitted functions.

    `ptx_coef`, `stop_metric` and `stop_limit` are its `ptx.coef`, `early_stop.metric` and `early_stop.limit`.
    """

    epochs: int = 2
    minibatches: int = 2
    accumulation: int = 1
    samples: int = 1
    reward_normalization: str = ""
    reward_clip: float = 0.0
    missing_end: str = "set"
    missing_end_penalty: float = -1.0
    kl_coef: float = 0.05
    kl_in: str = "reward"
    kl_estimator: str = "k1"
    kl_controller: str = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000
    estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    clip_ratio: float = 0.2
    ratio: str = "token"
    dual_clip: float = 0.0
    loss_weighting: str = ""
    critic: str = "reward"
    value_clip: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    stop_metric: str = ""
    stop_limit: float = 0.0
    constraint: ConstraintConfig | None = None

    @property
    def has_critic(self) -> bool:
        return self.estimator == "gae"

    @property
    def shares_critic(self) -> bool:
        """Whether values are read off the policy's own hidden states."""
        return self.has_critic and self.critic == "shared"

    @property
    def single(self) -> bool:
        """Whether a rollout is trained on in one step: its forward pass then scores for policy and critic."""
        return self.epochs == self.minibatches == self.accumulation == 1 and not self.stops_updates

    @property
    def stops_updates(self) -> bool:
        """Whether the stop metric is one of the update's, which ends an iteration's updates."""
        return self.stop_metric in UPDATE_METRICS

    @property
    def weighting(self) -> str:
        """How an answer counts in the loss; what the papers of GSPO, GRPO and Dr. GRPO do unless the config says."""
        if self.loss_weighting:
            return self.loss_weighting
        if self.ratio == "sequence":
            return "sequence"
        return {"grpo": "sequence", "dr_grpo": "constant"}.get(self.estimator, "token")


class Controllers(struct.PyTreeNode):
    """What steers the rewards from rollout to rollout: part of the train state, float32 () each but the last."""

    kl_coef: Array
    score_count: Array  # of all scores so far, or of the first rollout's
    score_mean: Array
    score_variance: Array  # biased
    lagrangian: Lagrangian | None = None  # where costs are constrained


def init_controllers(config: PPOConfig) -> Controllers:
    """Before the first rollout."""
    lagrangian = init_lagrangian(config.constraint) if config.constraint else None
    count, mean, variance = (jnp.zeros((), jnp.float32) for _ in range(3))
    return Controllers(jnp.float32(config.kl_coef), count, mean, variance, lagrangian)


class Experience(struct.PyTreeNode):
    """A scored rollout: what the update reads. (B, ...) leaves; entries beyond a length are 0."""

    prompts: Array  # (B, P)
    prompt_lengths: Array  # (B,)
    tokens: Array  # (B, N)
    lengths: Array  # (B,)
    logprobs: Array  # (B, N) of the policy that sampled, by scoring
    ref_logprobs: Array  # (B, N)
    values: Array  # (B, N); 0 without a critic
    advantages: Array  # (B, N)
    returns: Array  # (B, N); 0 without a critic
    sampling: Sampling = struct.field(pytree_node=False)  # its temperature is the update's
    cost_values: Array | None = None  # (B, N) of the cost critic; None without a constraint
    cost_returns: Array | None = None  # (B, N)


def answer_mask(lengths: Array, width: int) -> Array:
    """True on each answer's tokens: (B,) -> (B, width)."""
    return jnp.arange(width) < lengths[:, None]


def normalized_scores(config: PPOConfig, scores: Array, state: Controllers) -> tuple[Array, Controllers]:
    """Scores shifted to mean 0 and scaled to variance 1 by what the controllers remember, and these brought up to date.

    "start": statistics of the first rollout, which the reference policy wrote, for good. "running": of all scores so
    far, this rollout's included (Chan et al., 1983). Both are over the global batch.
    """
    count, mean, variance = jnp.float32(scores.shape[0]), scores.mean(), scores.var()
    total = state.score_count + count
    delta = mean - state.score_mean
    merged = state.score_mean + delta * count / total
    spread = state.score_variance * state.score_count + variance * count
    spread = spread + jnp.square(delta) * state.score_count * count / total
    renew = (state.score_count == 0) | (config.reward_normalization == "running")
    state = state.replace(
        score_count=jnp.where(renew, total, state.score_count),
        score_mean=jnp.where(renew, merged, state.score_mean),
        score_variance=jnp.where(renew, spread / total, state.score_variance),
    )
    return (scores - state.score_mean) * jax.lax.rsqrt(state.score_variance + 1e-8), state


def end_penalized(scores: Array, ended: Array, missing_end: str, penalty: float) -> Array:
    """Scores, and for every answer without a stop token the penalty: in its score's place ("set") or added to it."""
    return jnp.where(ended, scores, penalty if missing_end == "set" else scores + penalty)


def shaped_scores(config: PPOConfig, scores: Array, ended: Array, state: Controllers) -> tuple[Array, Controllers]:
    """What is trained on: scores normalized, clipped, then penalized for a missing end, in this order."""
    if config.reward_normalization:
        scores, state = normalized_scores(config, scores, state)
    if config.reward_clip:
        scores = jnp.clip(scores, -config.reward_clip, config.reward_clip)
    return end_penalized(scores, ended, config.missing_end, config.missing_end_penalty), state


def advantages_and_returns(config: PPOConfig, rewards: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Advantages and the critic's targets (B, N) from rewards a token, by the config's estimator.

    Group estimators give every token of an answer the advantage of its summed reward among the answers to its prompt.
    """
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if config.estimator in GROUP_ESTIMATORS:
        totals = rewards.sum(-1).reshape(-1, config.samples)
        if config.estimator == "rloo":
            each = rloo_advantages(totals)
        else:
            each = grpo_advantages(totals, scale=config.estimator == "grpo")
        return jnp.where(mask, each.reshape(-1, 1), 0.0), jnp.zeros_like(rewards)
    if config.estimator == "gae":
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    else:
        advantages, returns = reinforce_returns(rewards, mask, config.gamma), jnp.zeros_like(rewards)
    return whiten(advantages, mask) if config.whiten_advantages else advantages, returns


def constrained_advantages(
    config: PPOConfig, rewards: Array, costs: Array, roles: RoleScores, multiplier: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Advantages of rewards and costs a token (B, N) under lambda, and the targets of both critics (B, N).

    (A_r - lambda A_c) / (1 + lambda), each side by its own critic; only the sum is whitened. Estimators without a
    critic are linear in what they are given up to their own scaling, so they take the rewards combined before.
    """
    if not config.has_critic:
        advantages, none = advantages_and_returns(config, combined(rewards, costs, multiplier), roles.values, mask)
        return advantages, none, none
    assert roles.cost_values is not None
    reward_advantages, returns = gae(rewards, roles.values, mask, config.gamma, config.lam)
    cost_advantages, cost_returns = gae(costs, roles.cost_values, mask, config.gamma, config.lam)
    advantages = combined(reward_advantages, cost_advantages, multiplier)
    return whiten(advantages, mask) if config.whiten_advantages else advantages, returns, cost_returns


def check_rollout(rollout: Rollout, scores: Array) -> None:
    """Refuses, while tracing, what would train on the wrong thing in silence.

    Raises:
      UserError: scores that are not floating-point, or sampling on another support than scoring's.
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise UserError(
            f"rewards are {scores.dtype}: fractions would be cut off; give floating-point scores (astype float32)"
        )
    if rollout.sampling.top_k or rollout.sampling.top_p != 1.0 or not rollout.sampling.temperature > 0:
        raise UserError(
            f"the rollout was sampled with {rollout.sampling}, but log-probabilities are scored on the full support: "
            "set top_k=0, top_p=1.0 and a temperature above 0"
        )


@partial(jax.jit, static_argnames="config")
def make_experience(
    config: PPOConfig,
    rollout: Rollout,
    roles: RoleScores,
    scores: Array,
    controllers: Controllers,
    sources: Metrics | None = None,
    costs: Array | None = None,
) -> tuple[Experience, Metrics, Controllers]:
    """Rewards, advantages and returns of a scored rollout, its metrics, and the controllers' next state.

    Under a constraint the KL penalty stands on both sides, in the rewards and against the costs: in their combination
    (b + lambda b) / (1 + lambda) its weight is `kl_coef` whatever lambda is. (The paper writes half of its beta on each
    side, so its 0.1 acts as 0.05.) Costs are the sources' own: neither normalized nor clipped, nor changed for a
    missing end, so that 0 stays the safety boundary.

    Statistics (whitening, normalizers, metrics) are over the global batch. Metrics, each a mean over answers unless
    said: `objective/kl` sum over tokens of log pi - log pi_ref; `objective/entropy` sum of -log pi; `objective/scores`
    as trained on; `objective/raw_scores` as the sources gave them; `objective/rlhf_reward` = scores - kl_coef * kl;
    `policy/entropy` exact, mean over tokens; `rollout/logprob_gap` mean over tokens of |decode - score|;
    `rollout/repeated` share of answers that another row repeats; `rollout/dead_steps` share of decode steps spent on
    rows that had ended; `val/num_eos_tokens` a count;
    `val/var_explained` 1 - var(returns - values) / var(returns), over tokens; `val/cost_var_explained` of the cost
    critic; `safety/lambda` that the advantages were made with; `safety/cost` and `safety/cost_std` of the answers;
    `safety/unsafe_share` of answers whose cost is above 0; and those of `constraint.observe`.

    Args:
      roles: of the policy that sampled, the reference and the critic, by scoring.
      scores: (B,) float, as the sources gave them.
      controllers: as the last rollout left them; its `kl_coef` is this rollout's.
      sources: name -> (B,) scores of each source; the means of several are metrics too.
      costs: (B,) float, under a constraint.
    """
    check_rollout(rollout, scores)
    logprobs, ref_logprobs, entropy, values, cost_values = roles
    mask = answer_mask(rollout.lengths, rollout.tokens.shape[1])
    count = jnp.sum(mask)
    raw, kl_coef = scores, controllers.kl_coef
    scores, controllers = shaped_scores(config, scores, rollout.ended, controllers)
    in_reward = kl_coef if config.kl_in == "reward" else 0.0
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, rollout.lengths, in_reward, config.kl_estimator)
    safety: Metrics = {}
    cost_returns = None
    if config.constraint is None:
        advantages, returns = advantages_and_returns(config, rewards, values, mask)
    else:
        constraint, lagrangian = config.constraint, controllers.lagrangian
        assert lagrangian is not None and costs is not None
        trained = constrained_costs(constraint, costs, config.samples)
        each = kl_penalized_rewards(trained, logprobs, ref_logprobs, rollout.lengths, -in_reward, config.kl_estimator)
        multiplier = lagrangian.multiplier
        advantages, returns, cost_returns = constrained_advantages(config, rewards, each, roles, multiplier, mask)
        lagrangian, safety = observe(constraint, lagrangian, trained)
        lowest = jnp.minimum(lagrangian.lowest, costs.mean())
        controllers = controllers.replace(lagrangian=lagrangian.replace(lowest=lowest))
        safety |= {
            "safety/lambda": multiplier,
            "safety/cost": costs.mean(),
            "safety/cost_std": costs.std(),
            "safety/unsafe_share": jnp.mean(costs > 0, dtype=jnp.float32),
        }
    kl = jnp.sum(jnp.where(mask, logprobs - ref_logprobs, 0.0), axis=-1)
    if config.kl_controller == "adaptive":
        step = adaptive_kl_step(kl_coef, kl.mean(), config.kl_target, config.kl_horizon, kl.shape[0])
        controllers = controllers.replace(kl_coef=step)
    metrics = {
        "objective/kl": kl.mean(),
        "objective/entropy": -jnp.sum(logprobs, axis=-1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/raw_scores": raw.mean(),
        "objective/rlhf_reward": (scores - kl_coef * kl).mean(),
        "objective/kl_coef": kl_coef,
        "policy/entropy": entropy.sum() / count,
        "rollout/logprob_gap": jnp.sum(jnp.abs(rollout.logprobs - logprobs)) / count,
        "rollout/repeated": repeated_share(rollout.tokens),
        **({} if rollout.dead is None else {"rollout/dead_steps": rollout.dead.mean()}),
        "val/num_eos_tokens": rollout.ended.sum(),
        "response_length": rollout.lengths.mean(dtype=jnp.float32),
        **safety,
    }
    if sources is not None and len(sources) > 1:
        metrics |= {name: x.mean() for name, x in sources.items()}
    if config.has_critic:
        residual = jnp.where(mask, returns - values, 0.0)
        metrics |= {
            "returns/mean": returns.sum() / count,
            "returns/var": _variance(returns, mask),
            "val/error": jnp.sum(jnp.square(residual)) / count,
            "val/var_explained": _explained(returns, values, mask),
        }
        if cost_values is not None and cost_returns is not None:
            metrics["val/cost_var_explained"] = _explained(cost_returns, cost_values, mask)
    fields = (rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths)
    scored = (logprobs, ref_logprobs, values, advantages, returns)
    experience = Experience(
        *fields, *scored, sampling=rollout.sampling, cost_values=cost_values, cost_returns=cost_returns
    )
    return experience, metrics, controllers


def _explained(returns: Array, values: Array, mask: Array) -> Array:
    """1 - var(returns - values) / var(returns), over masked entries."""
    residual = jnp.where(mask, returns - values, 0.0)
    return 1.0 - _variance(residual, mask) / jnp.maximum(_variance(returns, mask), 1e-8)


def _variance(x: Array, mask: Array) -> Array:
    """Biased variance over masked entries."""
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.sum(jnp.where(mask, x, 0.0)) / count
    return jnp.sum(jnp.where(mask, jnp.square(x - mean), 0.0)) / count


def repeated_share(tokens: Array) -> Array:
    """The share of rows (B, N) that are equal to another row, by a 32-bit hash of each."""
    position = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
    words = (tokens.astype(jnp.uint32) + 1) * (position * jnp.uint32(2654435761) | 1)
    words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)
    ordered = jnp.sort(jnp.sum(words ^ (words >> 13), axis=-1, dtype=jnp.uint32))
    same = ordered[1:] == ordered[:-1]
    edge = jnp.zeros((1,), bool)
    return jnp.mean(jnp.concatenate([edge, same]) | jnp.concatenate([same, edge]), dtype=jnp.float32)
