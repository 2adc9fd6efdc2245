"""The report of a run: one self-contained HTML page, made from the files of a work directory alone."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_jax.evaluation.trend import jonckheere
from rlhf_jax.reporting import plots
from rlhf_jax.reporting.tables import Table, duration, figure_tables, memorization_rates, number, time_table

VISIBLE_SAMPLES = 3  # the other samples of a stage are folded away


@dataclass(frozen=True)
class Curve:
    """A plot of metrics against the step, and what a reader should know to read it."""

    series: dict[str, str]  # metric name -> label
    y_label: str
    caption: str


@dataclass
class Plot:
    svg: Markup
    caption: str


@dataclass
class Section:
    """What the page shows of one stage."""

    name: str
    kind: str
    time: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Privacy:
    """What the page says of the private stages together."""

    headline: str
    statement: list[str]
    runs: Table
    plots: list[Plot]


def _single(metric: str, y_label: str, caption: str) -> Curve:
    return Curve({metric: y_label}, y_label, caption)


def _held_out(training: str, held_out: str, y_label: str, caption: str, what: str = "") -> Curve:
    return Curve({training: f"training{what}", held_out: f"held-out{what}"}, y_label, caption)


_LOSS, _ACCURACY = ("loss/train", "loss/eval"), ("accuracy/train", "accuracy/eval")
_SCORE = "reward model score", "Score of sampled completions, before the KL penalty."
_KL = "KL (nats per sequence)"
_OPTIMIZER = (
    _single("optimizer/gradient_norm", "gradient norm", "Global norm of the gradient, before clipping."),
    _single("optimizer/learning_rate", "learning rate", "Learning rate of the optimizer."),
    _single("perf/tokens_per_second", "tokens per second", "Training throughput over all devices."),
    _single("perf/mfu", "share of peak FLOP/s", "Model FLOP/s utilization."),
    _single("privacy/epsilon", "epsilon spent", "Epsilon spent so far, by privacy loss distributions."),
)
CURVES = {
    "sft": (
        _held_out(*_LOSS, "loss (nats per token)", "Cross-entropy of the completion tokens."),
        _held_out(*_ACCURACY, "share of tokens", "Accuracy: tokens whose most likely prediction is right."),
        *_OPTIMIZER,
    ),
    "reward": (
        _held_out(
            *_LOSS,
            "loss (nats)",
            "Bradley-Terry loss of a chosen and a rejected completion, or logistic loss of a labelled text; chance is "
            "ln 2 = 0.693.",
        ),
        _held_out(
            *_ACCURACY,
            "share right",
            "Accuracy: pairs in which the chosen completion scores higher, or texts scored on their label's side.",
        ),
        *_OPTIMIZER,
    ),
    "preference": (
        _held_out(*_LOSS, "loss (per record)", "The preference loss; a DPO policy at its reference has ln 2 = 0.693."),
        _held_out(
            "rewards/margins",
            "eval/rewards/margins",
            "reward margin",
            "Implicit reward of chosen (desirable) answers minus that of rejected (undesirable) ones.",
        ),
        _held_out(
            "rewards/accuracies",
            "accuracy/eval",
            "share of records",
            "Accuracy: pairs whose chosen answer has the larger implicit reward; of KTO answers on their label's side.",
        ),
        Curve(
            {"logps/chosen": "chosen", "logps/rejected": "rejected"},
            "log-probability (nats per answer)",
            "Log-probability of the answers under the policy; that both fall is common.",
        ),
        *_OPTIMIZER,
    ),
    "ppo": (
        _held_out("objective/scores", "eval/score", *_SCORE, what=" prompts"),
        _held_out(
            "objective/kl",
            "eval/kl",
            _KL,
            "KL divergence of the policy from the frozen reference, summed over the completion.",
            what=" prompts",
        ),
        _single("objective/rlhf_reward", "score minus KL penalty", "The objective that PPO maximizes, per sequence."),
        _single("objective/kl_coef", "KL coefficient", "What a nat of KL costs; a controller may move it."),
        _single("objective/entropy", "entropy (nats)", "Entropy of the policy."),
        Curve({"loss/policy": "policy", "loss/value": "value"}, "loss", "Losses of the policy and of the value head."),
        _single("policy/approxkl", "approximate KL (nats)", "KL of each update from the policy that sampled."),
        _single("policy/clipfrac", "share of tokens clipped", "Tokens whose probability ratio was clipped."),
        _single("val/ratio", "probability ratio", "Mean ratio of new to sampling probability; 1 at the start."),
        _single("response_length", "tokens", "Mean length of the sampled completions."),
        _single("val/num_eos_tokens", "completions", "Completions a batch that ended by themselves."),
        _single("privacy/epsilon", "epsilon spent", "Epsilon spent so far, by privacy loss distributions."),
    ),
}


TOGETHER = (  # of several ppo stages, a line each
    _single("objective/scores", *_SCORE),
    _single(
        "objective/kl",
        _KL,
        "KL divergence from the frozen reference, summed over the completion; dashed: what the controller aims at.",
    ),
)


def write_report(workdir: Path) -> Path:
    """Writes `workdir/report.html`: headline figures, and for every stage its curves, tables and samples.

    The page carries its style and plots inside, loads nothing and needs no network. It is made from `summary.json`,
    `config.json` and each stage's `result.json` and `metrics.jsonl`; what is absent is left out of the page.

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
        headlines=_headlines(results, metrics, seconds),
        stages=time_table(results, seconds),
        time_plot=_plot(plots.time_bars(seconds), "Wall time of each stage.") if any(seconds.values()) else None,
        together=_together(results, metrics, targets),
        privacy=_privacy(_read_json(workdir / "privacy.json"), results, config or {}),
        sections=sections,
        visible_samples=VISIBLE_SAMPLES,
        number=number,
        max_points=plots.MAX_POINTS,
        config=json.dumps(config, indent=2, ensure_ascii=False) if config is not None else None,
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


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
            found.append(_plot(plots.curves(series, x_name, curve.y_label, limits=marks), curve.caption))
    return found


