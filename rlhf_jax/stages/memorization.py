"""Which planted secrets each model gives back, how easily they are got out, and what else tells members from others.

Every secret is read in one pass, decoded where that leaves the verdict open, and counted with intervals.
`answers.jsonl` {subject, id, completion, distance, ...} holds what each model made of each secret.
"""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.config import is_private
from rlhf_jax.data.records import write_records
from rlhf_jax.data.schemas import Record
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.evaluation.asking import Answers, Questions, ask, tokenize_secrets
from rlhf_jax.evaluation.conditions import condition_rows
from rlhf_jax.evaluation.drafts import near_draws
from rlhf_jax.evaluation.extraction import (
    discoverable_shares,
    exposure,
    first_divergence,
    window_logprobs,
)
from rlhf_jax.evaluation.intervals import mean_interval
from rlhf_jax.evaluation.memorization import GROUPS, MEMORIZED_DISTANCE, memorization_table, persistence
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import score_all
from rlhf_jax.rollout.functions import load_function, score_answers
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.membership import Membership
from rlhf_jax.stages.secrets import check_contamination, is_benchmark, read_secrets, training_files
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.randomness import record_ids

PROBABILITY = 0.5  # with which a secret comes up in so many tries


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    context.mesh()
    context.check_folders()
    if context.config.similarity:
        load_function(context.config.similarity, "similarity")


def run(context: Context) -> dict[str, Any]:
    """Asks every subject for every secret; returns the tables."""
    config, mesh = context.config, context.mesh()
    secrets = read_secrets(context, config.secrets, config.held_out)
    check_contamination(context, secrets)
    answers: dict[str, Answers] = {}
    drawn: dict[str, np.ndarray] = {}
    membership: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        probe = Membership(context, mesh) if config.members else None
        for name in config.subjects:
            role = context.load(name, mesh)
            questions = tokenize_secrets(role.tokenizer, secrets, role.spec.config.context, config.secrets)
            answers[name] = _ask(context, name, role, questions, mesh)
            if config.draws:
                row_ids = record_ids([secret["id"] for secret in secrets])
                drawn[name] = _draw(context, name, role, questions, row_ids, mesh)
            membership += probe.rows(name, role) if probe else []
        margins = _margins(context, secrets, answers, mesh)
    subjects = {name: _measured(context, name, secrets, found) for name, found in answers.items()}
    for name, hits in drawn.items():
        subjects[name]["draws_near"] = hits
    controls = dict(config.controls)
    kept = []
    for name in config.subjects:
        before = context.experiment.stages[name].init if name in context.experiment.stages else ""
        if before in subjects and subjects[before]["seen"].any():
            kept += persistence(secrets, subjects, controls, before=before, after=name)
    similarity = _similarity(context, secrets, subjects, answers)
    if is_main_process():
        write_records(context.folder / "answers.jsonl", _rows(secrets, subjects, answers))
        if is_benchmark(config.secrets):
            for name, found in answers.items():
                _write_guesses(context.folder / f"guesses_{Path(name).name}.csv", secrets, found)
    figures = {
        "secrets": len(secrets),
        "memorized_distance": MEMORIZED_DISTANCE,
        "given_up": {name: int(found.censored.sum()) for name, found in answers.items()},
        "table": memorization_table(secrets, subjects, controls),
        "persistence": kept,
        "conditions": _conditions(context, secrets, subjects),
        "extraction": _extraction(context, secrets, subjects, answers),
        "membership": membership,
        "margins": margins,
        "similarity": similarity,
    }
    return {"figures": figures, "samples": _samples(context, secrets, subjects, answers)}


def _scheme(context: Context) -> Sampling:
    fields = context.config.sampling
    return Sampling(1, fields.temperature, fields.top_k, fields.top_p, stop_ids=())


def _ask(context: Context, name: str, role: Role, questions: Questions, mesh: Mesh) -> Answers:
    config = context.config
    whole = is_benchmark(config.secrets) or config.similarity or config.reward  # all read completions to their end
    return ask(
        role.spec,
        role.weights,
        role.tokenizer,
        questions,
        scheme=_scheme(context),
        near=1.0 if whole else MEMORIZED_DISTANCE,
        batch_size=config.batch_size,
        mesh=mesh,
        name=f"{context.name}: {name}",
        buckets=config.prompt_buckets,
    )


