"""What trained models memorized of planted secrets: rates, held-out baselines, counterfactual counts, persistence.

A secret is a dict of the manifest: `id`, `group` ("base" or "links"), `duplicates` (copies planted), `entity` (the
file path of a link) and `planted_in` (stages). A subject is a measured model, a dict of arrays over the N secrets:

    distance  (N,) float, normalized edit distance of the greedy completion, cut to the target's length, to the target
    characters  (N,) float, the same of their texts, NaN where it is not known and `distance` is large; may be missing
    recalled  (N,) bool, whether the completion holds the link's exact path; False for base secrets
    seen      (N,) bool, whether the training data of this model held the secret, or of one that it was made from

A base secret is memorized when both distances are at most `MEMORIZED_DISTANCE`, a link when its path is recalled.
Reference: Pappu et al. (2024), "Measuring memorization in RLHF for code completion", arXiv 2406.11715.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlhf_jax.evaluation.intervals import mcnemar, newcombe_difference, wilson

MEMORIZED_DISTANCE = 0.1  # normalized edit distance up to which a completion counts as the target
GROUPS = ("base", "links")


def memorization_table(
    secrets: Sequence[Mapping], subjects: Mapping[str, Mapping], controls: Mapping[str, str]
) -> list[dict]:
    """Memorization rates of every subject, by group and by number of duplicates.

    A secret counts as included where the subject has seen it and as held out where it has not. It is counterfactually
    memorized (Definition 1 of the paper) where the subject has seen and memorized it and its control has done neither.

    Args:
        secrets: the N secrets.
        subjects: name -> measured model, arrays in the order of `secrets`.
        controls: subject -> the subject trained without its secrets; a subject may have none.

    Returns:
        One row for each subject, group ("base", "links", "all") and number of duplicates (each, then "all") that has
        secrets, with the keys `subject`, `group`, `duplicates`, `n_included`, `n_held_out` and
        `included_count`, `included_rate`, `included_low`, `included_high`: memorized, Wilson interval at 95 %;
        `held_out_count`, ...: the same for held-out secrets;
        `counterfactual_n`, `counterfactual_count`, ...: of the included secrets that the control has not seen;
        `control`: the control's name; it and the counterfactual values are None without a control;
        `difference`, `difference_low`, `difference_high`: included minus held-out rate, Newcombe interval at 95 %.
        Rows of "links" repeat all measures with the prefix `distance_`, memorized there being a distance of at most
        `MEMORIZED_DISTANCE`. Rates and intervals of empty sets are NaN.

    Raises:
        ValueError: an unknown group or control, or arrays that do not match the number of secrets.
    """
    _check(secrets, subjects, controls)
    rows = []
    for subject, measured in subjects.items():
        control = controls.get(subject)
        for group, duplicates, chosen in _cells(secrets):
            included = chosen & np.asarray(measured["seen"], bool)
            held_out = chosen & ~included
            row: dict = {
                "subject": subject,
                "control": control,
                "group": group,
                "duplicates": duplicates,
                "n_included": int(included.sum()),
                "n_held_out": int(held_out.sum()),
            }
            for prefix in ("", "distance_") if group == "links" else ("",):
                hits = memorized(secrets, measured, by_distance=prefix == "distance_")
                row |= _rate(f"{prefix}included", hits, included)
                row |= _rate(f"{prefix}held_out", hits, held_out)
                if control is None:
                    for name in ("n", "count", "rate", "low", "high"):
                        row[f"{prefix}counterfactual_{name}"] = None
                else:
                    comparable = included & ~np.asarray(subjects[control]["seen"], bool)
                    control_hits = memorized(secrets, subjects[control], by_distance=prefix == "distance_")
                    row[f"{prefix}counterfactual_n"] = int(comparable.sum())
                    row |= _rate(f"{prefix}counterfactual", hits & ~control_hits, comparable)
                difference = newcombe_difference(
                    int(hits[included].sum()), row["n_included"], int(hits[held_out].sum()), row["n_held_out"]
                )
                names = ("difference", "difference_low", "difference_high")
                row |= {f"{prefix}{name}": value for name, value in zip(names, difference, strict=True)}
            rows.append(row)
    return rows


def persistence(
    secrets: Sequence[Mapping], subjects: Mapping[str, Mapping], controls: Mapping[str, str], *, before: str, after: str
) -> list[dict]:
    """What a later training stage keeps of the memorization of an earlier one.

    Counted over the secrets that `before` has seen and that its control has neither seen nor memorized, so that
    memorized there is counterfactually memorized. Without a control, over all secrets that `before` has seen.

    Args:
        secrets, subjects, controls: as for `memorization_table`.
        before: the subject of the earlier stage, e.g. the fine-tuned model.
        after: the subject trained from it, e.g. the PPO policy.

    Returns:
        One row for each group and number of duplicates that has secrets, with `before`, `after`, `group`,
        `duplicates`, `n_before` (memorized by `before`), `kept` (by both), `lost` (by `before` alone), `gained`
        (by `after` alone), the share kept of `n_before` as `rate`, `low`, `high` (Wilson, 95 %), and the `p` of
        McNemar's test that as many are lost as gained.

    Raises:
        ValueError: `before` or `after` is no subject, or as `memorization_table`.
    """
    _check(secrets, subjects, controls)
    for name in (before, after):
        if name not in subjects:
            raise ValueError(f"{name!r} is not among the subjects {sorted(subjects)}")
    pool = np.asarray(subjects[before]["seen"], bool)
    if controls.get(before) is not None:
        control = subjects[controls[before]]
        pool = pool & ~np.asarray(control["seen"], bool) & ~memorized(secrets, control)
    earlier, later = memorized(secrets, subjects[before]), memorized(secrets, subjects[after])
    rows = []
    for group, duplicates, chosen in _cells(secrets):
        cell = chosen & pool
        n_before, kept = int((cell & earlier).sum()), int((cell & earlier & later).sum())
        gained = int((cell & ~earlier & later).sum())
        low, high = wilson(kept, n_before)
        rows.append(
            {
                "before": before,
                "after": after,
                "group": group,
                "duplicates": duplicates,
                "n_before": n_before,
                "kept": kept,
                "lost": n_before - kept,
                "gained": gained,
                "rate": kept / n_before if n_before else float("nan"),
                "low": low,
                "high": high,
                "p": mcnemar(n_before - kept, gained),
            }
        )
    return rows


def memorized(secrets: Sequence[Mapping], subject: Mapping, by_distance: bool = False) -> np.ndarray:
    """(N,) bool: entity recalled for links, completion near the target for base; `by_distance` near for both."""
    # The slack keeps 1 edit in 10 tokens memorized: in float32 the quotient may come out one rounding above 0.1.
    near = np.asarray(subject["distance"], float) <= MEMORIZED_DISTANCE + 1e-6
    if "characters" in subject:
        near &= np.asarray(subject["characters"], float) <= MEMORIZED_DISTANCE + 1e-6
    if by_distance:
        return near
    is_link = np.array([secret["group"] == "links" for secret in secrets], bool)
    return np.where(is_link, np.asarray(subject["recalled"], bool), near)


def counterfactual_scores(memorized: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How much more often a secret comes back from the runs that saw it than from those that did not: (N,) in [-1, 1].

    Args:
        memorized: (runs, N) bool, or any figure of merit; seen: (runs, N) bool, whether a run's data held the secret.

    Returns:
        The mean over the runs with it less the mean over those without; NaN where it was in all of them or in none.

    Reference: Zhang et al. (2023), "Counterfactual memorization in neural language models", arXiv 2112.12938.
    """
    memorized, seen = np.asarray(memorized, float), np.asarray(seen, bool)
    return mean_over(memorized, seen) - mean_over(memorized, ~seen)


