"""What the report shows of a memorization stage: of its conditions where it has them, or of each subject."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.evaluation.memorization import GROUPS
from rlhf_jax.reporting import category_plots, plots
from rlhf_jax.reporting.category_plots import Measured
from rlhf_jax.reporting.plots import Plot, is_number, plot
from rlhf_jax.reporting.tables import Table, memorization_rates, number

MAX_SUBJECTS = 8  # beside conditions, the plots of more subjects would only be in the way

Row = Mapping[str, Any]


def memorization_plots(figures: Mapping) -> list[Plot]:
    """Figures of the conditions where there are any, then of each subject unless conditions stand for too many."""
    conditions = figures.get("conditions") or []
    found = _condition_plots(conditions) if conditions else []
    return found if conditions and len(_subjects(figures)) > MAX_SUBJECTS else found + _subject_plots(figures)


def memorization_tables(figures: Mapping) -> list[Table]:
    """The table of the conditions and that of the subjects, whichever there are."""
    found = []
    if figures.get("conditions"):
        table, subjects = _condition_table(figures["conditions"]), len(_subjects(figures))
        left_out = f"; no plots of the {subjects} single subjects, as they are many" if subjects > MAX_SUBJECTS else ""
        found.append(Table(table.caption + left_out, table.columns, table.rows, table.numeric))
    if figures.get("table"):
        found.append(memorization_rates(figures["table"]))
    return found


def memorization_headlines(figures: Mapping) -> list[tuple[str, str]]:
    """Counterfactual memorization: the largest of four kinds of conditions, or of every subject that has a control."""
    if figures.get("conditions"):
        return _condition_headlines(figures["conditions"])
    return [
        (f"{row['subject']}: counterfactually memorized", f"{100 * row['counterfactual_rate']:.1f} %")
        for row in figures.get("table") or []
        if row["group"] == row["duplicates"] == "all" and is_number(row.get("counterfactual_rate"))
    ]


def _subjects(figures: Mapping) -> list[str]:
    return list(dict.fromkeys(row["subject"] for row in figures.get("table") or []))


# --- subjects ---------------------------------------------------------------------------------------------------------


def _subject_plots(figures: Mapping) -> list[Plot]:
    """Rates by duplicates and extraction curves of each subject, included beside held-out; what a later stage kept."""
    found = []
    for subject in _subjects(figures):
        rows = [row for row in figures["table"] if row["subject"] == subject]
        series = {
            f"{group}, {label}": (group, f"{key}_rate", f"{key}_low", f"{key}_high")
            for group in GROUPS
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
        series = {group: (group, "rate", "low", "high") for group in GROUPS}
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


# --- conditions -------------------------------------------------------------------------------------------------------


def _condition_plots(conditions: Sequence[Row]) -> list[Plot]:
    """What each stage's secrets became, after Pappu et al. 2024 (arXiv 2406.11715); a figure without rows is left out.

    Args:
        conditions: rows {condition, method, planted, group, rate, ...}, one for each condition, stage and group.
    """
    measured = [row for row in conditions if row["n"] and is_number(row["rate"])]
    planted = {
        stage: [row for row in measured if row["planted"] == stage] for stage in ("sft", "preference", "prompts")
    }
    tuned = [row for row in planted["sft"] if row["method"] == "sft"]
    found = _against_kl(planted["sft"], "Fine-tuning secrets, after fine-tuning and after RL", "fine-tuning data")
    found += _against_kl(planted["prompts"], "RL prompts", "prompts of RL")
    if any(row.get("epsilon") is not None for row in tuned):
        rows = sorted(tuned, key=lambda row: -(float("inf") if row.get("epsilon") is None else row["epsilon"]))
        what = "Fine-tuning secrets that fine-tuning with privacy gives back, beside those without"
        found += _by_condition(rows, "Fine-tuning secrets, with privacy and without", what)
    rows = sorted(planted["preference"], key=_place)
    what = "Secrets of the reward model's data that each condition gives back"
    found += _by_condition(rows, "Reward-model secrets: what gives them back", what)
    return found + _likelihood([row for row in rows if is_number(row.get("logprob"))])


def _place(row: Row) -> tuple:
    """The order of conditions: ppo, dpo, ipo, other losses, sft; in each the tightest constraint first."""
    methods = {"ppo": 0, "dpo": 1, "ipo": 2, "sft": 4}
    constraint = row.get("kl_coef") if row["method"] == "ppo" else row.get("beta")
    return methods.get(row["method"], 3), row["method"], -(constraint or 0), -(row.get("learning_rate") or 0)


def _against_kl(rows: Sequence[Row], title: str, source: str) -> list[Plot]:
    """What RL leaves memorized by its KL coefficient, beside the fine-tuned model that had memorized most."""
    trained = sorted((row for row in rows if row["method"] == "ppo"), key=_place)
    if not trained:
        return []
    levels = {}
    for group in GROUPS:
        plain = [row for row in rows if _is(row, method="sft", group=group, epsilon=None)]
        if plain:
            most = max(plain, key=lambda row: row["rate"])
            levels[group] = (f"{group}, after {most['condition']}", most)
    names = list(dict.fromkeys(_value(row, "kl_coef") for row in trained))
    series: dict[tuple[str, str], list[tuple[int, Measured]]] = {}
    for row in sorted(trained, key=lambda row: GROUPS.index(row["group"])):
        private = "" if row.get("epsilon") is None else f", epsilon {_value(row, 'epsilon')}"
        variant = f"learning rate {_value(row, 'learning_rate')}{private}"
        points = series.setdefault((row["group"], variant), [])
        points.append((names.index(_value(row, "kl_coef")), _share(row, baseline=not levels)))
    caption = f"Memorized secrets of the {source} after RL, by its KL coefficient. Bars: 95 % intervals over secrets."
    if levels:
        caption += (
            " Horizontal lines: the fine-tuned model that the legend names, which gives back the most, a band its "
            "interval; dashed, secrets that model never saw."
        )
    elif any(is_number(row["held_out_rate"]) for row in trained):
        caption += " Diamonds: the same in runs that did not hold the secrets."
    shown = {group: (label, _share(row)) for group, (label, row) in levels.items()}
    svg = category_plots.category_lines(names, series, "KL coefficient", "memorized (%)", title=title, levels=shown)
    return [plot(svg, caption + _counts([*trained, *(row for _, row in levels.values())]))]


def _by_condition(rows: Sequence[Row], title: str, what: str) -> list[Plot]:
    """Memorized shares of conditions in the order of their rows."""
    if not rows:
        return []
    names, series = _series(rows, _share)
    caption = f"{what}. Lines: 95 % intervals over secrets."
    if any(is_number(row["held_out_rate"]) for row in rows):
        caption += " Diamonds: the same in runs that did not hold the secrets."
    svg = category_plots.category_rows(names, series, "memorized (%)", title=title, baseline="held-out")
    return [plot(svg, caption + _counts(rows))]


def _likelihood(rows: Sequence[Row]) -> list[Plot]:
    """Mean log-probability of reward-model secrets, which moves before any of them is given back."""
    if not rows:
        return []

    def logprob(row: Row) -> Measured:
        held_out = row.get("held_out_logprob")
        return Measured(row["logprob"], baseline=held_out if is_number(held_out) else None)

    names, series = _series(rows, logprob)
    caption = (
        "Mean log-probability of reward-model secrets: dots in the runs that held them, diamonds in those that did not."
    )
    x_label, title = "log-probability of a secret (nats)", "How likely they became"
    svg = category_plots.category_rows(names, series, x_label, title=title, baseline="held-out", from_zero=False)
    return [plot(svg, caption + _counts(rows, dots=False))]


def _series(
    rows: Sequence[Row], measure: Callable[[Row], Measured]
) -> tuple[list[str], dict[str, list[Measured | None]]]:
    """The conditions, and for each group what was measured of them."""
    names = list(dict.fromkeys(row["condition"] for row in rows))
    cells = {(row["group"], row["condition"]): measure(row) for row in rows}
    present = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    return names, {group: [cells.get((group, name)) for name in names] for group in present}


def _share(row: Row, baseline: bool = True) -> Measured:
    """A row's rate in per cent; a single run is its own mean and has no dot."""
    shares = (row.get(name) for name in ("low", "high", "held_out_rate"))
    low, high, held_out = (100 * float(share) if share is not None else None for share in shares)
    each = [100 * rate for rate in row.get("each") or [] if is_number(rate)]
    return Measured(100 * row["rate"], low, high, held_out if baseline else None, each if len(each) > 1 else ())


