"""What the report shows of uncertain reward models: gold while proxies are optimized, and how sure they are rightly."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import FixedLocator, NullLocator

from rlhf_jax.reporting.plots import (
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    STYLE,
    Plot,
    add_legend,
    as_svg,
    is_number,
    new_axes,
    plot,
)
from rlhf_jax.reporting.posterior_card import (
    DRAWN,
    posterior_headlines,
    posterior_plots,
    posterior_tables,
    posterior_warnings,
)
from rlhf_jax.reporting.tables import Table, number

GREY = "#5a6575"
KINDS = {  # of a proxy's score: how its line looks, by colour, dash and mark
    "none": ("mean", BLUE, "-", "o"),
    "std": ("mean - {k} std", ORANGE, "--", "^"),
    "variance": ("mean - {k} variance", GREEN, "-.", "s"),
    "worst": ("worst member", PINK, ":", "D"),
    "oracle": ("gold itself", GREY, "-", ""),
}
PROXIES = ((BLUE, "o"), (ORANGE, "^"), (GREEN, "s"), (PINK, "D"), (SKY, "v"))
POLICIES = ((RED, "v"), (BLUE, "P"), (GREEN, "X"), (PINK, "*"), (ORANGE, "<"))
LONG = 22  # letters of the longest label that leaves room for a second column
KL = "KL from the policy (nats, root scale)"
GOLD = "gold (SD of the policy's own)"

# --- what the page calls ---------------------------------------------------------------------------------------------


def add_uncertainty(section: Any, figures: Mapping) -> None:
    """Adds to a section of the page what a laplace or an overoptimization stage found."""
    if section.kind == "laplace":
        section.warnings += posterior_warnings(figures)
        section.plots += posterior_plots(figures)
        section.tables[:0] = posterior_tables(figures)
    if section.kind == "overoptimization":
        section.warnings += overoptimization_warnings(figures)
        section.plots += overoptimization_plots(figures)
        section.tables[:0] = overoptimization_tables(figures)


def uncertainty_headlines(name: str, kind: str | None, figures: Mapping) -> list[tuple[str, str]]:
    """What the strip at the top says of a stage of this kind."""
    if kind == "laplace":
        return [(f"{name}, {label}", value) for label, value in posterior_headlines(figures)]
    return overoptimization_headlines(figures) if kind == "overoptimization" else []


def shown_by_page(kind: str, figures: Mapping) -> Mapping:
    """The figures that are left to the page's plain tables."""
    own = {"overoptimization": ("conditions", "curves", "sweep", "chosen", "policies"), "laplace": DRAWN}.get(kind, ())
    return {name: value for name, value in figures.items() if name not in own}


# --- over-optimization: headlines, warnings, tables ------------------------------------------------------------------


def overoptimization_headlines(figures: Mapping) -> list[tuple[str, str]]:
    """Of each proxy gold by its mean at the largest n, and what the best adjustment adds to it."""
    found, rows = [], figures.get("conditions") or []
    for row in rows:
        if row["adjustment"] == "none":
            found.append((f"{row['proxy']}: gold by the mean, from its peak to n = {figures['pool']:,}", _way(row)))
            gains = [other for other in rows if other["proxy"] == row["proxy"] and "gain" in other]
            if gains:
                best = max(gains, key=lambda other: other["gain"])
                found.append((f"{row['proxy']}: gold that {_label(best)} adds there", _cell(best, "gain")))
    return found


def overoptimization_warnings(figures: Mapping) -> list[str]:
    """What the pool cannot show: a fall behind its end."""
    return [
        f"{row['proxy']}: gold by the mean is highest at the last n: the peak may lie beyond n = {figures['pool']:,}."
        for row in figures.get("conditions") or []
        if row["adjustment"] == "none" and row["peak_n"] == figures["pool"]
    ]


