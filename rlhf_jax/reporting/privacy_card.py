"""What the report shows of private stages: their claim together, their runs, and what more of epsilon bought."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_jax.evaluation.trend import jonckheere
from rlhf_jax.reporting import plots
from rlhf_jax.reporting.plots import Plot, is_number, plot
from rlhf_jax.reporting.tables import Table, number


@dataclass(frozen=True)
class Privacy:
    """What the page says of the private stages together."""

    headline: str
    statement: list[str]
    runs: Table
    plots: list[Plot]


def privacy_card(ledger: Mapping | None, results: Mapping[str, Mapping], config: Mapping) -> Privacy | None:
    """What the private stages promise together, and what more of epsilon bought where there are several of them."""
    if ledger is None:
        return None
    claim, runs = ledger["claim"], ledger["runs"].values()
    rows = [
        [
            run["stage"],
            number(run["claim"]["epsilon"]),
            number(run["claim"]["delta"]),
            number(run["claim"]["noise_multiplier"]),
            f"{number(run['claim']['minibatches'])} x {run['claim']['uses']}",
            number(run["claim"]["sampling_rate"]),
            number(run["claim"]["units"]),
            run["data"]["unit"],
            run["state"],
        ]
        for run in runs
    ]
    names = ["stage", "epsilon", "delta", "noise multiplier", "minibatches x uses", "sampling rate", "units", "unit"]
    table = Table("runs", [*names, "run"], rows, [False] + [True] * 6 + [False] * 2)
    headline = f"epsilon {claim['epsilon']:.3g} at delta {claim['delta']:.2g}"
    return Privacy(headline, ledger["statement"], table, _score_against_epsilon(results, config))


def _score_against_epsilon(results: Mapping[str, Mapping], config: Mapping) -> list[Plot]:
    """Held-out score of private ppo stages by epsilon, with a test of its trend, where there are several epsilons.

    Of stages by several rewards the most frequent one counts; the others are controls, shown by what a best_of_n stage
    makes of them with that reward.
    """
    stages = config.get("stages", {})
    trained = {name: figures for name in results if (figures := _private_ppo(results[name])) is not None}
    rewards = {name: stages.get(name, {}).get("reward", "") for name in trained}
    most = max(rewards.values(), key=list(rewards.values()).count, default="")
    scores: dict[str, dict[float, list[float]]] = {"after sft": {}, "after ppo": {}}
    for name, figures in trained.items():
        for label in ("sft", "ppo") if rewards[name] == most else ():
            by_epsilon = scores[f"after {label}"].setdefault(figures["privacy"]["target"], [])
            by_epsilon.append(figures[f"{label}_score"])
    for name, stage in stages.items():
        subject = stage.get("subject", "")
        judged = name in results and stage.get("kind") == "best_of_n" and stage.get("reward") == most
        if judged and rewards.get(subject, most) != most:
            label = f"after ppo on {rewards[subject].rsplit(':')[-1]}"
            by_epsilon = scores.setdefault(label, {}).setdefault(trained[subject]["privacy"]["target"], [])
            by_epsilon.append(results[name]["figures"]["score"])
    private = {epsilon: values for epsilon, values in sorted(scores["after ppo"].items()) if math.isfinite(epsilon)}
    if len(scores["after ppo"]) < 2:
        return []
    caption = "Held-out score against what a stage may spend; bars: 95 % intervals of the mean over runs (t)."
    if len(private) > 1:
        statistic, p = jonckheere(list(private.values()))
        caption += (
            f" Trend over the finite epsilons (Jonckheere-Terpstra, one-sided, exact): J {statistic:g}, p {p:.3g}."
        )
    return [plot(plots.against_epsilon(scores, "held-out score"), caption)]


def _private_ppo(result: Mapping) -> Mapping | None:
    """The figures of a private ppo stage that was judged; None of any other stage."""
    figures = result.get("figures") or {}
    is_one = result.get("kind") == "ppo" and "privacy" in figures and is_number(figures.get("ppo_score"))
    return figures if is_one else None
