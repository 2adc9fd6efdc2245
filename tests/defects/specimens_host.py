"""Defects of keys, data order, resume and configuration."""

import importlib
import itertools
from pathlib import Path
from typing import Any

import harness
import jax.numpy as jnp
import truths_host as truths
from harness import Patches, Specimen, configuration_is_checked, small_stage_is_cut_and_goes_on

from rlhf_jax.data.order import DataOrder
from rlhf_jax.rollout import sampling as sampling_module
from rlhf_jax.stages import ppo as stage
from rlhf_jax.stages import ppo_roles, prompts
from rlhf_jax.stages import train as train_module
from rlhf_jax.training.checkpoints import Checkpoints

generation = importlib.import_module("rlhf_jax.rollout.generate")  # the package's attribute is the function

# --- draws ------------------------------------------------------------------------------------------------------------


def one_key_for_rollouts(patch: Patches) -> None:
    patch.wrap(stage, "step_keys", lambda keys: lambda key, count: keys(key, 1) * count)


def one_draw_for_epochs(patch: Patches) -> None:
    patch.set(prompts, "EPOCH_STRIDE", 0)


def one_key_for_rows(patch: Patches) -> None:
    patch.wrap(generation, "row_keys", lambda keys: lambda key, row_ids: keys(key, jnp.zeros_like(row_ids)))
    patch.retrace(prompts, "generate")


def whole_support_is_reported(patch: Patches) -> None:
    def wrapper(choose: Any) -> Any:
        def of_three(probs: Any, uniform: Any) -> Any:
            third = jnp.sort(probs, axis=-1)[:, -3:][:, :1]
            return choose(jnp.where(probs < third, 0.0, probs), uniform)

        return of_three

    patch.wrap(sampling_module, "inverse_cdf", wrapper)


# --- data order -------------------------------------------------------------------------------------------------------


def one_batch_for_all(patch: Patches) -> None:
    patch.wrap(DataOrder, "batch", lambda batch: lambda order, step, size: batch(order, 0, size))


def order_without_seed(patch: Patches) -> None:
    entropy = itertools.count()
    patch.wrap(
        DataOrder, "__init__", lambda init: lambda order, records, seed: init(order, records, seed + next(entropy))
    )


def rate_over_iterations(patch: Patches) -> None:
    patch.wrap(train_module, "make_schedule", lambda make: lambda config, steps: make(config, steps // 4))


# --- resume -----------------------------------------------------------------------------------------------------------


def reference_of_the_resumed_step(patch: Patches) -> None:
    def resumed(start: Any, folder: Path) -> Any:
        checkpoints = Checkpoints(folder / "checkpoints", 2, "identity")
        _, state, _ = checkpoints.restore(harness.small_state())
        checkpoints.close()
        return state.params

    patch.set(harness, "reference_weights", resumed)


def forgets(*fields: str) -> Any:
    """A restore that leaves these fields of the state as a fresh run has them."""

    def inject(patch: Patches) -> None:
        def wrapper(restore: Any) -> Any:
            def partly(checkpoints: Checkpoints, like: Any) -> Any:
                done, state, memory = restore(checkpoints, like)
                return done, state.replace(**{field: getattr(like, field) for field in fields}), memory

            return partly

        patch.wrap(Checkpoints, "restore", wrapper)

    return inject


def reference_without_adapters(patch: Patches) -> None:
    def wrapper(score: Any) -> Any:
        def forgetful(spec: Any, base: Any, adapters: Any, *rest: Any) -> Any:
            bare = {t: {**leaf, "b": jnp.zeros_like(leaf["b"])} for t, leaf in adapters["reference"].items()}
            return score(spec, base, {**adapters, "reference": bare}, *rest)

        return forgetful

    patch.wrap(ppo_roles, "score_together", wrapper)


# --- configuration ----------------------------------------------------------------------------------------------------


def asks_for(**changes: Any) -> Any:
    return lambda patch: patch.set(harness, "CHANGES", changes)


T = truths
CUT = small_stage_is_cut_and_goes_on
SPECIMENS = [
    Specimen(
        "one_key_for_all_rollouts",
        "Tunix, sampler.py:875",
        one_key_for_rollouts,
        T.rollouts_have_keys_of_their_own,
        "two rollouts have one key",
    ),
    Specimen(
        "one_draw_for_a_prompt",
        "verl's full_determinism: one seed for every request",
        one_draw_for_epochs,
        T.prompt_that_comes_twice_is_answered_anew,
        "has one answer",
    ),
    Specimen(
        "one_key_for_all_rows",
        "verl's full_determinism",
        one_key_for_rows,
        T.rows_are_drawn_apart,
        "rows of one prompt have one answer",
    ),
    Specimen(
        "top_k_with_logprobs_of_the_whole",
        "trl#6789: off by the kept mass",
        whole_support_is_reported,
        T.tokens_come_as_often_as_their_logprobs_say,
        "token . comes with",
    ),
    Specimen(
        "one_batch_for_all_steps",
        "DeepSpeed-Chat re-uses the last batch",
        one_batch_for_all,
        T.epoch_reads_every_record_once,
        "does not read every record once",
    ),
    Specimen("order_without_a_seed", "verl#7816", order_without_seed, T.order_is_its_seeds, "one seed has two orders"),
    Specimen(
        "rate_decays_over_iterations",
        "a slip: a scheduler that counts rollouts",
        rate_over_iterations,
        T.learning_rate_decays_over_steps,
        "before the last optimizer step",
    ),
    Specimen(
        "reference_of_the_resumed_step",
        "NeMo-RL#3722",
        reference_of_the_resumed_step,
        CUT,
        "the reference is not the one this stage was trained beside",
    ),
    Specimen("kl_coefficient_is_not_restored", "ray#22444, verl", forgets("controllers"), CUT, "never cut"),
    Specimen("weights_are_not_restored", "OpenRLHF PR 1286", forgets("params"), CUT, "never cut"),
    Specimen(
        "reference_without_its_adapters",
        "a slip: adapters switched off for the reference",
        reference_without_adapters,
        T.reference_is_where_the_policy_starts,
        "KL to the reference is",
    ),
    Specimen(
        "k1_in_the_loss",
        "a slip: arXiv 1909.08593 has it in the reward",
        asks_for(kl_in="loss", kl_estimator="k1"),
        configuration_is_checked,
        "its expected gradient is 0",
    ),
    Specimen(
        "training_on_top_k",
        "trl#6789",
        asks_for(top_k=50),
        configuration_is_checked,
        "truncated support",
    ),
    Specimen(
        "a_group_of_one",
        "Tunix: n / (n - 1) at n = 1",
        asks_for(estimator="grpo", samples=1),
        configuration_is_checked,
        "compares the answers to one prompt",
    ),
    Specimen(
        "batch_that_does_not_divide",
        "verl#12 hangs in silence",
        asks_for(batch_size=10, minibatches=4),
        configuration_is_checked,
        "does not divide into 4 minibatches",
    ),
]