def overoptimization_tables(figures: Mapping) -> list[Table]:
    """Gold of each way to rank, what uncertainty adds, the k that were tried, the fits, and the policies."""
    rows = figures.get("conditions") or []
    if not rows:
        return []
    runs = max(row["runs"] for row in rows)
    over = "prompts and runs" if runs > 1 else "prompts"
    last = f"n = {figures['pool']:,}"
    held = figures["prompts"] - figures["selection_prompts"]
    found = [
        _table(
            f"gold on {held:,} prompts, [95 % interval over {over}]; n of the peak, and k, are chosen on the other "
            f"{figures['selection_prompts']:,}",
            rows,
            {
                "runs": "runs",
                "peak_n": "peak at n",
                "peak_kl": "KL there",
                "peak": "gold at the peak",
                "end": f"gold at {last}",
                "drop": "lost since the peak",
                "falls": "falls",
                "runs_fall": "runs that fall",
                "proxy_end": f"proxy at {last}",
            },
        )
    ]
    gains = [row for row in rows if "gain" in row or "first_gain" in row]
    if gains:
        first = rows[0]["proxy"]
        columns = {
            "gain": f"at {last}, less its own mean",
            "peak_gain": "at each one's peak, less its own mean",
            "first_gain": f"at {last}, less the mean of {first}",
            "first_peak_gain": f"at each one's peak, less the mean of {first}",
        }
        shown = {name: label for name, label in columns.items() if any(name in row for row in gains)}
        paired = "on the same prompts" + (", runs paired where there are as many" if runs > 1 else "")
        found.append(_table(f"gold gained, {paired}", gains, shown))
    if figures.get("sweep"):
        labels = {"selection": f"gold at {last} on the prompts that choose", "end": f"gold at {last} on the others"}
        found.append(_table("every k that was tried", figures["sweep"], labels))
    return [*found, *_policy_tables(figures), *_fit_tables(figures)]


def _policy_tables(figures: Mapping) -> list[Table]:
    rows = figures.get("policies") or []
    labels = {"runs": "runs", "peak_kl": "KL at the peak", "peak": "gold at the peak", "end": "gold at the end"}
    if any("drop" in row for row in rows):
        labels |= {"drop": "lost since the peak", "falls": "falls"}
    caption = "trained policies [95 % interval over runs]; the peak of what is lost is found by the other runs"
    cells = [[row["policy"], *(_cell(row, name) for name in labels)] for row in rows]
    return [Table(caption, ["policy", *labels.values()], cells, [False] + [True] * len(labels))] if rows else []


def _fit_tables(figures: Mapping) -> list[Table]:
    """The fits of `evaluation.overoptimization.gao_fit`, of both forms."""
    fits = [(f"{row['proxy']}: {_label(row)}", row["fit"]) for row in figures.get("curves") or []]
    policies = [(f"{row['policy']} (policy)", row["fit"]) for row in figures.get("policies") or []]
    rows = [(name, fit) for name, fit in (*fits, *policies) if fit["alpha"] is not None]
    names = ("alpha", "beta", "peak_kl", "r2")
    cells = [[name, *(number(fit[column]) for column in names)] for name, fit in rows]
    form = (
        "d (alpha - beta d)" + (", of policies d (alpha - beta log d)" if policies else "") + ", d the root of the KL"
    )
    head = ["curve", "alpha", "beta", "KL at its peak", "R²"]
    return [Table(f"fits of gold = {form}", head, cells, [False] + [True] * 4)] if rows else []


def _table(caption: str, rows: Sequence[Mapping], columns: Mapping[str, str]) -> Table:
    cells = [[row["proxy"], _label(row), *(_cell(row, name) for name in columns)] for row in rows]
    numeric = [False, False] + [True] * len(columns)
    return Table(caption, ["proxy", "ranked by", *columns.values()], cells, numeric)


def _label(row: Mapping) -> str:
    """How a row's answers are ranked."""
    return KINDS[row["adjustment"]][0].format(k=number(row.get("k")))