def _privacy(ledger: Mapping | None, results: Mapping[str, Mapping], config: Mapping) -> Privacy | None:
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

    Stages of another reward than most have, such as controls, are left out: their scores are of another kind.
    """
    rewards = {name: stage.get("reward", "") for name, stage in config.get("stages", {}).items()}
    found = [
        (rewards.get(name, ""), result["figures"])
        for name, result in results.items()
        if result.get("kind") == "ppo"
        and "privacy" in (result.get("figures") or {})
        and _is_number(result["figures"].get("ppo_score"))
    ]
    most = max((reward for reward, _ in found), key=[reward for reward, _ in found].count, default="")
    scores: dict[str, dict[float, list[float]]] = {"after sft": {}, "after ppo": {}}
    for reward, figures in found:
        for label in ("sft", "ppo") if reward == most else ():
            by_epsilon = scores[f"after {label}"].setdefault(figures["privacy"]["target"], [])
            by_epsilon.append(figures[f"{label}_score"])
    private = {epsilon: values for epsilon, values in sorted(scores["after ppo"].items()) if math.isfinite(epsilon)}
    if len(scores["after ppo"]) < 2:
        return []
    caption = "Held-out score against what a stage may spend; bars: 95 % intervals of the mean over runs (t)."
    if len(private) > 1:
        statistic, p = jonckheere(list(private.values()))
        caption += (
            f" Trend over the finite epsilons (Jonckheere-Terpstra, one-sided, exact): J {statistic:g}, p {p:.3g}."
        )
    return [_plot(plots.against_epsilon(scores, "held-out score"), caption)]


def _section(name: str, result: Mapping, metrics: list[dict], kl_target: float | None) -> Section:
    kind = result.get("kind", "")
    figures = result.get("figures") or {}
    section = Section(name, kind, duration(result.get("seconds") or 0.0), samples=result.get("samples") or [])
    if kind == "ppo":
        section.plots += _reward_kl_plots(metrics, figures)
    marks = {"KL limit": figures.get("kl_limit"), "KL target": kl_target}
    known = {label: height for label, height in marks.items() if height is not None and _is_number(height)}
    for curve in CURVES.get(kind, ()):
        section.plots += _curve_plots(curve, metrics, {"objective/kl": known})
    if kind == "memorization" and figures.get("table"):
        section.plots += _memorization_plots(figures)
        section.tables.append(memorization_rates(figures["table"]))
        figures = {name: value for name, value in figures.items() if name != "table"}
    if kind == "best_of_n" and figures.get("curve"):
        caption = (
            "Expected score of the best of n answers with its 95 % interval over prompts, estimated without bias from "
            "all samples; above, the most that choosing can move the policy, KL = log n - (n - 1) / n."
        )
        section.plots.append(_plot(plots.best_of_n(figures["curve"]), caption))
    section.tables += figure_tables(figures)
    return section


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
    return [_plot(plots.curves(series, x_name, curve.y_label, limits=marks), curve.caption + warning)]


def _reward_kl_plots(metrics: list[dict], figures: Mapping) -> list[Plot]:
    training = _points(metrics, "objective/kl", "objective/scores")
    evaluation = _points(metrics, "eval/kl", "eval/score")
    if not training[0] and not evaluation[0]:
        return []
    svg = plots.reward_against_kl(
        training, evaluation, kl_limit=figures.get("kl_limit"), start_score=figures.get("sft_score")
    )
    return [_plot(svg, "Reward against the KL divergence it cost, in order of training; up and to the left is better.")]


def _memorization_plots(figures: Mapping) -> list[Plot]:
    """Rates by duplicates for each subject, included beside held-out, and what a later stage kept."""
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
        found.append(_plot(_bars(rows, series, "memorized (%)", str(subject)), caption))
    kept = figures.get("persistence") or []
    for before, after in dict.fromkeys((row["before"], row["after"]) for row in kept):
        rows = [row for row in kept if (row["before"], row["after"]) == (before, after)]
        series = {group: (group, "rate", "low", "high") for group in ("base", "links")}
        caption = f"Of the secrets memorized by {before}, the share still memorized by {after}, 95 % intervals."
        found.append(_plot(_bars(rows, series, "still memorized (%)", f"{before} to {after}"), caption))
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


# ---------------------------------------------------------------------------------------------------- figures


def _headlines(
    results: Mapping[str, Mapping], metrics: Mapping[str, list[dict]], seconds: Mapping[str, float]
) -> list[tuple[str, str]]:
    """The strip at the top: (label, value) of the total time, the stages, and each stage's figure of merit."""
    found = [("total time", duration(sum(seconds.values()))), ("stages", str(len(results)))]
    for name, result in results.items():
        kind, figures = result.get("kind"), result.get("figures") or {}
        if kind == "sft" and (loss := _last(metrics[name], "loss/eval")) is not None:
            found.append((f"{name}: held-out loss (nats per token)", f"{loss:.3f}"))
        if kind == "reward" and (accuracy := _last(metrics[name], "accuracy/eval")) is not None:
            found.append((f"{name}: held-out accuracy", f"{100 * accuracy:.1f} %"))
        if kind == "preference" and (accuracy := _last(metrics[name], "accuracy/eval")) is not None:
            found.append((f"{name}: held-out preference accuracy", f"{100 * accuracy:.1f} %"))
        if kind == "ppo" and _is_number(figures.get("sft_score")) and _is_number(figures.get("ppo_score")):
            found.append((f"{name}: score, SFT to PPO", f"{figures['sft_score']:.2f} → {figures['ppo_score']:.2f}"))
        if kind == "ppo" and (kl := _last(metrics[name], "eval/kl", "objective/kl")) is not None:
            limit = f" of {number(figures['kl_limit'])}" if _is_number(figures.get("kl_limit")) else ""
            found.append((f"{name}: KL (nats)", f"{kl:.2f}{limit}"))
        if kind == "best_of_n" and _is_number(figures.get("score")) and _is_number(figures.get("best_score")):
            scores = f"{figures['score']:.2f} → {figures['best_score']:.2f}"
            found.append((f"{name}: score, one answer to best of {figures['samples']}", scores))
        if kind == "memorization":
            found += _memorization_headlines(figures)
    return found


def _memorization_headlines(figures: Mapping) -> list[tuple[str, str]]:
    """Counterfactual memorization of every subject that has a control, over all its secrets."""
    return [
        (f"{row['subject']}: counterfactually memorized", f"{100 * row['counterfactual_rate']:.1f} %")
        for row in figures.get("table") or []
        if row["group"] == row["duplicates"] == "all" and _is_number(row.get("counterfactual_rate"))
    ]


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


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plot(svg: str, caption: str) -> Plot:
    return Plot(Markup(svg), caption)  # our own plot; matplotlib escapes its labels
