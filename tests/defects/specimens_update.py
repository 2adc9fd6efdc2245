"""Defects of losses, gradients and updates, and of the places where a role is read; they break a truth."""

from typing import Any

import jax
import jax.numpy as jnp
import truths_update as truths
from harness import Patches, Specimen
from specimens_rewards import mask_is_full

from rlhf_jax.rollout import scoring
from rlhf_jax.training import gradient as gradients
from rlhf_jax.training import ppo as updates

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


T = truths
SPECIMENS = [
    Specimen(
        "ratios_over_padding",
        "trl#2281",
        mask_is_full(updates),
        T.wider_padding_is_nothing_to_the_update,
        "padding changes",
    ),
    Specimen(
        "loss_takes_the_smaller",
        "a slip: min for max",
        loss_takes_the_smaller,
        T.loss_is_never_below_the_unclipped,
        "made the policy's loss lower",
    ),
    Specimen(
        "advantage_is_differentiated",
        "a slip: advantages made inside the loss",
        advantage_is_differentiated,
        T.gradient_at_ratio_1_is_the_advantage,
        "at ratio 1",
    ),
    Specimen(
        "dual_clip_for_all",
        "a slip: arXiv 1912.09729 bounds negative ones alone",
        dual_clip_for_all,
        T.dual_clip_leaves_positive_advantages,
        "moved the loss of a positive",
    ),
    Specimen(
        "value_is_clipped_at_its_return",
        "a slip: old values are the centre",
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
        "a slip: one permutation, tiled",
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
        "a slip: schedules then end late",
        iterations_are_counted,
        T.update_counts_its_steps,
        "not the number of optimizer steps",
    ),
    Specimen(
        "values_after_the_token",
        "a slip: the 2019 code reads the position before",
        values_after_the_token,
        T.value_knows_nothing_of_its_token,
        "it comes before",
    ),
    Specimen(
        "score_is_read_on_the_pad",
        "trl#937",
        score_on_the_pad,
        T.score_ends_with_the_answer,
        "beyond the answer's last token",
    ),
]
