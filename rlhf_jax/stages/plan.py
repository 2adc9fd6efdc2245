"""What `--dry_run` says of a stage before it runs: its model, who shares a base, memory, and decoded examples."""

import math
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.config import is_folder, is_function, score_sources, scoring_model
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.distributed.chips import GIB
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import axes, base_leaves, count, shapes
from rlhf_jax.models.lora import adapter_axes, init_adapters
from rlhf_jax.models.quantized import quantized_axes, quantized_shapes
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.footprint import Decoder, bytes_per_device, cache_bytes
from rlhf_jax.stages.judges import source_names
from rlhf_jax.training.artifacts import checkpoint_config, checkpoint_tokenizer, computed
from rlhf_jax.validation import REFERENCE_FREE


def tokenizer_of(context: Context, reference: str) -> Tokenizer | None:
    """The tokenizer of a stage or checkpoint folder, where it is there already."""
    stages = context.experiment.stages
    reference = scoring_model(stages, reference)
    while reference in stages:
        config = stages[reference]
        if config.get("tokenizer"):
            path = context.path(config.tokenizer)
            return load_tokenizer(path) if path.exists() else None
        reference = config.init
    return checkpoint_tokenizer(Path(reference).expanduser()) if is_folder(stages, reference) else None


def shape_of(context: Context, reference: str) -> TransformerConfig | None:
    """The decoder of a stage or checkpoint folder, as that stage computes it; None while its vocabulary is unknown."""
    stages = context.experiment.stages
    reference = scoring_model(stages, reference)
    if is_folder(stages, reference):
        return checkpoint_config(Path(reference).expanduser())
    config = stages[reference]
    if config.init != "scratch":
        inner = shape_of(context, config.init)
    else:
        tokenizer = tokenizer_of(context, reference)
        source = config.tokenizer.split("/")[0]
        size = tokenizer.vocab_size if tokenizer else stages[source].vocab_size if source in stages else 0
        inner = TransformerConfig(vocab_size=size, **config.model) if size else None
    return None if inner is None else computed(inner, config.compute)


def base_of(context: Context, reference: str) -> str:
    """The stage or folder whose base a model stands on: roles with the same one share its arrays."""
    stages = context.experiment.stages
    reference = scoring_model(stages, reference)
    if reference not in stages:
        return reference
    return _continued(context, stages[reference].init, reference)


def base_kind(context: Context, reference: str) -> str:
    """What a model's base is kept in: "" (plain arrays), "int8" or "nf4"."""
    stages = context.experiment.stages
    if reference not in stages or not stages[reference].lora.rank:
        return ""
    return stages[reference].compute.base or base_kind(context, stages[reference].init)


def _continued(context: Context, start: str, stage: str) -> str:
    """The base of what `stage` makes of `start`, as `artifacts.continue_role` does."""
    stages = context.experiment.stages
    lora, compute = stages[stage].lora, stages[stage].compute
    old = stages[start].lora if start in stages else None
    adapted = old is not None and old.rank > 0
    kind = compute.base or base_kind(context, start)
    if (
        not lora.rank
        or _casts(context, start, compute.param_dtype)
        or (adapted and (old != lora or kind != base_kind(context, start)))
    ):
        return stage
    owner = base_of(context, start)
    return f"{owner} in {kind}" if kind and not owner.endswith(kind) else owner


def _casts(context: Context, start: str, param_dtype: str) -> bool:
    """Whether a base is kept in another dtype than `start` has; a checkpoint folder is loaded in what is asked for."""
    if not param_dtype or is_folder(context.experiment.stages, start):
        return False
    shape = shape_of(context, start)
    return shape is None or shape.param_dtype != param_dtype


def role_bases(context: Context) -> dict[str, str]:
    """Role -> the stage or folder whose base it reads, for a ppo stage."""
    config, name = context.config, context.name
    policy = _continued(context, config.init, name)
    own = policy == name  # trained in full: the reference keeps the weights it started from
    roles = {
        "policy": f"{name} (policy)" if own else policy,
        "reference": base_of(context, config.init) if own else policy,
    }
    sources = score_sources(config)
    named = zip(source_names(sources), sources, strict=True)
    rewards = {title: source for title, source in named if not is_function(source)}
    cost = config.constraint.cost
    costs = {"cost": cost} if cost and not is_function(cost) else {}
    stages = context.experiment.stages
    critics = {"value": rewards} | ({"cost_value": costs} if cost else {})
    if config.estimator == "gae" and config.critic != "shared":
        for critic, sources_read in critics.items():
            models = [scoring_model(stages, source) for source in sources_read.values()]
            readers = [model for model in models if _same_tokenizer(context, model, config.init)]
            value = _continued(context, readers[0] if readers and config.critic == "reward" else config.init, name)
            roles[critic] = f"{name} ({critic})" if value == name else value
    judges = {title if len(rewards) > 1 else "reward": source for title, source in rewards.items()} | costs
    return roles | {title: base_of(context, source) for title, source in judges.items()}


def _same_tokenizer(context: Context, one: str, other: str) -> bool:
    """Whether two models have one tokenizer, as far as is known yet."""
    theirs, ours = tokenizer_of(context, one), tokenizer_of(context, other)
    return theirs is None or ours is None or theirs.identity == ours.identity


