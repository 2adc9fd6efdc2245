"""Defects of rewards, advantages, losses and gradients, which break a truth."""

from typing import Any

import jax
import jax.numpy as jnp
import truths
from harness import Patches, Specimen

from rlhf_jax.objectives import gae as right_gae
from rlhf_jax.rollout import scoring
from rlhf_jax.training import experience as experiences
from rlhf_jax.training import gradient as gradients
from rlhf_jax.training import ppo as updates

# --- rewards ----------------------------------------------------------------------------------------------------------


def spoil_rewards(patch: Patches, spoil: Any) -> None:
    """The rewards of each token become spoil(right, scores, logprobs, ref_logprobs, lengths, kl_coef, estimator)."""
    patch.wrap(experiences, "kl_penalized_rewards", lambda right: lambda *args: spoil(right, *args))


def placed_as_integers(right: Any, scores: Any, *rest: Any) -> Any:
    return right(scores.astype(jnp.int32), *rest)


def placed_after_the_end(right: Any, scores: Any, logprobs: Any, ref_logprobs: Any, lengths: Any, *rest: Any) -> Any:
    return right(scores, logprobs, ref_logprobs, lengths + 1, *rest)


def other_sign(right: Any, scores: Any, logprobs: Any, ref_logprobs: Any, lengths: Any, coef: Any, name: str) -> Any:
    return right(scores, logprobs, ref_logprobs, lengths, -coef, name)


def clipped_after_the_kl(right: Any, *args: Any) -> Any:
    return jnp.clip(right(*args), -0.5, 0.5)


def masked_by_a_product(
    right: Any, scores: Any, logprobs: Any, ref_logprobs: Any, lengths: Any, coef: Any, name: str
) -> Any:
    whole = right(scores, logprobs, ref_logprobs, jnp.full_like(lengths, logprobs.shape[1]), coef, name)
    return whole * (jnp.arange(logprobs.shape[1]) < lengths[:, None])


def penalty_for_nobody(patch: Patches) -> None:
    patch.wrap(
        experiences,
        "end_penalized",
        lambda right: lambda scores, ended, config: right(scores, jnp.ones_like(ended), config),
    )


def adapts_to_a_token(patch: Patches) -> None:
    def wrapper(step: Any) -> Any:
        return lambda coef, kl, *rest: step(coef, kl / truths.LENGTHS.mean(), *rest)

    patch.wrap(experiences, "adaptive_kl_step", wrapper)


# --- advantages -------------------------------------------------------------------------------------------------------


def whitened_by_device(patch: Patches) -> None:
    def wrapper(whiten: Any) -> Any:
        def by_half(x: Any, mask: Any, shift_mean: bool = True) -> Any:
            halves = zip(jnp.split(x, 2), jnp.split(mask, 2), strict=True)
            return jnp.concatenate([whiten(*half, shift_mean) for half in halves])

        return by_half

    patch.wrap(experiences, "whiten", wrapper)


def whitening_shifts(patch: Patches) -> None:
    patch.wrap(experiences, "whiten", lambda whiten: lambda x, mask, shift_mean=True: whiten(x, mask))


def holes_are_zeroed(patch: Patches) -> None:
    def zeroed(rewards: Any, values: Any, mask: Any, *rest: Any) -> Any:
        return right_gae(rewards * mask, values * mask, jnp.ones_like(mask), *rest)

    patch.set(experiences, "gae", zeroed)


def bootstraps_past_the_end(patch: Patches) -> None:
    def unmasked(rewards: Any, values: Any, mask: Any, *rest: Any) -> Any:
        advantages, returns = right_gae(rewards, values, jnp.ones_like(mask), *rest)
        return advantages * mask, returns * mask

    patch.set(experiences, "gae", unmasked)


def mask_is_full(owner: Any) -> Any:
    """Means over all places, pads too."""

    def inject(patch: Patches) -> None:
        patch.set(owner, "answer_mask", lambda lengths, width: jnp.ones((lengths.shape[0], width), bool))

    return inject


def groups_are_interleaved(patch: Patches) -> None:
    def wrapper(rloo: Any) -> Any:
        return lambda totals: rloo(totals.reshape(totals.shape[::-1]).T).T.reshape(totals.shape)

    patch.wrap(experiences, "rloo_advantages", wrapper)


