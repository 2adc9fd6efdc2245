"""What every trainable stage has: adapters, optimizer, arithmetic, privacy."""

import importlib.util

from ml_collections import ConfigDict

from rlhf_jax.config import LORA, NEEDS_QWIX, nearest
from rlhf_jax.errors import UserError
from rlhf_jax.validation.fields import choice, not_negative, positive

PRIVATE_BACKENDS = ("", "vmap", "adapters", "bookkeeping", "ghost")


def check_training(config: ConfigDict, where: str) -> None:
    """Adapters, optimizer and arithmetic of a trainable stage."""
    if config.lora.rank:
        valid = LORA["targets"]
        for target in config.lora.targets:
            if target not in valid:
                raise UserError(f'{where}.lora.targets has "{target}": {nearest(target, valid)}')
        if config.init == "scratch":
            raise UserError(f"{where} trains adapters on a random base: set lora.rank=0 or another init")
    optimizer = f"{where}.optimizer"
    choice(config.optimizer, optimizer, "schedule", ("cosine", "linear", "constant"))
    choice(config.optimizer, optimizer, "name", ("adamw", "adafactor"))
    choice(config.optimizer, optimizer, "moment_dtype", ("", "bfloat16"))
    if config.optimizer.tf_epsilon and config.optimizer.name != "adamw":
        raise UserError(f"{optimizer}.tf_epsilon is for adamw: set it to False for {config.optimizer.name}")
    choice(config.compute, f"{where}.compute", "dtype", ("", "float32", "bfloat16"))
    choice(config.compute, f"{where}.compute", "param_dtype", ("", "float32", "bfloat16"))
    choice(config.compute, f"{where}.compute", "remat", ("", "none", "full", "dots"))
    choice(config.compute, f"{where}.compute", "attention", ("", "auto", "plain", "cudnn", "splash"))
    choice(config.compute, f"{where}.compute", "base", ("", "int8", "nf4"))
    if config.compute.base and not config.lora.rank:
        raise UserError(
            f'{where}.compute.base is "{config.compute.base}" but {where}.lora.rank is 0: a quantized base is '
            'frozen, so give adapters a rank, or set compute.base=""'
        )
    if config.compute.base and importlib.util.find_spec("qwix") is None:
        raise UserError(f"{where}.{NEEDS_QWIX}")


def check_checkpoint(checkpoint: ConfigDict, where: str) -> None:
    """How often a stage saves, and what it keeps."""
    positive(checkpoint, where, ("every", "keep"))
    not_negative(checkpoint, where, ("keep_every",))
    if checkpoint.keep_every % checkpoint.every:
        raise UserError(
            f"{where}.keep_every is {checkpoint.keep_every} and every is {checkpoint.every}: what is kept for ever is "
            "saved first, so make keep_every a multiple of every"
        )


def check_privacy(config: ConfigDict, where: str) -> None:
    """Ranges of a private stage's numbers; what else it may not do is in `stages.provenance`."""
    privacy, where = config.privacy, f"{where}.privacy"
    not_negative(privacy, where, ("epsilon", "delta", "noise_multiplier", "critic_clip_norm", "physical_batch"))
    if not privacy.epsilon:
        if privacy.noise_multiplier or privacy.delta:
            raise UserError(
                f"{where}.epsilon is 0, so nothing is private, but noise_multiplier is {privacy.noise_multiplier:g} "
                f"and delta {privacy.delta:g}: give the epsilon that the stage may spend, or set both to 0"
            )
        return
    if privacy.epsilon < float("inf") and not 0 < privacy.delta < 1:
        raise UserError(f"{where}.delta is {privacy.delta:g}: give one above 0 and below 1 / units")
    positive(privacy, where, ("clip_norm", "contribution", "loss_bound", "kl_bound", "score_bound", "cost_bound"))
    choice(privacy, where, "adjacency", ("add_or_remove", "replace_one"))
    choice(privacy, where, "backend", PRIVATE_BACKENDS)
    if privacy.epsilon == float("inf") and privacy.noise_multiplier:
        raise UserError(f"{where}.epsilon is inf, which takes no noise: set noise_multiplier=0, or a finite epsilon")
    if not 0 <= privacy.released_share < 1:
        raise UserError(f"{where}.released_share is {privacy.released_share:g}: it must be in [0, 1)")
    own_critic = config.kind == "ppo" and config.estimator == "gae" and config.critic != "shared"
    if privacy.critic_clip_norm and not own_critic:
        raise UserError(f"{where}.critic_clip_norm is for a ppo stage with a critic of its own: set it to 0")
