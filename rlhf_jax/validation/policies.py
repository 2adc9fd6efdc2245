"""Stages that train a policy: fine-tuning, PPO and its kin, preference losses."""

from ml_collections import ConfigDict

from rlhf_jax.config import nearest, score_sources
from rlhf_jax.errors import UserError
from rlhf_jax.validation.fields import choice, not_negative, positive
from rlhf_jax.validation.references import check_adjustment

GROUP_ESTIMATORS = ("rloo", "grpo", "dr_grpo")  # compare the answers to one prompt
CRITIC_FREE = (*GROUP_ESTIMATORS, "reinforce++")
REFERENCE_FREE = ("orpo", "simpo")  # preference losses without a reference model
UPDATE_METRICS = ("policy/approxkl", "policy/clipfrac", "val/clipfrac", "val/ratio_error")
ROLLOUT_METRICS = (
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "policy/entropy",
    "rollout/logprob_gap",
    "rollout/repeated",
    "response_length",
)


def check_sft(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if config.init == "scratch" and not config.tokenizer:
        raise UserError(f'{where}.tokenizer is not set: a model from scratch needs one, as "prepare/tokenizer.model"')
    choice(config, where, "schema", ("text", "completion", "messages"))
    choice(config, where, "loss_on", ("completion", "all"))
    if config.schema == "text" and config.loss_on == "completion":
        raise UserError(f'{where}.loss_on is "completion" but schema "text" has none: set loss_on="all"')


def check_ppo(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    if config.top_k or config.top_p != 1.0:
        raise UserError(
            f"{where} samples on a truncated support (top_k {config.top_k}, top_p {config.top_p}) but scores on "
            "the full one: set top_k=0 and top_p=1.0 to train"
        )
    check_ppo_shapes(config, where)
    check_constraint(stages, config, where)
    choice(config, where, "reward_normalization", ("", "start", "running"))
    choice(config, where, "kl_in", ("reward", "loss"))
    choice(config, where, "kl_estimator", ("k1", "k2", "k3"))
    choice(config, where, "kl_controller", ("fixed", "adaptive"))
    choice(config, where, "ratio", ("token", "sequence"))
    choice(config, where, "loss_weighting", ("", "token", "sequence", "constant"))
    choice(config, where, "critic", ("reward", "policy", "shared"))
    positive(config, where, ("kl_target", "kl_horizon", "clip_ratio", "value_clip"))
    not_negative(config, where, ("reward_clip", "kl_coef", "entropy_coef", "value_coef", "dual_clip"))
    if config.kl_in == "loss" and config.kl_estimator == "k1":
        raise UserError(
            f'{where}.kl_estimator is "k1" in the loss, where its expected gradient is 0: set kl_estimator="k2" (the '
            'reverse KL\'s gradient) or "k3", or kl_in="reward"'
        )
    if config.kl_controller == "adaptive" and not config.kl_coef:
        raise UserError(f"{where}.kl_coef is 0, which the adaptive controller only multiplies: start above 0")
    if 0 < config.dual_clip <= 1:
        raise UserError(
            f"{where}.dual_clip is {config.dual_clip}: it bounds a ratio above 1, as 3.0; 0 switches it off"
        )
    if config.constraint.cost and config.whiten_rewards:
        raise UserError(
            f"{where}.whiten_rewards scales the rewards and not the costs, so that lambda would weigh them by the "
            "batch: set it to False; with constraint.cost the combined advantage is whitened"
        )
    if config.estimator in GROUP_ESTIMATORS and config.whiten_rewards:
        raise UserError(f"{where}.whiten_rewards is for gae and reinforce++: {config.estimator} compares whole answers")
    if config.ptx.coef:
        if not config.ptx.data:
            raise UserError(f"{where}.ptx.coef is {config.ptx.coef} but ptx.data is empty: name its records")
        choice(config.ptx, f"{where}.ptx", "schema", ("text", "completion", "messages"))
        positive(config.ptx, f"{where}.ptx", ("coef", "sequence_length"))
    elif config.ptx.data:
        raise UserError(f"{where}.ptx.data is given but ptx.coef is 0: set it, or ptx.data to nothing")
    if config.early_stop.metric:
        valid = (*UPDATE_METRICS, *ROLLOUT_METRICS)
        if config.early_stop.metric not in valid:
            raise UserError(
                f'{where}.early_stop.metric is "{config.early_stop.metric}": {nearest(config.early_stop.metric, valid)}'
            )
        positive(config.early_stop, f"{where}.early_stop", ("limit",))


def check_constraint(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    """The Lagrangian's numbers, where a constraint is given."""
    constraint, where = config.constraint, f"{where}.constraint"
    sources = score_sources(config, "constraint.cost")
    if not sources:
        return
    if len(sources) > 1:
        raise UserError(f'{where}.cost is "{constraint.cost}": name one source')
    check_adjustment(stages, constraint.adjustment, f"{where}.adjustment", sources)
    choice(constraint, where, "controller", ("lagrangian", "pid"))
    positive(constraint, where, ("lambda_init", "lambda_learning_rate", "lambda_max", "window"))
    not_negative(constraint, where, ("delay", "pessimism"))
    for field in constraint.pid:
        not_negative(constraint.pid, f"{where}.pid", (field,))
    if constraint.lambda_init > constraint.lambda_max:
        raise UserError(
            f"{where}.lambda_init {constraint.lambda_init:g} is above lambda_max {constraint.lambda_max:g}: start below"
        )
    if not 0 <= constraint.unsafe_share < 1:
        raise UserError(f"{where}.unsafe_share is {constraint.unsafe_share:g}: it must be in [0, 1)")
    if constraint.unsafe_share and constraint.threshold:
        raise UserError(
            f"{where}.unsafe_share is {constraint.unsafe_share:g} and threshold {constraint.threshold:g}: give one"
        )


def check_ppo_shapes(config: ConfigDict, where: str) -> None:
    """Answers into groups, minibatches, microbatches and rollout parts."""
    choice(config, where, "estimator", ("gae", *CRITIC_FREE))
    if config.estimator in GROUP_ESTIMATORS and config.samples < 2:
        raise UserError(
            f"{where}.samples is {config.samples}: {config.estimator} compares the answers to one prompt, so give it "
            "at least 2 (4 to 16 are usual)"
        )
    pieces = config.minibatches * config.accumulation
    if config.batch_size % pieces:
        raise UserError(
            f"{where}.batch_size {config.batch_size} does not divide into {config.minibatches} minibatches of "
            f"{config.accumulation} microbatches: make it a multiple of {pieces}"
        )
    positive(config, where, ("rollout_parts",))
    groups = config.samples * config.rollout_parts
    if config.batch_size % groups:
        raise UserError(
            f"{where}.batch_size {config.batch_size} does not divide into {config.rollout_parts} rollout part(s) of "
            f"prompts with {config.samples} answers each: make it a multiple of {groups}"
        )


def check_preference(stages: ConfigDict, config: ConfigDict, where: str) -> None:
    choice(config, where, "schema", ("preference", "safety", "unpaired"))
    choice(config, where, "loss", ("dpo", "hinge", "ipo", "kto", *REFERENCE_FREE))
    if (config.loss == "kto") != (config.schema == "unpaired"):
        raise UserError(
            f'{where}.loss "{config.loss}" does not fit schema "{config.schema}": kto reads "unpaired" records '
            '{prompt, completion, label}, every other loss "preference" or "safety"'
        )
    if config.reference and config.loss in REFERENCE_FREE:
        raise UserError(f'{where}.reference is "{config.reference}", but {config.loss} has none: set it to ""')
    if not 0 <= config.label_smoothing < 0.5:
        raise UserError(f"{where}.label_smoothing is {config.label_smoothing}: it must be in [0, 0.5)")
    if config.label_smoothing and config.loss != "dpo":
        raise UserError(f"{where}.label_smoothing is for dpo: set it to 0 for {config.loss}")
    positive(config, where, ("desirable_weight", "undesirable_weight"))