def _cell(row: Mapping, name: str) -> str:
    """`1.23 [1.10, 1.36]`, a dash for what is not there."""
    value = row.get(name)
    if name == "drop" and abs(value or 0.0) < 1e-9:  # the peak is the end
        return number(None)
    if not isinstance(value, float):
        return number(value)
    if not is_number(row.get(f"{name}_low")):
        return f"{value:z.2f}"
    return f"{value:z.2f} [{row[f'{name}_low']:z.2f}, {row[f'{name}_high']:z.2f}]"


def _way(row: Mapping) -> str:
    if row["runs"] > 1 and "runs_fall" in row:  # results of before lack it
        falling = f", {row['runs_fall']} of {row['runs']} runs fall"
    else:
        falling = ", falls" if row["falls"] else ""
    return f"{row['peak']:.2f} → {row['end']:.2f}{falling}"


# --- over-optimization: plots ----------------------------------------------------------------------------------------


def overoptimization_plots(figures: Mapping) -> list[Plot]:
    """Gold over KL of each proxy by every ranking, the proxies' own scores beside gold, and the policies'."""
    curves = figures.get("curves") or []
    oracle = [row for row in curves if row["adjustment"] == "oracle"]
    proxies = list(dict.fromkeys(row["proxy"] for row in curves if row["adjustment"] != "oracle"))
    found = []
    for name in proxies:
        shown = [*oracle, *(row for row in curves if row["proxy"] == name and row["adjustment"] != "oracle")]
        caption = (
            f"{name}: gold of the best of n = 1, 2, 4, … answers by each ranking, over the KL that this choice is away "
            "from the policy; bands: 95 % intervals. Where answers tie the KL ends before log n - (n - 1) / n."
        )
        found.append(plot(gold_over_kl(shown), caption))
    if len(proxies) > 1:
        best = {name: _best(figures, name) for name in proxies}
        labels = [f"{row['proxy']}: {_label(row)}" for row in curves if row["adjustment"] == best.get(row["proxy"])]
        caption = "Gold by the mean of each proxy (solid) and by what the prompts that choose like best (dashed): "
        caption += ", ".join(labels) + "."
        found.append(plot(proxies_together([row for row in curves if row["adjustment"] != "oracle"], best), caption))
    plain = [row for row in curves if row["adjustment"] == "none"]
    if plain:
        caption = "What the proxies say of the answers that their means choose (dashed), and gold (solid), each in SD."
        found.append(plot(proxy_beside_gold(plain), caption))
    if figures.get("policies"):
        caption = (
            "Gold of trained policies over their KL, the mean of their runs with its 95 % interval; thin: best-of-n by "
            "the mean of each proxy."
        )
        found.append(plot(policies_over_kl(figures["policies"], plain), caption))
    return found


def gold_over_kl(curves: Sequence[Mapping[str, Any]]) -> str:
    """A line with its band for each way to rank.

    Args:
        curves: rows of `curves` of `evaluation.overoptimization.laboratory`, of one proxy, and the oracle.
    """
    with rc_context(STYLE):
        figure, axes = new_axes(KL, GOLD, 3.3)
        for row in curves:
            _, color, line, marker = KINDS[row["adjustment"]]
            x, y = _points(row["points"], "kl", "gold")
            _band(axes, row["points"], "kl", color)
            thin = 1.0 if row["adjustment"] == "oracle" else 1.6
            axes.plot(x, y, color=color, linestyle=line, marker=marker, markersize=4, linewidth=thin, label=_label(row))
        _root_scale(axes, max(point["kl"] for row in curves for point in row["points"]))
        add_legend(axes, columns=2)
        return as_svg(figure)


def _best(figures: Mapping, proxy: str) -> str:
    """The kind of adjustment with the most gold on the prompts that choose; "none" where nothing was tried."""
    tried = [row for row in figures.get("sweep") or [] if row["proxy"] == proxy]
    return max(tried, key=lambda row: row["selection"])["adjustment"] if tried else "none"


