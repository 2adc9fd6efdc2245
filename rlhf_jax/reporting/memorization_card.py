"""What the report shows of a memorization stage."""

from collections.abc import Mapping

from rlhf_jax.reporting import plots
from rlhf_jax.reporting.plots import Plot, is_number, plot


def memorization_plots(figures: Mapping) -> list[Plot]:
    """Rates by duplicates and extraction curves of each subject, included beside held-out; what a later stage kept."""
    found = []
    table = figures.get("table") or []
    for subject in dict.fromkeys(row["subject"] for row in table):
        rows = [row for row in table if row["subject"] == subject]
        series = {
            f"{group}, {label}": (group, f"{key}_rate", f"{key}_low", f"{key}_high")
            for group in ("base", "links")
            for key, label in (("included", "included"), ("held_out", "held-out"))
        }
        caption = f"Memorized by {subject}: share of secrets in its training data and of held-out ones, 95 % intervals."
        found.append(plot(_bars(rows, series, "memorized (%)", str(subject)), caption))
        curves = [row for row in figures.get("extraction") or [] if row["subject"] == subject]
        if curves:
            caption = f"Secrets that sampling {subject} gets out, by the number of tries; nothing is sampled for it."
            found.append(plot(plots.extraction(curves), caption))
    kept = figures.get("persistence") or []
    for before, after in dict.fromkeys((row["before"], row["after"]) for row in kept):
        rows = [row for row in kept if (row["before"], row["after"]) == (before, after)]
        series = {group: (group, "rate", "low", "high") for group in ("base", "links")}
        caption = f"Of the secrets memorized by {before}, the share still memorized by {after}, 95 % intervals."
        found.append(plot(_bars(rows, series, "still memorized (%)", f"{before} to {after}"), caption))
    return found


def _bars(rows: list[dict], series: Mapping[str, tuple[str, str, str, str]], y_label: str, title: str) -> str:
    """Bars by number of duplicates; a series is the group of its rows and the keys of value, low and high."""
    counts = dict.fromkeys(row["duplicates"] for row in rows)
    categories = sorted((count for count in counts if count != "all"), key=float) + ["all"] * ("all" in counts)
    cells = {(row["group"], row["duplicates"]): row for row in rows}
    estimates = {
        label: [tuple(cells.get((group, category), {}).get(key) for key in keys) for category in categories]
        for label, (group, *keys) in series.items()
        if any((group, category) in cells for category in categories)
    }
    baselines = [label for label in estimates if label.endswith("held-out")]
    names = [str(category) for category in categories]
    return plots.interval_bars(names, estimates, "copies planted", y_label, title=title, baselines=baselines)


def memorization_headlines(figures: Mapping) -> list[tuple[str, str]]:
    """Counterfactual memorization of every subject that has a control, over all its secrets."""
    return [
        (f"{row['subject']}: counterfactually memorized", f"{100 * row['counterfactual_rate']:.1f} %")
        for row in figures.get("table") or []
        if row["group"] == row["duplicates"] == "all" and is_number(row.get("counterfactual_rate"))
    ]
