"""What a field that names something may name: stages of which kinds, files, folders, functions that score."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rlhf_jax.config import (
    PRODUCED,
    all_sources,
    is_folder,
    is_function,
    knows_uncertainty,
    nearest,
    references,
    score_sources,
    scoring_model,
)
from rlhf_jax.errors import UserError
from rlhf_jax.objectives.adjustment import KINDS
from rlhf_jax.validation.fields import choice, not_negative

TRAINED = ("sft", "ppo", "preference", "reward", "cost")  # kinds that leave a model
POLICIES = ("sft", "ppo", "preference")
MODELS = ("init", "policy", "reference", "subject")  # fields that name a model to go on with
SCORING = ("reward", "cost", "laplace")  # kinds that score answers
WANTED = {  # field, or kind and field -> kinds it may name
    "reward": SCORING,
    "judge": SCORING,
    "gold": SCORING,
    "proxies": SCORING,
    "laplace.subject": ("reward", "cost"),
    "memorization.reward": ("reward", "cost"),
    "cost": SCORING,
    "constraint.cost": SCORING,
    "policy": POLICIES,
    "reference": POLICIES,
}


def check_references(stages: ConfigDict, name: str) -> None:
    """Every field that names a model names one, of a kind that fits; every file of a stage is one that it makes."""
    config, where = stages[name], f"stages.{name}"
    models = [(field, config.get(field)) for field in MODELS]
    models += [(field, source) for field, source in all_sources(config) if not is_function(source)]
    for field, value in models:
        folder_fits = field != "subject" or config.kind in ("best_of_n", "annotate", "overoptimization")
        if not value or (field == "init" and value == "scratch") or (folder_fits and is_folder(stages, value)):
            continue
        if value not in stages:
            hint = nearest(value, [n for n in stages if n != name])
            folder = f" and no checkpoint folder ({Path(value).expanduser()})" if folder_fits else ""
            raise UserError(f'{where}.{field} is "{value}", which is no stage{folder}: {hint}')
        names = (f"{config.kind}.{field}", field, field.split(".")[0])
        wanted = next((WANTED[name] for name in names if name in WANTED), TRAINED)
        if stages[value].kind not in wanted:
            raise UserError(
                f'{where}.{field} is "{value}", a {stages[value].kind} stage: it must be one of {", ".join(wanted)}'
            )
        one = field in MODELS or (field, config.kind) == ("reward", "memorization")
        if one and config.kind != "laplace" and stages[value].get("members", 1) > 1:
            raise UserError(f'{where}.{field} is "{value}", an ensemble: it only scores answers: name one model')
    for field, value in references(config):
        head, _, file = value.partition("/")
        made = PRODUCED.get(stages[head].kind) if file and head in stages else None
        if made is not None and file not in made:
            raise UserError(f'{where}.{field} is "{value}", which {head} does not make: {nearest(file, made)}')


def check_reward_sources(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    sources, weights = score_sources(config), config.reward_weights
    if not sources and config.kind != "annotate":
        raise UserError(f'{where}.reward is "{config.reward}": name a reward stage, a folder, or FILE.py:FUNCTION')
    if weights and len(weights) != len(sources):
        raise UserError(f"{where}.reward_weights has {len(weights)} numbers for {len(sources)} sources: give one each")
    if len(set(sources)) != len(sources):
        raise UserError(f"{where}.reward names a source twice: {config.reward}")
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        if source in stages and stages[scoring_model(stages, source)].kind == "cost" and weight >= 0:
            raise UserError(
                f'{where}.reward weighs the cost stage "{source}" with {weight:g}: answers would be rewarded for harm; '
                "give it a negative weight in reward_weights, or name it in constraint.cost"
            )
    choice(config, where, "missing_end", ("set", "add"))
    check_adjustment(stages, config.reward_adjustment, f"{where}.reward_adjustment", sources)
    chosen_by = config.reward_adjustment.chosen_by
    if chosen_by and (chosen_by not in stages or stages[chosen_by].kind != "overoptimization"):
        raise UserError(f'{where}.reward_adjustment.chosen_by is "{chosen_by}": name an overoptimization stage')


def check_adjustment(stages: ConfigDict, fields: ConfigDict, where: str, sources: Sequence[str]) -> None:
    """What uncertainty costs: of sources of which one at least knows it."""
    choice(fields, where, "kind", KINDS)
    not_negative(fields, where, ("k",))
    if fields.kind == "none":
        return
    if not any(knows_uncertainty(stages, source) for source in sources):
        raise UserError(
            f'{where}.kind is "{fields.kind}", but {", ".join(sources)} has no uncertainty: name a laplace stage, or '
            "give the reward stage members"
        )
    alone = [
        source
        for source in sources
        if knows_uncertainty(stages, source) and stages[scoring_model(stages, source)].members == 1
    ]
    if fields.kind == "worst" and alone:
        raise UserError(f'{where}.kind is "worst", but {", ".join(alone)} has no members: use "std" or "variance"')


def check_one_source(config: ConfigDict, where: str, field: str) -> None:
    if len(score_sources(config, field)) > 1:
        raise UserError(f'{where}.{field} is "{config[field]}": name one source')