def proxies_together(curves: Sequence[Mapping[str, Any]], best: Mapping[str, str]) -> str:
    """Two lines for each proxy: by its mean, and by the kind of adjustment that `best` names for it."""
    styles = dict(zip(best, PROXIES, strict=False))
    with rc_context(STYLE):
        figure, axes = new_axes(KL, GOLD, 2.9 + 0.1 * len(styles))
        for row in curves:
            if row["proxy"] not in styles or row["adjustment"] not in ("none", best[row["proxy"]]):
                continue
            color, marker = styles[row["proxy"]]
            x, y = _points(row["points"], "kl", "gold")
            plain = row["adjustment"] == "none"
            line: dict[str, Any] = {"linestyle": "-", "label": row["proxy"]} if plain else {"linestyle": "--"}
            axes.plot(x, y, color=color, marker=marker, markersize=3.5, **line)
        _root_scale(axes, max(point["kl"] for row in curves for point in row["points"]))
        add_legend(axes, columns=2)
        return as_svg(figure)


def proxy_beside_gold(curves: Sequence[Mapping[str, Any]]) -> str:
    """Two lines for each proxy: its own standardized score and gold, of the best of n by its mean."""
    with rc_context(STYLE):
        figure, axes = new_axes(KL, "score (SD of the policy's own)", 2.9 + 0.1 * len(curves))
        for row, (color, marker) in zip(curves, PROXIES, strict=False):
            x, proxy = _points(row["points"], "kl", "proxy")
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3.5}
            axes.plot(x, proxy, linestyle="--", **style)
            axes.plot(x, _points(row["points"], "kl", "gold")[1], label=row["proxy"], **style)
        _root_scale(axes, max(point["kl"] for row in curves for point in row["points"]))
        add_legend(axes, columns=2)
        return as_svg(figure)


def policies_over_kl(policies: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    """A line with its band for each policy, in the order of training, and thin ones of best-of-n."""
    with rc_context(STYLE):
        columns = 2 if max(len(row["policy"]) for row in policies) <= LONG else 1
        height = 2.7 + 0.2 * (len(policies) + 1) / columns
        figure, axes = new_axes("KL from the start (nats a sequence, root scale)", GOLD, height)
        for i, row in enumerate(plain):
            style: dict[str, Any] = {"color": GREY, "linewidth": 0.8}
            label = {} if i else {"label": "best of n"}
            axes.plot(*_points(row["points"], "kl", "gold"), **style, **label)
        for row, (color, marker) in zip(policies, itertools.cycle(POLICIES), strict=False):
            points = sorted(row["points"], key=lambda point: point["kl"])
            _band(axes, points, "kl", color)
            x, y = _points(row["points"], "kl", "gold")
            style = {"marker": marker, "markersize": 5, "markevery": max(1, len(x) // 12), "linewidth": 1.2}
            axes.plot(x, y, color=color, label=row["policy"], **style)
        _root_scale(axes, max(point["kl"] for row in (*policies, *plain) for point in row["points"]))
        add_legend(axes, columns=columns)
        return as_svg(figure)


def _points(points: Sequence[Mapping], x_name: str, y_name: str) -> tuple[list[float], list[float]]:
    return [point[x_name] for point in points], [point[y_name] for point in points]


def _band(axes, points: Sequence[Mapping], x_name: str, color: str) -> None:
    """The interval of gold, where every point has one."""
    if all("gold_low" in point for point in points):
        x = [point[x_name] for point in points]
        low, high = ([point[f"gold_{side}"] for point in points] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _root_scale(axes, largest: float) -> None:
    """KL by its square root, in which gold is about a parabola; few marks, at round numbers of nats."""
    axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    steps = (0, 0.1, 0.5, 1, 2, 4, 6, 10, 15, 25, 40, 60, 100, 200, 400)
    axes.xaxis.set_major_locator(FixedLocator(_spread([x for x in steps if x <= 1.05 * largest], largest)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.05 * max(largest, 0.1))


def _spread(marks: Sequence[float], largest: float) -> list[float]:
    """The marks that stand at least a tenth of the axis apart."""
    kept = [0.0]
    for mark in marks:
        if mark**0.5 - kept[-1] ** 0.5 >= 0.1 * largest**0.5:
            kept.append(mark)
    return kept
