"""The best-of-n laboratory: what gold does while proxies are optimized, and what counting their uncertainty changes.

A pool of answers to each prompt is decoded once and scored by every proxy and by gold. `pool/<prompt>.npz` holds the
scores of a prompt's answers; a cut run goes on behind the last whole prompt. `chosen.json` {proxy source: {kind: k}} is
what gold prefers on the prompts that choose, for a policy stage's `reward_adjustment.chosen_by`, and `answers.jsonl`
the pools of the first prompts with their texts.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rlhf_jax.config import all_sources, is_function, score_sources, scoring_model
from rlhf_jax.data.records import write_records
from rlhf_jax.data.schemas import Record
from rlhf_jax.distributed.processes import barrier, is_main_process, mark
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.distributed.stopping import stop_requested
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.overoptimization import laboratory, policy_curve, same_scores, standardized
from rlhf_jax.models.roles import merged_base
from rlhf_jax.objectives.adjustment import Moments
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.reencode import answer_text
from rlhf_jax.stages.answers import check_answers, make_judge, prompt_text
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import COLUMNS, Judge, Pending, source_names
from rlhf_jax.stages.prompts import Prompts, make_sampler
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.checkpoints import write_json
from rlhf_jax.training.experience import end_penalized
from rlhf_jax.training.loop import Stopped

DECODING = ("max_new_tokens", "temperature", "top_k", "top_p", "stop_strings")  # the same in `policies`
SHOWN = 3  # prompts whose answers are kept as texts
Pool = dict[str, np.ndarray]  # of one prompt: "ended", "answer" (N,), "texts", and {moment}/{field} (sources, N)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    check_answers(context, "subject", [config.subject], config.batch_size)
    sources = [source for name in config.proxies for source in score_sources(config, f"proxies.{name}")]
    for source in sources:
        if sources.count(source) > 1:
            raise UserError(f"stages.{context.name}.proxies names {source} twice: its k has to be one, name it once")
    for name in config.policies:
        for policy in score_sources(config, f"policies.{name}"):
            _check_policy(context, name, policy)


def _check_policy(context: Context, name: str, policy: str) -> None:
    """Raises a UserError where a policy's KL and gold are of other answers, or from another start, than the pools'."""
    config, trained = context.config, context.experiment.stages[policy]
    where = f"stages.{context.name}.policies.{name}"
    if trained.init != config.subject:
        raise UserError(
            f"{where}: {policy} starts from {trained.init} and the pools are {config.subject}'s, so their KL is from "
            "two policies: make them one"
        )
    for field in DECODING:
        if trained[field] != config[field]:
            raise UserError(
                f"{where}: {policy} has {field} {trained[field]} and stages.{context.name} has {config[field]}, so "
                "their answers cannot be compared: make them one"
            )


def describe(context: Context) -> list[str]:
    """What `--dry_run` says: how much is decoded, and by how many models it is scored."""
    config, stages = context.config, context.experiment.stages
    sources = {source for _, source in all_sources(config) if not is_function(source)}
    models = sum(stages[scoring_model(stages, s)].members if s in stages else 1 for s in sources)
    answers = f"{config.records} prompts, {config.pool} answers each: {config.records * config.pool} in all"
    return [f"{answers}, each read by {models} models, posteriors' as by three"]


def run(context: Context) -> dict[str, Any]:
    """Answers, scores, ranks and writes; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        role = context.load(config.subject, mesh)
        prompts = Prompts(context, role.tokenizer, role.spec.config.context, config.data, config.records)
        selected = selection(prompts.records, config.selection)
        if selected.all() or not selected.any():
            raise UserError(
                f"stages.{context.name}.selection is {config.selection} of {len(prompts)} prompts, which leaves "
                f"{int(selected.sum())} to choose by and {int((~selected).sum())} to measure: give more prompts"
            )
        context.progress(f"{len(prompts)} prompts, {config.pool} answers each; {int(selected.sum())} prompts choose")
        pools = _pools(context, role, prompts, mesh)
    proxies, gold, plain_gold = _scores(context, pools)
    if gold.std() == 0:
        raise UserError(f"stages.{context.name}.gold: {config.gold} scores every answer the same: give another")
    found = laboratory(proxies, standardized(gold), config.adjustments.to_dict(), selected)
    chosen = {
        source: kinds for name, kinds in found["chosen"].items() for source in score_sources(config, f"proxies.{name}")
    }
    write_json(context.folder / "chosen.json", chosen)
    ended, answers = (np.stack([pool[name] for pool in pools]) for name in ("ended", "answer"))
    figures = {
        "prompts": len(prompts),
        "selection_prompts": int(selected.sum()),
        "skipped": prompts.skipped,
        "pool": config.pool,
        "ended": float(ended.mean()),
        "distinct": float(np.mean([len(np.unique(row)) for row in answers])),
        "gold_mean": float(gold.mean()),
        "gold_sd": float(gold.std()),
        **found,
        "policies": _policies(context, float(plain_gold.mean()), float(gold.std())),
    }
    for row in found["conditions"]:
        shown = {field: row[field] for field in ("peak_n", "peak", "end")}
        numbers = ", ".join(f"{field} {value:.4g}" for field, value in shown.items())
        context.progress(f"{row['proxy']}, {row['adjustment']}: gold at {numbers}")
    return {"figures": figures, "samples": _samples(context, role, prompts, pools, proxies, gold)}