def rollout_is_tiled(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        def tiled(*args: Any, samples: int, **kwargs: Any) -> Any:
            rollout = generate(*args, samples=samples, **kwargs)
            return jax.tree.map(lambda x: jnp.concatenate([x[i::samples] for i in range(samples)]), rollout)

        return tiled

    patch.wrap(truths.stage, "generate", wrapper)


def groups_are_split(patch: Patches) -> None:
    def wrapper(grpo: Any) -> Any:
        return lambda totals, **kwargs: grpo(totals.reshape(-1, totals.shape[1] // 2), **kwargs).reshape(totals.shape)

    patch.wrap(experiences, "grpo_advantages", wrapper)


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_takes_the_smaller(patch: Patches) -> None:
    def optimistic(logprobs: Any, old: Any, advantages: Any, clip_ratio: float = 0.2, dual_clip: float = 0.0) -> Any:
        ratio = jnp.exp(logprobs - old)
        return jnp.minimum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio))

    patch.set(updates, "ppo_policy_loss", optimistic)


def advantage_is_differentiated(patch: Patches) -> None:
    def wrapper(loss: Any) -> Any:
        return lambda logprobs, old, advantages, *rest: loss(logprobs, old, advantages - 0.1 * (logprobs - old), *rest)

    patch.wrap(updates, "ppo_policy_loss", wrapper)


def dual_clip_for_all(patch: Patches) -> None:
    def wrapper(loss: Any) -> Any:
        def bounded(logprobs: Any, old: Any, advantages: Any, clip_ratio: float = 0.2, dual_clip: float = 0.0) -> Any:
            plain = loss(logprobs, old, advantages, clip_ratio)
            return jnp.minimum(plain, -advantages * dual_clip) if dual_clip else plain

        return bounded

    patch.wrap(updates, "ppo_policy_loss", wrapper)


def value_near_its_return(patch: Patches) -> None:
    patch.wrap(
        updates,
        "ppo_value_loss",
        lambda loss: lambda values, old, returns, clip_range: loss(values, returns, returns, clip_range),
    )


def kl_is_paid_for(patch: Patches) -> None:
    patch.wrap(updates, "kl_estimate", lambda estimate: lambda *args: -estimate(*args))


def mask_is_advantages(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def masked_by_advantages(*args: Any) -> Any:
            objective = make(*args)
            return lambda trainable, frozen, batch: objective(
                trainable, frozen, batch.replace(lengths=(batch.advantages != 0).sum(1))
            )

        return masked_by_advantages

    patch.wrap(updates, "ppo_objective", wrapper)


def means_are_averaged(patch: Patches) -> None:
    def averaged(objective: Any, accumulation: int = 1) -> Any:
        def mean(trainable: Any, frozen: Any, part: Any) -> Any:
            out = objective(trainable, frozen, part)
            return out.losses.sum() / out.weights.sum()

        def gradient(trainable: Any, frozen: Any, batch: Any) -> Any:
            parts = gradients.microbatches(batch, accumulation)
            each = [
                jax.grad(mean)(trainable, frozen, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(accumulation)
            ]
            return jax.tree.map(lambda *grads: sum(grads) / accumulation, *each), {}

        return gradient

    patch.set(gradients, "plain_gradient", averaged)


def one_order_for_epochs(patch: Patches) -> None:
    def repeated(key: Any, rows: int, epochs: int, minibatches: int) -> Any:
        order = jax.random.permutation(key, rows).reshape(minibatches, -1)
        return jnp.tile(order, (epochs, 1))

    patch.set(updates, "minibatch_rows", repeated)


def one_order_for_updates(patch: Patches) -> None:
    patch.wrap(updates, "minibatch_rows", lambda rows: lambda key, *rest: rows(jax.random.key(0), *rest))


def iterations_are_counted(patch: Patches) -> None:
    def wrapper(apply: Any) -> Any:
        def uncounted(state: Any, grads: Any, optimizer: Any) -> Any:
            moved, norms = apply(state, grads, optimizer)
            return moved.replace(step=state.step), norms

        return uncounted

    patch.wrap(updates, "apply_gradient", wrapper)


# --- where a role is read ---------------------------------------------------------------------------------------------


def values_after_the_token(patch: Patches) -> None:
    patch.wrap(
        scoring, "_before_answers", lambda right: lambda hidden, lengths, count: right(hidden, lengths + 1, count)
    )
    patch.retrace(updates, "score_values")


def score_on_the_pad(patch: Patches) -> None:
    patch.wrap(
        scoring,
        "last_scores",
        lambda right: (
            lambda spec, weights, tokens, lengths: right(
                spec, weights, tokens, jnp.minimum(lengths + 1, tokens.shape[1])
            )
        ),
    )
    patch.retrace(updates, "score_rewards")


def rewards(spoil: Any) -> Any:
    return lambda patch: spoil_rewards(patch, spoil)


T = truths
OTHER = "trained rewards are not the logged ones"
PLACE = "depends on its row's place"
SPECIMENS = [
    Specimen(
        "score_placed_as_integer",
        "Tunix, ppo_learner.py:361",
        rewards(placed_as_integers),
        T.trained_on_is_logged,
        OTHER,
    ),
    Specimen("score_placed_after_the_end", "trl PR 5338", rewards(placed_after_the_end), T.trained_on_is_logged, OTHER),
    Specimen("kl_of_the_other_sign", "trl#1161, trl#351", rewards(other_sign), T.trained_on_is_logged, OTHER),
    Specimen(
        "clipped_after_the_kl",
        "safe-rlhf, DeepSpeed-Chat",
        rewards(clipped_after_the_kl),
        T.trained_on_is_logged,
        OTHER,
    ),
    Specimen(
        "nan_times_0",
        "verl#6361",
        rewards(masked_by_a_product),
        T.what_lies_beyond_may_be_nan,
        "a NaN on padding spreads",
    ),
    Specimen(
        "missing_end_costs_nothing",
        "trl#3750",
        penalty_for_nobody,
        T.only_a_missing_end_is_penalized,
        "missing-end penalty is not",
    ),
    Specimen(
        "controller_reads_a_token",
        "verl's adaptive KL",
        adapts_to_a_token,
        T.adaptive_coefficient_rests_at_its_target,
        "the coefficient moves",
    ),
    Specimen("whitened_by_device", "N-JAX, TRL", whitened_by_device, T.order_of_rows_is_nothing, PLACE),
    Specimen(
        "whitened_rewards_are_shifted",
        "lm-human-preferences has shift_mean=False",
        whitening_shifts,
        T.whitened_rewards_keep_their_sum,
        "moved their mean",
    ),
    Specimen(
        "holes_are_zeroed",
        "OpenRLHF, experience_maker.py:367",
        holes_are_zeroed,
        T.hole_is_skipped,
        "a hole in the mask",
    ),
    Specimen(
        "bootstraps_past_the_end",
        "TRL's padding_mask_p1",
        bootstraps_past_the_end,
        T.nothing_is_bootstrapped_past_the_end,
        "bootstrapped from",
    ),
    Specimen(
        "means_over_padding", "trl#2496", mask_is_full(experiences), T.wider_padding_is_nothing, "padding changes"
    ),
    Specimen(
        "ratios_over_padding",
        "trl#2281",
        mask_is_full(updates),
        T.wider_padding_is_nothing_to_the_update,
        "padding changes",
    ),
    Specimen(
        "groups_are_interleaved",
        "Tunix#816",
        groups_are_interleaved,
        T.prompt_alone_gives_no_advantage,
        "another prompt's",
    ),
    Specimen("rollout_is_tiled", "Tunix#816", rollout_is_tiled, T.prompt_alone_gives_no_advantage, "another prompt's"),
    Specimen(
        "groups_are_split",
        "Tunix#816: microbatch < group",
        groups_are_split,
        T.group_is_compared_whole,
        "place in the group",
    ),
    Specimen(
        "loss_takes_the_smaller",
        "the sign of the pessimistic bound",
        loss_takes_the_smaller,
        T.loss_is_never_below_the_unclipped,
        "made the policy's loss lower",
    ),
    Specimen(
        "advantage_is_differentiated",
        "KL in the reward, not stopped",
        advantage_is_differentiated,
        T.gradient_at_ratio_1_is_the_advantage,
        "at ratio 1",
    ),
    Specimen(
        "dual_clip_for_all",
        "bound on negative advantages alone",
        dual_clip_for_all,
        T.dual_clip_leaves_positive_advantages,
        "moved the loss of a positive",
    ),
    Specimen(
        "value_is_clipped_at_its_return",
        "old values are the centre",
        value_near_its_return,
        T.value_may_move_so_far,
        "clipped around something other",
    ),
    Specimen(
        "kl_in_the_loss_pays",
        "verl a65c915, Logic-RL#58",
        kl_is_paid_for,
        T.kl_in_the_loss_costs,
        "a KL in the loss lowers it",
    ),
    Specimen(
        "mask_is_advantages",
        "verl#2506",
        mask_is_advantages,
        T.answer_without_advantage_counts,
        "tokens of no advantage",
    ),
    Specimen(
        "microbatch_means_are_averaged",
        "trl#2175, NeMo-RL#230",
        means_are_averaged,
        T.accumulation_is_nothing,
        "number of microbatches",
    ),
    Specimen(
        "one_order_for_all_epochs",
        "N-JAX",
        one_order_for_epochs,
        T.epochs_have_orders_of_their_own,
        "two epochs of an update",
    ),
    Specimen(
        "one_order_for_all_updates",
        "N-JAX, train_policy_jax.py:816",
        one_order_for_updates,
        T.epochs_have_orders_of_their_own,
        "two updates have one order",
    ),
    Specimen(
        "step_counts_iterations",
        "schedules that end early or late",
        iterations_are_counted,
        T.update_counts_its_steps,
        "not the number of optimizer steps",
    ),
    Specimen(
        "values_after_the_token",
        "2019: position q - 1, before it",
        values_after_the_token,
        T.value_knows_nothing_of_its_token,
        "it comes before",
    ),
    Specimen(
        "score_is_read_on_the_pad",
        "trl#937, trl#3750",
        score_on_the_pad,
        T.score_ends_with_the_answer,
        "beyond the answer's last token",
    ),
]
