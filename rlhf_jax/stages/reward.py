"""The reward model: Bradley-Terry on preference pairs, or on each record's own continuation against a policy's sample.

Writes the model with its head calibrated: samples of the reference policy score mean 0, standard deviation 1. Pairs
with samples are left as `pairs.jsonl` {id, prompt, chosen, rejected}, for other stages to train on the same. With the
schema "label" it is a classifier of texts instead (`stages.reward_labels`); its score stays the log-odds of the label.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_private
from rlhf_jax.data.examples import answer_ids, completion_example, show_example
from rlhf_jax.data.order import in_batches, without_padding
from rlhf_jax.data.pairs import answers_of, pad_answers, save_arrays, tokenize_answers
from rlhf_jax.data.records import write_records
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, training_passes
from rlhf_jax.objectives import bradley_terry_loss
from rlhf_jax.objectives.records import Objective, RecordLosses
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, check_lengths
from rlhf_jax.rollout.reencode import answer_text
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import Private, owners_of, units_of
from rlhf_jax.stages.reward_calibration import Asked, calibrate
from rlhf_jax.stages.reward_labels import label_objective, labelled_texts, place_windows, show_window
from rlhf_jax.stages.train import accuracy_figures, ordered, prepare, steps_of, train
from rlhf_jax.training.artifacts import Role, continue_role, role_memory, save_role
from rlhf_jax.training.gradient import mean_metrics, plain_gradient

Pairs = dict[str, np.ndarray]
Rows = dict[str, np.ndarray]  # pairs, or labelled texts
Pair = tuple[int, list[int], list[int], list[int]]  # record number, marked prompt, chosen, rejected


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


def _given_pairs(
    context: Context, spec: RoleSpec, tokenizer: Tokenizer, records: list[dict[str, Any]], data: str
) -> tuple[list[Pair], int]:
    """The pairs of records that hold both answers, and how many were dropped: answers that are the same tokens, or
    (with on_error "skip") a row that is too long."""
    config, marked = context.config, Asked(spec, tokenizer, records).marked
    longest = min(config.sequence_length, spec.config.context)
    kept, answers = tokenize_answers(tokenizer, records, marked, config.schema, longest, config.on_error, data)
    rows = [(i, marked[i], chosen, rejected) for i, (chosen, rejected) in zip(kept, answers, strict=True)]
    return rows, len(records) - len(rows)


def _sampled_pairs(
    context: Context, spec: RoleSpec, policy: Role, records: list[dict[str, Any]], data: str, part: str, mesh: Mesh
) -> tuple[list[Pair], int]:
    """Each record's own continuation against the policy's sample, and how many had the same tokens twice."""
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
        for i, (prompt, chosen, tokens, length) in enumerate(zip(asked.marked, own, sampled, lengths, strict=True)):
            rejected = tokens[:length].tolist()
            if chosen != rejected:
                rows.append((i, prompt, chosen, rejected))
    return rows, len(records) * draws - len(rows)


def _make_pairs(context: Context, spec: RoleSpec, policy: Role, data: str, part: str, mesh: Mesh) -> Pairs:
    """Rows of (prompt + chosen, prompt + rejected) as the reward model reads them, made once.

    Returns {"tokens": (n, 2, T) int32, "lengths": (n, 2) int32 in all, "answer_lengths": (n, 2), "ended": (n, 2) bool},
    of a private stage's training data also "owners".
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
        pairs = pad_answers([p for _, p, _, _ in rows], [[c, r] for _, _, c, r in rows])
        pairs["ended"] = np.asarray([[a[-1] in stops for a in (c, r)] for _, _, c, r in rows])
        if part == "train":
            numbers = [i for i, _, _, _ in rows]
            pairs |= {name: column[numbers] for name, column in owners_of(context, records, data).items()}
        if is_main_process():
            if config.schema == "completion" and part == "train":
                write_records(context.folder / "pairs.jsonl", _as_records(policy.tokenizer, records, rows))
            save_arrays(file, {**pairs, "dropped": np.asarray(dropped), "skipped": np.asarray(skipped)})
        barrier(f"pairs {part}")
    with np.load(file) as saved:
        return dict(saved)


def _as_records(tokenizer: Tokenizer, records: list[dict[str, Any]], rows: list[Pair]) -> Iterator[dict[str, Any]]:
    """The pairs as texts, answers without the tokens that end them; left out where a text is empty or both are one."""
    for number, (i, _, *answers) in enumerate(rows):
        chosen, rejected = (answer_text(tokenizer, ids, ended=True) for ids in answers)
        if chosen and rejected and chosen != rejected:
            name = f"{records[i].get('id', i)}/{number}"
            yield {"id": name, "prompt": records[i]["prompt"], "chosen": chosen, "rejected": rejected}


