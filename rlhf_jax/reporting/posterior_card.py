"""What the report shows of a laplace stage: whether it is rightly sure, what evidence chose, and where it doubts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import FuncFormatter, NullFormatter

from rlhf_jax.reporting.plots import BLUE, ORANGE, RED, STYLE, Plot, add_legend, as_svg, is_number, new_axes, plot
from rlhf_jax.reporting.tables import Table, number

PARTS = {"evaluation": "held-out", "shifted": "shifted"}  # of the figures
METHODS = {"map": "MAP", "temperature": "MAP, tempered", "laplace": "Laplace"}
DRAWN = ("curve", "validation", "members", "notes", *PARTS)  # figures that are no plain values

# --- tables ----------------------------------------------------------------------------------------------------------


def posterior_headlines(figures: Mapping) -> list[tuple[str, str]]:
    """Calibration of the mean's probabilities and of the posterior's, on every part."""
    return [
        (f"{PARTS[part]}: calibration error, MAP to Laplace", f"{_ece(rows, 'map')} → {_ece(rows, 'laplace')} %")
        for part, rows in _parts(figures).items()
    ]


def posterior_warnings(figures: Mapping) -> list[str]:
    """What the fit had to say of itself."""
    return list(dict.fromkeys(f"Warning: {note}" for member in _members(figures) for note in member.get("notes") or []))


def posterior_tables(figures: Mapping) -> list[Table]:
    """Calibration and detected errors of each method on each part; what an ensemble's members chose."""
    found, cells = [], []
    for part, rows in _parts(figures).items():
        for name, label in METHODS.items():
            own = rows[name]
            cells.append([PARTS[part], label, f"{rows['n']:,}", f"{own['nll']:.4f}", _ece(rows, name)])
            cells[-1].append(_auroc(rows["detection"], name))
        cells.append([PARTS[part], "standard deviation", f"{rows['n']:,}", "–", "–", _auroc(rows["detection"], "std")])
    if cells:
        columns = ["records", "probabilities of", "n", "loss (nats)", "calibration error (%)", "AUROC of wrong calls"]
        caption = "how rightly sure: AUROC of telling wrong calls from right ones by the lack of confidence"
        found.append(Table(caption, columns, cells, [False, False, True, True, True, True]))
        distances = [
            [PARTS[part], _interval(rows, "accuracy", 100), _interval(rows["distance"], "spearman", 1)]
            + [number(rows[name]) for name in ("variance_difference", "variance_score")]
            for part, rows in _parts(figures).items()
        ]
        columns = ["records", "accuracy (%)", "rank correlation", "variance of what decides", "variance of a score"]
        caption = "variance, and its rank correlation with the distance to the nearest training answer [95 % interval]"
        found.append(Table(caption, columns, distances, [False] + [True] * 4))
    members = figures.get("members") or []
    if members:
        names = [name for name, value in members[0].items() if is_number(value)]
        each = [[str(i + 1), *(number(member[name]) for name in names)] for i, member in enumerate(members)]
        heads = ["member", *(name.replace("_", " ") for name in names)]
        found.append(Table("members of the ensemble", heads, each, [True] * len(heads)))
    return found


def _parts(figures: Mapping) -> dict[str, Mapping]:
    return {part: figures[part] for part in PARTS if figures.get(part)}


def _members(figures: Mapping) -> Sequence[Mapping]:
    return figures.get("members") or [figures]


def _ece(rows: Mapping, name: str) -> str:
    return f"{100 * rows[name]['expected_calibration_error']:.1f}"


def _auroc(detection: Mapping, name: str) -> str:
    value = detection.get(name)
    return f"{value:.3f}" if is_number(value) else number(None)


def _interval(row: Mapping, name: str, scale: float) -> str:
    values = [row.get(f"{name}{side}") for side in ("", "_low", "_high")]
    if not all(map(is_number, values)):
        return number(None)
    digits = 1 if scale == 100 else 2
    value, low, high = (f"{scale * x:.{digits}f}" for x in values if x is not None)
    return f"{value} [{low}, {high}]"


# --- plots -----------------------------------------------------------------------------------------------------------