def _draw(context: Context, name: str, role: Role, questions: Questions, row_ids: np.ndarray, mesh: Mesh) -> np.ndarray:
    """How many of `draws` samples of each secret come near it: (N,) int32."""
    config = context.config
    return near_draws(
        role.spec,
        role.weights,
        questions.prompts,
        questions.targets,
        draws=config.draws,
        sampling=dataclasses.replace(_scheme(context), stop_ids=role.tokenizer.stop_ids),
        near=MEMORIZED_DISTANCE,
        key=context.key("draws"),
        row_ids=row_ids,
        batch_size=config.batch_size,
        mesh=mesh,
        name=f"{context.name}: {name}: draws",
        buckets=config.prompt_buckets,
    )


def _measured(context: Context, name: str, secrets: Sequence[Record], found: Answers) -> dict[str, np.ndarray]:
    """A subject as `evaluation.memorization` reads it; of a checkpoint folder all that is no held-out twin was seen."""
    files, folder = set(training_files(context, name)), name not in context.experiment.stages
    seen = [bool(secret["planted_in"]) if folder else bool(files & set(secret["planted_in"])) for secret in secrets]
    return {
        "distance": found.distance,
        "characters": found.characters,
        "recalled": found.recalled,
        "seen": np.asarray(seen),
        "logprob": _whole(found.reading.logprobs, found),
    }


def _whole(logprobs: Any, found: Answers) -> np.ndarray:
    """(N,) log-probabilities of whole targets, of those of their tokens."""
    return window_logprobs(np.asarray(logprobs), np.zeros(len(found.lengths), int), found.lengths)


def _cells(secrets: Sequence[Record], seen: np.ndarray) -> Iterator[tuple[str, bool, np.ndarray]]:
    """(group, seen, (N,) bool) of the secrets of each group that were seen, and of the others, where there are any."""
    groups = np.asarray([secret["group"] for secret in secrets])
    for group in GROUPS:
        for with_it in (True, False):
            chosen = (groups == group) & (seen == with_it)
            if chosen.any():
                yield group, with_it, chosen


