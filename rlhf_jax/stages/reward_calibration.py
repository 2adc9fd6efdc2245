"""Gain and bias of a reward head: the policy's samples score mean 0, standard deviation 1."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.examples import prompt_ids
from rlhf_jax.data.order import in_batches
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import answer_all
from rlhf_jax.rollout.scoring import member_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.randomness import record_ids


class Asked:
    """The prompts of some records: as the policy reads them, and as the reward model does (with its answer mark)."""

    def __init__(self, spec: RoleSpec, tokenizer: Tokenizer, records: list[dict[str, Any]]):
        mark = [] if spec.answer_mark is None else [spec.answer_mark]
        self.prompts = [prompt_ids(tokenizer, r["prompt"]) for r in records]
        self.marked = [[*prompt, *mark] for prompt in self.prompts]
        self.ids = record_ids([str(r.get("id", i)) for i, r in enumerate(records)])


def calibrate(context: Context, role: Role, policy: Role, mesh: Mesh) -> dict[str, Any]:
    """Folds gain and bias into the head so that the policy's samples score mean 0, standard deviation 1; returns both.

    Every member of an ensemble gets its own, and the figures are lists. The samples answer prompts of the evaluation
    set where there is one: on training prompts the model has learned to score the policy's answers low.
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
    score = jax.jit(lambda weights, batch: member_scores(role.spec, weights, batch["tokens"], batch["lengths"]))

    def load(part: np.ndarray, mine: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": joined[part[mine]], "lengths": totals[part[mine]]}

    def all_scores() -> np.ndarray:
        out = []
        for part in in_batches(count, size, fill=0):
            out.append(fetch(score(role.weights, place_batch(size, partial(load, part), mesh))))
        return np.concatenate(out, axis=1)[:, :count]

    before = all_scores()
    members, head = role.spec.members, role.weights["head"]
    mean, deviation = before.mean(1), before.std(1)
    leading = (members,) if members > 1 else ()

    def per_member(values: np.ndarray, leaf: jax.Array) -> np.ndarray:
        return values.reshape(*leading, *[1] * (leaf.ndim - len(leading)))

    gain = {name: per_member(deviation, leaf) for name, leaf in head.items()}
    shifted = {"kernel": head["kernel"], "bias": head["bias"] - per_member(mean, head["bias"])}
    role.weights = {**role.weights, "head": {name: shifted[name] / gain[name] for name in head}}
    after = all_scores()
    figures = {"mean_before": mean, "std_before": deviation, "mean": after.mean(1), "std": after.std(1)}
    return {"samples": count} | {name: x.tolist() if leading else float(x[0]) for name, x in figures.items()}
