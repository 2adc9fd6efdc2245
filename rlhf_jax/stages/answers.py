"""Answers of a policy to a data set's prompts, decoded and scored batch by batch; a cut run goes on behind the last
whole batch in its file."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rlhf_jax.config import is_folder
from rlhf_jax.data.schemas import Text
from rlhf_jax.distributed.processes import barrier, is_main_process, mark
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.distributed.stopping import stop_requested
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import mean_interval
from rlhf_jax.models.roles import merged_base
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.reencode import answer_text
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import Judge, Pending, check_sources
from rlhf_jax.stages.plan import tokenizer_of
from rlhf_jax.stages.prompts import Prompts, check_decode_rows, check_stop_strings, make_sampler
from rlhf_jax.training.artifacts import Role, is_reward_checkpoint
from rlhf_jax.training.experience import end_penalized
from rlhf_jax.training.loop import Stopped

Row = dict[str, Any]
Scorers = Mapping[str, tuple[str, Judge]]  # name in a row -> the config field that names the sources, and their judge


def check_answers(context: Context, field: str, subjects: list[str], rows: int) -> None:
    """What a stage that answers prompts can refuse before anything runs; `rows` prompts are decoded together.

    Raises:
      UserError: a function, folder or data set that cannot be read, a reward model among the subjects that `field`
        names, or rows that do not divide over the devices.
    """
    config = context.config
    context.check_rows("batch_size" if rows == config.batch_size else "batch_size / samples", rows)
    context.check_folders()
    check_sources(context)
    for subject in subjects:
        if is_folder(context.experiment.stages, subject) and is_reward_checkpoint(Path(subject).expanduser()):
            raise UserError(f"stages.{context.name}.{field}: {subject} is a reward model: give a language model")
        check_stop_strings(context, tokenizer_of(context, subject))
    check_decode_rows(context, config.batch_size // rows)
    context.check_data(config.schema)


def make_judge(context: Context, role: Role, mesh: Mesh, field: str) -> tuple[str, Judge]:
    """The entry of `Scorers` for a config field, of a policy's answers."""
    stops = bool(context.config.stop_strings)
    return field, Judge(context, role.tokenizer, mesh, parts=1, stop_strings=stops, field=field)


def answer_all(
    context: Context,
    role: Role,
    prompts: Prompts,
    mesh: Mesh,
    scorers: Scorers,
    *,
    samples: int,
    path: Path,
    label: str,
) -> list[Row]:
    """The rows of the file at `path` in the prompts' order; functions score one batch while the next is decoded.

    Returns:
      {"prompt", "completions", name: scores, "ended"} of each prompt, by the names of `scorers`, and
      {"rewards/<source>": scores} of a field with several sources. Scores of the field "reward" have the penalty for a
      missing end.
    """
    config = context.config
    each = config.batch_size // samples
    order = np.argsort(prompts.rows["lengths"], kind="stable")  # batches of near lengths: narrow ones stay narrow
    batches = [order[start : start + each] for start in range(0, len(order), each)]
    done = _finished(path, [len(batch) for batch in batches])
    sample, key = make_sampler(context, role, mesh), context.key("answers")
    base = jax.jit(lambda weights: merged_base(role.spec, weights))(role.weights)
    started: list[tuple[np.ndarray, Rollout, dict[str, Pending]]] = []

    def finish() -> None:
        numbers, rollout, pending = started.pop(0)
        _append(path, _scored(context, role, scorers, samples, numbers, rollout, pending))

    bar = tqdm(
        total=len(batches),
        initial=done,
        desc=label,
        disable=not is_main_process(),
        mininterval=1.0,
        file=sys.stdout,
    )
    with bar:
        for batch in batches[done:]:
            full = np.concatenate([batch, np.full(each - len(batch), batch[0])])
            rollout = sample(base, prompts.place(full, np.zeros(each, int), mesh), key, samples)
            records = [prompts.records[i] for i in full for _ in range(samples)]
            pending = {name: judge.begin(rollout, records) for name, (_, judge) in scorers.items()}
            started.append((batch, rollout, pending))
            mark(f"{label}, prompt {batch[0]}")
            if len(started) > 1:
                finish()
                bar.update()
            if stop_requested():
                raise Stopped(f"{context.name}: stopped, the answers so far are saved")
        while started:
            finish()
            bar.update()
    barrier(f"answers of {label}")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["prompt"])


def _scored(
    context: Context,
    role: Role,
    scorers: Scorers,
    samples: int,
    numbers: np.ndarray,
    rollout: Rollout,
    pending: Mapping[str, Pending],
) -> list[Row]:
    """The rows of one batch: for each prompt its answers' texts, scores and ends."""
    config = context.config
    scores: dict[str, jax.Array] = {}
    sources: dict[str, dict[str, jax.Array]] = {}
    for name, (field, judge) in scorers.items():
        scores[name], sources[name] = judge.finish([pending[name]])
        if field == "reward":
            scores[name] = end_penalized(scores[name], rollout.ended, config.missing_end, config.missing_end_penalty)
    tokens, lengths, ended, scores, sources = fetch((rollout.tokens, rollout.lengths, rollout.ended, scores, sources))
    for source, values in (pair for columns in sources.values() for pair in columns.items()):
        if not np.isfinite(values).all():
            raise UserError(f"stages.{context.name}: {source} of an answer is not finite: mend that reward model")
    parts = {name: values for columns in sources.values() if len(columns) > 1 for name, values in columns.items()}
    out = []
    for at, number in enumerate(numbers):
        span = slice(at * samples, (at + 1) * samples)
        answers = zip(tokens[span], lengths[span], ended[span], strict=True)
        out.append(
            {
                "prompt": int(number),
                "completions": [answer_text(role.tokenizer, row[:n].tolist(), bool(end)) for row, n, end in answers],
                **{name: values[span].tolist() for name, values in scores.items()},
                "ended": ended[span].tolist(),
                **{name: values[span].tolist() for name, values in parts.items()},
            }
        )
    return out


def _finished(path: Path, sizes: list[int]) -> int:
    """How many batches of `sizes` rows the file holds whole; what is behind them is cut off."""
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    done = int(np.searchsorted(np.cumsum(sizes), len(lines), side="right"))
    barrier(f"read {path}")  # before it is cut
    if is_main_process():
        with path.open("a") as file:
            file.truncate(len("".join(lines[: sum(sizes[:done])]).encode()))
    return done


def _append(path: Path, rows: list[Row]) -> None:
    if is_main_process():
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def as_answer(prompt: Text, text: str) -> Text:
    """An answer's text as what its prompt is: a string, or a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def prompt_text(role: Role, prompts: Prompts, row: int) -> str:
    """A prompt as the policy read it."""
    return role.tokenizer.decode(prompts.rows["prompts"][row, : prompts.rows["lengths"][row]].tolist())


def column(rows: list[Row], name: str) -> np.ndarray:
    """(prompts, samples) of one score, or of the ends, of rows of answers."""
    return np.asarray([row[name] for row in rows])


def over_prompts(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of (prompts, samples) values with its 95 % interval over prompts."""
    return mean_interval(name, values.mean(-1))