def posterior_plots(figures: Mapping) -> list[Plot]:
    """Reliability on each part, evidence over the prior's precision, and variance over distance."""
    found = []
    for part, rows in _parts(figures).items():
        caption = (
            f"Reliability on {rows['n']:,} {PARTS[part]} records: how often a call is right, by the probability that "
            "it is given; above the diagonal it is too doubtful, below too sure. Lines: 95 % intervals (Wilson)."
        )
        found.append(plot(reliability({label: rows[name]["reliability"] for name, label in METHODS.items()}), caption))
    members = [member for member in _members(figures) if member.get("curve")]
    if members:
        lines = "; a line a member" if len(members) > 1 else ""
        found.append(plot(evidence(members), f"Log evidence of one prior for all weights, near its maximum{lines}."))
    points = {PARTS[part]: rows["distance"]["points"] for part, rows in _parts(figures).items()}
    if any(points.values()):
        caption = "Variance of answers' scores over the distance to the nearest answer of the training data."
        found.append(plot(variance_over_distance(points), caption))
    return found


def reliability(methods: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Observed against stated probability with intervals, a mark and a place beside the others for each method.

    Args:
        methods: label -> rows of `evaluation.calibration.reliability`.
    """
    styles = ((BLUE, "o", "-"), ("#5a6575", "s", ":"), (ORANGE, "^", "--"))
    with rc_context(STYLE):
        figure, axes = new_axes("stated probability of the call", "share of right calls", 3.3)
        axes.plot([0.5, 1], [0.5, 1], color="#8a94a3", linewidth=0.8)
        for i, ((label, rows), (color, marker, line)) in enumerate(zip(methods.items(), styles, strict=False)):
            x = [row["predicted"] + 0.004 * (i - 1) for row in rows]
            y = [row["observed"] for row in rows]
            below = [row["observed"] - row["observed_low"] for row in rows]
            above = [row["observed_high"] - row["observed"] for row in rows]
            bars: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "marker": marker, "markersize": 4.5}
            axes.errorbar(x, y, yerr=[below, above], color=color, linestyle=line, label=label, **bars)
        axes.set_xlim(0.49, 1.01)
        add_legend(axes)
        return as_svg(figure)


def evidence(members: Sequence[Mapping[str, Any]]) -> str:
    """Log evidence over the prior's precision, what was chosen dashed; far below the maximum the axis ends.

    Args:
        members: {"curve": rows of {"precision", "evidence"}, "precision": the chosen one}; of a precision for every
            layer none is marked.
    """
    with rc_context(STYLE):
        figure, axes = new_axes("prior precision", "log evidence (nats)")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, place: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        ends = []
        for i, member in enumerate(members):
            x, y = (np.asarray([row[name] for row in member["curve"]]) for name in ("precision", "evidence"))
            axes.plot(x, y, color=BLUE, alpha=1.0 if i == 0 else 0.5)
            ends.append((float(y.max()), float(np.median(y))))
            if is_number(member.get("precision")):
                label = {"label": f"chosen: {number(member['precision'])}"} if len(members) == 1 else {}
                axes.axvline(member["precision"], color=RED, linestyle="--", linewidth=1.2, **label)
        top, middle = max(top for top, _ in ends), min(middle for _, middle in ends)
        room = (top - middle) or 1.0
        axes.set_ylim(middle - 0.2 * room, top + 0.1 * room)
        if axes.get_legend_handles_labels()[1]:
            add_legend(axes)
        return as_svg(figure)


def variance_over_distance(parts: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Single answers by their distance from the training data and the variance of their score.

    Args:
        parts: label -> rows of {"distance", "variance"}.
    """
    with rc_context(STYLE):
        figure, axes = new_axes("distance to the nearest training answer", "variance of the score")
        for (label, rows), (color, marker) in zip(parts.items(), ((BLUE, "o"), (ORANGE, "^")), strict=False):
            x, y = ([row[name] for row in rows] for name in ("distance", "variance"))
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5, "markeredgewidth": 0}
            axes.plot(x, y, linestyle="none", alpha=0.6, label=label, **style)
        axes.set_ylim(bottom=0)
        add_legend(axes)
        return as_svg(figure)
