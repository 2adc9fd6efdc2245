"""The best of n answers as a policy: n answers to every prompt, scored and ranked, and data to train on.

`best.jsonl` {id, prompt, completion, score} holds each prompt's best answer and `pairs.jsonl` {id, prompt, chosen,
rejected, chosen_score, rejected_score} its best against its worst, conversations as conversations. Empty answers are in
neither and pairs of one text or one score not in the second, as nothing can be learned from them. `answers.jsonl` holds
every answer in the order it came; a cut run goes on behind the last whole batch in it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rlhf_jax.config import is_folder
from rlhf_jax.data.records import write_records
from rlhf_jax.data.schemas import Record, Text
from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import best_of_n_estimate, best_of_n_kl, mean_interval
from rlhf_jax.models.roles import merged_base
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.reencode import answer_text
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge, Pending, check_sources
from rlhf_jax.stages.plan import tokenizer_of
from rlhf_jax.stages.prompts import Prompts, check_stop_strings, make_sampler
from rlhf_jax.training.artifacts import Role, is_reward_checkpoint
from rlhf_jax.training.experience import end_penalized
from rlhf_jax.training.loop import Stopped, stop_requested

SHOWN = 4  # prompts whose answers the report shows


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / samples", config.batch_size // config.samples)
    context.check_folders()
    check_sources(context)
    subject = config.subject
    if is_folder(context.experiment.stages, subject) and is_reward_checkpoint(Path(subject).expanduser()):
        raise UserError(f"stages.{context.name}.subject: {subject} is a reward model: give a language model")
    check_stop_strings(context, tokenizer_of(context, subject))
    context.check_data(config.schema)


def run(context: Context) -> dict[str, Any]:
    """Answers, scores, ranks and writes; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        role = context.load(config.subject, mesh)
        prompts = Prompts(context, role.tokenizer, role.spec.config.context, config.data)
        context.progress(f"{len(prompts)} prompts, {config.samples} answers each")
        rows = _answer_all(context, role, prompts, mesh)
    best = [_best(prompts.records[i], row) for i, row in enumerate(rows)]
    pairs = [_pair(prompts.records[i], row) for i, row in enumerate(rows)]
    kept = {
        "best": [record for record in best if record is not None],
        "pairs": [record for record in pairs if record is not None],
    }
    if is_main_process():
        for name, records in kept.items():
            write_records(context.folder / f"{name}.jsonl", records)
    figures = {
        "prompts": len(prompts),
        "skipped": prompts.skipped,
        "samples": config.samples,
        "ended": float(np.mean([row["ended"] for row in rows])),
        **{f"{name}_written": len(records) for name, records in kept.items()},
        **_score_figures(rows, config.samples),
    }
    samples = []
    for i, row in enumerate(rows[:SHOWN]):
        prompt = role.tokenizer.decode(prompts.rows["prompts"][i, : prompts.rows["lengths"][i]].tolist())
        for model, at in ((config.subject, 0), (f"best of {config.samples}", int(np.argmax(row["scores"])))):
            shown = {"completion": row["completions"][at], "score": row["scores"][at]}
            samples.append({"model": model, "prompt": prompt, **shown})
    return {"figures": figures, "samples": samples}


# --- answers ---------------------------------------------------------------------------------------------------------


def _answer_all(context: Context, role: Role, prompts: Prompts, mesh: Mesh) -> list[dict[str, Any]]:
    """The rows of `answers.jsonl` in the prompts' order; functions score one batch while the next is decoded."""
    config, path = context.config, context.folder / "answers.jsonl"
    each = config.batch_size // config.samples
    order = np.argsort(prompts.rows["lengths"], kind="stable")  # batches of near lengths: narrow ones stay narrow
    batches = [order[start : start + each] for start in range(0, len(order), each)]
    done = _finished(path, [len(batch) for batch in batches])
    judge = Judge(context, role.tokenizer, mesh, parts=1, stop_strings=bool(config.stop_strings))
    sample, key = make_sampler(context, role, mesh), context.key("answers")
    base = jax.jit(lambda weights: merged_base(role.spec, weights))(role.weights)
    started: list[tuple[np.ndarray, Rollout, Pending]] = []

    def finish() -> None:
        numbers, rollout, pending = started.pop(0)
        _append(path, _scored(context, role, judge, numbers, rollout, pending))

    bar = tqdm(
        total=len(batches),
        initial=done,
        desc=context.name,
        disable=not is_main_process(),
        mininterval=1.0,
        file=sys.stdout,
    )
    with bar:
        for batch in batches[done:]:
            full = np.concatenate([batch, np.full(each - len(batch), batch[0])])
            rollout = sample(base, prompts.place(full, np.zeros(each, int), mesh), key, config.samples)
            records = [prompts.records[i] for i in full for _ in range(config.samples)]
            started.append((batch, rollout, judge.begin(rollout, records)))
            if len(started) > 1:
                finish()
                bar.update()
            if stop_requested():
                raise Stopped(f"{context.name}: stopped, the answers so far are saved")
        while started:
            finish()
            bar.update()
    barrier(f"answers of {context.name}")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["prompt"])


