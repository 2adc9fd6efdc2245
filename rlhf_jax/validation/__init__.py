"""The checks that need neither data nor devices: every refusal names the field, its value and the remedy."""

from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import REQUIRED, experiment, merge, nearest, stage, stage_order
from rlhf_jax.errors import UserError
from rlhf_jax.validation.evaluations import (
    check_annotate,
    check_audit,
    check_best_of_n,
    check_memorization,
    check_overoptimization,
    check_safety,
)
from rlhf_jax.validation.fields import choice, pair_of, positive
from rlhf_jax.validation.policies import (
    GROUP_ESTIMATORS,
    REFERENCE_FREE,
    ROLLOUT_METRICS,
    UPDATE_METRICS,
    check_ppo,
    check_preference,
    check_sft,
)
from rlhf_jax.validation.references import check_references, check_reward_sources
from rlhf_jax.validation.scorers import check_cost, check_laplace, check_reward
from rlhf_jax.validation.sources import check_export, check_safety_task, check_split, check_tokenizer
from rlhf_jax.validation.training import check_checkpoint, check_privacy, check_training

__all__ = ["GROUP_ESTIMATORS", "REFERENCE_FREE", "ROLLOUT_METRICS", "UPDATE_METRICS", "validate"]

CHECKS_BY_KIND: dict[str, Any] = {
    "tokenizer": check_tokenizer,
    "split": check_split,
    "safety_task": check_safety_task,
    "sft": check_sft,
    "reward": check_reward,
    "cost": check_cost,
    "laplace": check_laplace,
    "overoptimization": check_overoptimization,
    "export": check_export,
    "memorization": check_memorization,
    "ppo": check_ppo,
    "preference": check_preference,
    "best_of_n": check_best_of_n,
    "annotate": check_annotate,
    "safety": check_safety,
    "audit": check_audit,
}


def validate(config: ConfigDict) -> list[str]:
    """Checks all that needs neither data nor devices; returns the stages in the order they run.

    Raises:
      UserError: the first problem found, naming field, value and remedy.
    """
    known = experiment()
    for where, valid in (("", known), *((group, known[group]) for group in ("logging", "checks", "privacy"))):
        for name in config.get(where) if where else config:
            if name not in valid:
                raise UserError(f"unknown field {f'{where}.{name}'.lstrip('.')}: {nearest(name, valid)}")
    positive(config.logging, "logging", ("every",))
    choice(config.privacy, "privacy", "overlap", ("refuse", "compose"))
    if not config.get("stages"):
        raise UserError("config.stages is empty: add at least one stage")
    for name, fields in config.stages.items():
        if not isinstance(fields, ConfigDict) or "kind" not in fields:
            raise UserError(f"stages.{name} has no kind: build it with stage(kind, ...)")
        if not name.isidentifier():
            raise UserError(f'stage name "{name}" is no identifier: use letters, digits and underscores')
        checked = stage(fields.kind)
        merge(checked, {k: v for k, v in fields.items() if k != "kind"}, f"stages.{name}")
    for name, fields in config.stages.items():
        for field, value in fields.items():
            if isinstance(value, str) and value == REQUIRED:
                raise UserError(f"stages.{name}.{field} is not set: a {fields.kind} stage needs it")
        check_references(config.stages, name)
    for name in config.stages:  # names are known to fit: a check may read a stage that another names
        _check_stage(config.stages, name)
    return stage_order(config.stages)


def _check_stage(stages: ConfigDict, name: str) -> None:
    config, where = stages[name], f"stages.{name}"
    positive(config, where, ("batch_size", "accumulation", "epochs", "iterations", "minibatches", "max_new_tokens"))
    positive(config, where, ("temperature", "sequence_length", "rollout_batch_size", "calibration_prompts"))
    positive(config, where, ("vocab_size", "max_bytes", "samples", "beta"))
    if "checkpoint" in config:
        check_checkpoint(config.checkpoint, f"{where}.checkpoint")
        positive(config.evaluation, f"{where}.evaluation", ("every", "records"))
        silent = config.kind in ("reward", "cost")
        if config.evaluation.secrets and (silent or not config.evaluation.data):
            why = f"a {config.kind} model writes nothing" if silent else "evaluation.data is empty"
            raise UserError(f"{where}.evaluation.secrets is followed at every evaluation of a policy, and {why}")
    if "on_error" in config:
        choice(config, where, "on_error", ("raise", "skip"))
    if "reward_weights" in config:
        check_reward_sources(stages, config, where)
    if "prefix_tokens" in config:
        choice(config, where, "schema", ("prompt", "text"))
        fewest, most = pair_of(config, where, "prefix_tokens")
        if not 1 <= fewest <= most:
            raise UserError(f"{where}.prefix_tokens is ({fewest}, {most}): give fewest and most, both at least 1")
    if "accumulation" in config and config.kind != "ppo" and config.batch_size % config.accumulation:
        raise UserError(
            f"{where}.batch_size {config.batch_size} does not divide into {config.accumulation} microbatches: "
            "make it a multiple"
        )
    if config.kind in CHECKS_BY_KIND:
        CHECKS_BY_KIND[config.kind](stages, config, where)
    if "optimizer" in config:
        check_training(config, where)
        check_privacy(config, where)
