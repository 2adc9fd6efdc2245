import html
import json
import re

import pytest

from rlhf_jax.evaluation import memorization_table, persistence
from rlhf_jax.reporting import write_report

SAMPLE = {
    "prompt": "<script>alert(1)</script>\n\tif x:",
    "completion": "a & b",
    "reference": None,
    "score": float("nan"),
}
SFT_ROWS = [
    {"step": 1, "loss/train": 3.0, "perf/mfu": 0.3},
    {"step": 2, "loss/train": float("nan"), "loss/eval": 2.5, "accuracy/eval": 0.4},
]
PPO_ROWS = [
    {"step": 4, "iteration": 1, "objective/kl": 0.5, "objective/scores": 0.1},
    {"step": 8, "iteration": 2, "objective/kl": 1.5, "objective/scores": 0.9, "eval/kl": 1.25, "eval/score": 0.8},
]
PPO_FIGURES = {
    "kl": 1.25,
    "kl_limit": 10.0,
    "sft_score": -0.5,
    "ppo_score": 0.75,
    "ppo_score_low": 0.5,
    "ppo_score_high": 1.0,
}


def memorization_figures():
    secrets = [{"id": str(i), "group": ("base", "links")[i % 2], "duplicates": (1, 4)[i // 2 % 2]} for i in range(8)]
    subjects = {
        name: {"distance": [distance] * 8, "recalled": [False] * 8, "seen": seen}
        for name, distance, seen in (("control", 1.0, [False] * 8), ("sft", 0.0, [True] * 4 + [False] * 4))
    }
    controls = {"sft": "control"}
    kept = persistence(secrets, subjects, controls, before="sft", after="sft")
    extraction = [{"subject": "sft", "group": "base", "seen": True, "tries": [1, 9], "shares": [0.25, 0.75]}]
    table = memorization_table(secrets, subjects, controls)
    return {"table": table, "persistence": kept, "extraction": extraction}


def write_workdir(folder, stages):
    """A work directory of stages: name -> (kind, figures, samples, logged rows or None)."""
    results = {}
    for name, (kind, figures, samples, rows) in stages.items():
        (folder / name).mkdir(parents=True)
        results[name] = {"stage": name, "kind": kind, "seconds": 90.0, "figures": figures, "samples": samples}
        (folder / name / "result.json").write_text(json.dumps(results[name]))
        if rows is not None:
            (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"seed": 17, "stages": results, "seconds": dict.fromkeys(results, 90.0)}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"seed": 17, "note": "</details><b>"}))
    return folder


@pytest.fixture
def workdir(tmp_path):
    stages = {
        "prepare": ("prepare", {"records": {"train": 12345}}, [], None),
        "sft": ("sft", {"loss/eval": 2.5}, [SAMPLE] * 5, SFT_ROWS),
        "ppo_low": ("ppo", PPO_FIGURES, [], PPO_ROWS),
        "leaks": ("memorization", memorization_figures(), [], None),
    }
    return write_workdir(tmp_path / "run", stages)


def test_every_stage_is_on_the_page(workdir):
    path = write_report(workdir)
    page = path.read_text()
    assert path == workdir / "report.html"
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Stages", "prepare", "sft", "ppo_low", "leaks", "Configuration"]
    for shown in (
        "seed 17",
        "6 min 00 s",
        "12,345",
        "loss (nats per token)",
        "0.75 [0.5, 1]",
        "-0.50 → 0.75",
        "1.25 of 10",
    ):
        assert shown in page
    assert "sft: counterfactually memorized" in page
    assert "Of the secrets memorized by sft" in page and "Secrets that sampling sft gets out" in page
    assert page.count("<svg") == page.count("<figcaption>") == 1 + 3 + 3 + 4


def test_several_ppo_stages_stand_in_one_plot_each_of_score_and_kl(tmp_path):
    shown, rows = {}, [{name: x for name, x in row.items() if name != "iteration"} for row in PPO_ROWS]
    for names in (("ppo_1",), ("ppo_1", "ppo_2", "ppo_3")):
        stages = {name: ("ppo", {}, [], rows) for name in names} | {"sft": ("sft", {}, [], SFT_ROWS)}
        workdir = write_workdir(tmp_path / str(len(names)), stages)
        aims = {"kl_controller": "adaptive", "kl_target": 1.375}
        config = {"stages": {name: {"kind": "ppo", **(aims if name != "ppo_2" else {})} for name in names}}
        (workdir / "config.json").write_text(json.dumps(config))
        shown[len(names)] = write_report(workdir).read_text()
    assert "run by run" not in shown[1] and shown[1].count("KL target") == 1
    card = shown[3][shown[3].index("<h2>Policy optimization, run by run</h2>") :]
    score, kl = re.findall(r"<figure.*?</figure>", card[: card.index("</section>")], re.DOTALL)
    for plot in (score, kl):
        assert {"ppo_1", "ppo_2", "ppo_3", "step"} <= set(re.findall(r"<text[^>]*>(.*?)</text>", plot))
    assert "KL target 1.375" in kl and "KL target" not in score
    stage_plots = shown[3][shown[3].index("<h2>ppo_1</h2>") :].split("<h2>")
    assert ["KL target" in section for section in stage_plots[1:4]] == [True, False, True]


def test_headlines_are_of_the_result_and_not_of_the_last_evaluation(tmp_path):
    rows = [{"step": i, "loss/eval": loss, "accuracy/eval": 1 - loss} for i, loss in enumerate((0.3, 0.2, 0.4))]
    stages = {"sft": ("sft", {"loss/eval": 0.2}, [], rows), "judge": ("reward", {"accuracy": 0.8}, [], rows)}
    page = write_report(write_workdir(tmp_path / "run", stages)).read_text()
    assert "<b>0.200</b><span>sft: held-out loss" in page and "<b>80.0 %</b><span>judge: held-out accuracy" in page