def _reference_base(context: Context) -> str:
    """The base that a preference stage's reference reads in every step."""
    config = context.config
    if config.reference not in ("", config.init):
        return base_of(context, config.reference)
    policy = _continued(context, config.init, context.name)
    return base_of(context, config.init) if policy == context.name else policy


def _moments(config: Any, param_dtype: str) -> float:
    """Bytes a trained parameter takes in gradient and optimizer, over its own: adafactor's factors are not counted."""
    first = 2 if config.optimizer.moment_dtype else 4
    moments = 0 if config.optimizer.name == "adafactor" else first + 4
    return 4 + moments + (4 if param_dtype == "bfloat16" else 0)


def _ppo_working_memory(context: Context, shape: TransformerConfig, trained: int) -> list[str]:
    """What a rollout and an update take on one device beside the weights: an estimate, by the largest arrays alone.

    A rollout has the merged weights once more, by its own table and in the dtype of products, and the cache of its
    rows.
    """
    config, on = context.config, Decoder(shape, dict(context.mesh().shape))
    longest = max(config.prompt_buckets, default=shape.context - config.max_new_tokens)
    tokens = longest + config.max_new_tokens
    rows = math.ceil(config.batch_size / config.rollout_parts / on.shards)
    micro = math.ceil(config.batch_size / (config.minibatches * config.accumulation) / on.shards)
    weights, cache = on.prepared(), cache_bytes(shape, rows, tokens, on.tensor)
    kept = on.backward(micro * tokens, trained)
    return [
        f"rollout: about {(weights + cache) / GIB:.2f} GiB more per device: weights as decoding reads them "
        f"{weights / GIB:.2f}, cache of {rows} answers of {tokens} tokens {cache / GIB:.2f}",
        f"update: about {kept / GIB:.2f} GiB more per device: {micro} answers of {tokens} tokens through {trained} "
        f"trained role(s), remat {shape.remat}",
    ]


def describe(context: Context) -> list[str]:
    """Lines about a trainable stage: parameters, sharing, memory of weights and optimizer on one device."""
    config, mesh = context.config, context.mesh()
    shape = shape_of(context, config.init if config.init != "scratch" else context.name)
    if shape is None:
        return [f"model: known once {config.tokenizer} is there"]
    shape = computed(shape, config.compute)
    base = base_leaves(shape)
    full = bytes_per_device(shapes(base, shape.param_dtype), axes(base), mesh)
    kind, held = base_kind(context, context.name), full
    if kind:
        small = quantized_shapes(shape, kind)
        held = bytes_per_device(small, quantized_axes(shape, small), mesh)
    lines = [
        f"{shape.family} decoder, {count(base) / 1e6:.2f}M parameters in {shape.param_dtype}, products in "
        f"{shape.dtype}, remat {shape.remat}, attention {shape.attention}" + (f", base in {kind}" if kind else "")
    ]
    lora = context.lora()
    if lora is not None:
        like = jax.eval_shape(lambda: init_adapters(shape, lora, key=jax.random.key(0)))
        trained = bytes_per_device(like, adapter_axes(shape, like), mesh) // 4
    else:
        trained = full // (2 if shape.param_dtype == "bfloat16" else 4)
    if config.get("members", 1) > 1:
        trained *= config.members
        lines.append(f"{config.members} members: adapters and a head each, in one pass over the base")
    roles = {context.name: base_of(context, context.name)}
    train = trained * (_moments(config, shape.param_dtype if lora is None else "float32") + (4 if lora else 0))
    if config.kind == "preference" and config.loss not in REFERENCE_FREE and not config.precompute_reference:
        roles["reference"] = _reference_base(context)
    if config.kind == "ppo":
        roles = role_bases(context)
        train *= 1 + sum(critic in roles for critic in ("value", "cost_value"))
        groups: dict[str, list[str]] = {}
        for role, owner in roles.items():
            groups.setdefault(owner, []).append(role)
        lines.append("bases: " + "; ".join(f"{'+'.join(names)} on {owner}" for owner, names in groups.items()))
    total = sum(held if kind and owner.endswith(kind) else full for owner in set(roles.values())) + train
    lines.append(
        f"memory per device: {total / 2**30:.3f} GiB in weights, gradients and optimizer ({len(set(roles.values()))} "
        f"base(s)), activations and caches not counted"
    )
    if config.kind == "ppo":
        lines += _ppo_working_memory(context, shape, sum(role in roles for role in ("policy", "value", "cost_value")))
    tensor = mesh.shape["tensor"]
    if shape.kv_heads % tensor:
        lines.append(f"{shape.kv_heads} key-value heads do not divide over tensor {tensor}: each device keeps them all")
    return lines


def previews(context: Context, kind: Any) -> list[str]:
    """Three decoded examples of the stage's data, where data and tokenizer are there already."""
    reference = context.name if context.config.get("tokenizer") else context.config.init
    tokenizer = tokenizer_of(context, reference)
    names = context.data_names("data")
    stages = context.experiment.stages
    waiting = [n for n in names if n.split("/")[0] in stages and not context.path(n).exists()]
    if tokenizer is None or waiting:
        return [f"examples: once {waiting[0] if waiting else context.config.tokenizer} is there"]
    out = []
    for number, text in enumerate(kind.preview(context, tokenizer), 1):
        out += [f"example {number}: {line}" if i == 0 else f"    {line}" for i, line in enumerate(text.splitlines())]
    return out
