"""Stages that leave a scorer: reward and cost models, ensembles of them, posteriors over their weights."""

from ml_collections import ConfigDict

from rlhf_jax.config import is_private
from rlhf_jax.errors import UserError
from rlhf_jax.validation.fields import choice, not_negative, positive


def check_reward(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    choice(config, where, "schema", ("completion", "preference", "safety", "label"))
    check_members(config, where)
    if config.members > 1 and config.schema == "label":
        raise UserError(f'{where}.members is {config.members}, but schema "label" trains one classifier: set it to 1')


def check_members(config: ConfigDict, where: str) -> None:
    positive(config, where, ("members",))
    if config.members > 1 and not config.lora.rank:
        raise UserError(
            f"{where}.members is {config.members}, which share one frozen base: set lora.rank, as each has adapters "
            "and a head of its own"
        )
    if config.members > 1 and is_private(config):
        raise UserError(f"{where}.members is {config.members} with privacy.epsilon: a private stage trains one model")


def check_cost(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    check_members(config, where)
    choice(config, where, "schema", ("safety", "safety_label"))
    choice(config, where, "on_contradiction", ("drop", "raise"))
    choice(config, where, "loss_on", ("sequence", "token"))
    not_negative(config, where, ("regularization",))


def check_laplace(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    subject, named = stages[config.subject], f'{where}.subject is "{config.subject}"'
    if subject.get("schema") == "label":
        raise UserError(f"{named}, a classifier of texts: a posterior is fitted to pairs, or to answers' safety labels")
    if is_private(subject):
        raise UserError(f"{named}, a private stage: a posterior reads its training data, outside what it claims")
    choice(config, where, "scope", ("all", "head"))
    if config.scope == "all" and not subject.lora.rank:
        raise UserError(f'{named}, which has no adapters: give stages.{config.subject}.lora.rank, or set scope="head"')
    choice(config, where, "structure", ("kronecker", "diagonal", "dual"))
    choice(config, where, "factors", ("tokens", "records"))
    choice(config, where, "prior", ("evidence", "validation", "given"))
    positive(config, where, ("precision",))
    not_negative(config, where, ("rank",))
    positive(config.evaluation, f"{where}.evaluation", ("records",))
    if config.structure != "kronecker" and (config.rank or config.corrected):
        raise UserError(f'{where}.structure is "{config.structure}": rank and corrected are of "kronecker" alone')
    if config.per_layer and (config.prior != "evidence" or config.structure == "dual"):
        raise UserError(f'{where}.per_layer needs prior="evidence" and a structure with blocks, not "dual"')
    for field, asked in (('prior is "validation"', config.prior == "validation"), ("temper is True", config.temper)):
        if asked and not config.evaluation.data:
            raise UserError(f"{where}.{field}, which is fitted to held-out records: give evaluation.data")
