"""Stages that make or share out data, and what is written for others."""

from ml_collections import ConfigDict

from rlhf_jax.errors import UserError
from rlhf_jax.validation.fields import choice, not_negative, positive


def check_tokenizer(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    choice(config, where, "schema", ("text", "completion"))


def check_split(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    choice(config, where, "schema", ("completion", "preference", "safety", "safety_label", "unpaired"))
    if not 0 < config.test < 1:
        raise UserError(f"{where}.test is {config.test}: it must be between 0 and 1")


def check_safety_task(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    positive(config, where, ("answers",))
    not_negative(config, where, ("zipf",))
    if not 8 <= config.held_out <= 4096:
        raise UserError(f"{where}.held_out is {config.held_out}: the task has 4608 prompts, hold out 8 to 4096 of them")


def check_export(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    choice(config, where, "dtype", ("", "float32", "bfloat16"))
    positive(config, where, ("shard_gib",))