def test_values_that_are_not_finite_are_counted_not_hidden(tmp_path):
    nan = float("nan")
    rows = [{"step": 1, "loss/train": 3.0, "loss/eval": 3.0}, {"step": 2, "loss/train": nan, "loss/eval": nan}]
    figures = {"kl_limit": nan, "sft_score": nan, "ppo_score": nan}
    stages = {"sft": ("sft", {"loss/eval": nan}, [], rows), "ppo": ("ppo", figures, [], PPO_ROWS)}
    page = write_report(write_workdir(tmp_path / "run", stages)).read_text()
    assert "Values left out as not finite: 2." in page
    assert "<b>nan</b><span>sft: held-out loss" in page
    assert "KL limit" not in page and "score, SFT to PPO" not in page


def test_text_from_files_is_escaped_and_keeps_its_whitespace(workdir):
    page = write_report(workdir).read_text()
    assert "<script" not in page
    assert "</details><b>" not in page
    assert f"<pre>\n{html.escape(SAMPLE['prompt'], quote=False)}</pre>" in page
    assert page.count("a &amp; b") == 5


def test_page_loads_nothing(workdir):
    page = write_report(workdir).read_text()
    references = re.findall(r"(?:src|href|action|data)\s*=\s*[\"']([^\"']*)", page) + re.findall(r"url\(([^)]*)", page)
    assert references and all(reference.startswith("#") for reference in references)
    assert "@import" not in page and "<link" not in page


def test_absent_and_torn_files_are_left_out(tmp_path):
    stages = {
        "sft": ("sft", None, None, None),
        "ppo": ("ppo", {}, [], [{"step": 1}]),
        "odd": ("other", {"x": None}, [], None),
    }
    workdir = write_workdir(tmp_path / "run", stages)
    for absent in ("config.json", "summary.json", "sft/result.json"):
        (workdir / absent).unlink()
    (workdir / "ppo" / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 0.5, "iteration": 1}\n{"step": 2, "obj')
    page = write_report(workdir).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Stages", "odd", "ppo"]
    assert "KL (nats per sequence)" in page
    assert "Configuration" not in page


def test_folder_without_results_has_a_page_and_no_folder_has_none(tmp_path):
    assert "No stage has finished" in write_report(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="absent"):
        write_report(tmp_path / "absent")


def test_private_runs_are_shown_against_their_epsilon(tmp_path):
    """Three epsilons of two runs each, a control of another reward, and the ledger's statement."""
    stages, runs = {}, {}
    for number, (epsilon, score) in enumerate([(1, 0.1), (1, 0.2), (4, 0.4), (4, 0.3), (8, 0.6), (8, 0.5)]):
        stages[f"ppo_{number}"] = ("judge", epsilon, score)
    stages["control"] = ("zero.py:zero", 4, 9.0)
    for name, (_, epsilon, score) in stages.items():
        claim = dict(epsilon=epsilon, delta=1e-5, noise_multiplier=1.0, minibatches=10, uses=1, sampling_rate=0.1)
        claim |= dict(units=100, target=float(epsilon))
        runs[name] = {"stage": name, "state": "finished", "data": {"unit": "author"}, "claim": claim}
        (tmp_path / name).mkdir()
        figures = {"privacy": claim, "sft_score": 0.0, "ppo_score": score}
        result = {"stage": name, "kind": "ppo", "figures": figures, "samples": [], "seconds": 1.0}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    fields = {name: {"kind": "ppo", "reward": reward} for name, (reward, *_) in stages.items()}
    fields["judged"] = {"kind": "best_of_n", "reward": "judge", "subject": "control"}
    (tmp_path / "judged").mkdir()
    judged = {"stage": "judged", "kind": "best_of_n", "figures": {"score": 0.01}, "seconds": 1.0}
    (tmp_path / "judged" / "result.json").write_text(json.dumps(judged))
    config = {"stages": fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ledger = {"claim": {"epsilon": 8.0, "delta": 1e-5}, "statement": ["Covered: <nothing>."], "runs": runs}
    (tmp_path / "privacy.json").write_text(json.dumps(ledger))
    page = write_report(tmp_path).read_text()
    assert "Covered: &lt;nothing&gt;." in page and "epsilon 8 at delta 1e-05" in page
    assert "after ppo on zero" in page  # the control, as the others' reward judges it
    assert "J 12, p 0.0111" in page  # each later pair above each earlier one: one order of 6! / 2!^3 = 90


def test_a_sweep_of_many_stages_is_folded(tmp_path):
    """Fifteen stages: twelve figures stay in sight, the others and sections are folded, but for what judges them."""
    scores = {name: value for name, value in PPO_FIGURES.items() if name != "kl"}
    stages = {f"ppo_{i}": ("ppo", scores, [], None) for i in range(15)} | {"leaks": ("memorization", {}, [], None)}
    page = write_report(write_workdir(tmp_path / "sweep", stages)).read_text()
    strip, _, rest = page.partition("5 more figures")  # time and number of stages, then one a stage: 17
    assert strip.count('class="key"') == 12 and rest.count('class="key"') == 5
    assert page.count('<details class="card">') == 15 and page.count('<summary class="heading">') == 16
    assert page.count('<details class="card" open>') == 1
    few = write_report(write_workdir(tmp_path / "few", dict(list(stages.items())[:3]))).read_text()
    assert "more figures" not in few and '<details class="card">' not in few
