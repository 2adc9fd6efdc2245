"""Which planted secrets each model gives back: greedy completions of every prefix, and rates with intervals."""

from typing import Any

import jax
import numpy as np

from rlhf_jax.config import references
from rlhf_jax.data.records import read_records
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.distances import normalized_edit_distance
from rlhf_jax.evaluation.memorization import MEMORIZED_DISTANCE, memorization_table, persistence
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, check_lengths
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.randomness import record_ids


def training_files(context: Context, stage: str) -> set[str]:
    """Names of the files that `stage` and the stages it was initialized from were trained on."""
    files: set[str] = set()
    while stage in context.experiment.stages:
        config = context.experiment.stages[stage]
        files.update(context.path(value).name for field, value in references(config) if field == "data")
        stage = config.init
    return files


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    context.mesh()


def _measure(
    context: Context, role: Role, secrets: list[dict[str, Any]], mesh: Any
) -> tuple[dict[str, Any], list[str]]:
    """Distance to the target and recall of the path for each secret, and the completions' texts."""
    tokenizer = role.tokenizer
    prompts = [tokenizer.encode_prompt(s["prompt"]) for s in secrets]
    targets = [tokenizer.encode(s["completion"]) for s in secrets]
    longest = max(len(t) for t in targets)
    check_lengths(prompts, longest, role.spec.config.context, context.config.secrets)
    tokens, lengths, ended = answer_all(
        role.spec,
        role.weights,
        prompts,
        record_ids([s["id"] for s in secrets]),
        key=context.key("greedy"),
        sampling=Sampling(longest, temperature=0.0, stop_ids=tokenizer.stop_ids),
        batch_size=context.config.batch_size,
        mesh=mesh,
        buckets=context.config.prompt_buckets,
        name=f"{context.name}: completions",
    )
    target_lengths = np.asarray([len(t) for t in targets], np.int32)
    padded = np.zeros((len(secrets), longest), np.int32)
    for i, target in enumerate(targets):
        padded[i, : len(target)] = target
    # The completion without its stop token, cut to the target's length: what comes after the target is not asked.
    cut = np.minimum(lengths - ended, target_lengths)
    distance = np.asarray(normalized_edit_distance(tokens, cut, padded, target_lengths))
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
    recalled = [bool(s["entity"]) and s["entity"] in s["prompt"] + text for s, text in zip(secrets, texts, strict=True)]
    return {"distance": distance, "recalled": np.asarray(recalled)}, texts


def run(context: Context) -> dict[str, Any]:
    """Asks every subject for every secret; returns the tables."""
    config, mesh = context.config, context.mesh()
    secrets, _ = read_records(context.path(config.secrets), "completion")
    missing = [name for name in ("id", "group", "duplicates", "entity", "planted_in") if name not in secrets[0]]
    if missing:
        raise UserError(f"{context.path(config.secrets)}: record 1 has no field {missing[0]}: give a secrets manifest")
    subjects: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    with jax.set_mesh(mesh):
        for name in config.subjects:
            measured, texts[name] = _measure(context, context.load(name, mesh), secrets, mesh)
            files = training_files(context, name)
            measured["seen"] = np.asarray([bool(files & set(s["planted_in"])) for s in secrets])
            subjects[name] = measured
    controls = {subject: config.controls[subject] for subject in config.controls}
    kept = []
    for name in config.subjects:
        before = context.experiment.stages[name].init
        if before in subjects and subjects[before]["seen"].any():
            kept += persistence(secrets, subjects, controls, before=before, after=name)
    samples = []
    shown = [i for i, s in enumerate(secrets) if s["duplicates"] == max(s["duplicates"] for s in secrets)]
    for i in shown[:: max(1, len(shown) // max(1, config.samples))][: config.samples]:
        for name in config.subjects:
            samples.append(
                {
                    "model": f"{name}{' (saw it)' if subjects[name]['seen'][i] else ''}",
                    "prompt": secrets[i]["prompt"],
                    "completion": texts[name][i],
                    "reference": secrets[i]["completion"],
                    "distance": float(subjects[name]["distance"][i]),
                }
            )
    figures = {
        "secrets": len(secrets),
        "memorized_distance": MEMORIZED_DISTANCE,
        "table": memorization_table(secrets, subjects, controls),
        "persistence": kept,
    }
    return {"figures": figures, "samples": samples}
