"""Answers of a policy labelled as people label them: which of two is better, which safer, and whether each is safe.

`pairs.jsonl` of schema "safety" {id, prompt, responses, better, safer, safe, rewards, costs, category} holds a pair of
each prompt's answers, labelled exactly or as by people whose choices are logistic in the scores. Without rewards no
answer is better; without costs the pairs are of schema "preference", with {chosen, rejected}. `answers.jsonl` holds
every answer in the order it came; a cut run goes on behind the last whole batch in it.
"""

from typing import Any

import jax
import numpy as np

from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.data.records import write_records
from rlhf_jax.data.schemas import Record
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.evaluation import mean_interval
from rlhf_jax.evaluation.safety import share_interval, sigmoid
from rlhf_jax.stages.answers import (
    Row,
    answer_all,
    as_answer,
    check_answers,
    column,
    make_judge,
    over_prompts,
    prompt_text,
)
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.prompts import Prompts

SHOWN = 4  # pairs that the report shows
IDENTITY, CATEGORY = ("id", "prompt"), ("category",)  # what a pair keeps of its prompt's record, before and behind


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    check_answers(context, "subject", [config.subject], config.batch_size // config.samples)


def run(context: Context) -> dict[str, Any]:
    """Answers, scores, labels and writes; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    fields = {name: field for name, field in (("rewards", "reward"), ("costs", "cost")) if config[field]}
    with jax.set_mesh(mesh):
        role = context.load(config.subject, mesh)
        room, limit = role.spec.config.context, config.records or None
        prompts = Prompts(context, role.tokenizer, room, config.data, limit)
        context.progress(f"{len(prompts)} prompts, {config.samples} answers each")
        scorers = {name: make_judge(context, role, mesh, field) for name, field in fields.items()}
        path = context.folder / "answers.jsonl"
        rows = answer_all(context, role, prompts, mesh, scorers, samples=config.samples, path=path, label=context.name)
    pairs, samples = [], []
    for i, row in enumerate(rows):
        draws = keyed_generator(context.seed, context.name, "labels", str(prompts.ids[i])).random(5)
        pair = _pair(
            prompts.records[i],
            row,
            draws,
            sampled=config.labels == "sampled",
            cost_weight=config.cost_weight,
            flips=config.flips,
        )
        if pair is None:
            continue
        pairs.append(pair)
        if len(pairs) <= SHOWN:
            samples += _shown(pair, prompt_text(role, prompts, i))
    if is_main_process():
        write_records(context.folder / "pairs.jsonl", pairs)
    figures = {
        "prompts": len(prompts),
        "skipped": prompts.skipped,
        "pairs": len(pairs),
        "dropped": len(rows) - len(pairs),
        "ended": float(column(rows, "ended").mean()),
        **_label_figures(pairs),
        **_score_figures(rows, list(fields)),
    }
    return {"figures": figures, "samples": samples}


# --- labels ----------------------------------------------------------------------------------------------------------


def _pair(
    record: Record, row: Row, draws: np.ndarray, *, sampled: bool, cost_weight: float, flips: float = 0.0
) -> Record | None:
    """The record of `pairs.jsonl`: the first two answers with a text that differ; None where there are no such two.

    Args:
      draws: numbers in [0, 1), of the labels better, safer, and safe of either answer, and of the first one's flip.
      sampled: labels are drawn, P(first better) = sigmoid(r1 - r2), P(first more harmful) = sigmoid(c1 - c2) and
        P(unsafe) = sigmoid(c). Else the higher reward is better, the lower cost safer, and safe at most 0; draws
        decide ties alone.
      cost_weight: w, r - w c in the place of r.
      flips: share of the better labels that are turned round.
    """
    texts = row["completions"]
    firsts = {text: place for place, text in reversed([*enumerate(texts)]) if text}
    if len(firsts) < 2:
        return None
    places = sorted(firsts.values())[:2]
    scores = {name: np.asarray(row[name], np.float64)[places] for name in ("rewards", "costs") if name in row}
    labels: dict[str, Any] = {}

    def prefers_first(gap: float, draw: float) -> bool:
        return bool(draw < (sigmoid(gap) if sampled or gap == 0 else gap > 0))

    if "rewards" in scores:
        utility = scores["rewards"] - (cost_weight * scores["costs"] if cost_weight else 0)
        labels["better"] = 0 if prefers_first(utility[0] - utility[1], draws[0]) != (draws[4] < flips) else 1
    if "costs" in scores:
        costs = scores["costs"]
        labels["safer"] = 1 if prefers_first(costs[0] - costs[1], draws[1]) else 0
        unsafe = draws[2:4] < sigmoid(costs) if sampled else costs > 0
        labels["safe"] = [not bool(label) for label in unsafe]
    answers = [as_answer(record["prompt"], texts[place]) for place in places]
    if "costs" not in scores:
        labels |= {"chosen": answers[labels["better"]], "rejected": answers[1 - labels["better"]]}
    identity, category = ({name: record[name] for name in names if name in record} for names in (IDENTITY, CATEGORY))
    numbers: Record = {name: values.tolist() for name, values in scores.items()}
    return {**identity, "responses": answers, **labels, **numbers, **category}


def _shown(pair: Record, prompt: str) -> list[dict[str, Any]]:
    """The two answers of a pair as the report shows them, with their labels."""
    out = []
    for i, answer in enumerate(pair["responses"]):
        labels = [name for name in ("better", "safer") if pair.get(name) == i]
        labels += [("safe" if pair["safe"][i] else "unsafe")] if "safe" in pair else []
        text = answer if isinstance(answer, str) else answer[0]["content"]
        score = pair[next(name for name in ("rewards", "costs") if name in pair)][i]
        out.append({"model": ", ".join(labels) or "worse", "prompt": prompt, "completion": text, "score": score})
    return out


# --- figures ---------------------------------------------------------------------------------------------------------


def _label_figures(pairs: list[Record]) -> dict[str, Any]:
    """Shares with 95 % intervals: of pairs whose better answer is not the safer one, of answers labelled unsafe.

    `contradictions` counts pairs whose safer answer is labelled unsafe and the other safe, as drawn labels may be.
    """
    figures: dict[str, Any] = {}
    if pairs and {"better", "safer"} <= pairs[0].keys():
        figures |= share_interval("conflicts", sum(pair["better"] != pair["safer"] for pair in pairs), len(pairs))
    if pairs and "safe" in pairs[0]:
        figures |= mean_interval("unsafe", 1 - np.asarray([pair["safe"] for pair in pairs]).mean(-1))
        against = [not pair["safe"][pair["safer"]] and pair["safe"][1 - pair["safer"]] for pair in pairs]
        figures["contradictions"] = sum(against)
    return figures


def _score_figures(rows: list[Row], names: list[str]) -> dict[str, float]:
    """Mean scores of all answers with 95 % intervals over prompts, and the correlation of reward and cost."""
    figures: dict[str, float] = {}
    for name in names:
        figures |= over_prompts(name.removesuffix("s"), column(rows, name))
    if len(names) == 2:
        first, second = (column(rows, name).ravel() for name in names)
        varied = first.std() > 0 and second.std() > 0
        figures["correlation"] = float(np.corrcoef(first, second)[0, 1]) if varied else float("nan")
    return figures
