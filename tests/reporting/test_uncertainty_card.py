"""What a report shows of over-optimization and of a posterior's calibration."""

import json
import xml.etree.ElementTree as ElementTree
from functools import cache

import numpy as np
import pytest

from rlhf_jax.evaluation.overoptimization import laboratory, policy_curve, standardized
from rlhf_jax.evaluation.uncertainty import distance_figures, uncertainty_figures
from rlhf_jax.objectives.adjustment import Moments
from rlhf_jax.reporting import write_report
from rlhf_jax.reporting.posterior_card import posterior_plots, posterior_tables
from rlhf_jax.reporting.uncertainty_card import (
    overoptimization_headlines,
    overoptimization_plots,
    overoptimization_tables,
    overoptimization_warnings,
)

SVG = "{http://www.w3.org/2000/svg}"


@cache
def measured(policies=2):
    """Figures of two proxies of three runs, of which the mean is led astray by answers it is not sure of."""
    rng = np.random.default_rng(0)
    prompts, pool = 24, 256
    gold = standardized(rng.normal(size=(prompts, pool)))
    proxies = {}
    for name, reach in (("laplace", 2.5), ("ensemble", 1.2)):
        runs = []
        for _ in range(3):
            std = 0.3 + reach * (rng.random(gold.shape) < 0.04) * rng.random(gold.shape)
            error = std * rng.normal(size=gold.shape)
            mean = (gold + 1.5 * error - 0.4 * (std > 0.3)).astype(np.float32)
            members = (mean - std, mean + std) if name == "ensemble" else (None, None)
            runs.append(Moments(mean, np.square(std).astype(np.float32), *members))
        proxies[name] = runs
    grid = {"std": (0.5, 1.0, 2.0), "variance": (0.5, 1.0, 2.0), "worst": (0.0,)}
    found = laboratory(proxies, gold, grid, np.arange(prompts) < 12)
    d = np.linspace(0, 3.2, 30)
    curves = []
    for i in range(policies):
        runs = [(d**2, d * (1.2 - (0.4 - 0.25 * i) * d) + 0.06 * rng.normal(size=30)) for _ in range(3)]
        curves.append({"policy": ("ppo by the mean", "ppo by mean - k std")[i], **policy_curve(runs)})
    start = {"prompts": prompts, "selection_prompts": 12, "skipped": 0, "pool": pool, "ended": 1.0, "distinct": 250.0}
    return json.loads(json.dumps({**start, "gold_mean": 0.5, "gold_sd": 2.0, **found, "policies": curves}))


