"""Defects of private stages: of sampling, keys and accounting, and of what mixes records."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import truths_private_stages as truths
from harness import Patches, Specimen
from specimens_privacy import CLIPPED, spoils_the_step

from rlhf_jax.data.poisson import PoissonBatches
from rlhf_jax.errors import UserError
from rlhf_jax.stages import ledger, private, private_ppo, provenance

# --- keys -------------------------------------------------------------------------------------------------------------


def one_key_for_steps(patch: Patches) -> None:
    patch.wrap(private, "step_keys", lambda keys: lambda key, count: keys(key, 1) * count)


def one_key_for(**same: str) -> Any:
    """Keys that do not hang on the run's nonce or the stage."""

    def inject(patch: Patches) -> None:
        def wrapper(step_key: Any) -> Any:
            def spoiled(key: Any, run_nonce: str, stage: str, *rest: Any) -> Any:
                return step_key(key, same.get("run_nonce", run_nonce), same.get("stage", stage), *rest)

            return spoiled

        patch.wrap(private, "step_key", wrapper)

    return inject


# --- sampling and accounting ------------------------------------------------------------------------------------------


def shuffled(patch: Patches) -> None:
    def batch(self: Any, step: int) -> Any:
        size, order = round(self.records * self.sampling_rate), np.random.default_rng(0).permutation(self.records)
        rows = np.zeros(self.physical_batch, np.int64)
        rows[:size] = np.roll(order, step * size)[:size]
        return rows, np.arange(self.physical_batch) < size

    patch.set(PoissonBatches, "batch", batch)


def empty_batches_are_drawn_again(patch: Patches) -> None:
    def wrapper(batch: Any) -> Any:
        def again(self: Any, step: int) -> Any:
            drawn = batch(self, step)
            return drawn if drawn[1].any() else again(self, step + (1 << 20))

        return again

    patch.wrap(PoissonBatches, "batch", wrapper)


