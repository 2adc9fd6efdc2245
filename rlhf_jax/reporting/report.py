"""The report of a run: one self-contained HTML page, made from the files of a work directory alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_jax.reporting import plots
from rlhf_jax.reporting.curves import CURVES, TOGETHER, Curve
from rlhf_jax.reporting.memorization_card import memorization_headlines, memorization_plots, memorization_tables
from rlhf_jax.reporting.plots import Plot, is_number, plot
from rlhf_jax.reporting.privacy_card import Privacy, privacy_card
from rlhf_jax.reporting.safety_card import (
    SAFETY_CURVES,
    constraint_limits,
    constraint_warnings,
    other_figures,
    read_scores,
    safety_headlines,
    safety_plots,
    safety_tables,
)
from rlhf_jax.reporting.tables import Table, duration, figure_tables, number, time_table
from rlhf_jax.reporting.uncertainty_card import add_uncertainty, shown_by_page, uncertainty_headlines

VISIBLE_SAMPLES = 3  # the other samples of a stage are folded away
VISIBLE_HEADLINES, VISIBLE_SECTIONS = 12, 12  # the other figures are folded away, and of more stages all
JUDGING = ("memorization", "audit", "best_of_n", "safety", "overoptimization")  # but these, which judge the others


@dataclass
class Section:
    """What the page shows of one stage."""

    name: str
    kind: str
    time: str
    warnings: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)


def write_report(workdir: Path) -> Path:
    """Writes `workdir/report.html`: headline figures, and for every stage its curves, tables and samples.

    The page carries its style and plots inside, loads nothing and needs no network. It is made from `summary.json`,
    `config.json`, each stage's `result.json` and `metrics.jsonl`, and a safety stage's `scores.npz`; what is absent is
    left out of the page.

    Args:
        workdir: the work directory of a run.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: `workdir` does not exist.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"no work directory at {workdir}")
    summary = _read_json(workdir / "summary.json") or {}
    config = _read_json(workdir / "config.json")
    results = _read_results(workdir, summary)
    metrics = {name: _read_metrics(workdir / name / "metrics.jsonl") for name in results}
    seconds = {name: result.get("seconds") or 0.0 for name, result in results.items()}
    targets = _kl_targets(config or {})
    sections = [_section(name, result, metrics[name], targets.get(name)) for name, result in results.items()]
    for section in sections:
        _add_safety(section, workdir, results[section.name], metrics[section.name], config or {})
        add_uncertainty(section, results[section.name].get("figures") or {})
    privacy = privacy_card(_read_json(workdir / "privacy.json"), results, config or {})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=workdir.resolve().name,
        seed=summary.get("seed"),
        headlines=_headlines(results, metrics, seconds, privacy),
        stages=time_table(results, seconds),
        time_plot=plot(plots.time_bars(seconds), _time_caption(seconds)) if any(seconds.values()) else None,
        together=_together(results, metrics, targets),
        privacy=privacy,
        sections=sections,
        visible_samples=VISIBLE_SAMPLES,
        visible_headlines=VISIBLE_HEADLINES,
        visible_sections=VISIBLE_SECTIONS,
        judging=JUDGING,
        number=number,
        max_points=plots.MAX_POINTS,
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _time_caption(seconds: Mapping[str, float]) -> str:
    return "Wall time of each stage." if len(seconds) <= plots.MAX_BARS else f"The {plots.MAX_BARS} longest stages."


# ---------------------------------------------------------------------------------------------------- reading


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _read_results(workdir: Path, summary: Mapping) -> dict[str, dict]:
    """Stage -> result, in the order of the summary, then stages it does not name in the order of their names."""
    found = {path.parent.name: path for path in sorted(workdir.glob("*/result.json"))}
    summarized = summary.get("stages", {})
    results = {}
    for name in [*summarized, *(name for name in found if name not in summarized)]:
        result = _read_json(found[name]) if name in found else summarized[name]
        results[name] = {**result, "seconds": summary.get("seconds", {}).get(name, result.get("seconds"))}
    return results


