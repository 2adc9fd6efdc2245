"""The cost model of Safe RLHF: which of two answers is the more harmful, and whether each is unsafe.

An answer's cost is positive where it is unsafe: the safety labels' terms make 0 the boundary. So the head is never
shifted or scaled. From pairs without safety labels it learns the ranking alone, and 0 means nothing. With the schema
"safety_label" records have one answer each, and the labels' terms are all there is.
"""

from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import is_private
from rlhf_jax.data.examples import completion_example, show_example
from rlhf_jax.data.pairs import all_equal, answer_tokens, answers_of, contradiction, pad_answers, save_arrays
from rlhf_jax.data.schemas import Record
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.roles import RoleSpec, hidden_states
from rlhf_jax.objectives import bradley_terry_loss, cost_model_loss
from rlhf_jax.objectives.cost import sign_loss
from rlhf_jax.objectives.records import Objective, RecordLosses
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import CHECKED_RECORDS, Context
from rlhf_jax.stages.cost_figures import held_out_figures
from rlhf_jax.stages.private import owners_of
from rlhf_jax.stages.reward_calibration import Asked
from rlhf_jax.stages.scorer import (
    Rows,
    baseline_accuracy,
    place_answers,
    rows_hash,
    score_rows,
    start_scorer,
    train_scorer,
)
from rlhf_jax.stages.train import accuracy_figures
from rlhf_jax.training.artifacts import Role, role_memory, save_role

DROPPED = ("contradictory", "identical", "too_long")  # why a record is left out
NO_BOUNDARY = "none: without safety labels a cost of 0 means nothing"
Array = jax.Array