def _place(pairs: Pairs, rows: np.ndarray, epochs: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of pairs, the same in every epoch; a row number of -1 is a padding pair of weight 0."""

    def load(mine: np.ndarray) -> dict[str, np.ndarray]:
        wanted = rows[mine]
        batch = {name: pairs[name][wanted] for name in ("tokens", "lengths")}
        return without_padding({**batch, "weight": np.ones(len(wanted), np.float32)}, wanted, lengths=1)

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
    for number, record in enumerate(context.stream(config.data, config.schema, 3)):
        if config.schema == "label":
            label = "positive" if record["label"] else "negative"
            out.append(f"{label}: {show_window(context, tokenizer, record, number)}")
            continue
        if config.schema == "completion":
            answers = {"chosen (the rejected one is sampled)": record["completion"]}
        else:
            names = ("better", "worse") if config.schema == "safety" else ("chosen", "rejected")
            answers = dict(zip(names, answers_of(config.schema, record), strict=True))
        shown = {n: completion_example(tokenizer, record["prompt"], a, "completion") for n, a in answers.items()}
        out.append("\n".join(f"{name}: {show_example(tokenizer, example)}" for name, example in shown.items()))
    return out


def run(context: Context) -> dict[str, Any]:
    """Trains and calibrates the reward model; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- roles and rows --------------------------------------------------------------------------------------
        labelled = config.schema == "label"
        start = context.load(config.init, mesh)
        policy = context.load(config.policy, mesh) if config.policy and not labelled else start
        role = continue_role(start, context.lora(), config.compute, key=context.key("adapters"))
        if labelled:  # a text has no answer in it
            role.spec = dataclasses.replace(role.spec, answer_mark=None)
        elif config.answer_mark and role.tokenizer.fim_middle_id is not None:
            role.spec = dataclasses.replace(role.spec, answer_mark=role.tokenizer.fim_middle_id)
        width = role.spec.config.width
        fresh = init_head(width, (width + 1) ** -0.5, key=context.key("head"))
        role.weights["head"] = start.weights.get("head", fresh)  # an imported reward model goes on with its own

        def make(data: str, part: str) -> Rows:
            if labelled:
                limit = None if part == "train" else config.evaluation.records
                return labelled_texts(context, role.spec, role.tokenizer, data, limit)
            return _make_pairs(context, role.spec, policy, data, part, mesh)

        training = make(config.data, "train")
        held_out = make(config.evaluation.data, "evaluation") if config.evaluation.data else None
        place = partial(place_windows, context) if labelled else _place
        count, noun = len(training["lengths"]), "texts" if labelled else "pairs"
        private = Private.of_records(context, *units_of(context, training)) if is_private(config) else None
        steps = private.iterations if private else steps_of(config, count)
        why = "" if labelled else f" ({int(training['dropped'])} dropped: equal answers, or too long)"
        context.progress(f"{count} {noun}{why}, {steps} steps")

        # --- step ------------------------------------------------------------------------------------------------
        objective = label_objective(role.spec) if labelled else reward_objective(role.spec)
        plain = plain_gradient(objective, config.accumulation)
        positions = math.prod(training["tokens"].shape[1:])
        gradient = private.gradient(objective, role, positions) if private else plain
        state, frozen, step = prepare(context, role, gradient, steps, mesh)
        tokens = config.batch_size * positions

        def placed(rows: np.ndarray, epochs: np.ndarray) -> dict[str, jax.Array]:
            return place(training, rows, epochs, mesh)

        batch = private.batches(placed, mesh) if private else ordered(context, count, placed)

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, batch(iteration))

        evaluate = _evaluation(objective, frozen, held_out, place, config.batch_size, mesh) if held_out else None

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
            account=private.account if private else None,
        )
        role.weights = {**frozen, **params}

        # --- calibration -----------------------------------------------------------------------------------------
        figures: dict[str, Any] = {noun: count, "skipped": int(training["skipped"]), "steps": steps}
        if labelled:
            figures["score"] = "log-odds of the label, not calibrated"
        else:
            figures["dropped"] = int(training["dropped"])
            figures["calibration"] = calibrate(context, role, policy, mesh)
        prints = save_role(context.workdir, context.name, role)
    if held_out is not None:
        figures |= accuracy_figures(noun, len(held_out["lengths"]), summary)
        figures |= {"accuracy_start": summary["first"]["accuracy/eval"], "result_step": summary["result_step"]}
    if held_out is not None and not labelled and private is None:  # it is fitted to the training pairs
        figures["accuracy_length_and_end_baseline"] = baseline_accuracy(training, held_out)
    figures |= private.figures() if private else {}
    figures |= {"fingerprints": prints, "memory": role_memory({context.name: role.weights})}
    return {"figures": figures, "samples": []}


def _evaluation(objective: Objective, frozen: Any, held_out: Rows, place: Any, size: int, mesh: Mesh):
    """The function (params, iteration) -> {"loss/eval", "accuracy/eval"} over the held-out rows."""
    first = np.zeros(size, int)  # epoch
    batches = [place(held_out, rows, first, mesh) for rows in in_batches(len(held_out["lengths"]), size)]

    @jax.jit
    def totals(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
        return objective(params, frozen, batch).metrics

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        parts = [totals(params, frozen, batch) for batch in batches]
        means = mean_metrics(jax.tree.map(lambda *x: sum(x), *parts))
        return {f"{name}/eval": float(means[f"{name}/train"]) for name in ("loss", "accuracy")}

    return evaluate
