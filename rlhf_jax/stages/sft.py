"""Supervised fine-tuning, and pretraining: next-token loss on documents or completions.

Loads records, tokenizes and packs them; one jitted step; writes the best model by `evaluation.metric`.
"""

import itertools
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_private
from rlhf_jax.data.examples import prompt_ids, show_example
from rlhf_jax.data.order import in_batches
from rlhf_jax.data.table import pad_prompts
from rlhf_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from rlhf_jax.data.turns import plain_text, split_last_answer
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, base_axes, init_base, merged_base, training_passes
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.packed import PackedData, packed_examples
from rlhf_jax.stages.private import Private
from rlhf_jax.stages.secrets import follow_secrets
from rlhf_jax.stages.train import ordered, prepare, steps_of, train
from rlhf_jax.training.artifacts import Role, checkpoint_config, computed, continue_role, role_memory, save_role
from rlhf_jax.training.gradient import plain_gradient
from rlhf_jax.training.language_model import sft_objective
from rlhf_jax.training.metrics import cut_back

SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 48, 48


def _start(context: Context, mesh: Mesh) -> Role:
    """The role to train: a random decoder, or the continuation of another stage's."""
    config = context.config
    if config.init != "scratch":
        role = context.load(config.init, mesh)
        role = continue_role(role, context.lora(), config.compute, key=context.key("adapters"))
        if config.tokenizer:  # the same vocabulary with another chat template, say
            role.tokenizer = load_tokenizer(context.path(config.tokenizer))
            check_vocabulary(role.tokenizer, role.spec.config.vocab_size, config.tokenizer)
        return role
    tokenizer = load_tokenizer(context.path(config.tokenizer))
    shape = computed(TransformerConfig(vocab_size=tokenizer.vocab_size, **config.model), config.compute)
    make = jax.jit(
        lambda key: init_base(shape, key=key),
        out_shardings=tree_shardings(
            jax.eval_shape(lambda: init_base(shape, key=jax.random.key(0))), base_axes(shape), mesh
        ),
    )
    return Role(RoleSpec(shape), {"base": make(context.key("parameters"))}, tokenizer)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / accumulation", config.batch_size // config.accumulation)
    if config.init == "scratch" and config.sequence_length > config.model.context:
        raise UserError(
            f"stages.{context.name}.sequence_length {config.sequence_length} is above model.context "
            f"{config.model.context}: lower one or raise the other"
        )
    context.check_folders()
    for _, folder in context.folders():
        _check_context(context, checkpoint_config(folder))
    context.check_data(config.schema)


def _check_context(context: Context, shape: TransformerConfig) -> None:
    if context.config.sequence_length > shape.context:
        raise UserError(
            f"stages.{context.name}.sequence_length {context.config.sequence_length} is above the context "
            f"{shape.context} of {context.config.init}: lower it"
        )


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first examples as training reads them, what the loss leaves out marked."""
    examples = packed_examples(context, tokenizer, context.config.data, context.config, {})
    return [show_example(tokenizer, example) for example in itertools.islice(examples, 3)]


def run(context: Context) -> dict[str, Any]:
    """Trains, and returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- role and data ---------------------------------------------------------------------------------------
        role = _start(context, mesh)
        _check_context(context, role.spec.config)
        data = PackedData(context, role.tokenizer, config.data, "train", config)
        private = Private.of_records(context, *data.units()) if is_private(config) else None
        steps = private.iterations if private else steps_of(config, len(data.plan))
        tokens = config.batch_size * config.sequence_length
        context.progress(
            f"{len(data.table)} records in {len(data.plan)} rows of {data.width} tokens ({data.filled:.0%} filled), "
            f"{role.spec.config.parameters / 1e6:.2f}M parameters, {steps} steps of {tokens} tokens"
        )

        # --- step ------------------------------------------------------------------------------------------------
        objective = sft_objective(role.spec, data.segments)
        plain = plain_gradient(objective, config.accumulation)
        gradient = private.gradient(objective, role, data.width) if private else plain
        state, frozen, step = prepare(context, role, gradient, steps, mesh)
        flops = training_passes(role.spec) * tokens * role.spec.config.forward_flops(data.width)

        def place(rows: np.ndarray, epochs: np.ndarray) -> dict[str, jax.Array]:
            return data.place(rows, mesh)

        batch = private.batches(place, mesh) if private else ordered(context, len(data.plan), place)

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, batch(iteration))

        evaluate = None
        if config.evaluation.data:
            evaluate = _evaluation(context, role, frozen, mesh)
            evaluate = follow_secrets(context, role, lambda params: {**frozen, **params}, evaluate, mesh)

        # --- loop ------------------------------------------------------------------------------------------------
        params, summary = train(
            context,
            state,
            advance,
            evaluate,
            iterations=steps,
            shown=("loss/train", "loss/eval", "perf/tokens_per_second"),
            tokens_each=tokens,
            flops_each=flops,
            account=private.account if private else None,
        )
        role.weights = {**frozen, **params}
        prints = save_role(context.workdir, context.name, role)
    figures = {
        "parameters": role.spec.config.parameters,
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "records": len(data.table),
        "skipped": data.skipped,
        "rows": len(data.plan),
        **(private.figures() if private else {"filled": data.filled}),
        "steps": steps,
        "fingerprints": prints,
        "memory": role_memory({context.name: role.weights}),
    }
    if evaluate is not None:
        figures |= {
            "loss/eval": summary["result"]["loss/eval"],
            "loss/eval_start": summary["first"]["loss/eval"],
            "result_step": summary["result_step"],
        }
    return {"figures": figures, "samples": _last_samples(context)}


