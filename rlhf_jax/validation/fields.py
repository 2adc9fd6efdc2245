"""Checks of single fields."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from rlhf_jax.errors import UserError


def positive(config: ConfigDict, where: str, fields: Sequence[str]) -> None:
    for field in fields:
        if field in config and not config[field] > 0:
            raise UserError(f"{where}.{field} is {config[field]}: it must be above 0")


def not_negative(config: ConfigDict, where: str, fields: Sequence[str]) -> None:
    for field in fields:
        if not config[field] >= 0:
            raise UserError(f"{where}.{field} is {config[field]}: it must be at least 0")


def choice(config: ConfigDict, where: str, field: str, valid: Sequence[str]) -> None:
    if config[field] not in valid:
        names = ", ".join(f'"{name}"' for name in valid[:-1]) + f' or "{valid[-1]}"'
        raise UserError(f'{where}.{field} is "{config[field]}": it must be {names}')


def pair_of(config: ConfigDict, where: str, field: str) -> tuple[int, int]:
    value = config[field]
    if len(value) != 2 or not all(isinstance(x, int) for x in value):
        raise UserError(f"{where}.{field} is {value}: give two whole numbers")
    return value