def texts(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_ranking_has_a_line_and_a_row():
    figures = measured()
    gold, gained, sweep, policies, fits = overoptimization_tables(figures)
    assert len(gold.rows) == 8  # two proxies by mean, std, variance; the ensemble's worst; gold itself
    assert [row[:2] for row in gold.rows][:2] == [["laplace", "mean"], ["laplace", f"mean - {_k(figures)} std"]]
    plain = figures["conditions"][0]
    cells = dict(zip(gold.columns, gold.rows[0], strict=True))
    assert cells["gold at n = 256"] == f"{plain['end']:.2f} [{plain['end_low']:.2f}, {plain['end_high']:.2f}]"
    assert cells["peak at n"] == str(plain["peak_n"]) and cells["falls"] == ("yes" if plain["falls"] else "no")
    assert len(sweep.rows) == 13 and len(policies.rows) == 2
    assert all(len(row) == len(table.columns) for table in (gold, gained, sweep, policies, fits) for row in table.rows)
    assert [row[:2] for row in gained.rows if row[0] == "ensemble"][0] == ["ensemble", "mean"]  # against the first
    drawn = overoptimization_plots(figures)
    assert len(drawn) == 5
    shown = [" ".join(texts(plot.svg)) for plot in drawn]
    for label in ("gold itself", "mean", "std", "variance"):
        assert label in shown[0]
    assert "laplace: mean - 2 variance" in drawn[2].caption and "ensemble: " in drawn[2].caption
    assert "worst member" in shown[1] and "worst member" not in shown[0]
    assert "ppo by the mean" in shown[4] and "best of n" in shown[4]


def _k(figures):
    return f"{figures['chosen']['laplace']['std']:g}"


def test_a_peak_at_the_last_n_is_said():
    figures = measured()
    last = {**figures, "conditions": [{**row, "peak_n": figures["pool"]} for row in figures["conditions"]]}
    assert overoptimization_warnings(last) == [
        f"{name}: gold by the mean is highest at the last n: the peak may lie beyond n = 256."
        for name in ("laplace", "ensemble")
    ]
    inside = {**figures, "conditions": [{**row, "peak_n": 64} for row in figures["conditions"]]}
    assert overoptimization_warnings(inside) == []


def test_headlines_say_what_the_mean_loses_and_what_is_gained():
    figures = measured()
    labels = [label for label, _ in overoptimization_headlines(figures)]
    assert labels[0] == "laplace: gold by the mean, from its peak to n = 256" and len(labels) == 4
    assert "adds there" in labels[1]
    assert overoptimization_headlines({}) == [] and overoptimization_tables({}) == overoptimization_plots({}) == []


def write(folder, figures, kind="overoptimization"):
    (folder / "lab").mkdir(parents=True)
    result = {"stage": "lab", "kind": kind, "seconds": 1.0, "figures": figures, "samples": []}
    (folder / "lab" / "result.json").write_text(json.dumps(result))
    return write_report(folder).read_text()


@pytest.mark.parametrize("whole", [True, False])
def test_the_page_shows_it(tmp_path, whole):
    figures = measured() if whole else {"prompts": 4}
    page = write(tmp_path / "work", figures)
    assert ("peak may lie beyond" in page) == bool(overoptimization_warnings(figures))
    assert page.count("<svg") == (6 if whole else 1)
    assert ("every k that was tried" in page) == whole


# --- laplace ---------------------------------------------------------------------------------------------------------


@cache
def posterior():
    """Figures of a laplace stage, as its own functions make them of scores that are too sure."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, width in (("evaluation", 1.0), ("shifted", 3.0)):
        distance = width * rng.random(400)
        variance = 0.2 + distance**2
        truth = rng.normal(size=400)
        mean = 2 * (truth + np.sqrt(variance) * rng.normal(size=400))
        outcomes = rng.random(400) < 1 / (1 + np.exp(-2 * truth))
        parts[part] = {
            **uncertainty_figures(mean, 4 * variance, outcomes, 1.7),
            "map_temperature": 1.7,
            "variance_difference": 2.5,
            "variance_score": float(variance.mean()),
            "distance": distance_figures(distance, variance),
        }
    grid = np.logspace(-4, 6, 81)
    curve = [{"precision": x, "evidence": -200 - 8 * np.log10(x / 3) ** 2} for x in grid.tolist()]
    own = {"precision": 3.0, "log_evidence": -200.0, "curve": curve, "notes": ["the prior's precision is at its bound"]}
    return json.loads(json.dumps({"records": 900, **own, **parts}))


@pytest.mark.parametrize("members", [1, 3])
def test_a_posterior_is_shown_beside_its_mean(tmp_path, members):
    figures = posterior()
    if members > 1:
        own = ("precision", "log_evidence", "curve", "notes")
        shared = {name: value for name, value in figures.items() if name not in own}
        figures = {**shared, "members": [{name: figures[name] for name in own}] * members}
    tables = posterior_tables(figures)
    told, distances = tables[:2]
    assert [row[:2] for row in told.rows[:4]] == [
        ["held-out", name] for name in ("MAP", "MAP, tempered", "Laplace", "standard deviation")
    ]
    shifted = figures["shifted"]
    assert told.rows[6][3:] == [
        f"{shifted['laplace']['nll']:.4f}",
        f"{100 * shifted['laplace']['expected_calibration_error']:.1f}",
        f"{shifted['detection']['laplace']:.3f}",
    ]
    assert distances.rows[0][1] == "{:.1f} [{:.1f}, {:.1f}]".format(
        *(100 * figures["evaluation"][f"accuracy{side}"] for side in ("", "_low", "_high"))
    )
    assert len(tables) == (2 if members == 1 else 3) and all(len(t.rows[0]) == len(t.columns) for t in tables)
    held_out, moved, evidence, scatter = posterior_plots(figures)
    assert {"MAP", "MAP, tempered", "Laplace"} <= set(texts(held_out.svg)) & set(texts(moved.svg))
    assert ("chosen: 3" in texts(evidence.svg)) == (members == 1) and "shifted" in texts(scatter.svg)
    page = write(tmp_path / "work", figures, "laplace")
    assert page.count("the prior&#39;s precision is at its bound") == 1 and page.count("<svg") == 5
    assert "lab, held-out: calibration error, MAP to Laplace" in page
    assert "{&#39;" not in page  # no nested figure is printed as it is


def test_a_posterior_without_held_out_records_shows_its_evidence(tmp_path):
    figures = {name: value for name, value in posterior().items() if name not in ("evaluation", "shifted")}
    assert posterior_tables(figures) == [] and len(posterior_plots(figures)) == 1
    per_layer = {**figures, "precision": {"0": 1.0, "head": 2.0}}
    page = write(tmp_path / "work", per_layer, "laplace")
    assert page.count("<svg") == 2 and "log evidence (nats)" in page