def _evaluation(context: Context, role: Role, frozen: Any, mesh: Mesh):
    """The function (params, iteration) -> {"loss/eval": nats a token}; also writes sampled completions."""
    config = context.config
    data = PackedData(context, role.tokenizer, config.evaluation.data, "evaluation", config)
    batches = [data.place(rows, mesh) for rows in in_batches(len(data.plan), config.batch_size)]
    objective = sft_objective(role.spec, data.segments)

    @jax.jit
    def totals(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return objective(params, frozen, batch).metrics["loss/train"]

    sample = _sampler(context, role, mesh)

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        parts = [totals(params, frozen, batch) for batch in batches]
        if sample is not None:
            sample({**frozen, **params}, iteration)
        return {"loss/eval": float(sum(loss for loss, _ in parts) / sum(count for _, count in parts))}

    return evaluate


def _sampler(context: Context, role: Role, mesh: Mesh):
    """The function (weights, iteration) that appends completions of held-out prompts to samples.jsonl."""
    config, tokenizer = context.config, role.tokenizer
    if not config.evaluation.samples:
        return None
    records, _ = context.records(config.evaluation.data, config.schema, config.evaluation.samples)
    if config.schema == "text":
        ids = [tokenizer.encode_prompt(r["text"])[:SAMPLE_PROMPT_TOKENS] for r in records]
        references = [""] * len(ids)
    elif config.schema == "messages":
        turns = [split_last_answer(r["messages"]) for r in records]
        ids = [prompt_ids(tokenizer, prompt) for prompt, _ in turns]
        references = [answer for _, answer in turns]
    else:
        ids = [prompt_ids(tokenizer, r["prompt"]) for r in records]
        references = [plain_text(r["completion"]) for r in records]
    room = role.spec.config.context
    new_tokens = min(SAMPLE_TOKENS, room // 2)
    ids = [row[new_tokens - room :] for row in ids]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    prompts = pad_prompts(ids, max(len(x) for x in ids), len(ids) + -len(ids) % shards)
    batch = place_batch(len(prompts["lengths"]), lambda rows: {k: v[rows] for k, v in prompts.items()}, mesh)
    sampling = Sampling(new_tokens, temperature=0.0, stop_ids=tokenizer.stop_ids)
    key, path = context.key("samples"), context.folder / "samples.jsonl"

    @jax.jit
    def merged(weights: Any) -> Any:
        return merged_base(role.spec, weights)

    def sample(weights: Any, iteration: int) -> None:
        rollout = generate(
            role.spec.config, merged(weights), batch["prompts"], batch["lengths"], key=key, sampling=sampling
        )
        tokens, lengths = fetch((rollout.tokens, rollout.lengths))
        if not is_main_process():
            return
        cut_back(path, iteration - 1)
        with path.open("a") as file:
            for i, prompt in enumerate(ids):
                row = {
                    "step": iteration,
                    "prompt": tokenizer.decode(prompt),
                    "completion": tokenizer.decode(tokens[i, : lengths[i]].tolist()),
                    "reference": references[i],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    return sample


def _last_samples(context: Context) -> list[dict[str, Any]]:
    path = context.folder / "samples.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] == rows[-1]["step"]] if rows else []