def minibatches_are_mixed_again(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def spoiled(*args: Any) -> Any:
            inner = make(*args)

            def gradient(trainable: Any, frozen: Any, batch: Any) -> Any:
                present = jax.random.permutation(batch.key, batch.present)
                return inner(trainable, frozen, batch._replace(present=present))

            return gradient

        return spoiled

    patch.wrap(private_ppo, "private_gradient", wrapper)


def plan_without(**changes: Any) -> Any:
    """A plan that does not hear of the uses, or of how many units a batch has room for."""

    def inject(patch: Patches) -> None:
        def wrapper(make: Any) -> Any:
            return lambda where, **given: make(where, **{**given, **{k: f(given) for k, f in changes.items()}})

        patch.wrap(private, "make_plan", wrapper)

    return inject


def data_is_not_looked_at(patch: Patches) -> None:
    patch.set(private, "digest", lambda *arrays: "data")


def ledger_begins_anew(patch: Patches) -> None:
    def wrapper(runs: Any) -> Any:
        def forgetful(kept: Any) -> Any:
            kept._path.unlink(missing_ok=True)
            return runs(kept)

        return forgetful

    patch.wrap(ledger.Ledger, "_runs", wrapper)


def whole_records_are_compared(patch: Patches) -> None:
    patch.set(ledger, "normalized_prompt", lambda record: json.dumps(record, sort_keys=True))


# --- statistics of the batch ------------------------------------------------------------------------------------------


def experience_with(**changes: Any) -> Any:
    """Experience made by other settings than the config's."""

    def inject(patch: Patches) -> None:
        def wrapper(make: Any) -> Any:
            return lambda settings, *rest: make(dataclasses.replace(settings, **changes), *rest)

        patch.wrap(private_ppo, "make_experience", wrapper)

    return inject


def baseline_of_the_batch(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def centred(*args: Any) -> Any:
            experience, *rest = make(*args)
            return experience.replace(advantages=experience.advantages - experience.advantages.mean()), *rest

        return centred

    patch.wrap(private_ppo, "make_experience", wrapper)


def guard_on_scores(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def guarded(settings: Any, rollout: Any, read: Any, scores: Any, *rest: Any) -> Any:
            if not np.isfinite(scores).all():
                raise UserError("a score is not finite: look at the reward")
            return make(settings, rollout, read, scores, *rest)

        return guarded

    patch.wrap(private_ppo, "make_experience", wrapper)


def is_allowed(*checks: str) -> Any:
    """Checks that see nothing."""

    def inject(patch: Patches) -> None:
        for check in checks:
            patch.set(provenance, check, lambda *args: None)

    return inject


def blind_to(**harmless: Any) -> Any:
    """Options that are looked at as if they stood otherwise."""

    def inject(patch: Patches) -> None:
        def wrapper(check: Any) -> Any:
            def spoiled(stage: Any, where: str) -> None:
                seen = stage.copy_and_resolve_references()
                for name, value in harmless.items():
                    if name in seen:
                        seen[name] = value
                check(seen, where)

            return spoiled

        patch.wrap(provenance, "_check_mixing", wrapper)

    return inject


def raw_kl(step: Any, batch: Any, grads: Any, metrics: Any) -> Any:
    return grads, metrics | {"objective/kl": batch.figures["objective/kl"].mean()}


T = truths
TRL = "TRL: masked_whiten over the whole rollout"


def of_the_step(name: str, source: str, inject: Any) -> Specimen:
    return Specimen(name, source, inject, T.record_moves_a_step_by_its_bound, CLIPPED)


def of_the_config(name: str, source: str, inject: Any, said: str, change: Any) -> Specimen:
    return Specimen(name, source, inject, T.refused(said, change), f"a private stage takes {said}")


SPECIMENS = [
    Specimen(
        "empty_batch_is_drawn_again",
        "a slip: a sampler that gives no empty batch",
        empty_batches_are_drawn_again,
        T.batch_sizes_are_binomial,
        "of the batches are empty|batch sizes vary",
    ),
    Specimen(
        "shuffled_batches",
        "arXiv 2403.17673, private-transformers#7",
        shuffled,
        T.batch_sizes_are_binomial,
        r"batch sizes vary by 0\.00",
    ),
    Specimen(
        "one_noise_for_all_steps",
        "a slip: the stage's key in every step",
        one_key_for_steps,
        T.every_noisy_step_has_a_key,
        "two steps have one noise",
    ),
    Specimen(
        "one_noise_for_all_stages",
        "a slip: seed and purpose alone",
        one_key_for(stage=""),
        T.stages_have_keys_of_their_own,
        "two stages have one noise",
    ),
    Specimen(
        "one_noise_for_all_runs",
        "a crash, and a start with the same noise on other batches",
        one_key_for(run_nonce=""),
        T.runs_have_keys_of_their_own,
        "two runs have one noise",
    ),
    Specimen(
        "minibatches_mixed_between_uses",
        "PPO: a new order for every epoch",
        minibatches_are_mixed_again,
        T.uses_read_one_minibatch,
        "second use reads other records",
    ),
    Specimen(
        "uses_are_not_accounted",
        "arXiv 2310.16960 left T_PPO > 1 open",
        plan_without(uses=lambda given: 1),
        T.claim_counts(uses=2, room=20),
        "is claimed and .* is spent",
    ),
    Specimen(
        "truncation_is_not_accounted",
        "a slip: a physical batch that cuts in silence",
        plan_without(physical_batch=lambda given: given["units"]),
        T.claim_counts(uses=1, room=5),
        "is claimed and .* is spent",
    ),
    Specimen(
        "goes_on_with_other_data",
        "a slip: the same noise on other data gives both away",
        data_is_not_looked_at,
        T.other_data_is_refused,
        "goes on with other data",
    ),
    Specimen(
        "deleted_runs_are_forgotten",
        "a slip: a ledger of what is there",
        ledger_begins_anew,
        T.deleted_run_is_remembered,
        "was deleted is forgotten",
    ),
    Specimen(
        "overlap_by_whole_records",
        "a slip: a hash of every field",
        whole_records_are_compared,
        T.shared_units_are_found,
        "taken to be disjoint",
    ),
    of_the_step("advantages_whitened_over_the_batch", TRL, experience_with(whiten_advantages=True)),
    of_the_step("rewards_whitened_over_the_batch", TRL, experience_with(whiten_rewards=True)),
    of_the_step(
        "scores_normalized_over_the_batch", "TRL: score scaling", experience_with(reward_normalization="running")
    ),
    of_the_step("baseline_of_the_batch", "REINFORCE++, arXiv 2501.03262", baseline_of_the_batch),
    Specimen(
        "guard_on_raw_scores",
        "our own guards of plain policy optimization",
        guard_on_scores,
        T.scores_do_not_stop_a_stage,
        "a score is not finite",
    ),
    Specimen(
        "coefficient_follows_the_raw_kl",
        "TRL: adap_kl_ctrl",
        spoils_the_step(raw_kl),
        T.coefficient_follows_what_was_released,
        "released has no noise",
    ),
    of_the_config(
        "adaptive_kl_is_allowed",
        "TRL: adap_kl_ctrl",
        blind_to(kl_controller="fixed"),
        "stages.ppo.kl_controller",
        T.fields(kl_controller="adaptive"),
    ),
    of_the_config(
        "whitening_is_allowed",
        TRL,
        blind_to(whiten_advantages=False),
        "stages.ppo.whiten_advantages",
        T.fields(whiten_advantages=True),
    ),
    of_the_config(
        "early_stop_is_allowed",
        "TRL: target_kl, ratio_threshold",
        blind_to(early_stop={"metric": ""}),
        "stages.ppo.early_stop.metric",
        T.fields(early_stop__metric="policy/approxkl"),
    ),
    of_the_config(
        "packing_is_allowed",
        "VaultGemma: the unit is the packed sequence",
        blind_to(packing=False),
        "stages.other.packing",
        T.private_stage("sft"),
    ),
    of_the_config(
        "kto_is_allowed",
        "KTO: its KL is the batch's",
        blind_to(loss="dpo"),
        "stages.other.loss",
        T.private_stage("preference", loss="kto"),
    ),
    of_the_config(
        "calibration_by_training_prompts",
        "a slip: the head is shifted by raw scores",
        is_allowed("_check_mixing"),
        "stages.other.evaluation.data",
        T.private_stage("reward"),
    ),
    of_the_config(
        "selection_by_private_validation",
        "early stopping on private data",
        is_allowed("_check_feeding"),
        "stages.ppo.evaluation.data",
        T.fields(evaluation__data="held_out.jsonl"),
    ),
    of_the_config(
        "completions_of_private_prompts",
        "TRL: samples of the training prompts in the log",
        is_allowed("_check_feeding"),
        "stages.ppo.evaluation.data",
        T.fields(evaluation__data="prompts.jsonl"),
    ),
    of_the_config(
        "private_ptx",
        "InstructGPT's pretraining mix",
        is_allowed("_check_feeding", "_check_mixing"),
        "stages.ppo.ptx",
        T.fields(ptx__data="texts.jsonl", ptx__coef=0.1),
    ),
    of_the_config(
        "judged_by_a_raw_reward_model",
        "arXiv 2310.16960, section 4",
        is_allowed("_check_feeding"),
        "stages.ppo.reward",
        lambda config: config.privacy.update(public=("sft.jsonl", "tokenizer.model")),
    ),
]
