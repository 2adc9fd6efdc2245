"""Defects of rewards, advantages and groups, which break a truth."""

from typing import Any

import jax
import jax.numpy as jnp
import truths
from harness import Patches, Specimen

from rlhf_jax.objectives import gae as right_gae
from rlhf_jax.stages import prompts
from rlhf_jax.training import experience as experiences

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
        lambda right: lambda scores, ended, *how: right(scores, jnp.ones_like(ended), *how),
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

    patch.wrap(prompts, "generate", wrapper)


def groups_are_split(patch: Patches) -> None:
    def wrapper(grpo: Any) -> Any:
        return lambda totals, **kwargs: grpo(totals.reshape(-1, totals.shape[1] // 2), **kwargs).reshape(totals.shape)

    patch.wrap(experiences, "grpo_advantages", wrapper)


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
    Specimen("score_placed_after_the_end", "trl#3750", rewards(placed_after_the_end), T.trained_on_is_logged, OTHER),
    Specimen(
        "kl_of_the_other_sign", "trl#1161, trl#351: negative KL", rewards(other_sign), T.trained_on_is_logged, OTHER
    ),
    Specimen(
        "clipped_after_the_kl",
        "safe-rlhf",
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
        "verl: its adaptive KL",
        adapts_to_a_token,
        T.adaptive_coefficient_rests_at_its_target,
        "the coefficient moves",
    ),
    Specimen("whitened_by_device", "N-JAX, TRL", whitened_by_device, T.order_of_rows_is_nothing, PLACE),
    Specimen(
        "whitened_rewards_are_shifted",
        "a slip: the 2019 code keeps the mean",
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
        "what TRL's padding_mask_p1 is for",
        bootstraps_past_the_end,
        T.nothing_is_bootstrapped_past_the_end,
        "bootstrapped from",
    ),
    Specimen(
        "means_over_padding", "trl#2496", mask_is_full(experiences), T.wider_padding_is_nothing, "padding changes"
    ),
    Specimen(
        "groups_are_interleaved",
        "a slip: tile for repeat",
        groups_are_interleaved,
        T.prompt_alone_gives_no_advantage,
        "another prompt's",
    ),
    Specimen(
        "rollout_is_tiled",
        "a slip: tile for repeat",
        rollout_is_tiled,
        T.prompt_alone_gives_no_advantage,
        "another prompt's",
    ),
    Specimen(
        "groups_are_split",
        "Tunix#816: microbatch < group",
        groups_are_split,
        T.group_is_compared_whole,
        "place in the group",
    ),
]