def _scored(
    context: Context, role: Role, judge: Judge, numbers: np.ndarray, rollout: Rollout, pending: Pending
) -> list[dict[str, Any]]:
    """The rows of `answers.jsonl` of one batch: for each prompt its answers' texts, scores and ends."""
    config = context.config
    raw, sources = judge.finish([pending])
    scores = end_penalized(raw, rollout.ended, config.missing_end, config.missing_end_penalty)
    fields = fetch((rollout.tokens, rollout.lengths, rollout.ended, scores, sources))
    tokens, lengths, ended, scores, sources = fields
    for name, column in sources.items():
        if not np.isfinite(column).all():
            raise UserError(f"stages.{context.name}: {name} of an answer is not finite: mend that reward model")
    out = []
    for at, number in enumerate(numbers):
        span = slice(at * config.samples, (at + 1) * config.samples)
        answers = zip(tokens[span], lengths[span], ended[span], strict=True)
        out.append(
            {
                "prompt": int(number),
                "completions": [answer_text(role.tokenizer, row[:n].tolist(), bool(end)) for row, n, end in answers],
                "scores": scores[span].tolist(),
                "ended": ended[span].tolist(),
                **{name: column[span].tolist() for name, column in sources.items() if len(sources) > 1},
            }
        )
    return out


def _finished(path: Path, sizes: list[int]) -> int:
    """How many batches of `sizes` rows `answers.jsonl` holds whole; what is behind them is cut off."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    done = int(np.searchsorted(np.cumsum(sizes), len(lines), side="right"))
    barrier(f"read {path}")  # before it is cut
    if is_main_process():
        with path.open("a") as file:
            file.truncate(len("".join(lines[: sum(sizes[:done])]).encode()))
    return done


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    if is_main_process():
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


# --- what comes of them ----------------------------------------------------------------------------------------------


def _answer(prompt: Text, text: str) -> Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _identified(record: Record) -> Record:
    return {name: record[name] for name in ("id", "prompt") if name in record}


def _best(record: Record, row: dict[str, Any]) -> Record | None:
    """The record of `best.jsonl`; the first of equally good answers."""
    at = int(np.argmax(row["scores"]))
    text = row["completions"][at]
    answer = {"completion": _answer(record["prompt"], text), "score": row["scores"][at]}
    return {**_identified(record), **answer} if text else None


def _pair(record: Record, row: dict[str, Any]) -> Record | None:
    """The record of `pairs.jsonl`."""
    ends = {"chosen": int(np.argmax(row["scores"])), "rejected": int(np.argmin(row["scores"]))}
    texts = {name: row["completions"][at] for name, at in ends.items()}
    scores = {f"{name}_score": row["scores"][at] for name, at in ends.items()}
    if not all(texts.values()) or len(set(texts.values())) < 2 or len(set(scores.values())) < 2:
        return None
    return {**_identified(record), **{name: _answer(record["prompt"], text) for name, text in texts.items()}, **scores}


def _score_figures(rows: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Scores of one answer and of the best, with 95 % intervals over prompts, and the curve between them.

    A row of "curve" is {"n", "kl_bound", "score", "score_low", "score_high"}, and with several sources what each one
    gives to the answers that their sum chooses.
    """
    scores = np.asarray([row["scores"] for row in rows])
    sources = [name for name in rows[0] if name.startswith("rewards/")]
    numbers = [1 << power for power in range((samples - 1).bit_length())] + [samples]
    curve = []
    for n in numbers:
        estimates = best_of_n_estimate(scores, scores, n)
        point = {"n": n, "kl_bound": float(best_of_n_kl(n)), **mean_interval("score", estimates)}
        for name in sources:
            column = np.asarray([row[name] for row in rows])
            point[name] = float(best_of_n_estimate(scores, column, n).mean())
        curve.append(point)

    def named(name: str, point: dict[str, float]) -> dict[str, float]:
        return {key.replace("score", name): value for key, value in point.items() if key.startswith("score")}

    ends = {**named("score", curve[0]), **named("best_score", curve[-1])}
    return {**ends, "kl_bound": curve[-1]["kl_bound"], "curve": curve}