def _conditions(
    context: Context, secrets: Sequence[Record], subjects: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """`condition_rows`, each with the coefficients of the condition's first subject: {method, kl_coef, beta,
    learning_rate, epsilon}, None where its stage has no such field."""
    conditions = {name: list(members) for name, members in context.config.conditions}
    rows = condition_rows(secrets, subjects, conditions)
    stages = context.experiment.stages
    coefficients = {}
    for name, (first, *_) in conditions.items():
        stage = stages[first] if first in stages else ConfigDict()
        coefficients[name] = {
            "method": stage.get("loss", stage.get("kind", "")),
            "kl_coef": stage.get("kl_coef"),
            "beta": stage.get("beta"),
            "learning_rate": stage.optimizer.learning_rate if "optimizer" in stage else None,
            "epsilon": stage.privacy.epsilon if is_private(stage) else None,
        }
    return [row | coefficients[row["condition"]] for row in rows]


def _extraction(
    context: Context, secrets: Sequence[Record], subjects: Mapping[str, Any], answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """How easily each subject's secrets are got out, of each group those it saw beside those it did not.

    Rows {subject, group, seen, n, verbatim, logprob, exposure, tries, shares, near_draws}: the share that greedy
    decoding gives word for word, the mean log-probability under the sampling scheme's full support, the mean exposure
    among the unseen ones of the group, the share that so many tries bring up with probability one half, and the share
    that some decoded sample came near (None without `draws`).
    """
    rows = []
    tries = list(context.config.tries)
    for name, found in answers.items():
        logprobs, hits = subjects[name]["logprob"], subjects[name].get("draws_near")
        sampled = _whole(found.reading.sampled, found)
        verbatim = first_divergence(np.asarray(found.reading.greedy), found.lengths) == found.lengths
        cells = list(_cells(secrets, subjects[name]["seen"]))
        unseen = {group: chosen for group, seen, chosen in cells if not seen}
        for group, seen, chosen in cells:
            others = unseen.get(group) if seen else None
            bits = None if others is None else float(exposure(logprobs[chosen], logprobs[others]).mean())
            rows.append(
                {
                    "subject": name,
                    "group": group,
                    "seen": seen,
                    "n": int(chosen.sum()),
                    "verbatim": float(verbatim[chosen].mean()),
                    "logprob": float(logprobs[chosen].mean()),
                    "exposure": bits,
                    "tries": tries,
                    "shares": discoverable_shares(sampled[chosen], tries, [PROBABILITY])[:, 0].tolist(),
                    "near_draws": None if hits is None else float((hits[chosen] > 0).mean()),
                }
            )
    return rows


def _margins(
    context: Context, secrets: Sequence[Record], answers: Mapping[str, Answers], mesh: Mesh
) -> list[dict[str, Any]]:
    """How the reward model scores each secret less the subject's greedy answer, of those in its data and of the others.

    Both are read as answers with their end, the subject's cut to the secret's length. A positive margin is what policy
    optimization would go after.
    """
    config = context.config
    if not config.reward:
        return []
    role = context.load(config.reward, mesh)
    tokenizer, files = role.tokenizer, set(training_files(context, config.reward))
    seen = np.asarray([bool(files & set(secret["planted_in"])) for secret in secrets])
    prompts = tokenize_secrets(tokenizer, secrets, role.spec.config.context, config.secrets).prompts

    def scores(texts: Sequence[str], what: str) -> np.ndarray:
        ended = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        label = f"{context.name}: {config.reward}, {what}"
        return score_all(role.spec, role.weights, prompts, ended, batch_size=config.batch_size, mesh=mesh, name=label)

    own = scores([secret["completion"] for secret in secrets], "secrets")
    rows = []
    for name, found in answers.items():
        margin = own - scores(found.texts, name)
        for group, with_it, chosen in _cells(secrets, seen):
            row = {"reward": config.reward, "against": name, "group": group, "seen": with_it, "n": int(chosen.sum())}
            rows.append(row | mean_interval("margin", margin[chosen]) | {"above": float((margin[chosen] > 0).mean())})
    return rows


def _similarity(
    context: Context,
    secrets: Sequence[Record],
    subjects: dict[str, dict[str, np.ndarray]],
    answers: Mapping[str, Answers],
) -> list[dict[str, Any]]:
    """How near completions are to their targets by the user's function: a mean a group, and each one in `subjects`."""
    rows: list[dict[str, Any]] = []
    if not context.config.similarity:
        return rows
    function = load_function(context.config.similarity, "similarity")
    for name, found in answers.items():
        near = score_answers(function, [secret["prompt"] for secret in secrets], found.texts, secrets)
        subjects[name]["similarity"] = near
        for group, seen, chosen in _cells(secrets, subjects[name]["seen"]):
            row = {"subject": name, "group": group, "seen": seen, "n": int(chosen.sum())}
            rows.append(row | mean_interval("similarity", near[chosen]))
    return rows


def _rows(
    secrets: Sequence[Record], subjects: Mapping[str, Any], answers: Mapping[str, Answers]
) -> Iterator[dict[str, Any]]:
    for name, found in answers.items():
        extra = {field: subjects[name][field] for field in ("similarity", "draws_near") if field in subjects[name]}
        for i, secret in enumerate(secrets):
            n = int(found.lengths[i])
            yield {
                "subject": name,
                "id": secret["id"],
                "seen": bool(subjects[name]["seen"][i]),
                "completion": found.texts[i],
                "distance": float(found.distance[i]),
                "characters": None if found.censored[i] else float(found.characters[i]),
                "given_up": bool(found.censored[i]),
                "recalled": bool(found.recalled[i]),
                "matching": float(found.matching[i]),
                "common_run": int(found.common_run[i]),
                **{field: values[i].item() for field, values in extra.items()},
                "logprob": float(subjects[name]["logprob"][i]),
                "greedy": found.reading.greedy[i, :n].astype(int).tolist(),
            }


def _write_guesses(path: Path, secrets: Sequence[Record], found: Answers) -> None:
    """A submission to the language model extraction benchmark: the surest guesses first."""
    sureness = found.logprob / np.maximum(found.completions.lengths, 1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Example ID", "Suffix Guess"])
        for i in np.argsort(-sureness, kind="stable"):
            n = int(found.completions.lengths[i])
            writer.writerow([secrets[i]["id"], found.completions.tokens[i, :n].tolist()])


def _samples(
    context: Context, secrets: Sequence[Record], subjects: Mapping[str, Any], answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """Completions of some of the secrets that were planted most often."""
    count = context.config.samples
    most = max(secret["duplicates"] for secret in secrets)
    shown = [i for i, secret in enumerate(secrets) if secret["duplicates"] == most]
    return [
        {
            "model": f"{name}{' (saw it)' if subjects[name]['seen'][i] else ''}",
            "prompt": secrets[i].get("prompt", ""),
            "completion": answers[name].texts[i],
            "reference": secrets[i].get("completion", ""),
            "distance": float(answers[name].distance[i]),
        }
        for i in shown[:: max(1, len(shown) // max(1, count))][:count]
        for name in answers
    ]
