"""What an experiment may say: the defaults of each stage kind, and the checks that need no data.

A config file builds an experiment from `experiment()` and one `stage(kind, ...)` a stage::

    def get_config():
        config = experiment(seed=0)
        config.stages.prepare = stage("prepare")
        config.stages.sft = stage("sft", init="scratch", data="prepare/pretrain.jsonl")
        return config

A stage names what it depends on: another stage ("sft"), or a file of one ("prepare/pretrain.jsonl").
"""

import copy
import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.errors import UserError

REQUIRED = "<required>"  # a field without a default
NEEDS_QWIX = 'compute.base needs the package qwix, which is not installed: pip install "rlhf_jax[quantized]"'

MESH = dict(
    data=-1,  # devices along the pure data axis; -1: all that the other axes leave
    fsdp=1,  # devices over which parameters and batch are sharded together
    tensor=1,  # devices over which heads, feed-forward and vocabulary are sharded
)
MODEL = dict(
    layers=4,
    width=192,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ffn=512,
    context=256,  # longest sequence, in tokens
    rope_theta=10_000.0,
    tie_embeddings=True,
)
COMPUTE = dict(  # "" takes what the model that a stage starts from has; a new one has the first
    dtype="",  # of matrix products: "float32" | "bfloat16"
    param_dtype="",  # of parameters: "float32" | "bfloat16" (then the optimizer keeps a float32 master copy)
    remat="",  # what of a layer the backward pass recomputes: "none" | "full" | "dots" (all but matrix products)
    attention="",  # "auto" (by platform) | "plain" | "cudnn" (NVIDIA) | "splash" (TPU)
    base="",  # what the frozen base under adapters is kept in: "int8" | "nf4" (4 bits, QLoRA); lora.rank=0 keeps none
)
LORA: dict[str, Any] = dict(
    rank=0,  # 0 trains every weight
    alpha=16.0,
    targets=("q", "k", "v", "o", "gate", "up", "down"),
    rslora=False,  # scale by alpha / sqrt(rank) instead of alpha / rank
)
OPTIMIZER = dict(
    name="adamw",  # "adamw" | "adafactor" (factored second moments)
    moment_dtype="",  # of adamw's first moment: "" (float32) | "bfloat16"
    learning_rate=1e-3,
    schedule="cosine",  # "cosine" | "linear" | "constant", after the warm-up
    warmup=0.05,  # share of all optimizer steps
    final=0.1,  # where the decay ends, over the peak
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,  # never on norms, biases and scalars
    clip_norm=1.0,  # global gradient norm; 0 switches clipping off
)
CHECKPOINT = dict(every=100, keep=2)  # optimizer steps (iterations for ppo)
EVALUATION = dict(
    data="",  # records like the training data; "" evaluates nothing
    every=100,  # optimizer steps (iterations for ppo)
    records=256,  # at most so many
    metric="loss/eval",  # the model of its best evaluation is the result; "" takes the last one
    higher_is_better=False,
    samples=4,  # completions shown in the report
)
TRAINABLE = dict(
    compute=COMPUTE, lora=LORA, optimizer=OPTIMIZER, checkpoint=CHECKPOINT, evaluation=EVALUATION, mesh=MESH
)