def _read_metrics(path: Path) -> list[dict]:
    """The logged steps; a last line torn by a stopped process is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.strip() and (line.endswith("\n") or line.endswith("}"))]


# ---------------------------------------------------------------------------------------------------- sections


def _kl_targets(config: Mapping) -> dict[str, float]:
    """Stage -> the KL that its adaptive controller aims at."""
    stages = config.get("stages", {}).items()
    return {name: stage["kl_target"] for name, stage in stages if stage.get("kl_controller") == "adaptive"}


def _together(results: Mapping, metrics: Mapping[str, list[dict]], targets: Mapping[str, float]) -> list[Plot]:
    """Score and KL of all ppo stages in one plot each, where there are several."""
    names = [name for name, result in results.items() if result.get("kind") == "ppo"]
    if len(names) < 2:
        return []
    found, x_name = [], _x_name([row for name in names for row in metrics[name]])
    for curve in TOGETHER:
        (metric,) = curve.series
        series = {name: _points(metrics[name], x_name, metric) for name in names}
        series = {name: points for name, points in series.items() if points[0]}
        aims = dict.fromkeys(targets[name] for name in series if name in targets) if metric == "objective/kl" else {}
        marks = {f"KL target {number(target)}": target for target in aims}
        if series:
            many = f" {len(series)} runs, named in their own sections." if len(series) > plots.NAMED else ""
            found.append(plot(plots.curves(series, x_name, curve.y_label, limits=marks), curve.caption + many))
    return found


def _section(name: str, result: Mapping, metrics: list[dict], kl_target: float | None) -> Section:
    kind = result.get("kind", "")
    figures = result.get("figures") or {}
    section = Section(name, kind, duration(result.get("seconds") or 0.0), samples=result.get("samples") or [])
    if kind == "ppo":
        section.plots += _reward_kl_plots(metrics, figures)
    marks = {"KL limit": figures.get("kl_limit"), "KL target": kl_target}
    known = {label: height for label, height in marks.items() if height is not None and is_number(height)}
    for curve in CURVES.get(kind, ()):
        section.plots += _curve_plots(curve, metrics, {"objective/kl": known})
    if kind == "memorization":
        section.plots += memorization_plots(figures)
        section.tables += memorization_tables(figures)
        figures = {name: value for name, value in figures.items() if name not in ("table", "conditions")}
    if kind == "safety":
        figures = other_figures(figures)
    figures = shown_by_page(kind, figures)
    if kind == "best_of_n" and figures.get("curve"):
        caption = (
            "Expected score of the best of n answers with its 95 % interval over prompts, estimated without bias from "
            "all samples; above, the most that choosing can move the policy, KL = log n - (n - 1) / n."
        )
        section.plots.append(plot(plots.best_of_n(figures["curve"]), caption))
    section.tables += figure_tables(figures)
    return section


def _add_safety(section: Section, workdir: Path, result: Mapping, metrics: list[dict], config: Mapping) -> None:
    """What a constraint did in a ppo stage, first of all; the models that a safety stage asked."""
    figures = result.get("figures") or {}
    if section.kind == "ppo":
        constraint = config.get("stages", {}).get(section.name, {}).get("constraint", {})
        limits = constraint_limits(figures, constraint)
        section.warnings += constraint_warnings(figures)
        section.plots[:0] = [drawn for curve in SAFETY_CURVES for drawn in _curve_plots(curve, metrics, limits)]
    if section.kind == "safety":
        section.plots += safety_plots(figures, read_scores(workdir / section.name / "scores.npz"))
        section.tables[:0] = safety_tables(figures)


def _curve_plots(curve: Curve, metrics: list[dict], limits: Mapping[str, Mapping[str, float]]) -> list[Plot]:
    """The plot of a curve whose metrics were logged, or nothing."""
    x_name = _x_name(metrics)
    series = {label: _points(metrics, x_name, name) for name, label in curve.series.items()}
    series = {label: points for label, points in series.items() if points[0]}
    if not series:
        return []
    marks = {label: y for name in curve.series for label, y in limits.get(name, {}).items()}
    dropped = sum(not math.isfinite(value) for _, y in series.values() for value in y)
    warning = f" Values left out as not finite: {dropped}." if dropped else ""
    return [plot(plots.curves(series, x_name, curve.y_label, limits=marks), curve.caption + warning)]


def _reward_kl_plots(metrics: list[dict], figures: Mapping) -> list[Plot]:
    training = _points(metrics, "objective/kl", "objective/scores")
    evaluation = _points(metrics, "eval/kl", "eval/score")
    if not training[0] and not evaluation[0]:
        return []
    svg = plots.reward_against_kl(
        training, evaluation, kl_limit=figures.get("kl_limit"), start_score=figures.get("sft_score")
    )
    return [plot(svg, "Reward against the KL divergence it cost, in order of training; up and to the left is better.")]


# ---------------------------------------------------------------------------------------------------- figures


def _headlines(
    results: Mapping[str, Mapping],
    metrics: Mapping[str, list[dict]],
    seconds: Mapping[str, float],
    privacy: Privacy | None,
) -> list[tuple[str, str]]:
    """The strip at the top: (label, value) of the total time, the stages, and each stage's figure of merit."""
    found = [("total time", duration(sum(seconds.values()))), ("stages", str(len(results)))]
    if privacy:
        epsilon, _, delta = privacy.headline.partition(" at ")
        found.append((f"all private stages together, at {delta}", epsilon))
    for name, result in results.items():
        kind, figures = result.get("kind"), result.get("figures") or {}
        # Of the result, which the last evaluation may not be.
        if kind == "sft" and figures.get("loss/eval") is not None:
            found.append((f"{name}: held-out loss (nats per token)", f"{figures['loss/eval']:.3f}"))
        if kind in ("reward", "cost", "preference") and figures.get("accuracy") is not None:
            what = "held-out preference accuracy" if kind == "preference" else "held-out accuracy"
            found.append((f"{name}: {what}", f"{100 * figures['accuracy']:.1f} %"))
        if kind == "ppo" and is_number(figures.get("sft_score")) and is_number(figures.get("ppo_score")):
            found.append((f"{name}: score, SFT to PPO", f"{figures['sft_score']:.2f} → {figures['ppo_score']:.2f}"))
        kl = figures.get("kl", _last(metrics[name], "objective/kl"))
        if kind == "ppo" and kl is not None:
            limit = f" of {number(figures['kl_limit'])}" if is_number(figures.get("kl_limit")) else ""
            found.append((f"{name}: KL (nats)", f"{kl:.2f}{limit}"))
        if kind == "best_of_n" and is_number(figures.get("score")) and is_number(figures.get("best_score")):
            scores = f"{figures['score']:.2f} → {figures['best_score']:.2f}"
            found.append((f"{name}: score, one answer to best of {figures['samples']}", scores))
        if kind == "memorization":
            found += memorization_headlines(figures)
        if kind == "safety":
            found += safety_headlines(figures)
        found += uncertainty_headlines(name, kind, figures)
    return found


def _x_name(metrics: list[dict]) -> str:
    return "iteration" if any("iteration" in row for row in metrics) else "step"


def _points(metrics: list[dict], x_name: str, y_name: str) -> plots.Points:
    """The values of both metrics where both were logged, NaN included, in order of the steps."""
    rows = [row for row in metrics if _is_logged(row, x_name) and _is_logged(row, y_name)]
    return [row[x_name] for row in rows], [row[y_name] for row in rows]


def _last(metrics: list[dict], *names: str) -> float | None:
    """The last value, were it NaN, of the first of the metrics that was logged."""
    for name in names:
        values = [row[name] for row in metrics if _is_logged(row, name)]
        if values:
            return values[-1]
    return None


def _is_logged(row: Mapping, name: str) -> bool:
    return isinstance(row.get(name), int | float)
