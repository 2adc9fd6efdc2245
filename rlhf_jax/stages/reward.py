"""The reward model: Bradley-Terry on preference pairs, or on each record's own continuation against a policy's sample.

Writes the model with its head calibrated: samples of the reference policy score mean 0, standard deviation 1. Pairs
with samples are left as `pairs.jsonl` {id, prompt, chosen, rejected}, for other stages to train on the same. With the
schema "label" it is a classifier of texts instead (`stages.reward_labels`); its score stays the log-odds of the label.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.examples import answer_ids, completion_example, show_example
from rlhf_jax.data.pairs import answers_of, pad_answers, save_arrays, tokenize_answers
from rlhf_jax.data.records import write_records
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import as_process_0, barrier, is_main_process
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.objectives import bradley_terry_loss
from rlhf_jax.objectives.records import Objective, RecordLosses
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all, check_lengths
from rlhf_jax.rollout.reencode import answer_text
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import owners_of
from rlhf_jax.stages.reward_calibration import Asked, calibrate
from rlhf_jax.stages.reward_labels import label_objective, labelled_texts, place_windows, show_window
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

Pairs = dict[str, np.ndarray]
_place = partial(place_answers, ("tokens", "lengths"))
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


def make_pairs(context: Context, spec: RoleSpec, policy: Role, data: str, part: str, mesh: Mesh) -> Pairs:
    """Rows of (prompt + chosen, prompt + rejected) as the reward model reads them, made once.

    Returns {"tokens": (n, 2, T) int32, "lengths": (n, 2) int32 in all, "answer_lengths": (n, 2), "ended": (n, 2) bool},
    of a private stage's training data also "owners".
    """
    file = context.folder / "data" / f"pairs_{part}.npz"
    if not as_process_0(file.exists()):
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
    labelled = config.schema == "label"  # a text has no answer in it
    with jax.set_mesh(mesh):
        # --- roles and rows --------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        policy = context.load(config.policy, mesh) if config.policy and not labelled else start
        role = start_scorer(context, start, marked=not labelled)

        def make(data: str, part: str) -> Rows:
            if labelled:
                limit = None if part == "train" else config.evaluation.records
                return labelled_texts(context, role.spec, role.tokenizer, data, limit)
            return make_pairs(context, role.spec, policy, data, part, mesh)

        training = make(config.data, "train")
        held_out = make(config.evaluation.data, "evaluation") if config.evaluation.data else None
        count, noun = len(training["lengths"]), "texts" if labelled else "pairs"

        # --- training --------------------------------------------------------------------------------------------
        objective = label_objective(role.spec) if labelled else reward_objective(role.spec)
        place = partial(place_windows, context) if labelled else _place
        why = "" if labelled else f" ({int(training['dropped'])} dropped: equal answers, or too long)"
        trained = train_scorer(context, role, objective, training, held_out, place, mesh, noun=noun + why)

        # --- calibration -----------------------------------------------------------------------------------------
        figures: dict[str, Any] = {noun: count, "skipped": int(training["skipped"]), "steps": trained.steps}
        if labelled:
            figures["score"] = "log-odds of the label, not calibrated"
        else:
            figures["dropped"] = int(training["dropped"])
            figures["calibration"] = calibrate(context, role, policy, mesh)
        prints = save_role(context.workdir, context.name, role)
        together = score_rows(role, held_out, config.batch_size, mesh) if held_out and config.members > 1 else None
    summary, private = trained.summary, trained.private
    if held_out is not None:
        figures |= accuracy_figures(noun, len(held_out["lengths"]), summary)
        figures |= {"accuracy_start": summary["first"]["accuracy/eval"], "result_step": summary["result_step"]}
    if config.members > 1:
        figures["members"] = config.members
    if together is not None:  # accuracy above is the members' mean
        figures["accuracy_of_their_mean"] = float(np.mean(together[:, 0] > together[:, 1]))
    if held_out is not None and not labelled and private is None:  # it is fitted to the training pairs
        figures["accuracy_length_and_end_baseline"] = baseline_accuracy(training, held_out)
    figures |= private.figures() if private else {"rows": rows_hash(training)}
    figures |= {"fingerprints": prints, "memory": role_memory({context.name: role.weights})}
    return {"figures": figures, "samples": []}