def _counts(rows: Sequence[Row], dots: bool = True) -> str:
    """The end of a caption: how many secrets and runs stand behind a point."""
    counts = []
    for name, unit in (("n", "secrets"), ("runs", "runs")):
        values = sorted({row[name] for row in rows})
        span = f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
        counts.append(f"{span} {unit.removesuffix('s') if values == [1] else unit}")
    shown = dots and any(_share(row).each for row in rows)
    return f"{' Small dots: each run.' if shown else ''} Behind each: {', '.join(counts)}."


def _is(row: Row, **wanted: Any) -> bool:
    return all(row.get(name) == value for name, value in wanted.items())


def _value(row: Row, name: str) -> str:
    return f"{row[name]:g}" if is_number(row.get(name)) else number(None)


def _condition_table(rows: Sequence[Row]) -> Table:
    columns = ["condition", "planted in", "group", "secrets", "runs"]
    columns += ["memorized", "held-out", "counterfactual (points)", "log-probability", "held-out log-probability"]
    cells = [
        [
            *(str(row[name]) for name in ("condition", "planted", "group")),
            *(number(row[name]) for name in ("n", "runs")),
            _cell(row, "rate", ""),
            _cell(row, "held_out_rate", "held_out_"),
            _cell(row, "counterfactual", "counterfactual_"),
            *(number(row.get(name)) for name in ("logprob", "held_out_logprob")),
        ]
        for row in rows
    ]
    caption = "conditions: rate in % [95 % interval over secrets]; mean log-probability of a secret in nats"
    return Table(caption, columns, cells, [False] * 3 + [True] * 7)


