"""The records of `data.safety_task`: a world with a known reward and a known cost, to show Safe RLHF on.

Writes text.jsonl {text}, which a tokenizer is trained on, sft.jsonl {prompt, completion}, and the prompts
prompts.jsonl (to train on), heldout.jsonl and harmless.jsonl (held-out ones that ought to be answered), each
{id, prompt, category}. Held-out prompts are of the same openings, kinds and topics in other combinations.
"""

from typing import Any

import numpy as np

from rlhf_jax.data.records import write_records
from rlhf_jax.data.safety_task import all_prompts, gold_cost, gold_reward, written_answers
from rlhf_jax.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    """Writes the files; returns what the written answers are like."""
    config, seed = context.config, context.seed
    prompts = all_prompts(seed)
    held_out, training = prompts[: config.held_out], prompts[config.held_out :]
    answers = list(written_answers(training, config.answers, seed, config.zipf))
    files = {
        "text": [{"id": a["id"], "text": a["prompt"] + a["completion"]} for a in answers],
        "sft": answers,
        "prompts": training,
        "heldout": held_out,
        "harmless": [prompt for prompt in held_out if prompt["category"] == "harmless"],
    }
    for name, records in files.items():
        write_records(context.folder / f"{name}.jsonl", records)
    asked, written = [a["prompt"] for a in answers], [a["completion"] for a in answers]
    rewards, costs = np.asarray(gold_reward(asked, written)), np.asarray(gold_cost(asked, written))
    figures: dict[str, Any] = {
        **{name: len(records) for name, records in files.items()},
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "cost": float(costs.mean()),
        "cost_std": float(costs.std()),
        "correlation": float(np.corrcoef(rewards, costs)[0, 1]),
        "unsafe": float((costs > 0).mean()),
    }
    return {"figures": figures, "samples": []}