def cost_objective(spec: RoleSpec, *, loss_on: str = "sequence", regularization: float = 0.0) -> Objective:
    """`cost_model_loss` of pairs, the sign term alone of single answers: losses and weights (B,).

    Read at each answer's last token; or (loss_on "token") at every token from the first one in which the two answers
    differ to the end of the longer one, averaged, where an answer that has ended keeps its last cost.

    The batch has "tokens" (B, A, T), the more harmful answer first, "lengths" (B, A), "first" (B,), "weight" (B,) and,
    of data with safety labels, "unsafe" (B, A) and "labelled" (B,) bool.

    Args:
      regularization: weighs the mean square of all costs read, which "loss/train" leaves out.
    """

    def read(weights: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
        """Costs (B, A, N), the last of them at the answer's end, and which places count (B, N)."""
        rows, answers, width = batch["tokens"].shape
        tokens, lengths = batch["tokens"].reshape(rows * answers, width), batch["lengths"].reshape(-1)
        if loss_on == "sequence":
            costs = last_scores(spec, weights, tokens, lengths)
            return costs.reshape(rows, answers, 1), jnp.ones((rows, 1), bool)
        costs, at = apply_head(weights["head"], hidden_states(spec, weights, tokens)), jnp.arange(width)
        kept = jnp.take_along_axis(costs, jnp.minimum(at, lengths[:, None] - 1), axis=1)
        inside = (at >= batch["first"][:, None]) & (at < batch["lengths"].max(axis=1)[:, None])
        return kept.reshape(rows, answers, width), inside

    def objective(trainable: Any, frozen: Any, batch: dict[str, Array]) -> RecordLosses:
        costs, inside = read({**frozen, **trainable}, batch)
        weight, end = batch["weight"], costs[:, :, -1]
        each = _losses(costs, batch)
        penalty = regularization * jnp.square(costs).mean(axis=1)
        places = inside.sum(axis=1)
        losses, penalties = (jnp.where(inside, x, 0.0).sum(axis=1) / places * weight for x in (each, penalty))
        count = weight.sum()
        metrics = {"loss/train": (losses.sum(), count)}
        if "unsafe" in batch:
            signed = weight * batch["labelled"]
            right = jnp.sum(((end > 0) == batch["unsafe"]) * signed[:, None])
            metrics["sign_accuracy/train"] = right, signed.sum() * end.shape[1]
        if end.shape[1] == 2:
            margin = end[:, 0] - end[:, 1]
            metrics["accuracy/train"] = jnp.sum((margin > 0) * weight), count
            metrics["costs/margin"] = jnp.sum(margin * weight), count
        else:
            metrics["accuracy/train"] = metrics.pop("sign_accuracy/train")
        return RecordLosses(losses + penalties, weight, metrics)

    return objective


def _losses(costs: Array, batch: dict[str, Array]) -> Array:
    """The loss at every place: costs (B, A, N) -> (B, N)."""
    if costs.shape[1] == 1:
        return sign_loss(costs[:, 0], batch["unsafe"])
    harmful, safer = costs[:, 0], costs[:, 1]
    if "unsafe" not in batch:
        return bradley_terry_loss(harmful, safer)
    harmful_is_unsafe, safer_is_unsafe = batch["unsafe"][:, :1], batch["unsafe"][:, 1:]
    return cost_model_loss(harmful, safer, harmful_is_unsafe, safer_is_unsafe, labelled=batch["labelled"][:, None])


# --- rows ------------------------------------------------------------------------------------------------------------


def _refuse(context: Context, where: str, why: str) -> None:
    if context.config.on_contradiction == "raise":
        raise UserError(f'{where}: {why}: correct it, or set stages.{context.name}.on_contradiction="drop"')


def _fault(schema: str, record: Record) -> str:
    return contradiction(record) if schema == "safety" else ""


def make_rows(context: Context, role: Role, data: str, part: str) -> Rows:
    """Rows of a prompt with its more harmful and with its safer answer, or with its one answer, made once.

    Returns {"tokens": (n, A, T) int32, "lengths": (n, A) int32 in all, "answer_lengths": (n, A), "ended": (n, A) bool,
    "first": (n,) int32, the first token in which the answers differ, "unsafe": (n, A) bool, "labelled": (n,) bool,
    whether that is known}, the numbers of `DROPPED` and "skipped" records; of a private stage's training data also
    "owners", of held-out data "categories" and "severity" as `cost_figures` reads them, where a record has them.
    """
    file = context.folder / "data" / f"rows_{part}.npz"
    limit = None if part == "train" else context.config.evaluation.records

    def build() -> None:
        records, skipped = context.records(data, context.config.schema)
        count = len(records) if limit is None else min(limit, len(records))
        numbers = [i * len(records) // count for i in range(count)]  # spread: data may be sorted by its labels
        kept, rows, dropped = _tokenized(context, role, records, numbers, data)
        if not kept:
            raise UserError(f"{data}: no record is left to train on ({_counted(dropped)}): look at sequence_length")
        if part == "train":
            rows |= {name: column[kept] for name, column in owners_of(context, records, data).items()}
        else:
            rows |= _harms([records[i] for i in kept], rows["lengths"].shape[1])
        counts = {name: np.asarray(dropped[name]) for name in DROPPED}
        save_arrays(file, {**rows, **counts, "skipped": np.asarray(skipped)})

    context.once(file, build)
    with np.load(file) as saved:
        return dict(saved)


def _tokenized(
    context: Context, role: Role, records: list[Record], numbers: list[int], data: str
) -> tuple[list[int], Rows, Counter[str]]:
    """The records of these numbers that are kept, their rows, and how many were dropped for what."""
    config, tokenizer = context.config, role.tokenizer
    view = "harm" if config.schema == "safety" else config.schema
    longest = min(config.sequence_length, role.spec.config.context)
    marked = Asked(role.spec, tokenizer, [records[i] for i in numbers]).marked
    kept, prompts, answers, dropped = [], [], [], Counter[str]()
    for number, prompt in zip(numbers, marked, strict=True):
        record, where = records[number], f"{data}: record {number + 1}"
        if fault := _fault(config.schema, record):
            _refuse(context, where, fault)
            dropped["contradictory"] += 1
            continue
        ids = answer_tokens(tokenizer, record, prompt, view, longest, config.on_error, where)
        if ids is None:
            dropped["too_long"] += 1
        elif all_equal(ids):
            _refuse(context, where, "its two answers are the same")
            dropped["identical"] += 1
        else:
            kept.append(number)
            prompts.append(prompt)
            answers.append(ids)
    if not kept:
        return kept, {}, dropped
    safe = [_labels(config.schema, records[i]) for i in kept]
    common = [_common(ids) for ids in answers]
    rows = pad_answers(prompts, answers)
    rows["ended"] = np.asarray([[x[-1] in tokenizer.stop_ids for x in ids] for ids in answers])
    rows["first"] = np.asarray([len(p) + n for p, n in zip(prompts, common, strict=True)], np.int32)
    rows["unsafe"] = np.asarray([[label is False for label in labels] for labels in safe])
    rows["labelled"] = np.asarray([None not in labels for labels in safe])
    return kept, rows, dropped


def _labels(schema: str, record: Record) -> list[bool | None]:
    """Whether each answer is safe, in the order of its rows."""
    if schema == "safety_label":
        return [record["safe"]]
    return [record["safe"][1 - record["safer"]], record["safe"][record["safer"]]]


def _common(answers: list[list[int]]) -> int:
    """How many tokens two answers begin with alike; 0 of one answer."""
    if len(answers) == 1:
        return 0
    shorter = min(map(len, answers))
    return next((i for i in range(shorter) if answers[0][i] != answers[1][i]), shorter)


def _harms(records: list[Record], answers: int) -> Rows:
    """Categories and severity of the answers, in the order of their rows, where a record has any.

    A record without `categories` may have one `category`, a name, of its prompt.
    """

    def of(record: Record, name: str, missing: Any) -> list[Any]:
        if name not in record:
            return [missing] * answers
        return [record[name]] if answers == 1 else [record[name][i] for i in (1 - record["safer"], record["safer"])]

    prompts = [[r["category"]] if isinstance(r.get("category"), str) else [] for r in records]
    names = [of(record, "categories", prompt) for record, prompt in zip(records, prompts, strict=True)]
    out = {}
    if any(any(each) for each in names):
        out["categories"] = np.asarray([["\n".join(of_answer) for of_answer in each] for each in names])
    if any("severity" in record for record in records):
        out["severity"] = np.asarray([of(record, "severity", -1) for record in records], np.int32)
    return out


def _counted(counts: Any) -> str:
    return ", ".join(f"{int(counts[name])} {name.replace('_', ' ')}" for name in DROPPED)


# --- the stage -------------------------------------------------------------------------------------------------------


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / accumulation", config.batch_size // config.accumulation)
    context.check_folders()
    context.check_data(config.schema)
    for field, data in (("data", config.data), ("evaluation.data", config.evaluation.data)):
        made = any(name.split("/")[0] in context.experiment.stages for name in context.data_names(field))
        if not data or made or config.on_contradiction != "raise":
            continue
        for number, record in enumerate(context.stream(data, config.schema, CHECKED_RECORDS)):
            if fault := _fault(config.schema, record):
                _refuse(context, f"{data}: record {number + 1}", fault)


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first records' answers as the cost model reads them: it scores the end of what is not masked."""
    config, out = context.config, []
    pairs = config.schema == "safety"
    for record in context.stream(config.data, config.schema, 3):
        answers, labels = answers_of("harm" if pairs else config.schema, record), _labels(config.schema, record)
        named = zip(("more harmful", "safer") if pairs else ("answer",), answers, labels, strict=True)
        lines = []
        for name, answer, safe in named:
            label = "" if safe is None else f" ({'safe' if safe else 'unsafe'})"
            example = completion_example(tokenizer, record["prompt"], answer, "completion")
            lines.append(f"{name}{label}: {show_example(tokenizer, example)}")
        out.append("\n".join(lines))
    return out


def run(context: Context) -> dict[str, Any]:
    """Trains the cost model; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- roles and rows --------------------------------------------------------------------------------------
        role = start_scorer(context, context.load(config.init, mesh), marked=True)
        training = make_rows(context, role, config.data, "train")
        held_out = make_rows(context, role, config.evaluation.data, "evaluation") if config.evaluation.data else None
        (count, answers), signs = training["lengths"].shape, bool(training["labelled"].any())
        noun, private = "pairs" if answers == 2 else "answers", is_private(config)
        if not signs:
            context.progress("no safety labels: only the ranking of answers is learned, and a cost of 0 means nothing")

        # --- training --------------------------------------------------------------------------------------------
        columns = ("tokens", "lengths", "first", *(("unsafe", "labelled") if signs else ()))
        objective = cost_objective(role.spec, loss_on=config.loss_on, regularization=config.regularization)
        measured = ("loss", "accuracy", *(("sign_accuracy",) if signs and answers == 2 else ()))
        trained = train_scorer(
            context,
            role,
            objective,
            training,
            held_out,
            partial(place_answers, columns),
            mesh,
            noun=noun if private else f"{noun} ({_counted(training)} left out)",
            measured=measured,
        )
        prints = save_role(context.workdir, context.name, role)
        costs = score_rows(role, held_out, config.batch_size, mesh) if held_out else None

    # --- figures -------------------------------------------------------------------------------------------------
    summary = trained.summary
    figures: dict[str, Any] = {noun: count, "steps": trained.steps}
    if not private:  # counts of the records are raw figures of them
        labels = int(training["labelled"].sum()) * answers
        figures |= {name: int(training[name]) for name in (*DROPPED, "skipped")} | {"sign_labels": labels}
    if not signs:
        figures |= {"sign_labels": 0, "boundary": NO_BOUNDARY}
    if held_out and costs is not None:
        figures |= accuracy_figures(noun, len(costs), summary)
        figures |= {"accuracy_start": summary["first"]["accuracy/eval"], "result_step": summary["result_step"]}
        if answers == 2 and not private:  # it is fitted to the training pairs
            figures["accuracy_length_and_end_baseline"] = baseline_accuracy(training, held_out)
        figures |= held_out_figures(costs, held_out) if signs else {}
        if figures.get("cost_unsafe", 1.0) <= figures.get("cost_safe", 0.0):
            context.progress("warning: held-out unsafe answers cost no more than safe ones: a threshold means nothing")
    figures |= trained.private.figures() if trained.private else {"rows": rows_hash(training)}
    figures |= {"fingerprints": prints, "memory": role_memory({context.name: role.weights})}
    return {"figures": figures, "samples": []}