def selection(records: list[Record], share: float) -> np.ndarray:
    """(P,) bool, the prompts that choose: by a hash of the prompt, whatever others there are."""
    words = [json.dumps(["selection", record["prompt"]]).encode() for record in records]
    return np.asarray([int.from_bytes(hashlib.sha256(word).digest()[:4], "big") < share * 2**32 for word in words])


# --- the pools -------------------------------------------------------------------------------------------------------


def _path(context: Context, prompt: int) -> Path:
    return context.folder / "pool" / f"{prompt:06}.npz"


def _rounds(context: Context, prompts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Prompt by prompt the numbers of the answers that are decoded together."""
    size = context.config.batch_size
    yield from ((i, np.arange(start, start + size)) for i in prompts for start in range(0, context.config.pool, size))


def _pools(context: Context, role: Role, prompts: Prompts, mesh: Mesh) -> list[Pool]:
    """Every prompt's pool; an answer's draws are keyed by its prompt and its number in the pool alone."""
    config = context.config
    waiting = [i for i in range(len(prompts)) if not _path(context, i).exists()]
    barrier(f"pools of {context.name} read")
    if is_main_process():
        _path(context, 0).parent.mkdir(exist_ok=True)
    fields = ["gold", *(f"proxies.{name}" for name in config.proxies)]
    judges = {field: make_judge(context, role, mesh, field)[1] for field in fields}
    sample, key = make_sampler(context, role, mesh), context.key("answers")
    base = jax.jit(lambda weights: merged_base(role.spec, weights))(role.weights)
    started: list[tuple[int, Rollout, dict[str, Pending]]] = []
    parts: list[Pool] = []
    bar = tqdm(
        total=len(prompts) * config.pool // config.batch_size,
        initial=(len(prompts) - len(waiting)) * config.pool // config.batch_size,
        desc=context.name,
        disable=not is_main_process(),
        mininterval=1.0,
        file=sys.stdout,
    )

    def finish() -> None:
        i, rollout, pending = started.pop(0)
        parts.append(_scored(context, role, judges, rollout, pending, texts=i < SHOWN))
        if len(parts) * config.batch_size == config.pool:
            _write(_path(context, i), parts)
            parts.clear()
        bar.update()

    with bar:
        for i, draws in _rounds(context, waiting):
            rollout = sample(base, prompts.place(np.full(len(draws), i), draws, mesh), key)
            records = [prompts.records[i]] * len(draws)
            pending = {field: judge.begin(rollout, records) for field, judge in judges.items()}
            started.append((i, rollout, pending))
            mark(f"{context.name}, prompt {i}")
            if len(started) > 1:
                finish()
            if stop_requested():
                raise Stopped(f"{context.name}: stopped, the pools so far are saved")
        while started:
            finish()
    barrier(f"pools of {context.name} written")
    return [dict(np.load(_path(context, i), allow_pickle=False)) for i in range(len(prompts))]


def _scored(
    context: Context,
    role: Role,
    judges: Mapping[str, Judge],
    rollout: Rollout,
    pending: Mapping[str, Pending],
    *,
    texts: bool,
) -> Pool:
    """A part of one prompt's pool: what every source says of the answers of a rollout."""
    scores = {field: judge.finish([pending[field]])[1] for field, judge in judges.items()}
    tokens, lengths, ended, scores = fetch((rollout.tokens, rollout.lengths, rollout.ended, scores))
    rows = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    pool = {"ended": ended, "answer": np.asarray([_digest(row) for row in rows])}
    if texts:
        whole = zip(rows, ended, strict=True)
        pool["texts"] = np.asarray([answer_text(role.tokenizer, row.tolist(), bool(end)) for row, end in whole])
    for field, columns in scores.items():
        for name, values in columns.items():
            if not np.isfinite(values).all():
                raise UserError(f"stages.{context.name}.{field}: {name} of an answer is not finite: mend that model")
        for moment, prefix in COLUMNS.items():
            known = [columns.get(f"{prefix}/{source}") for source in judges[field].names]
            if all(values is not None for values in known):
                pool[f"{moment}/{field}"] = np.stack(known)
    return pool


def _digest(tokens: np.ndarray) -> np.int64:
    digest = hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).digest()
    return np.frombuffer(digest[:8], np.int64)[0]