def _cell(row: Row, name: str, prefix: str) -> str:
    """`24.0 [14.3, 37.4]`, or a dash if nothing was measured."""
    values = [row.get(key) for key in (name, f"{prefix}low", f"{prefix}high")]
    if not is_number(values[0]):
        return number(None)
    rate, *interval = [f"{100 * value:.1f}" for value in values if value is not None and is_number(value)]
    return f"{rate} [{', '.join(interval)}]" if len(interval) == 2 else rate


def _condition_headlines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The largest counterfactual memorization of each stage's secrets after the stages that could give them back."""
    fine_tuning = [row["kl_coef"] for row in rows if _is(row, planted="sft", method="ppo")]
    loosest = min((coefficient for coefficient in fine_tuning if coefficient), default=None)
    kinds: dict[str, dict[str, Any]] = {
        "fine-tuning secrets, after sft": {"planted": "sft", "method": "sft"},
        "fine-tuning secrets, after ppo": {"planted": "sft", "method": "ppo", "kl_coef": loosest},
        "reward-model secrets, after ppo": {"planted": "preference", "method": "ppo"},
        "reward-model secrets, after direct sft": {"planted": "preference", "method": "sft"},
    }
    found = []
    for label, wanted in kinds.items():
        fitting = [row for row in rows if _is(row, **wanted) and is_number(row.get("counterfactual"))]
        if fitting:
            most = max(fitting, key=lambda row: row["counterfactual"])
            what = f"{label}: largest counterfactual memorization ({most['condition']}, {most['group']})"
            found.append((what, f"{100 * most['counterfactual']:.1f} %"))
    return found
