"""Stages that ask models: best of n, labels, safety, memorization, audits, over-optimization."""

from ml_collections import ConfigDict

from rlhf_jax.config import all_sources, is_folder, is_function, nearest, score_sources, scoring_model
from rlhf_jax.errors import UserError
from rlhf_jax.validation.fields import choice, not_negative, positive
from rlhf_jax.validation.references import POLICIES, check_one_source


def check_best_of_n(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if config.subject in stages and stages[config.subject].kind not in POLICIES:
        kind = stages[config.subject].kind
        raise UserError(f'{where}.subject is "{config.subject}", a {kind} stage: name one of {", ".join(POLICIES)}')
    if config.samples < 2:
        does = "best-of-n ranks the answers" if config.kind == "best_of_n" else "a pair needs two answers"
        raise UserError(f"{where}.samples is {config.samples}: {does} to a prompt, give at least 2")
    if config.batch_size % config.samples:
        raise UserError(
            f"{where}.batch_size {config.batch_size} is not whole prompts of {config.samples} answers: make it a "
            f"multiple of {config.samples}"
        )


def check_annotate(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    check_best_of_n(stages, config, where)
    choice(config, where, "labels", ("exact", "sampled"))
    if not config.reward and not config.cost:
        raise UserError(f"{where}.reward and cost are both empty: name what judges the answers")
    not_negative(config, where, ("cost_weight", "records"))
    if not 0 <= config.flips < 1 or (config.flips and not config.reward):
        why = "it is a share of the better labels, below 1" if config.reward else "without a reward nothing is better"
        raise UserError(f"{where}.flips is {config.flips:g}: {why}")
    if config.cost_weight and not (config.reward and config.cost):
        missing = "cost" if config.reward else "reward"
        raise UserError(
            f"{where}.cost_weight weighs a cost against a reward, and {missing} is empty: name it, or set it to 0"
        )
    check_one_source(config, where, "cost")


def check_safety(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if not config.subjects:
        raise UserError(f"{where}.subjects is empty: name the stages whose models answer, the start first")
    if len(set(config.subjects)) != len(config.subjects):
        raise UserError(f"{where}.subjects names a model twice: {', '.join(config.subjects)}")
    for subject in config.subjects:
        if not is_folder(stages, subject) and (subject not in stages or stages[subject].kind not in POLICIES):
            hint = nearest(subject, [n for n in stages if stages[n].kind in POLICIES])
            raise UserError(f'{where} asks "{subject}", which is no {", ".join(POLICIES)} stage and no folder: {hint}')
    check_conditions(config, where)
    start, members = config.subjects[0], [subject for _, runs in config.conditions for subject in runs]
    if members and start not in members:
        raise UserError(f'{where}.conditions has not "{start}", the start: add ("{start}", ("{start}",))')
    what, names = ("condition", [name for name, _ in config.conditions]) if members else ("subject", config.subjects)
    for name in config.frontier:
        if name not in names:
            raise UserError(f'{where}.frontier has "{name}", which is no {what}: {nearest(name, names)}')
    if config.frontier and len(set(config.frontier)) < 2:
        raise UserError(f"{where}.frontier is {tuple(config.frontier)}: name two {what}s or more, which span costs")
    for field in ("cost", "judge"):
        check_one_source(config, where, field)
    if not config.cost:
        raise UserError(f"{where}.cost is empty: name a cost stage, a folder, or FILE.py:FUNCTION")
    if config.refusals and not is_function(config.refusals):
        raise UserError(f'{where}.refusals is "{config.refusals}": give FILE.py:FUNCTION')
    if config.refusals and not config.harmless:
        raise UserError(f"{where}.refusals counts refused harmless prompts, and harmless is empty: name their data")
    positive(config, where, ("records",))
    for field in ("confidence", "tail"):
        if not 0 < config[field] < 1:
            raise UserError(f"{where}.{field} is {config[field]:g}: it must be between 0 and 1")


def check_overoptimization(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if len(score_sources(config, "gold")) != 1:
        raise UserError(f'{where}.gold is "{config.gold}": name one source')
    if not config.proxies:
        raise UserError(f"{where}.proxies is empty: name at least one, {{name: SOURCE[,SOURCE...]}}")
    for name in (*config.proxies, *config.policies):
        if "." in name:
            raise UserError(f'{where} has the name "{name}": names hold no full stop')
    for name in config.proxies:
        if not score_sources(config, f"proxies.{name}"):
            raise UserError(f'{where}.proxies["{name}"] is "{config.proxies[name]}": name at least one source')
    if config.pool % config.batch_size:
        raise UserError(f"{where}.pool {config.pool} is no multiple of batch_size {config.batch_size}: make it one")
    for kind, ks in config.adjustments.items():
        if ks and min(ks) < 0:
            raise UserError(f"{where}.adjustments.{kind} is {tuple(ks)}: give numbers of at least 0, or none of them")
    for field, source in all_sources(config):
        if source in stages and stages[scoring_model(stages, source)].kind == "cost":
            raise UserError(f'{where}.{field} is "{source}", a cost: more of it ranks higher here: name a reward')
    if not 0 < config.selection < 1:
        raise UserError(f"{where}.selection is {config.selection:g}: it is a share of the prompts, between 0 and 1")
    for name in config.policies:
        for policy in score_sources(config, f"policies.{name}"):
            if policy not in stages or stages[policy].kind != "ppo":
                raise UserError(f'{where}.policies["{name}"] names "{policy}", which is no ppo stage')
            if config.gold not in score_sources(stages[policy]):
                raise UserError(
                    f'{where}.policies["{name}"]: "{policy}" does not score by gold: add "{config.gold}" to its reward '
                    "with the weight 0 in reward_weights"
                )


def check_conditions(config: ConfigDict, where: str) -> None:
    for condition in config.conditions:
        if len(condition) != 2 or isinstance(condition[1], str) or not condition[1]:
            raise UserError(f"{where}.conditions has {condition!r}: give (name, (subject, ...)) each")
        for subject in condition[1]:
            if subject not in config.subjects:
                hint = nearest(subject, config.subjects)
                raise UserError(f'{where}.conditions: "{condition[0]}" has "{subject}", which is no subject: {hint}')
        if len(set(condition[1])) != len(condition[1]):
            raise UserError(f'{where}.conditions: "{condition[0]}" names a subject twice: {", ".join(condition[1])}')
    names = [name for name, _ in config.conditions]
    if len(set(names)) != len(names):
        raise UserError(f"{where}.conditions names a condition twice: {', '.join(names)}")


def check_memorization(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if not config.subjects:
        raise UserError(f"{where}.subjects is empty: name the stages whose models are asked")
    for subject in (*config.subjects, *config.controls, *config.controls.values()):
        if is_folder(stages, subject):
            continue
        if subject not in stages or stages[subject].kind not in POLICIES:
            hint = nearest(subject, [n for n in stages if stages[n].kind in POLICIES])
            raise UserError(f'{where} asks "{subject}", which is no {", ".join(POLICIES)} stage and no folder: {hint}')
    check_conditions(config, where)
    if "," in config.reward or is_function(config.reward):
        raise UserError(f'{where}.reward is "{config.reward}": name one reward stage')
    if bool(config.members) != bool(config.others):
        missing = "others" if config.members else "members"
        raise UserError(f"{where}.{missing} is empty: membership scores need both, members and others; or neither")
    if config.similarity and not is_function(config.similarity):
        raise UserError(f'{where}.similarity is "{config.similarity}": give FILE.py:FUNCTION')
    if config.similarity and config.secrets.endswith(".npy"):
        raise UserError(f"{where}.similarity reads texts, which arrays of token ids have not: leave it out")
    if not config.tries or min(config.tries) < 1:
        raise UserError(f"{where}.tries is {tuple(config.tries)}: give numbers of at least 1")
    if config.draws < 0:
        raise UserError(f"{where}.draws is {config.draws}: give a number of samples, or 0")
    if config.sampling.temperature <= 0:
        raise UserError(f"{where}.sampling.temperature is {config.sampling.temperature}: it must be above 0")


def check_audit(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    subject = stages[config.subject]
    if not 0 < subject.privacy.epsilon < float("inf"):
        raise UserError(
            f'{where}.subject is "{config.subject}", which claims no privacy: give stages.{config.subject} a finite '
            "privacy.epsilon, or name another stage"
        )
    for field, least in (("canaries", 20), ("idle", 2)):
        if config[field] < least:
            raise UserError(f"{where}.{field} is {config[field]}: give at least {least}")
    for field in ("confidence", "level"):
        if not 0 < config[field] < 1:
            raise UserError(f"{where}.{field} is {config[field]}: it must be between 0 and 1")
