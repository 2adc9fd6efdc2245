"""Plots over categories, such as the conditions of a sweep: figures with intervals, baselines and each run's value."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from rlhf_jax.reporting.plots import FIGURE_SIZE, PALETTE, STYLE, add_legend, as_svg, new_axes


@dataclass(frozen=True)
class Measured:
    """A figure as a plot of categories shows it: with its 95 % interval, what it is compared with, and each run's."""

    value: float
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    each: Sequence[float] = ()


def category_lines(
    categories: Sequence[str],
    series: Mapping[tuple[str, str], Sequence[tuple[int, Measured]]],
    x_label: str,
    y_label: str,
    *,
    title: str,
    levels: Mapping[str, tuple[str, Measured]],
) -> str:
    """Lines over evenly spaced categories with intervals, runs as small dots and baselines as hollow diamonds.

    Args:
        categories: the C places of the x axis.
        series: (group, variant) -> (place, figure) from left to right; a group has one colour, a variant one marker.
        x_label, y_label: axis labels with units.
        title: stands above the legend.
        levels: group -> label and figure of a horizontal line in its colour, its interval a band, its baseline dashed.
    """
    groups, variants = ([*dict.fromkeys(key[i] for key in series)] for i in (0, 1))
    colors = dict(zip(dict.fromkeys([*groups, *levels]), PALETTE, strict=False))
    with rc_context(STYLE):
        figure, axes = new_axes(x_label, y_label, FIGURE_SIZE[1] + 0.17 * (len(series) + len(levels)))
        for i, ((group, variant), points) in enumerate(series.items()):
            x = [k + 0.14 * (i - (len(series) - 1) / 2) for k, _ in points]
            label = f"{group}, {variant}" if len(variants) > 1 else group
            marker = "os^Dv*"[variants.index(variant) % 6]
            values = [point.value for _, point in points]
            axes.plot(x, values, color=colors[group], marker=marker, markersize=4.5, label=label)
            for place, (_, point) in zip(x, points, strict=True):
                _details(axes, point, place, place + 0.06, colors[group], upright=True)
                if point.baseline is not None:
                    axes.plot(place, point.baseline, clip_on=False, **_hollow(colors[group]))
        for group, (label, level) in levels.items():
            if level.low is not None and level.high is not None:
                axes.axhspan(level.low, level.high, color=colors[group], alpha=0.15, linewidth=0)
            axes.axhline(level.value, color=colors[group], linewidth=1.2, label=textwrap.fill(label, 54))
            if level.baseline is not None:
                axes.axhline(level.baseline, color=colors[group], linewidth=1.2, linestyle="--")
        axes.set_xticks(range(len(categories)), categories)
        axes.set_xlim(-0.5, len(categories) - 0.5)
        axes.set_ylim(-0.03 * axes.get_ylim()[1], axes.get_ylim()[1])
        axes.grid(axis="x", visible=False)
        add_legend(axes, title=title, columns=1)
        return as_svg(figure)


def category_rows(
    categories: Sequence[str],
    series: Mapping[str, Sequence[Measured | None]],
    x_label: str,
    *,
    title: str,
    baseline: str,
    from_zero: bool = True,
) -> str:
    """Horizontal bars of each category with intervals, runs as small dots and baselines as hollow diamonds.

    Args:
        categories: the C groups of bars, from the top.
        series: label -> C figures; None leaves a gap.
        x_label: axis label with its unit.
        title: stands above the legend.
        baseline: what the diamonds are.
        from_zero: whether a bar starts at 0; else a dot stands at the value, and a line joins it to its baseline.
    """
    height = 0.8 / len(series)
    with rc_context(STYLE):
        figure, axes = new_axes(x_label, "", 1.1 + len(categories) * max(0.3, 0.08 + 0.14 * len(series)))
        for i, (label, color) in enumerate(zip(series, PALETTE, strict=False)):
            axes.plot([], [], color=color, label=label, **({"linewidth": 7} if from_zero else _DOT))
            for k, point in enumerate(series[label]):
                y = k + (i - (len(series) - 1) / 2) * height
                if point is None:
                    continue
                if from_zero:
                    axes.barh(y, point.value, height * 0.9, color=color)
                else:
                    axes.plot(point.value, y, color=color, **_DOT)
                _details(axes, point, y, y + 0.3 * height, "#2b3442", upright=False)
                if point.baseline is not None:
                    axes.plot(point.baseline, y, clip_on=False, **_hollow(color))
                    if not from_zero:
                        axes.plot([point.value, point.baseline], [y] * 2, color=color, linewidth=1, zorder=1.9)
        if any(point and point.baseline is not None for points in series.values() for point in points):
            axes.plot([], [], **_hollow("#2b3442"), label=baseline)
        axes.set_yticks(range(len(categories)), [textwrap.fill(name, 25) for name in categories], fontsize=8.5)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        if from_zero:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        add_legend(axes, title=title)
        return as_svg(figure)


_DOT: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none"}


def _details(axes, point: Measured, place: float, beside: float, color: str, *, upright: bool) -> None:
    """A figure's interval at its place and its runs beside it, along the y axis where upright."""
    intervals = [] if point.low is None or point.high is None else [point.low, point.high]
    dots: dict[str, Any] = {"marker": ".", "markersize": 3.5, "linestyle": "none", "clip_on": False, "zorder": 3}
    line: dict[str, Any] = {"marker": "_" if upright else "|", "markersize": 4, "linewidth": 1}
    for values, at, style in ((intervals, place, line), (point.each, beside, dots)):
        places = [at] * len(values)
        if places:  # an empty line that is not clipped would take room at the figure's corner
            axes.plot(*((places, values) if upright else (values, places)), color=color, **style)


def _hollow(color: str) -> dict[str, Any]:
    face = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 1}
    return {"marker": "D", "markersize": 4, "linestyle": "none", "zorder": 3, **face}