def _write(path: Path, parts: list[Pool]) -> None:
    """The whole pool of a prompt, put into place at once."""
    if not is_main_process():
        return
    temporary = path.with_suffix(".tmp")
    whole: dict[str, Any] = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    with temporary.open("wb") as file:
        np.savez(file, **whole)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- what comes of them ----------------------------------------------------------------------------------------------


def _scores(context: Context, pools: list[Pool]) -> tuple[dict[str, list[Moments]], np.ndarray, np.ndarray]:
    """Each proxy's runs and gold (P, N), with the penalty for a missing end, and gold without it.

    The penalty is the same for all: "set" it is the answer's score, and certain; "add" it is added to it.
    """
    config = context.config
    ended: Any = np.stack([pool["ended"] for pool in pools])
    answers = np.stack([pool["answer"] for pool in pools])

    def column(name: str, source: int) -> Any:
        if name not in pools[0]:
            return None
        return same_scores(np.stack([pool[name][source] for pool in pools]), answers)

    def penalized(scores: Any) -> Any:
        if scores is None:
            return None
        return np.asarray(end_penalized(scores, ended, config.missing_end, config.missing_end_penalty))

    def moments(field: str, source: int) -> Moments:
        mean, variance, lowest, highest = (column(f"{moment}/{field}", source) for moment in COLUMNS)
        if variance is not None and config.missing_end == "set":
            variance = np.where(ended, variance, 0)
        return Moments(penalized(mean), variance, penalized(lowest), penalized(highest))

    proxies = {}
    for name in config.proxies:
        sources = range(len(score_sources(config, f"proxies.{name}")))
        proxies[name] = [moments(f"proxies.{name}", source) for source in sources]
    gold = column("mean/gold", 0)
    return proxies, np.asarray(penalized(gold), np.float64), gold


def _policies(context: Context, mean: float, spread: float) -> list[dict[str, Any]]:
    """`policy_curve` of each policy, by the iterations that it logged, on the scale of the subject's own gold.

    A policy stage logs what gold gave its answers without the penalty for a missing end, so `mean` is of those.
    """
    config, stages, found = context.config, context.experiment.stages, []
    for name in config.policies:
        runs = []
        for policy in score_sources(config, f"policies.{name}"):
            sources = score_sources(stages[policy])
            metric = f"rewards/{source_names(sources)[sources.index(config.gold)]}"
            lines = (context.workdir / policy / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "objective/kl" in row and metric in row]
            if not rows:
                raise UserError(
                    f"stages.{context.name}.policies.{name}: {policy} logged no {metric} beside objective/kl: add "
                    f'"{config.gold}" to stages.{policy}.reward with a weight of 0'
                )
            kl, gold = (np.asarray([row[column] for row in rows]) for column in ("objective/kl", metric))
            runs.append((kl, (gold - mean) / spread))
        found.append({"policy": name, **policy_curve(runs)})
    return found


def _samples(
    context: Context,
    role: Role,
    prompts: Prompts,
    pools: list[Pool],
    proxies: Mapping[str, list[Moments]],
    gold: np.ndarray,
) -> list[dict[str, Any]]:
    """Of the first prompts the first answer, the best by the first proxy and the best by gold; writes their pools."""
    name, (first, *_) = next(iter(proxies.items()))
    samples, kept = [], []
    for i, pool in enumerate(pools[:SHOWN]):
        prompt, texts, ranking = prompt_text(role, prompts, i), pool["texts"].tolist(), np.asarray(first.mean[i])
        kept.append({"prompt": i, "completions": texts, "gold": gold[i].tolist(), "proxy": ranking.tolist()})
        bests = {f"best by {name}": int(np.argmax(ranking)), "best by gold": int(np.argmax(gold[i]))}
        for model, at in {context.config.subject: 0, **bests}.items():
            score = {"completion": texts[at], "score": float(gold[i, at])}
            samples.append({"model": f"{model}, gold", "prompt": prompt, **score})
    if is_main_process():
        write_records(context.folder / "answers.jsonl", kept)
    return samples