STAGES: dict[str, dict[str, Any]] = {
    "prepare": dict(
        source="python_stdlib",  # or a folder of .py files
        fractions=dict(pretrain=0.5, sft=0.2, preference=0.1, prompts=0.06, heldout=0.08, secrets=0.06),
        vocab_size=2048,
        max_pretrain_bytes=4_000_000,
        prompt_tokens=64,
        completion_tokens=32,
        examples=dict(sft=2000, preference=1500, prompts=1000, heldout=768),
        near_duplicate_threshold=0.7,  # Jaccard similarity of 5-token shingles
        secrets=dict(per_cell=32, duplicates=(1, 4, 16)),  # a cell is a group and a number of duplicates
    ),
    "sft": dict(
        init=REQUIRED,  # a stage, "scratch", or a Hugging Face checkpoint or PEFT adapter folder
        tokenizer="",  # a tokenizer file or checkpoint folder; "" takes init's
        model=MODEL,  # used with init="scratch"
        data=REQUIRED,  # SOURCE[,SOURCE...], each a file, folder or hub name, as NAME[@SPLIT][:WEIGHT]
        schema="completion",  # "text" | "completion" | "messages"
        on_error="raise",  # a malformed record: "raise" | "skip"
        loss_on="completion",  # "completion" | "all" tokens
        fim_rate=0.0,  # share of completions asked as fill-in-the-middle
        packing=True,
        sequence_length=256,
        batch_size=8,  # rows of sequence_length tokens
        accumulation=1,  # microbatches a step
        epochs=1.0,
        **TRAINABLE,
    ),
    "reward": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        policy="",  # the stage or folder whose samples are rejected answers and calibrate the head; "" takes init
        data=REQUIRED,
        schema="completion",  # "completion" (against the policy's samples) | "preference" | "safety" (PKU: the better)
        on_error="raise",
        max_new_tokens=32,
        temperature=1.0,
        answer_mark=True,  # show the reward model where the answer begins, by the tokenizer's fim_middle token
        samples=1,  # rejected answers, and so pairs, of each training prompt; schema "completion"
        sequence_length=512,  # longest prompt with its answer, of schemas with both answers
        rollout_batch_size=128,
        prompt_buckets=(),  # widths prompts are padded to when the policy answers them; each compiles once
        batch_size=32,  # pairs
        accumulation=1,
        epochs=1.0,
        calibration_prompts=256,  # reference samples that set the reward to mean 0, standard deviation 1
        **TRAINABLE,
    ),
    "ppo": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        reward=REQUIRED,  # a reward stage, or a sequence-classification checkpoint folder (with its own tokenizer)
        data=REQUIRED,  # prompts
        on_error="raise",
        prompt_buckets=(),  # widths prompts are padded to; (): one, the longest. Each width compiles once
        iterations=50,  # rollouts
        batch_size=64,  # prompts a rollout
        epochs=2,
        minibatches=2,
        accumulation=1,  # microbatches a minibatch
        max_new_tokens=32,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop_strings=(),  # an answer also ends where it spells one of these
        kl_coef=0.05,
        kl_limit=20.0,  # nats a sequence; reported against, and the summary says whether it held
        missing_end_penalty=-1.0,  # the score of an answer without its stop token
        gamma=1.0,
        lam=0.95,
        clip_ratio=0.2,
        value_clip=0.2,
        value_coef=0.1,
        whiten_advantages=True,
        compute=COMPUTE,
        lora=LORA,
        optimizer={**OPTIMIZER, "learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.0},
        checkpoint={**CHECKPOINT, "every": 10},
        evaluation={**EVALUATION, "every": 10, "metric": ""},
        mesh=MESH,
    ),
    "memorization": dict(
        subjects=(),  # stages whose models are asked; at least one
        controls=dict(),  # subject -> the stage trained on the complementary half
        secrets="prepare/secrets.jsonl",
        batch_size=64,
        prompt_buckets=(),  # widths prompts are padded to; (): one, the longest. Each width compiles once
        samples=6,
        mesh=MESH,
    ),
    "export": dict(
        subject=REQUIRED,  # the stage whose model is written as a Hugging Face folder, <stage>/checkpoint
        merge=True,  # adapters merged into the base; False writes a PEFT adapter folder
        dtype="",  # of the tensors: "" (as the parameters are) | "float32" | "bfloat16"
        shard_gib=5.0,  # largest safetensors file
        mesh=MESH,
    ),
}
# What a prepare stage leaves for others.
PREPARED = (
    "tokenizer.model",
    *(f"{name}.jsonl" for name in ("pretrain", "sft", "sft_control", "preference", "prompts")),
    *(f"{name}.jsonl" for name in ("heldout", "heldout_text", "secrets")),
)
# Changing these never changes what a finished stage holds, up to rounding.
NOT_SEMANTIC = ("mesh", "checkpoint")


def _config_dict(fields: Mapping[str, Any]) -> ConfigDict:
    out = ConfigDict(sort_keys=False)
    for name, value in fields.items():
        out[name] = _config_dict(value) if isinstance(value, Mapping) else copy.copy(value)
    return out


