"""The reward model: Bradley-Terry on each record's own continuation against a sample of the policy.

Writes the model with its head calibrated: samples of the reference policy score mean 0, standard deviation 1.
"""

import dataclasses
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.records import read_records
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.evaluation.intervals import wilson
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, split, weight_axes
from rlhf_jax.objectives import bradley_terry_loss
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, check_lengths
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role, continue_role, save_role
from rlhf_jax.training.gradient import Objective, RecordLosses, mean_metrics, plain_gradient
from rlhf_jax.training.loop import Schedule, run_loop
from rlhf_jax.training.randomness import order_seed, record_ids
from rlhf_jax.training.state import init_state, make_optimizer, make_schedule, make_step, state_shardings
from rlhf_jax.training.throughput import peak_flops

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


def _marked_prompts(spec: RoleSpec, tokenizer: Tokenizer, records: list[dict[str, Any]]) -> list[list[int]]:
    """Prompts as the reward model reads them: [bos] prompt, and its answer mark."""
    mark = [] if spec.answer_mark is None else [spec.answer_mark]
    return [[tokenizer.bos_id, *tokenizer.encode(r["prompt"]), *mark] for r in records]


def _make_pairs(context: Context, spec: RoleSpec, policy: Role, path: Path, part: str, mesh: Mesh) -> Pairs:
    """Rows of (prompt + own continuation, prompt + policy's sample) as the reward model reads them, made once.

    Returns {"tokens": (n, 2, T) int32, "lengths": (n, 2) int32 in all, "answer_lengths": (n, 2), "ended": (n, 2) bool}.
    A pair whose two answers are the same tokens is left out.
    """
    folder = context.folder / "data"
    file = folder / f"pairs_{part}.npz"
    if not file.exists():
        config, tokenizer = context.config, policy.tokenizer
        records, _ = read_records(path, "completion", config.on_error)
        if part == "evaluation":
            records = records[: config.evaluation.records]
        prompts = [[tokenizer.bos_id, *tokenizer.encode(r["prompt"])] for r in records]
        count = config.max_new_tokens
        marked = _marked_prompts(spec, tokenizer, records)
        check_lengths(marked, count, policy.spec.config.context, str(path))
        own = [([*tokenizer.encode(r["completion"]), tokenizer.eos_id])[:count] for r in records]
        ids = record_ids([str(r.get("id", i)) for i, r in enumerate(records)])
        rows = []
        for draw in range(config.samples if part == "train" else 1):
            sampled, lengths, _ = answer_all(
                policy.spec,
                policy.weights,
                prompts,
                ids,
                key=jax.random.fold_in(context.key(f"pairs/{part}"), draw),
                sampling=Sampling(count, config.temperature, stop_ids=(tokenizer.eos_id,)),
                batch_size=config.rollout_batch_size,
                mesh=mesh,
                name=f"{context.name}: {part} samples",
            )
            for prompt, chosen, tokens, length in zip(marked, own, sampled, lengths, strict=True):
                rejected = tokens[:length].tolist()
                if chosen != rejected:
                    rows.append((prompt, chosen, rejected))
            dropped = len(prompts) * (draw + 1) - len(rows)
        width = max(len(p) for p in marked) + count
        pairs: Pairs = {
            "tokens": np.zeros((len(rows), 2, width), np.int32),
            "lengths": np.asarray([[len(p) + len(c), len(p) + len(r)] for p, c, r in rows], np.int32),
            "answer_lengths": np.asarray([[len(c), len(r)] for _, c, r in rows], np.int32),
            "ended": np.asarray([[a[-1] == tokenizer.eos_id for a in (c, r)] for _, c, r in rows]),
            "dropped": np.asarray(dropped),
        }
        for i, (prompt, *answers) in enumerate(rows):
            for j, answer in enumerate(answers):
                pairs["tokens"][i, j, : pairs["lengths"][i, j]] = prompt + answer
        if is_main_process():
            folder.mkdir(exist_ok=True)
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
    for _, path in context.own_files():
        read_records(path, "completion", config.on_error)


def run(context: Context) -> dict[str, Any]:
    """Trains and calibrates the reward model; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- roles and pairs -------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        policy = context.load(config.policy, mesh) if config.policy else start
        role = continue_role(start, context.lora(), key=context.key("adapters"))
        if config.answer_mark and role.tokenizer.fim_middle_id is not None:
            role.spec = dataclasses.replace(role.spec, answer_mark=role.tokenizer.fim_middle_id)
        width = role.spec.config.width
        role.weights["head"] = init_head(width, (width + 1) ** -0.5, key=context.key("head"))
        train = _make_pairs(context, role.spec, policy, context.path(config.data), "train", mesh)
        held_out = None
        if config.evaluation.data:
            held_out = _make_pairs(context, role.spec, policy, context.path(config.evaluation.data), "evaluation", mesh)
        pairs = len(train["lengths"])
        order = DataOrder(pairs, order_seed(context.seed, context.name))
        steps = max(1, math.ceil(config.epochs * pairs / config.batch_size))
        context.progress(f"{pairs} pairs ({int(train['dropped'])} with equal answers dropped), {steps} steps")

        # --- step ------------------------------------------------------------------------------------------------
        trainable, frozen = split(role.spec, role.weights)
        axes = weight_axes(role.spec, trainable)
        optimizer = make_optimizer(config.optimizer, steps)
        objective = reward_objective(role.spec)
        gradient = plain_gradient(objective, config.accumulation)
        step = make_step(gradient, optimizer, state_shardings(trainable, axes, optimizer, mesh))
        state = init_state(trainable, axes, optimizer, mesh)
        tokens = 2 * config.batch_size * train["tokens"].shape[-1]

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, _place(train, order.batch(iteration, config.batch_size), mesh))

        evaluate = _evaluation(objective, frozen, held_out, config.batch_size, mesh) if held_out else None

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
            shown=("loss/train", "accuracy/train", "loss/eval", "accuracy/eval"),
            learning_rate=make_schedule(config.optimizer, steps),
            tokens_each=tokens,
            flops_each=3 * tokens * role.spec.config.forward_flops(train["tokens"].shape[-1], logits=False),
            peak_flops=peak_flops(),
            keep=config.checkpoint.keep,
            tensorboard=context.experiment.logging.tensorboard,
        )
        role.weights = {**frozen, **params}

        # --- calibration -----------------------------------------------------------------------------------------
        calibration = _calibrate(context, role, policy, mesh)
        prints = save_role(context.workdir, context.name, role)
    figures = {"pairs": pairs, "dropped_equal": int(train["dropped"]), "steps": steps, "calibration": calibration}
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
            "accuracy_length_and_end_baseline": baseline_accuracy(train, held_out),
            "result_step": summary["result_step"],
        }
    return {"figures": figures | {"fingerprints": prints}, "samples": []}


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
    path = context.path(config.evaluation.data or config.data)
    records, _ = read_records(path, "completion", config.on_error)
    records = records[: config.calibration_prompts]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(r["prompt"])] for r in records]
    tokens, lengths, _ = answer_all(
        policy.spec,
        policy.weights,
        prompts,
        record_ids([str(r.get("id", i)) for i, r in enumerate(records)]),
        key=context.key("calibration"),
        sampling=Sampling(config.max_new_tokens, config.temperature, stop_ids=(tokenizer.eos_id,)),
        batch_size=config.rollout_batch_size,
        mesh=mesh,
        name=f"{context.name}: calibration samples",
    )
    marked = _marked_prompts(role.spec, tokenizer, records)
    count, size = len(prompts), config.batch_size
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
