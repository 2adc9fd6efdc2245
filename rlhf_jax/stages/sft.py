"""Supervised fine-tuning, and pretraining: next-token loss on documents or completions.

Loads records, tokenizes and packs them; one jitted step; writes the best model by `evaluation.metric`.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.records import read_records
from rlhf_jax.data.table import (
    Example,
    completion_example,
    fim_example,
    load_table,
    make_rows,
    pack,
    pad_prompts,
    save_table,
    text_examples,
)
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, base_axes, hidden_states, init_base, merged_base, split, weight_axes
from rlhf_jax.models.transformer import output_kernel
from rlhf_jax.objectives.language_model import segment_totals, token_logprobs
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role, continue_role, save_role
from rlhf_jax.training.gradient import Objective, RecordLosses, plain_gradient
from rlhf_jax.training.loop import Schedule, run_loop
from rlhf_jax.training.metrics import cut_back
from rlhf_jax.training.randomness import order_seed
from rlhf_jax.training.state import init_state, make_optimizer, make_schedule, make_step, state_shardings
from rlhf_jax.training.throughput import peak_flops

SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 48, 48


def sft_objective(spec: RoleSpec, segments: int) -> Objective:
    """Negative log-likelihood of the counted targets, one loss a packed record: losses and weights (B, segments)."""

    def objective(trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> RecordLosses:
        weights = {**frozen, **trainable}
        where = {"positions": batch["positions"], "segment_ids": batch["segment_ids"]}
        hidden = hidden_states(spec, weights, batch["tokens"], **where)
        kernel = output_kernel(spec.config, weights["base"])
        logprobs, _ = token_logprobs(hidden, kernel, batch["targets"], softcap=spec.config.logit_softcap)
        losses = segment_totals(-logprobs * batch["loss_mask"], batch["segment_ids"], segments)
        counts = segment_totals(batch["loss_mask"], batch["segment_ids"], segments)
        return RecordLosses(losses, counts, {"loss/train": (losses.sum(), counts.sum())})

    return objective


def _examples(
    config: ConfigDict, tokenizer: Tokenizer, path: Path, seed: int, train: bool
) -> tuple[list[Example], int]:
    """Tokenized records of a file, and how many were skipped."""
    records, skipped = read_records(path, config.schema, config.on_error)
    if not train:
        records = records[: config.evaluation.records]
    length, out = config.sequence_length, []
    for number, record in enumerate(records, 1):
        if config.schema == "text":
            out.extend(text_examples(tokenizer, record["text"], length))
            continue
        keyed = np.random.Generator(np.random.Philox(key=[seed, number]))
        fields = (tokenizer, record["prompt"], record["completion"])
        if train and keyed.random() < config.fim_rate:
            example = fim_example(*fields, keyed.random(), config.loss_on)
        else:
            example = completion_example(*fields, config.loss_on)
        if len(example.tokens) - 1 <= length:
            out.append(example)
        elif config.on_error == "skip":
            skipped += 1
        else:
            raise UserError(
                f"{path}: record {number} has {len(example.tokens)} tokens, above sequence_length {length} + 1: "
                'shorten it, raise sequence_length, or set on_error="skip"'
            )
    if not out:
        raise UserError(f"{path}: no record is left to train on: look at on_error and sequence_length")
    return out, skipped


class PackedData:
    """A tokenized file as rows of fixed width."""

    def __init__(self, context: Context, tokenizer: Tokenizer, path: Path, part: str):
        config = context.config
        folder = context.folder / "data" / part
        train = part == "train"

        def build() -> None:
            examples, skipped = _examples(config, tokenizer, path, context.seed, train)
            folder.parent.mkdir(exist_ok=True)
            (context.folder / "data" / f"{part}_skipped.json").write_text(json.dumps(skipped))
            save_table(folder, examples)  # last: its presence says that both are there

        context.once(folder, build)
        self.skipped = json.loads((context.folder / "data" / f"{part}_skipped.json").read_text())
        self.table = load_table(folder)
        self.width = config.sequence_length
        lengths = self.table.lengths
        self.plan = pack(lengths, self.width) if config.packing else [[i] for i in range(len(lengths))]
        self.segments = max(len(row) for row in self.plan)
        self.filled = float(lengths.sum() / (len(self.plan) * self.width))

    def place(self, rows: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
        """The batch of the given rows on the mesh; a row number of -1 is an all-padding row."""

        def load(mine: np.ndarray) -> dict[str, np.ndarray]:
            wanted = [self.plan[row] if row >= 0 else [] for row in rows[mine]]
            return make_rows(self.table, wanted, self.width)

        return place_batch(len(rows), load, mesh)


def _start(context: Context, mesh: Mesh) -> Role:
    """The role to train: a random decoder, or the continuation of another stage's."""
    config = context.config
    if config.init != "scratch":
        return continue_role(context.load(config.init, mesh), context.lora(), key=context.key("adapters"))
    tokenizer = Tokenizer(context.path(config.tokenizer))
    shape = TransformerConfig(vocab_size=tokenizer.vocab_size, **config.model)
    make = jax.jit(
        lambda key: init_base(shape, key=key),
        out_shardings=tree_shardings(
            jax.eval_shape(lambda: init_base(shape, key=jax.random.key(0))), base_axes(shape), mesh
        ),
    )
    return Role(RoleSpec(shape), {"base": make(context.key("parameters"))}, "", tokenizer)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / accumulation", config.batch_size // config.accumulation)
    if config.init == "scratch" and config.sequence_length > config.model.context:
        raise UserError(
            f"stages.{context.name}.sequence_length {config.sequence_length} is above model.context "
            f"{config.model.context}: lower one or raise the other"
        )
    for _, path in context.own_files():
        read_records(path, config.schema, config.on_error)


