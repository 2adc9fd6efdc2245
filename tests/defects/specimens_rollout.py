"""Defects of sampling and scoring, which the watch of every iteration sees."""

import dataclasses
from typing import Any

import harness
import jax
import jax.numpy as jnp
from harness import COUNT, STOP_IDS, Patches, Specimen, watched_run

from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout import sampling as sampling_module
from rlhf_jax.stages import ppo as stage
from rlhf_jax.stages import ppo_roles, prompts


def spoil_rollout(patch: Patches, spoil: Any) -> None:
    """Every rollout becomes spoil(rollout)."""
    patch.wrap(prompts, "generate", lambda generate: lambda *args, **kwargs: spoil(generate(*args, **kwargs)))


def spoil_scores(patch: Patches, spoil: Any) -> None:
    """What the roles read of a rollout becomes spoil(read, rollout)."""

    def wrapper(score: Any) -> Any:
        return lambda roles, acting, rollout, parts: spoil(score(roles, acting, rollout, parts), rollout)

    patch.wrap(ppo_roles.Roles, "score", wrapper)


def untempered(rollout: Rollout) -> Rollout:
    return rollout.replace(sampling=dataclasses.replace(rollout.sampling, temperature=1.0))


def inside(rollout: Rollout) -> Any:
    return jnp.arange(COUNT) < rollout.lengths[:, None]


def integer_scores(patch: Patches) -> None:
    patch.wrap(harness, "reward", lambda reward: lambda rollout: reward(rollout).astype(jnp.int32))


def nan_score(patch: Patches) -> None:
    patch.wrap(harness, "reward", lambda reward: lambda rollout: reward(rollout).at[3].set(jnp.nan))


def reference_untempered(patch: Patches) -> None:
    def wrapper(score: Any) -> Any:
        def mixed(roles: Any, acting: Any, rollout: Rollout, parts: int) -> Any:
            other, _ = ppo_roles.score_logprobs(roles.policy.spec, roles.reference, untempered(rollout), parts)
            return score(roles, acting, rollout, parts)._replace(ref_logprobs=other)

        return mixed

    patch.wrap(ppo_roles.Roles, "score", wrapper)


def old_untempered(patch: Patches) -> None:
    def wrapper(score: Any) -> Any:
        return lambda spec, weights, rollout, parts: score(spec, weights, untempered(rollout), parts)

    patch.wrap(ppo_roles, "score_logprobs", wrapper)