def nearest(name: str, valid) -> str:
    """` (did you mean "x"?)`, or the valid names when none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else "valid: " + ", ".join(sorted(valid))


def _merge(defaults: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    open_mapping = where.endswith((".controls", ".fractions"))  # the user names these keys
    for name, value in fields.items():
        if name not in defaults and not open_mapping:
            raise UserError(f"unknown field {where}.{name}: {nearest(name, defaults)}")
        if isinstance(defaults.get(name), ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{name} is a group of fields, got {value!r}: give a dict")
            _merge(defaults[name], value, f"{where}.{name}")
        else:
            try:
                defaults[name] = tuple(value) if isinstance(value, list) else value
            except TypeError as error:
                raise UserError(f"{where}.{name}: {error}") from None


def experiment(seed: int = 0) -> ConfigDict:
    """An experiment without stages: `seed` keys every draw, `stages` keep their order."""
    config = ConfigDict(sort_keys=False)
    config.seed = seed
    config.stages = ConfigDict(sort_keys=False)
    config.logging = ConfigDict(dict(every=10, tensorboard=True))  # optimizer steps
    return config


def stage(kind: str, **fields: Any) -> ConfigDict:
    """The config of one stage: the defaults of `kind`, with `fields` over them.

    Raises:
      UserError: an unknown kind or field (with the nearest valid name), or a value of another type.
    """
    if kind not in STAGES:
        raise UserError(f'unknown stage kind "{kind}": {nearest(kind, STAGES)}')
    out = _config_dict({"kind": kind, **STAGES[kind]})
    _merge(out, fields, kind)
    return out


def references(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields (field, value) for each field by which a stage may name another one."""
    for field in ("init", "policy", "reward", "tokenizer", "secrets", "subject"):
        value = config.get(field)
        if isinstance(value, str) and value:
            yield field, value
    evaluation = config.get("evaluation")
    for field, data in (("data", config.get("data")), ("evaluation.data", evaluation and evaluation.data)):
        # NAME[@SPLIT][:WEIGHT] each; what follows a name is no part of a stage's file
        yield from ((field, re.split(r"[@:]", part.strip())[0]) for part in (data or "").split(",") if part)
    if config.kind == "memorization":
        yield from (("subjects", name) for name in config.subjects)
        yield from (("controls", name) for name in config.controls.values())


def upstream(stages: ConfigDict, name: str) -> list[str]:
    """The stages that stage `name` depends on, without repeats, in the order its fields name them."""
    heads = [value.split("/")[0] for _, value in references(stages[name])]
    return list(dict.fromkeys(head for head in heads if head in stages))


def is_folder(stages: ConfigDict, value: str) -> bool:
    """Whether a field that names a model names a folder on disk, not a stage."""
    return value not in stages and Path(value).expanduser().is_dir()


def stage_order(stages: ConfigDict) -> list[str]:
    """Topological order of the stages' references; the config's own order where that leaves a choice.

    Raises:
      UserError: the references form a circle.
    """
    order: list[str] = []
    waiting = list(stages)
    while waiting:
        ready = next((name for name in waiting if all(u in order for u in upstream(stages, name))), None)
        if ready is None:
            raise UserError(f"stages refer to each other in a circle: {', '.join(waiting)}; break one reference")
        order.append(ready)
        waiting.remove(ready)
    return order


def _positive(config: ConfigDict, where: str, fields: tuple[str, ...]) -> None:
    for field in fields:
        if field in config and not config[field] > 0:
            raise UserError(f"{where}.{field} is {config[field]}: it must be above 0")


def _choice(config: ConfigDict, where: str, field: str, valid: tuple[str, ...]) -> None:
    if config[field] not in valid:
        names = ", ".join(f'"{name}"' for name in valid[:-1]) + f' or "{valid[-1]}"'
        raise UserError(f'{where}.{field} is "{config[field]}": it must be {names}')