def run(context: Context) -> dict[str, Any]:
    """Trains, and returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- role and data ---------------------------------------------------------------------------------------
        role = _start(context, mesh)
        if config.sequence_length > role.spec.config.context:
            raise UserError(
                f"stages.{context.name}.sequence_length {config.sequence_length} is above the context "
                f"{role.spec.config.context} of {config.init}: lower it"
            )
        data = PackedData(context, role.tokenizer, context.path(config.data), "train")
        order = DataOrder(len(data.plan), order_seed(context.seed, context.name))
        steps = max(1, math.ceil(config.epochs * len(data.plan) / config.batch_size))
        tokens = config.batch_size * config.sequence_length
        context.progress(
            f"{len(data.table)} records in {len(data.plan)} rows of {data.width} tokens ({data.filled:.0%} filled), "
            f"{role.spec.config.parameters / 1e6:.2f}M parameters, {steps} steps of {tokens} tokens"
        )

        # --- step ------------------------------------------------------------------------------------------------
        trainable, frozen = split(role.spec, role.weights)
        axes = weight_axes(role.spec, trainable)
        optimizer = make_optimizer(config.optimizer, steps)
        gradient = plain_gradient(sft_objective(role.spec, data.segments), config.accumulation)
        step = make_step(gradient, optimizer, state_shardings(trainable, axes, optimizer, mesh))
        state = init_state(trainable, axes, optimizer, mesh)
        flops = 3 * tokens * role.spec.config.forward_flops(data.width)

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, data.place(order.batch(iteration, config.batch_size), mesh))

        evaluate = _evaluation(context, role, frozen, mesh) if config.evaluation.data else None

        # --- loop ------------------------------------------------------------------------------------------------
        params, summary = run_loop(
            name=context.name,
            folder=context.folder,
            identity=context.identity,
            schedule=Schedule(
                steps, context.experiment.logging.every, config.evaluation.every, config.checkpoint.every
            ),
            state=state,
            advance=advance,
            evaluate=evaluate,
            metric=config.evaluation.metric,
            higher_is_better=config.evaluation.higher_is_better,
            shown=("loss/train", "loss/eval", "perf/tokens_per_second"),
            learning_rate=make_schedule(config.optimizer, steps),
            tokens_each=tokens,
            flops_each=flops,
            peak_flops=peak_flops(),
            keep=config.checkpoint.keep,
            tensorboard=context.experiment.logging.tensorboard,
        )
        role.weights = {**frozen, **params}
        prints = save_role(context.workdir, context.name, role)
    figures = {
        "parameters": role.spec.config.parameters,
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(trainable)),
        "records": len(data.table),
        "skipped": data.skipped,
        "rows": len(data.plan),
        "filled": data.filled,
        "steps": steps,
        "fingerprints": prints,
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
    data = PackedData(context, role.tokenizer, context.path(config.evaluation.data), "evaluation")
    size = config.batch_size
    padded = np.concatenate([np.arange(len(data.plan)), np.full(-len(data.plan) % size, -1)])
    batches = [data.place(rows, mesh) for rows in padded.reshape(-1, size)]
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
    records, _ = read_records(context.path(config.evaluation.data), config.schema, config.on_error)
    records = records[: config.evaluation.samples]
    if config.schema == "text":
        ids = [[tokenizer.bos_id, *tokenizer.encode(r["text"])][:SAMPLE_PROMPT_TOKENS] for r in records]
        references = [""] * len(ids)
    else:
        ids = [[tokenizer.bos_id, *tokenizer.encode(r["prompt"])] for r in records]
        references = [r["completion"] for r in records]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    prompts = pad_prompts(ids, max(len(x) for x in ids), len(ids) + -len(ids) % shards)
    batch = place_batch(len(prompts["lengths"]), lambda rows: {k: v[rows] for k, v in prompts.items()}, mesh)
    sampling = Sampling(SAMPLE_TOKENS, temperature=0.0, stop_ids=(tokenizer.eos_id,))
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
