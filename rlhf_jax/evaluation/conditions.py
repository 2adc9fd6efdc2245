"""What a sweep shows of planted secrets: conditions, each of several runs whose data hold complementary halves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation.intervals import newcombe_difference, wilson
from rlhf_jax.evaluation.memorization import GROUPS, mean_over, memorized

Array = np.ndarray


def condition_rows(
    secrets: Sequence[Mapping], subjects: Mapping[str, Mapping], conditions: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """How much of what was planted in which stage each condition gives back.

    Args:
      secrets: N dicts of the manifest, with the `stage` whose data holds each ("" where it is not known).
      subjects: as for `evaluation.memorization`, with `logprob` (N,) beside the rest.
      conditions: name -> the subjects that repeat one another, each a run on one half of the secrets.

    Returns:
      One row for each condition, planted stage and group that has secrets: {condition, planted, group, runs, n, rate,
      low, high, held_out_n, held_out_rate, held_out_low, held_out_high, counterfactual, counterfactual_low,
      counterfactual_high, each, logprob, held_out_logprob}. `rate` is the mean over the `n` secrets that some run held
      of how often those runs give each back; `held_out_rate` the same over the runs that did not hold it.
      `counterfactual` is the difference over the secrets that have runs of both kinds, the mean of
      `counterfactual_scores`. `each` is the rate in every run. What has no secrets is None.

    Intervals are Wilson's and Newcombe's at 95 % with as many trials as secrets: several runs are no further trials of
    a secret, which makes them too wide rather than too narrow.
    """
    rows = []
    for name, members in conditions.items():
        runs = [subjects[member] for member in members]
        seen = np.stack([np.asarray(run["seen"], bool) for run in runs])
        hits = np.stack([memorized(secrets, run) for run in runs]).astype(float)
        logprobs = np.stack([np.asarray(run["logprob"], float) for run in runs])
        for planted, group, chosen in _cells(secrets):
            held, had = seen[:, chosen], hits[:, chosen]
            row = {"condition": name, "planted": planted, "group": group, "runs": len(runs)}
            row |= _share("", had, held) | _share("held_out_", had, ~held) | _counterfactual(had, held)
            row["each"] = [_mean(run_hits[run_held]) for run_hits, run_held in zip(had, held, strict=True)]
            row["logprob"] = _mean(logprobs[:, chosen][held])
            row["held_out_logprob"] = _mean(logprobs[:, chosen][~held])
            rows.append(row)
    return rows


def _cells(secrets: Sequence[Mapping]) -> Iterator[tuple[str, str, Array]]:
    """Every stage in which secrets are planted and every group, with its (N,) bool selection."""
    stages = np.array([secret.get("stage", "") for secret in secrets])
    groups = np.array([secret["group"] for secret in secrets])
    for stage in dict.fromkeys(stages.tolist()):
        for group in GROUPS:
            chosen = (stages == stage) & (groups == group)
            if chosen.any():
                yield stage, group, chosen


def _share(name: str, hits: Array, among: Array) -> dict[str, Any]:
    shares = mean_over(hits, among)
    shares = shares[~np.isnan(shares)]
    n = len(shares)
    if not n:
        return {f"{name}n": 0, f"{name}rate": None, f"{name}low": None, f"{name}high": None}
    low, high = wilson(float(shares.sum()), n)
    return {f"{name}n": n, f"{name}rate": float(shares.mean()), f"{name}low": low, f"{name}high": high}


def _counterfactual(hits: Array, seen: Array) -> dict[str, Any]:
    both = seen.any(0) & ~seen.all(0)
    with_it, without = (mean_over(hits, among)[both] for among in (seen, ~seen))
    n = int(both.sum())
    found = newcombe_difference(float(with_it.sum()), n, float(without.sum()), n) if n else (None, None, None)
    return dict(zip(("counterfactual", "counterfactual_low", "counterfactual_high"), found, strict=True))


def _mean(values: Array) -> float | None:
    return float(values.mean()) if values.size else None