def _check_stage(stages: ConfigDict, name: str) -> None:
    config, where = stages[name], f"stages.{name}"
    for field, value in config.items():
        if isinstance(value, str) and value == REQUIRED:
            raise UserError(f"{where}.{field} is not set: a {config.kind} stage needs it")
    for field in ("init", "policy", "reward", "subject"):
        value = config.get(field)
        if not value or (field == "init" and value == "scratch") or (field != "subject" and is_folder(stages, value)):
            continue
        if value not in stages:
            hint = nearest(value, [n for n in stages if n != name])
            folder = "" if field == "subject" else f" and no checkpoint folder ({Path(value).expanduser()})"
            raise UserError(f'{where}.{field} is "{value}", which is no stage{folder}: {hint}')
        wanted = {"reward": ("reward",), "policy": ("sft", "ppo")}.get(field, ("sft", "ppo", "reward"))
        if stages[value].kind not in wanted:
            raise UserError(
                f'{where}.{field} is "{value}", a {stages[value].kind} stage: it must be one of {", ".join(wanted)}'
            )
    _positive(config, where, ("batch_size", "accumulation", "epochs", "iterations", "minibatches", "max_new_tokens"))
    _positive(config, where, ("temperature", "sequence_length", "rollout_batch_size", "calibration_prompts"))
    if "checkpoint" in config:
        _positive(config.checkpoint, f"{where}.checkpoint", ("every", "keep"))
        _positive(config.evaluation, f"{where}.evaluation", ("every", "records"))
    for field, value in references(config):
        head, _, file = value.partition("/")
        if file and head in stages and stages[head].kind == "prepare" and file not in PREPARED:
            raise UserError(f'{where}.{field} is "{value}", which {head} does not make: {nearest(file, PREPARED)}')
    if config.kind == "sft":
        if config.init == "scratch" and not config.tokenizer:
            raise UserError(
                f'{where}.tokenizer is not set: a model from scratch needs one, as "prepare/tokenizer.model"'
            )
        _choice(config, where, "schema", ("text", "completion", "messages"))
        _choice(config, where, "loss_on", ("completion", "all"))
        if config.schema == "text" and config.loss_on == "completion":
            raise UserError(f'{where}.loss_on is "completion" but schema "text" has none: set loss_on="all"')
    if config.kind == "reward":
        _choice(config, where, "schema", ("completion", "preference", "safety"))
    if config.kind == "export":
        _choice(config, where, "dtype", ("", "float32", "bfloat16"))
        _positive(config, where, ("shard_gib",))
    if config.kind == "ppo":
        if config.top_k or config.top_p != 1.0:
            raise UserError(
                f"{where} samples on a truncated support (top_k {config.top_k}, top_p {config.top_p}) but scores on "
                "the full one: set top_k=0 and top_p=1.0 to train"
            )
        if config.batch_size % (config.minibatches * config.accumulation):
            raise UserError(
                f"{where}.batch_size {config.batch_size} does not divide into {config.minibatches} minibatches of "
                f"{config.accumulation} microbatches: make it a multiple of {config.minibatches * config.accumulation}"
            )
    elif "accumulation" in config and config.batch_size % config.accumulation:
        raise UserError(
            f"{where}.batch_size {config.batch_size} does not divide into {config.accumulation} microbatches: "
            "make it a multiple"
        )
    if config.kind == "memorization":
        if not config.subjects:
            raise UserError(f"{where}.subjects is empty: name the stages whose models are asked")
        for subject in (*config.subjects, *config.controls, *config.controls.values()):
            if subject not in stages or stages[subject].kind not in ("sft", "ppo"):
                hint = nearest(subject, [n for n in stages if stages[n].kind in ("sft", "ppo")])
                raise UserError(f'{where} asks "{subject}", which is no sft or ppo stage: {hint}')
    if "lora" in config and config.lora.rank:
        valid = LORA["targets"]
        for target in config.lora.targets:
            if target not in valid:
                raise UserError(f'{where}.lora.targets has "{target}": {nearest(target, valid)}')
        if config.init == "scratch":
            raise UserError(f"{where} trains adapters on a random base: set lora.rank=0 or another init")
    if "optimizer" in config:
        _choice(config.optimizer, f"{where}.optimizer", "schedule", ("cosine", "linear", "constant"))
        _choice(config.optimizer, f"{where}.optimizer", "name", ("adamw", "adafactor"))
        _choice(config.optimizer, f"{where}.optimizer", "moment_dtype", ("", "bfloat16"))
        _choice(config.compute, f"{where}.compute", "dtype", ("", "float32", "bfloat16"))
        _choice(config.compute, f"{where}.compute", "param_dtype", ("", "float32", "bfloat16"))
        _choice(config.compute, f"{where}.compute", "remat", ("", "none", "full", "dots"))
        _choice(config.compute, f"{where}.compute", "attention", ("", "auto", "plain", "cudnn", "splash"))
        _choice(config.compute, f"{where}.compute", "base", ("", "int8", "nf4"))
        if config.compute.base and not config.lora.rank:
            raise UserError(
                f'{where}.compute.base is "{config.compute.base}" but {where}.lora.rank is 0: a quantized base is '
                'frozen, so give adapters a rank, or set compute.base=""'
            )
        if config.compute.base and importlib.util.find_spec("qwix") is None:
            raise UserError(f"{where}.{NEEDS_QWIX}")
    if "on_error" in config:
        _choice(config, where, "on_error", ("raise", "skip"))


def validate(config: ConfigDict) -> list[str]:
    """Checks all that needs neither data nor devices; returns the stages in the order they run.

    Raises:
      UserError: the first problem found, naming field, value and remedy.
    """
    known = experiment()
    for where, valid in (("", known), ("logging", known.logging)):
        for name in config.get(where) if where else config:
            if name not in valid:
                raise UserError(f"unknown field {f'{where}.{name}'.lstrip('.')}: {nearest(name, valid)}")
    _positive(config.logging, "logging", ("every",))
    if not config.get("stages"):
        raise UserError("config.stages is empty: add at least one stage")
    for name, fields in config.stages.items():
        if not isinstance(fields, ConfigDict) or "kind" not in fields:
            raise UserError(f"stages.{name} has no kind: build it with stage(kind, ...)")
        if not name.isidentifier():
            raise UserError(f'stage name "{name}" is no identifier: use letters, digits and underscores')
        checked = stage(fields.kind)
        _merge(checked, {k: v for k, v in fields.items() if k != "kind"}, f"stages.{name}")
        _check_stage(config.stages, name)
    return stage_order(config.stages)
