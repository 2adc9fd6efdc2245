"""Policy optimization after a rollout: scoring by every role, and all epochs and minibatches in one jitted program.

Old, reference and new log-probabilities come from `rollout.scoring.answer_logprobs` at one minibatch shape: before the
first update every ratio is 1 and the KL to an equal reference is 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.objectives import kl_estimate, ppo_policy_loss, ppo_value_loss, sequence_logprobs
from rlhf_jax.objectives.adjustment import Moments
from rlhf_jax.objectives.records import Objective, RecordLosses, microbatches
from rlhf_jax.rollout.generate import Rollout
from rlhf_jax.rollout.scoring import (
    RoleScores,
    answer_logprobs,
    answer_logprobs_and_values,
    answer_rows,
    answer_scores,
    answer_values,
    scores_together,
    with_end_token,
)
from rlhf_jax.training.experience import Experience, PPOConfig, answer_mask, make_experience
from rlhf_jax.training.gradient import mean_metrics, plain_gradient, widened
from rlhf_jax.training.language_model import sft_objective
from rlhf_jax.training.shared import JittedStep
from rlhf_jax.training.state import TrainState, apply_gradient

Array = jax.Array
Metrics = dict[str, Array]
# (spec, weights, posterior, tokens (B, T), lengths (B,)) -> what a scorer says of each row, or of (B, 2, T) and (B, 2)
# of each first row, where what is uncertain is its difference to the second one
Moment = Callable[..., Moments]  # (spec, weights, posterior, tokens, lengths, reference rows or nothing)


def _row_fields(rollout: Rollout | Experience) -> tuple[Array, Array, Array, Array]:
    return rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths


def _over_parts(score: Any, fields: tuple[Array, ...], parts: int) -> Any:
    """Maps `score` over `parts` strided parts of the rows; the result is in the rows' order again."""
    if parts == 1:
        return score(*fields)
    out = jax.lax.map(lambda rows: score(*rows), microbatches(fields, parts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_logprobs(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int) -> tuple[Array, Array]:
    """Log-probabilities and entropies (B, N) of a rollout, `parts` pieces of the update's minibatch shape at a time.

    Policy and reference go through this one compiled program.
    """
    score = partial(answer_logprobs, spec, weights, temperature=rollout.sampling.temperature)
    return _over_parts(score, _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_values(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int) -> Array:
    """Values (B, N) of a rollout."""
    return _over_parts(partial(answer_values, spec, weights), _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_shared(
    spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int
) -> tuple[Array, Array, Array, Array | None]:
    """Log-probabilities, entropies and values (B, N) of a policy that carries the value heads, in one pass."""
    score = partial(answer_logprobs_and_values, spec, weights, temperature=rollout.sampling.temperature)
    return _over_parts(score, _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts"))
def score_together(
    spec: RoleSpec,
    base: Any,
    adapters: dict[str, Any],
    value_head: dict[str, Array],
    rollout: Rollout,
    parts: int,
    cost_head: dict[str, Array] | None = None,
) -> RoleScores:
    """`score_logprobs` of policy and reference and `score_values`, for roles that share a base, in one pass."""
    temperature = rollout.sampling.temperature
    score = partial(scores_together, spec, base, adapters, value_head, temperature=temperature, cost_head=cost_head)
    return _over_parts(score, _row_fields(rollout), parts)


@partial(jax.jit, static_argnames=("spec", "parts", "stop_strings"))
def score_rewards(spec: RoleSpec, weights: Weights, rollout: Rollout, parts: int, stop_strings: bool = False) -> Array:
    """The reward model's scores (B,) of a rollout, before any penalty.

    `stop_strings`: answers may have ended without a stop token; they are read `with_end_token`.
    """
    return _over_parts(partial(answer_scores, spec, weights), _ended_fields(rollout, stop_strings), parts)


@partial(jax.jit, static_argnames=("moment", "spec", "parts", "stop_strings"))
def score_moments(
    moment: Moment,
    spec: RoleSpec,
    weights: Weights,
    posterior: Any,
    rollout: Rollout,
    parts: int,
    stop_strings: bool = False,
    references: tuple[Array, ...] = (),
) -> Moments:
    """`score_rewards` of a model that knows its uncertainty, by `moment`: (B,) each.

    `references`: tokens (B, N) and lengths (B,) of other answers to the same prompts, N at most the rollout's; one row
    where all answers are to one prompt.
    """
    shared = references if references and len(references[0]) == 1 else ()

    def score(prompts: Array, prompt_lengths: Array, answers: Array, lengths: Array, *own: Array) -> Moments:
        rows = answer_rows(spec, prompts, prompt_lengths, answers, lengths)
        if not references:
            return moment(spec, weights, posterior, *rows)
        others, other_lengths = shared or own
        padded = jnp.pad(others, ((0, 0), (0, answers.shape[1] - others.shape[1])))
        many = len(others)
        second = answer_rows(spec, prompts[:many], prompt_lengths[:many], padded, other_lengths)
        return moment(spec, weights, posterior, *rows, second)

    return _over_parts(score, (*_ended_fields(rollout, stop_strings), *(() if shared else references)), parts)


def _ended_fields(rollout: Rollout, stop_strings: bool) -> tuple[Array, Array, Array, Array]:
    prompts, prompt_lengths, tokens, lengths = _row_fields(rollout)
    if stop_strings:
        tokens, lengths = with_end_token(tokens, lengths, rollout.ended, rollout.sampling.stop_ids)
    return prompts, prompt_lengths, tokens, lengths


class AnswerOutputs(NamedTuple):
    """What the trained roles say of answers: (B, N) each."""

    logprobs: Array
    entropy: Array
    values: Array  # 0 without a critic
    cost_values: Array | None = None  # of the cost critic, under a constraint


def answer_outputs(
    config: PPOConfig,
    policy: RoleSpec,
    value: RoleSpec | None,
    weights: dict[str, Weights],
    rows: Rollout | Experience,
    cost_value: RoleSpec | None = None,
) -> AnswerOutputs:
    """The trained roles on answers; the specs are of critics of their own."""
    fields, temperature = _row_fields(rows), rows.sampling.temperature
    if config.shares_critic:
        return AnswerOutputs(*answer_logprobs_and_values(policy, weights["policy"], *fields, temperature))
    logprobs, entropy = answer_logprobs(policy, weights["policy"], *fields, temperature)
    if value is None:
        return AnswerOutputs(logprobs, entropy, jnp.zeros_like(logprobs))
    values = answer_values(value, weights["value"], *fields)
    costs = None if cost_value is None else answer_values(cost_value, weights["cost_value"], *fields)
    return AnswerOutputs(logprobs, entropy, values, costs)


def answer_losses(config: PPOConfig, outputs: AnswerOutputs, kl_coef: Array, batch: Experience) -> RecordLosses:
    """Clipped policy loss, value_coef * clipped value loss of each critic, KL and entropy terms: one loss an answer.

    An answer's loss and weight follow `PPOConfig.weighting`: "token": its sum, over all tokens of the batch;
    "sequence": its mean over its tokens, over all answers; "constant": its sum over the longest answer allowed, over
    all answers.

    Args:
      outputs: `answer_outputs` of the weights that train.
    """
    logprobs, entropy, values, cost_values = outputs
    mask = answer_mask(batch.lengths, batch.tokens.shape[1])
    count = jnp.sum(mask, dtype=jnp.float32)

    def masked(x: Array) -> Array:
        return jnp.where(mask, x, 0.0)

    compared = logprobs, batch.logprobs
    if config.ratio == "sequence":
        compared = sequence_logprobs(logprobs, mask), sequence_logprobs(batch.logprobs, mask)
    pg = masked(ppo_policy_loss(*compared, batch.advantages, config.clip_ratio, config.dual_clip))
    log_ratio = masked(compared[0] - compared[1])
    ratio = jnp.exp(log_ratio)
    tokens = {
        "loss/policy": pg,
        "policy/approxkl": 0.5 * jnp.square(log_ratio),
        "policy/clipfrac": masked(jnp.abs(ratio - 1.0) > config.clip_ratio),
        "val/ratio": masked(ratio),
        "val/ratio_error": masked(jnp.abs(ratio - 1.0)),
    }
    losses = pg
    if config.has_critic:
        vf = masked(ppo_value_loss(values, batch.values, batch.returns, config.value_clip))
        tokens["loss/value"] = vf
        tokens["val/clipfrac"] = masked(jnp.abs(values - batch.values) > config.value_clip)
        losses = losses + config.value_coef * vf
    if cost_values is not None and batch.cost_values is not None and batch.cost_returns is not None:
        vf = masked(ppo_value_loss(cost_values, batch.cost_values, batch.cost_returns, config.value_clip))
        tokens["loss/cost_value"] = vf
        losses = losses + config.value_coef * vf
    if config.kl_in == "loss":
        tokens["loss/kl"] = masked(kl_estimate(logprobs, batch.ref_logprobs, config.kl_estimator))
        losses = losses + kl_coef * tokens["loss/kl"]
    if config.entropy_coef:
        tokens["loss/entropy"] = masked(entropy)
        losses = losses - config.entropy_coef * tokens["loss/entropy"]
    sums = {name: (jnp.sum(x, dtype=jnp.float32), count) for name, x in tokens.items()}
    return RecordLosses(*_weighted(config, jnp.sum(losses, axis=-1), batch), sums)


def ppo_objective(
    config: PPOConfig, policy: RoleSpec, value: RoleSpec | None, cost_value: RoleSpec | None = None
) -> Objective:
    """`answer_losses` of what trains.

    trainable and frozen: {"policy": parts of the weights, "value": parts, "cost_value": parts}, and
    frozen["kl_coef"] (); batch: `Experience`. `value` and `cost_value` are None without critics of their own.
    """

    def objective(trainable: Any, frozen: Any, batch: Experience) -> RecordLosses:
        weights = {role: {**frozen[role], **trainable[role]} for role in trainable}
        outputs = answer_outputs(config, policy, value, weights, batch, cost_value)
        return answer_losses(config, outputs, frozen["kl_coef"], batch)

    return objective


def _weighted(config: PPOConfig, losses: Array, batch: Experience) -> tuple[Array, Array]:
    """Each answer's summed loss (B,) as `config.weighting` counts it, and its share of the denominator."""
    lengths, longest = batch.lengths.astype(jnp.float32), batch.tokens.shape[1]
    if config.weighting == "token":
        return losses, lengths
    return losses / (lengths if config.weighting == "sequence" else longest), jnp.ones_like(lengths)


def minibatch_rows(key: Array, rows: int, epochs: int, minibatches: int) -> Array:
    """Row numbers (epochs * minibatches, rows / minibatches): a fresh keyed permutation for every epoch."""
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    orders = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return orders.reshape(epochs * minibatches, rows // minibatches)


def _ptx_gradient(config: PPOConfig, policy: RoleSpec, segments: int):
    """The function (params, frozen, ptx, grads) -> (grads with ptx_coef times the language-model loss's, its loss)."""
    theirs = plain_gradient(sft_objective(policy, segments), config.accumulation)

    def mix(params: Any, frozen: Any, ptx: Any, grads: Any) -> tuple[Any, Metrics]:
        mixed, figures = theirs(params["policy"], frozen["policy"], ptx)
        both = jax.tree.map(lambda a, b: a + config.ptx_coef * b, grads["policy"], mixed)
        return {**grads, "policy": both}, {"loss/ptx": figures["loss/train"]}

    return mix if config.ptx_coef else lambda params, frozen, ptx, grads: (grads, {})


def make_update(
    config: PPOConfig,
    policy: RoleSpec,
    value: RoleSpec | None,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    segments: int = 1,
    cost_value: RoleSpec | None = None,
) -> JittedStep:
    """The jitted `(state, frozen, experience, kl_coef, key, ptx) -> (state, metrics)`: one rollout's updates.

    All epochs and minibatches run in one program; the state is donated. `kl_coef` is the rollout's; `ptx`, or None, is
    a packed batch whose rows are those of all minibatches, one minibatch after the other. Where `stops_updates`, the
    first minibatch that passes `stop_limit` is not applied, and none after it.

    Metrics are means over the updates that were made, `policy/updates` of them; `val/first_ratio_error` is of the first
    minibatch, where nothing has been updated yet: the mean of |ratio - 1|, 0 up to rounding.
    """
    gradient = plain_gradient(ppo_objective(config, policy, value, cost_value), config.accumulation)
    mix = _ptx_gradient(config, policy, segments)
    count = config.epochs * config.minibatches

    def update(
        state: TrainState, frozen: Any, experience: Experience, kl_coef: Array, key: Array, ptx: Any = None
    ) -> tuple[TrainState, Metrics]:
        constants = {**frozen, "kl_coef": kl_coef}

        def step(state: TrainState, rows: Array, ptx: Any) -> tuple[TrainState, Metrics, Array]:
            batch = jax.tree.map(lambda x: constrain(x[rows], "batch", *[None] * (x.ndim - 1)), experience)
            grads, metrics = gradient(state.params, constants, batch)
            grads, mixed = mix(state.params, constants, ptx, grads)
            moved, norms = apply_gradient(state, grads, optimizer)
            going = jnp.bool_(True)
            if config.stops_updates:
                going = metrics[config.stop_metric] <= config.stop_limit
                moved = jax.tree.map(lambda new, old: jnp.where(going, new, old), moved, state)
            return moved, metrics | mixed | norms, going

        def skip(state: TrainState, rows: Array, ptx: Any) -> tuple[TrainState, Metrics, Array]:
            _, metrics, _ = jax.eval_shape(step, state, rows, ptx)
            return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics), jnp.bool_(False)

        def one(carry: tuple[TrainState, Array], inputs: tuple[Array, Any]) -> tuple[tuple[TrainState, Array], Any]:
            state, going = carry
            out = jax.lax.cond(going, step, skip, state, *inputs) if config.stops_updates else step(state, *inputs)
            state, metrics, going = out
            return (state, going), (metrics, going)

        rows = minibatch_rows(key, experience.lengths.shape[0], config.epochs, config.minibatches)
        mixed = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), ptx)
        (state, _), (stacked, made) = jax.lax.scan(one, (state, jnp.bool_(True)), (rows, mixed))
        looked_at = jnp.concatenate([jnp.ones((1,), bool), made[:-1]])  # the one that stopped it is measured too
        metrics = {name: jnp.sum(x * looked_at) / looked_at.sum() for name, x in stacked.items()}
        metrics["policy/updates"] = made.sum()
        metrics["val/first_ratio_error"] = stacked["val/ratio_error"][0]
        metrics["val/ratio_var"] = stacked["val/ratio"].var(where=looked_at)
        return state, metrics

    return JittedStep(update, None if shardings is None else (shardings, None))


def make_single_update(
    config: PPOConfig,
    policy: RoleSpec,
    value: RoleSpec | None,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    segments: int = 1,
    cost_value: RoleSpec | None = None,
) -> JittedStep:
    """The jitted `(state, frozen, rollout, ref_logprobs, scores, sources, ptx, costs) -> (state, experience, metrics)`.

    For `config.single`: where a rollout is trained on once, in one step, old log-probabilities and values are those of
    the step's own forward pass, so policy and critic read the rollout once instead of twice. Gradient, metrics and new
    state are those of `make_experience` and `make_update`; the state is donated, its controllers are moved on.
    """
    mix = _ptx_gradient(config, policy, segments)

    def loss(params: Any, frozen: Any, rollout: Rollout, ref_logprobs: Array, *judged: Any):
        weights = {role: {**frozen[role], **params[role]} for role in params}
        outputs = answer_outputs(config, policy, value, weights, rollout, cost_value)
        logprobs, entropy, values, cost_values = jax.lax.stop_gradient(outputs)
        read = RoleScores(logprobs, ref_logprobs, entropy, values, cost_values)
        experience, figures, controllers = make_experience(config, rollout, read, *judged)
        out = answer_losses(config, outputs, figures["objective/kl_coef"], experience)
        mean = jnp.sum(out.losses) / jnp.maximum(jnp.sum(out.weights), 1.0)
        return mean, (experience, figures | mean_metrics(out.metrics), controllers)

    def update(
        state: TrainState,
        frozen: Any,
        rollout: Rollout,
        ref_logprobs: Array,
        scores: Array,
        sources: Metrics,
        ptx: Any = None,
        costs: Array | None = None,
    ) -> tuple[TrainState, Experience, Metrics]:
        differentiate = jax.grad(loss, has_aux=True)
        inputs = (rollout, ref_logprobs, scores, state.controllers, sources, costs)
        grads, (experience, metrics, controllers) = differentiate(state.params, frozen, *inputs)
        grads, mixed = mix(state.params, frozen, ptx, widened(grads))
        state, norms = apply_gradient(state.replace(controllers=controllers), grads, optimizer)
        single = {"policy/updates": jnp.int32(1), "val/ratio_var": jnp.float32(0)}
        single["val/first_ratio_error"] = metrics["val/ratio_error"]
        return state, experience, metrics | mixed | norms | single

    return JittedStep(update, None if shardings is None else (shardings, None, None))
