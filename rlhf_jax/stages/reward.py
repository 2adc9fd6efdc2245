"""The reward model: Bradley-Terry on preference pairs, or on each record's own continuation against a policy's sample.

Writes the model with its head calibrated: samples of the reference policy score mean 0, standard deviation 1.
"""

import dataclasses
import math
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.examples import answer_ids, completion_example, prompt_ids, show_example
from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.schemas import Text
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, split, training_passes, weight_axes
from rlhf_jax.objectives import bradley_terry_loss
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, check_lengths
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.train import train
from rlhf_jax.training.artifacts import Role, continue_role, role_memory, save_role
from rlhf_jax.training.gradient import Objective, RecordLosses, mean_metrics, plain_gradient
from rlhf_jax.training.randomness import order_seed, record_ids
from rlhf_jax.training.state import init_state, make_optimizer, make_step, state_shardings

Pairs = dict[str, np.ndarray]


def reward_objective(spec: RoleSpec) -> Objective:
    """Bradley-Terry loss, one a pair: losses and weights (B,). Both answers of a pair run in one pass."""

    def objective(trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> RecordLosses:
        pairs, _, width = batch["tokens"].shape  # (B, 2, T): chosen, rejected
        scores = last_scores(
            spec, {**frozen, **trainable}, batch["tokens"].reshape(2 * pairs, width), batch["lengths"].reshape(-1)
        ).reshape(pairs, 2)
        chosen, rejected = scores[:, 0], scores[:, 1]
        weight = batch["weight"]
        losses = bradley_terry_loss(chosen, rejected) * weight
        count = weight.sum()
        correct = jnp.sum((chosen > rejected) * weight)
        metrics = {
            "loss/train": (losses.sum(), count),
            "accuracy/train": (correct, count),
            "rewards/margin": (jnp.sum((chosen - rejected) * weight), count),
        }
        return RecordLosses(losses, weight, metrics)

    return objective


class Asked:
    """The prompts of some records: as the policy reads them, and as the reward model does (with its answer mark)."""

    def __init__(self, spec: RoleSpec, tokenizer: Tokenizer, records: list[dict[str, Any]]):
        mark = [] if spec.answer_mark is None else [spec.answer_mark]
        self.prompts = [prompt_ids(tokenizer, r["prompt"]) for r in records]
        self.marked = [[*prompt, *mark] for prompt in self.prompts]
        self.ids = record_ids([str(r.get("id", i)) for i, r in enumerate(records)])


def _both_answers(schema: str, record: dict[str, Any]) -> tuple[Text, Text]:
    """The better and the worse answer of a record that holds both."""
    if schema == "safety":
        return record["responses"][record["better"]], record["responses"][1 - record["better"]]
    return record["chosen"], record["rejected"]


def _given_pairs(
    context: Context, spec: RoleSpec, tokenizer: Tokenizer, records: list[dict[str, Any]], data: str
) -> tuple[list[tuple[list[int], list[int], list[int]]], int]:
    """(marked prompt, chosen, rejected) of records that hold both answers, and how many were dropped: answers that are
    the same tokens, or (with on_error "skip") a row that is too long."""
    config = context.config
    longest = min(config.sequence_length, spec.config.context)
    rows, dropped = [], 0
    for number, (record, marked) in enumerate(zip(records, Asked(spec, tokenizer, records).marked, strict=True), 1):
        answers = _both_answers(config.schema, record)
        chosen, rejected = (answer_ids(tokenizer, record["prompt"], answer) for answer in answers)
        length = len(marked) + max(len(chosen), len(rejected))
        if length > longest and config.on_error == "raise":
            raise UserError(
                f"{data}: record {number} has {length} tokens, above {longest}: shorten it, raise sequence_length, "
                'or set on_error="skip"'
            )
        if length > longest or chosen == rejected:
            dropped += 1
        else:
            rows.append((marked, chosen, rejected))
    return rows, dropped


def _sampled_pairs(
    context: Context, spec: RoleSpec, policy: Role, records: list[dict[str, Any]], data: str, part: str, mesh: Mesh
) -> tuple[list[tuple[list[int], list[int], list[int]]], int]:
    """(marked prompt, own continuation, policy's sample) of each record, and how many had the same tokens twice."""
    config, tokenizer = context.config, policy.tokenizer
    asked, count = Asked(spec, tokenizer, records), config.max_new_tokens
    check_lengths(asked.marked, count, policy.spec.config.context, data)
    own = [answer_ids(tokenizer, r["prompt"], r["completion"])[:count] for r in records]
    rows, draws = [], config.samples if part == "train" else 1
    for draw in range(draws):
        sampled, lengths, _ = answer_all(
            policy.spec,
            policy.weights,
            asked.prompts,
            asked.ids,
            key=jax.random.fold_in(context.key(f"pairs/{part}"), draw),
            sampling=Sampling(count, config.temperature, stop_ids=tokenizer.stop_ids),
            batch_size=config.rollout_batch_size,
            mesh=mesh,
            buckets=config.prompt_buckets,
            name=f"{context.name}: {part} samples",
        )
        for prompt, chosen, tokens, length in zip(asked.marked, own, sampled, lengths, strict=True):
            rejected = tokens[:length].tolist()
            if chosen != rejected:
                rows.append((prompt, chosen, rejected))
    return rows, len(records) * draws - len(rows)


def _make_pairs(context: Context, spec: RoleSpec, policy: Role, data: str, part: str, mesh: Mesh) -> Pairs:
    """Rows of (prompt + chosen, prompt + rejected) as the reward model reads them, made once.

    Returns {"tokens": (n, 2, T) int32, "lengths": (n, 2) int32 in all, "answer_lengths": (n, 2), "ended": (n, 2) bool}.
    """
    file = context.folder / "data" / f"pairs_{part}.npz"
    if not file.exists():
        config, stops = context.config, policy.tokenizer.stop_ids
        records, skipped = context.records(data, config.schema, None if part == "train" else config.evaluation.records)
        if config.schema == "completion":
            rows, dropped = _sampled_pairs(context, spec, policy, records, data, part, mesh)
        else:
            rows, dropped = _given_pairs(context, spec, policy.tokenizer, records, data)
        if not rows:
            raise UserError(f"{data}: no pair is left to train on ({dropped} dropped): look at sequence_length")
        width = max(len(p) + max(len(c), len(r)) for p, c, r in rows)
        pairs: Pairs = {
            "tokens": np.zeros((len(rows), 2, width), np.int32),
            "lengths": np.asarray([[len(p) + len(c), len(p) + len(r)] for p, c, r in rows], np.int32),
            "answer_lengths": np.asarray([[len(c), len(r)] for _, c, r in rows], np.int32),
            "ended": np.asarray([[a[-1] in stops for a in (c, r)] for _, c, r in rows]),
            "dropped": np.asarray(dropped),
            "skipped": np.asarray(skipped),
        }
        for i, (prompt, *answers) in enumerate(rows):
            for j, answer in enumerate(answers):
                pairs["tokens"][i, j, : pairs["lengths"][i, j]] = prompt + answer
        if is_main_process():
            file.parent.mkdir(exist_ok=True)
            with open(f"{file}.tmp", "wb") as out:
                np.savez(out, **pairs)  # type: ignore[arg-type]
            os.replace(f"{file}.tmp", file)
        barrier(f"pairs {part}")
    with np.load(file) as saved:
        return dict(saved)


def _place(pairs: Pairs, rows: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of pairs; a row number of -1 is a padding pair of weight 0."""

    def load(mine: np.ndarray) -> dict[str, np.ndarray]:
        wanted = rows[mine]
        batch = {name: pairs[name][np.maximum(wanted, 0)] for name in ("tokens", "lengths")}
        return {**batch, "weight": (wanted >= 0).astype(np.float32)}

    return place_batch(len(rows), load, mesh)


def baseline_accuracy(train: Pairs, held_out: Pairs) -> float:
    """Held-out pair accuracy of a logistic regression that sees only each answer's length and whether it ended.

    Features (differences of chosen and rejected): length, its square, ended. No intercept, ridge 1e-3, 25 Newton steps;
    a tie counts one half.
    """

    def features(pairs: Pairs) -> np.ndarray:
        length = pairs["answer_lengths"] / 32.0
        x = np.stack([length, length**2, pairs["ended"].astype(float)], -1)  # (n, 2, 3)
        return x[:, 0] - x[:, 1]

    x = features(train)
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(w))
        w += np.linalg.solve(hessian, x.T @ (1 - p) - 1e-3 * w)
    margin = features(held_out) @ w
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / accumulation", config.batch_size // config.accumulation)
    context.check_folders()
    context.check_data(config.schema)


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first records' answers as the reward model reads them: it scores the end of what is not masked."""
    config, out = context.config, []
    for record in context.stream(config.data, config.schema, 3):
        if config.schema == "completion":
            answers = {"chosen (the rejected one is sampled)": record["completion"]}
        elif config.schema == "safety":
            answers = {
                "better": record["responses"][record["better"]],
                "worse": record["responses"][1 - record["better"]],
            }
        else:
            answers = {"chosen": record["chosen"], "rejected": record["rejected"]}
        shown = {n: completion_example(tokenizer, record["prompt"], a, "completion") for n, a in answers.items()}
        out.append("\n".join(f"{name}: {show_example(tokenizer, example)}" for name, example in shown.items()))
    return out


def run(context: Context) -> dict[str, Any]:
    """Trains and calibrates the reward model; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- roles and pairs -------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        policy = context.load(config.policy, mesh) if config.policy else start
        role = continue_role(start, context.lora(), config.compute, key=context.key("adapters"))
        if config.answer_mark and role.tokenizer.fim_middle_id is not None:
            role.spec = dataclasses.replace(role.spec, answer_mark=role.tokenizer.fim_middle_id)
        width = role.spec.config.width
        fresh = init_head(width, (width + 1) ** -0.5, key=context.key("head"))
        role.weights["head"] = start.weights.get("head", fresh)  # an imported reward model goes on with its own
        training = _make_pairs(context, role.spec, policy, config.data, "train", mesh)
        held_out = None
        if config.evaluation.data:
            held_out = _make_pairs(context, role.spec, policy, config.evaluation.data, "evaluation", mesh)
        pairs = len(training["lengths"])
        order = DataOrder(pairs, order_seed(context.seed, context.name))
        steps = max(1, math.ceil(config.epochs * pairs / config.batch_size))
        context.progress(
            f"{pairs} pairs ({int(training['dropped'])} dropped: equal answers, or too long), {steps} steps"
        )

        # --- step ------------------------------------------------------------------------------------------------
        trainable, frozen = split(role.spec, role.weights)
        axes = weight_axes(role.spec, trainable)
        optimizer = make_optimizer(config.optimizer, steps, param_dtype=role.spec.config.param_dtype)
        objective = reward_objective(role.spec)
        gradient = plain_gradient(objective, config.accumulation)
        step = make_step(gradient, optimizer, state_shardings(trainable, axes, optimizer, mesh))
        state = init_state(trainable, axes, optimizer, mesh)
        tokens = 2 * config.batch_size * training["tokens"].shape[-1]

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, _place(training, order.batch(iteration, config.batch_size), mesh))

        evaluate = _evaluation(objective, frozen, held_out, config.batch_size, mesh) if held_out else None

        # --- loop ------------------------------------------------------------------------------------------------
        params, summary = train(
            context,
            state,
            advance,
            evaluate,
            iterations=steps,
            shown=("loss/train", "accuracy/train", "loss/eval", "accuracy/eval"),
            tokens_each=tokens,
            flops_each=training_passes(role.spec)
            * tokens
            * role.spec.config.forward_flops(training["tokens"].shape[-1], logits=False),
        )
        role.weights = {**frozen, **params}

        # --- calibration -----------------------------------------------------------------------------------------
        calibration = _calibrate(context, role, policy, mesh)
        prints = save_role(context.workdir, context.name, role)
    figures: dict[str, Any] = {
        "pairs": pairs,
        "dropped": int(training["dropped"]),
        "skipped": int(training["skipped"]),
        "steps": steps,
        "calibration": calibration,
    }
    if held_out is not None:
        count = len(held_out["lengths"])
        low, high = wilson(round(summary["result"]["accuracy/eval"] * count), count)
        figures |= {
            "pairs_eval": count,
            "loss/eval": summary["result"]["loss/eval"],
            "loss/eval_start": summary["first"]["loss/eval"],
            "accuracy": summary["result"]["accuracy/eval"],
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_start": summary["first"]["accuracy/eval"],
            "accuracy_length_and_end_baseline": baseline_accuracy(training, held_out),
            "result_step": summary["result_step"],
        }
    figures |= {"fingerprints": prints, "memory": role_memory({context.name: role.weights})}
    return {"figures": figures, "samples": []}


def _evaluation(objective: Objective, frozen: Any, pairs: Pairs, size: int, mesh: Mesh):
    """The function (params, iteration) -> {"loss/eval", "accuracy/eval"} over the held-out pairs."""
    count = len(pairs["lengths"])
    rows = np.concatenate([np.arange(count), np.full(-count % size, -1)]).reshape(-1, size)
    batches = [_place(pairs, part, mesh) for part in rows]

    @jax.jit
    def totals(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
        return objective(params, frozen, batch).metrics

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        parts = [totals(params, frozen, batch) for batch in batches]
        means = mean_metrics(jax.tree.map(lambda *x: sum(x), *parts))
        return {f"{name}/eval": float(means[f"{name}/train"]) for name in ("loss", "accuracy")}

    return evaluate


def _calibrate(context: Context, role: Role, policy: Role, mesh: Mesh) -> dict[str, float]:
    """Folds gain and bias into the head so that the policy's samples score mean 0, standard deviation 1.

    The samples answer prompts of the evaluation set where there is one: on training prompts the model has learned to
    score the policy's answers low.
    """
    config, tokenizer = context.config, role.tokenizer
    data = config.evaluation.data or config.data
    records, _ = context.records(data, config.schema, config.calibration_prompts)
    asked = Asked(role.spec, tokenizer, records)
    room = role.spec.config.context - config.max_new_tokens
    fits = [i for i, marked in enumerate(asked.marked) if len(marked) <= room]
    if not fits:
        raise UserError(f"{data}: no prompt leaves room for {config.max_new_tokens} new tokens: lower max_new_tokens")
    tokens, lengths, _ = answer_all(
        policy.spec,
        policy.weights,
        [asked.prompts[i] for i in fits],
        asked.ids[fits],
        key=context.key("calibration"),
        sampling=Sampling(config.max_new_tokens, config.temperature, stop_ids=tokenizer.stop_ids),
        batch_size=config.rollout_batch_size,
        mesh=mesh,
        buckets=config.prompt_buckets,
        name=f"{context.name}: calibration samples",
    )
    marked = [asked.marked[i] for i in fits]
    count, size = len(marked), config.batch_size
    joined = np.zeros((count, max(len(p) for p in marked) + tokens.shape[1]), np.int32)
    totals = np.asarray([len(p) for p in marked], np.int32) + lengths
    for i, prompt in enumerate(marked):
        joined[i, : totals[i]] = prompt + tokens[i, : lengths[i]].tolist()
    rows = np.concatenate([np.arange(count), np.zeros(-count % size, int)]).reshape(-1, size)
    score = jax.jit(lambda weights, batch: last_scores(role.spec, weights, batch["tokens"], batch["lengths"]))

    def load(part: np.ndarray, mine: np.ndarray) -> Pairs:
        return {"tokens": joined[part[mine]], "lengths": totals[part[mine]]}

    def all_scores() -> np.ndarray:
        out = []
        for part in rows:
            out.append(fetch(score(role.weights, place_batch(size, partial(load, part), mesh))))
        return np.concatenate(out)[:count]

    before = all_scores()
    mean, deviation = float(before.mean()), float(before.std())
    head = role.weights["head"]
    role.weights = {
        **role.weights,
        "head": {"kernel": head["kernel"] / deviation, "bias": (head["bias"] - mean) / deviation},
    }
    after = all_scores()
    return {
        "samples": count,
        "mean_before": mean,
        "std_before": deviation,
        "mean": float(after.mean()),
        "std": float(after.std()),
    }