def stop_token_is_padding(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def with_token_mask(config: Any, rollout: Rollout, *rest: Any) -> Any:
            real = inside(rollout) & ~jnp.isin(rollout.tokens, jnp.asarray(STOP_IDS))
            return make(config, rollout.replace(lengths=real.sum(1, dtype=jnp.int32)), *rest)

        return with_token_mask

    patch.wrap(stage, "make_experience", wrapper)


def length_without_stop(patch: Patches) -> None:
    spoil_rollout(patch, lambda r: r.replace(lengths=jnp.maximum(r.lengths - r.ended, 1)))


def unknown_is_padding(patch: Patches) -> None:
    def spoil(rollout: Rollout) -> Rollout:
        commonest = jnp.argmax(jnp.bincount(rollout.tokens[:, 0], length=13))
        real = inside(rollout) & (rollout.tokens != commonest)
        return rollout.replace(lengths=real.sum(1, dtype=jnp.int32))

    spoil_rollout(patch, spoil)


def stop_is_ignored(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        def run_on(*args: Any, sampling: Any, **kwargs: Any) -> Rollout:
            rollout = generate(*args, sampling=dataclasses.replace(sampling, stop_ids=()), **kwargs)
            return rollout.replace(sampling=sampling)

        return run_on

    patch.wrap(prompts, "generate", wrapper)


def last_token(rollout: Rollout) -> Any:
    return jnp.take_along_axis(rollout.tokens, (rollout.lengths - 1)[:, None], axis=1)[:, 0]


def end_is_one_of_two(patch: Patches) -> None:
    spoil_rollout(patch, lambda r: r.replace(ended=last_token(r) == 11))


def cut_is_ended(patch: Patches) -> None:
    spoil_rollout(patch, lambda r: r.replace(ended=jnp.ones_like(r.ended)))


def top_k(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        def truncated(*args: Any, sampling: Any, **kwargs: Any) -> Rollout:
            return generate(*args, sampling=dataclasses.replace(sampling, top_k=3), **kwargs)

        return truncated

    patch.wrap(prompts, "generate", wrapper)


def secret_top_k(patch: Patches) -> None:
    def wrapper(support: Any) -> Any:
        def truncated(logits: Any, sampling: Any) -> Any:
            return support(logits, dataclasses.replace(sampling, top_k=3))

        return truncated

    patch.wrap(sampling_module, "support_logits", wrapper)
    patch.retrace(prompts, "generate")


def logprobs_off_by_one(patch: Patches) -> None:
    spoil_rollout(patch, lambda r: r.replace(logprobs=jnp.roll(r.logprobs, -1, axis=1)))


def sampler_keeps_its_weights(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        start = harness.start_weights()["policy"]["base"]
        return lambda config, base, *args, **kwargs: generate(config, start, *args, **kwargs)

    patch.wrap(prompts, "generate", wrapper)


def old_of_the_last_rollout(patch: Patches) -> None:
    def wrapper(score: Any) -> Any:
        kept: list[Any] = []

        def stale(roles: Any, acting: Any, rollout: Rollout, parts: int) -> Any:
            kept.append(jax.tree.map(jnp.copy, acting))
            return score(roles, kept[max(0, len(kept) - 2)], rollout, parts)

        return stale

    patch.wrap(ppo_roles.Roles, "score", wrapper)


def dropout_in_scoring(patch: Patches) -> None:
    def spoil(read: Any, rollout: Rollout) -> Any:
        noise = jnp.where(inside(rollout), 0.1 * jax.random.normal(jax.random.key(9), read.logprobs.shape), 0.0)
        return read._replace(logprobs=read.logprobs + noise, ref_logprobs=read.ref_logprobs + noise)

    spoil_scores(patch, spoil)


def pads_filled_with_1(patch: Patches) -> None:
    def spoil(read: Any, rollout: Rollout) -> Any:
        return read._replace(logprobs=jnp.where(inside(rollout), read.logprobs, 1.0))

    spoil_scores(patch, spoil)


def reference_trains_too(patch: Patches) -> None:
    def shared(roles: Any, state: Any) -> Any:
        roles.reference["base"] = jax.tree.map(jnp.copy, state.params["policy"]["base"])
        return state

    patch.set(harness, "after_update", shared)


def one_answer_for_all(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        def alike(config: Any, base: Any, prompts: Any, lengths: Any, *, row_ids: Any, **kwargs: Any) -> Rollout:
            first = jnp.zeros_like(row_ids)
            return generate(config, base, prompts[first], lengths[first], row_ids=first, **kwargs)

        return alike

    patch.wrap(prompts, "generate", wrapper)


def policy_collapses(patch: Patches) -> None:
    def collapsed(roles: Any, state: Any) -> Any:
        base = state.params["policy"]["base"]
        sharp = {**base, "head": -50.0 * base["head"]}
        return state.replace(params={**state.params, "policy": {"base": sharp}})

    patch.set(harness, "after_update", collapsed)


def answers_end_at_once(patch: Patches) -> None:
    """One of the two stop tokens is the likeliest after anything."""

    def ended(roles: Any, state: Any) -> Any:
        base = state.params["policy"]["base"]
        column = 50.0 * base["head"][:, 0]
        head = jnp.zeros_like(base["head"]).at[:, STOP_IDS[0]].set(column).at[:, STOP_IDS[1]].set(-column)
        return state.replace(params={**state.params, "policy": {"base": {**base, "head": head}}})

    patch.set(harness, "after_update", ended)


def sampler_has_another_temperature(patch: Patches) -> None:
    def wrapper(generate: Any) -> Any:
        def warmer(*args: Any, sampling: Any, **kwargs: Any) -> Rollout:
            other = dataclasses.replace(sampling, temperature=1.0)
            return generate(*args, sampling=other, **kwargs).replace(sampling=sampling)

        return warmer

    patch.wrap(prompts, "generate", wrapper)


ROWS = [
    ("rewards_are_integers", "Tunix, ppo_learner.py:361", integer_scores, "rewards are int32"),
    ("a_reward_is_nan", "a slip: a reward that divides by 0", nan_score, "a score that is NaN"),
    ("reference_at_another_temperature", "Tunix, rl_cluster.py:987", reference_untempered, "KL to the reference is"),
    ("old_at_another_temperature", "Tunix: its GRPO passes it, its PPO does not", old_untempered, "ratios are off"),
    ("sampler_at_another_temperature", "EasyDeL PPO, _fn.py:79", sampler_has_another_temperature, "scoring differ"),
    (
        "stop_token_is_padding",
        "Tunix, ppo_learner.py:288 with pad = eos",
        stop_token_is_padding,
        "never from token ids",
    ),
    ("length_without_the_stop_token", "trl#1623, trl#3091: pad = eos", length_without_stop, "is no stop token"),
    ("unknown_token_is_padding", "safe-rlhf, rl_trainer.py:420", unknown_is_padding, "have a length that is not"),
    ("answers_go_on_after_their_end", "trl#2387", stop_is_ignored, "go on after a stop token"),
    ("end_means_eos_alone", "trl#3750", end_is_one_of_two, "end early without an end"),
    ("a_cut_answer_counts_as_ended", "a slip: trl#3750 the other way", cut_is_ended, "is no stop token"),
    ("sampled_by_top_k", "trl#6789, EasyDeL's defaults", top_k, "scored on the full support"),
    ("sampled_by_top_k_in_secret", "prime-rl#2601", secret_top_k, "decoding and scoring differ"),
    ("logprobs_off_by_one", "a slip: labels shifted twice", logprobs_off_by_one, "decoding and scoring differ"),
    ("sampler_is_not_updated", "verl#6280, verl#2996", sampler_keeps_its_weights, "decoding and scoring differ"),
    ("old_logprobs_are_stale", "verl#6280, verl#2996", old_of_the_last_rollout, "ratios are off"),
    ("dropout_in_scoring", "safe-rlhf updates in train mode", dropout_in_scoring, "ratios are off"),
    ("pads_are_filled_with_1", "trl#2022: INVALID_LOGPROB", pads_filled_with_1, "log-probabilities on padding"),
    ("reference_trains_too", "a slip: a shared base", reference_trains_too, "the frozen reference has changed"),
    ("all_answers_are_one", "verl's full_determinism", one_answer_for_all, "repeat another one"),
    ("policy_collapses", "DeepSpeedExamples#297", policy_collapses, "entropy fell"),
    ("kl_explodes", "trl#925, trl#1857", policy_collapses, "KL reached"),
    ("answers_end_at_once", "DeepSpeedExamples#887", answers_end_at_once, "answers fell to"),
]
SPECIMENS = [Specimen(name, source, inject, watched_run, sign) for name, source, inject, sign in ROWS]