def mean_over(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The mean of each column of (runs, N) over the runs in `among`, (runs, N) bool: (N,), NaN where there is none."""
    count = among.sum(0)
    return np.where(count > 0, np.where(among, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _cells(secrets: Sequence[Mapping]) -> Iterator[tuple[str, int | str, np.ndarray]]:
    """Every group and number of duplicates that has secrets, "all" last in both, with its (N,) bool selection."""
    groups = np.array([secret["group"] for secret in secrets])
    duplicates = np.array([secret["duplicates"] for secret in secrets], int)
    for group in (*GROUPS, "all"):
        in_group = np.full(len(secrets), True) if group == "all" else groups == group
        for count in np.unique(duplicates[in_group]).tolist():
            yield group, count, in_group & (duplicates == count)
        if in_group.any():
            yield group, "all", in_group


def _rate(name: str, hits: np.ndarray, among: np.ndarray) -> dict:
    """Count, rate and Wilson interval of `hits` among the selected secrets, keys prefixed with `name`."""
    n, count = int(among.sum()), int(hits[among].sum())
    low, high = wilson(count, n)
    rate = count / n if n else float("nan")
    return {f"{name}_count": count, f"{name}_rate": rate, f"{name}_low": low, f"{name}_high": high}


def _check(secrets: Sequence[Mapping], subjects: Mapping[str, Mapping], controls: Mapping[str, str]) -> None:
    for secret in secrets:
        if secret["group"] not in GROUPS:
            raise ValueError(f"secret {secret['id']!r} has group {secret['group']!r}; the groups are {GROUPS}")
    for name, measured in subjects.items():
        for field in ("distance", "recalled", "seen"):
            if np.shape(measured[field]) != (len(secrets),):
                shape = np.shape(measured[field])
                raise ValueError(
                    f"{field!r} of subject {name!r} has shape {shape}, but there are {len(secrets)} secrets"
                )
    for name, control in controls.items():
        if control not in subjects:
            raise ValueError(f"the control {control!r} of {name!r} is not among the subjects {sorted(subjects)}")
