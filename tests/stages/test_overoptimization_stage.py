"""The best-of-n laboratory on a tiny decoder: its figures against its own pools, cut runs, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import replicated
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import best_of_n_estimate, best_of_n_kl
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages import judges, overoptimization
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.loop import Stopped
from rlhf_jax.validation import validate

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
SHAPE = dict(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64)
CONFIG = TransformerConfig(vocab_size=TOKENIZER.vocab_size, **SHAPE)
ROLE = Role(RoleSpec(CONFIG), {"base": init_base(CONFIG, key=jax.random.key(0))}, TOKENIZER)
FUNCTIONS = """
def gold(prompts, completions):
    return [sum(map(ord, text)) % 16 for text in completions]

def close(prompts, completions):
    return [sum(map(ord, text)) % 16 // 2 for text in completions]

def far(prompts, completions):
    return [sum(map(ord, text)) % 5 for text in completions]

def same(prompts, completions):
    return [1.0 for text in completions]

def sum_of(prompts, completions):
    return [float(len(text)) for text in completions]
"""
POOL, PROMPTS = 16, 10


def make_context(folder, sure=(), **fields):
    folder.mkdir(exist_ok=True)
    (folder / "scores.py").write_text(FUNCTIONS)
    config = experiment(seed=3)
    config.stages.sft = stage("sft", init="scratch", tokenizer="t", data="x")
    records = [{"id": f"p{i}", "prompt": f"Say {i:02}"} for i in range(PROMPTS)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("one", "two"):
        config.stages[name] = stage(
            "ppo",
            init="sft",
            reward=f"{folder}/scores.py:far,{folder}/scores.py:gold",
            reward_weights=(1.0, 0.0),
            data=f"{folder}/data.jsonl",
            max_new_tokens=4,
        )
        (folder / name).mkdir(exist_ok=True)
    source = f"{folder}/scores.py"
    given = dict(proxies={"seeds": f"{source}:close,{source}:far", "other": f"{source}:sum_of"}, gold=f"{source}:gold")
    given |= dict(pool=POOL, batch_size=8, records=PROMPTS, max_new_tokens=4, top_k=6, stop_strings=("e", "i"))
    given |= dict(
        missing_end="add", missing_end_penalty=-2.0, adjustments=dict(std=(0.5, 8.0), variance=(1.0,), worst=(0.0,))
    )
    config.stages.lab = stage("overoptimization", subject="sft", data=f"{folder}/data.jsonl", **{**given, **fields})
    validate(config)
    context = Context("lab", config, folder, "identity")
    context.folder.mkdir(exist_ok=True)

    def load(name, mesh):
        return dataclasses.replace(ROLE, weights=jax.device_put(ROLE.weights, replicated(mesh)))

    context.load = load
    return context


@pytest.fixture(autouse=True)
def uncertain(monkeypatch):
    """`close` and `far` say how sure they are: variance and members as a laplace stage or an ensemble has them."""

    right = judges.Judge.finish

    def finish(self, pending):
        total, columns = right(self, pending)
        for name in ("close", "far"):
            if f"rewards/{name}" in columns:
                mean = columns[f"rewards/{name}"]
                columns[f"variance/{name}"] = jnp.square(mean % 3)
                columns[f"lowest/{name}"] = mean - mean % 3
                columns[f"highest/{name}"] = mean + mean % 3
        return total, columns

    monkeypatch.setattr(judges.Judge, "finish", finish)


@pytest.fixture
def done(tmp_path):
    context = make_context(tmp_path)
    overoptimization.check(context)
    return context, overoptimization.run(context)


def pools(context):
    found = [dict(np.load(path)) for path in sorted((context.folder / "pool").iterdir())]
    return {name: np.stack([pool[name] for pool in found]) for name in found[0] if name != "texts"}


def test_the_figures_are_those_of_the_pools(done):
    context, result = done
    figures, found = result["figures"], pools(context)
    assert found["answer"].shape == (PROMPTS, POOL) and found["mean/proxies.seeds"].shape == (PROMPTS, 2, POOL)
    assert {name for name in found if name.endswith("other")} == {"mean/proxies.other"}
    penalty = -2.0 * ~found["ended"]
    gold = found["mean/gold"][:, 0] + penalty
    assert (figures["gold_mean"], figures["gold_sd"]) == (pytest.approx(gold.mean()), pytest.approx(gold.std()))
    assert 0.02 < figures["ended"] == found["ended"].mean() < 0.98
    assert 2 < figures["distinct"] == np.mean([len(set(row)) for row in found["answer"].tolist()]) < POOL
    gold = (gold - gold.mean()) / gold.std()
    selected = overoptimization.selection([{"prompt": f"Say {i:02}"} for i in range(PROMPTS)], 0.5)
    assert 0 < selected.sum() == figures["selection_prompts"] < PROMPTS
    mean, variance, lowest = (found[f"{name}/proxies.seeds"].swapaxes(0, 1) for name in ("mean", "variance", "lowest"))
    numbers = [1, 2, 4, 8, 16]

    def curves(rankings):
        """(seeds, prompts, numbers)"""
        return np.stack([np.stack([best_of_n_estimate(x, gold, n) for n in numbers], -1) for x in rankings])

    std = {k: curves(mean - k * np.sqrt(variance) + penalty) for k in (0.5, 8.0)}
    k = max(std, key=lambda k: std[k][:, selected, -1].mean())
    expected = {
        ("seeds", "none"): curves(mean + penalty),
        ("seeds", "std"): std[k],
        ("seeds", "variance"): curves(mean - variance + penalty),
        ("seeds", "worst"): curves(lowest + penalty),
        ("other", "none"): curves(found["mean/proxies.other"].swapaxes(0, 1) + penalty),
        ("gold", "oracle"): curves(gold[None]),
    }
    rows = {(row["proxy"], row["adjustment"]): row for row in figures["conditions"]}
    assert rows.keys() == expected.keys() and rows["seeds", "std"]["k"] == k and rows["seeds", "worst"]["k"] is None
    for name, values in expected.items():
        best = int(np.argmax(values[:, selected].mean((0, 1))))
        assert rows[name]["peak_n"] == numbers[best]
        assert rows[name]["end"] == pytest.approx(values[:, ~selected, -1].mean(), abs=1e-5)
        assert rows[name]["peak"] == pytest.approx(values[:, ~selected, best].mean(), abs=1e-5)
    plain = expected["seeds", "none"][:, ~selected, -1].mean()
    assert rows["seeds", "std"]["gain"] == pytest.approx(rows["seeds", "std"]["end"] - plain, abs=1e-5)
    assert rows["other", "none"]["first_gain"] == pytest.approx(rows["other", "none"]["end"] - plain, abs=1e-5)
    points = figures["curves"][0]["points"]
    assert [point["n"] for point in points] == numbers and points[-1]["kl_bound"] == best_of_n_kl(16)
    assert 0 < points[-1]["kl"] < points[-1]["kl_bound"]
    source = f"{context.workdir}/scores.py"
    chosen = json.loads((context.folder / "chosen.json").read_text())
    assert chosen == {f"{source}:{name}": {"std": k, "variance": 1.0, "worst": 0.0} for name in ("close", "far")} | {
        f"{source}:sum_of": {}
    }
    assert json.loads(json.dumps(figures)) == figures  # plain


def test_texts_of_the_first_prompts_are_kept(done):
    context, result = done
    rows = [json.loads(line) for line in (context.folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == overoptimization.SHOWN and all(len(row["completions"]) == POOL for row in rows)
    ended = pools(context)["ended"]
    for i, row in enumerate(rows):
        expected = [sum(map(ord, text)) % 16 for text in row["completions"]] - 2.0 * ~ended[i]
        assert row["gold"] == expected.tolist()
    samples = result["samples"][:3]
    assert [sample["model"] for sample in samples] == ["sft, gold", "best by seeds, gold", "best by gold, gold"]
    assert samples[0]["completion"] == rows[0]["completions"][0] and samples[2]["score"] == max(rows[0]["gold"])


def test_an_answer_is_the_same_whatever_is_decoded_beside_it(done, tmp_path):
    """Neither the batch's size, nor the pool's, nor which prompts there are, moves a draw."""
    first = pools(done[0])
    other = make_context(tmp_path / "other", batch_size=16, pool=32, records=PROMPTS - 1)
    overoptimization.run(other)
    again = pools(other)
    np.testing.assert_array_equal(again["answer"][:, :POOL], first["answer"][:-1])
    assert len(np.unique(first["answer"])) > PROMPTS * POOL / 4  # the draws differ


def test_a_cut_run_goes_on_behind_the_last_whole_prompt(done, monkeypatch):
    context, result = done
    files = sorted(path for path in context.folder.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    kept = context.folder / "pool" / "000000.npz"
    for path in files[1:]:
        if path.suffix == ".npz" and path != kept:
            path.unlink()
    torn = context.folder / "pool" / "000001.tmp"
    torn.write_bytes(whole[kept][:100])
    stops = iter([False] * 5 + [True])
    monkeypatch.setattr(overoptimization, "stop_requested", lambda: next(stops))
    with pytest.raises(Stopped):
        overoptimization.run(context)
    left = sorted((context.folder / "pool").glob("*.npz"))
    assert [path.name for path in left] == ["000000.npz", "000001.npz", "000002.npz"]
    times = {path: path.stat().st_mtime_ns for path in left}
    monkeypatch.setattr(overoptimization, "stop_requested", lambda: False)
    assert overoptimization.run(context) == result
    assert {path: path.stat().st_mtime_ns for path in left} == times  # not decoded again
    assert {path: path.read_bytes() for path in files} == whole


def metrics(context, stage, kl, gold):
    rows = [{"step": i, "objective/kl": k, "rewards/gold": g} for i, (k, g) in enumerate(zip(kl, gold, strict=True))]
    lines = [json.dumps({"step": 0, "eval/score": 1.0}), *map(json.dumps, rows)]
    (context.workdir / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_policies_stand_on_the_scale_of_the_subjects_gold(tmp_path):
    """A policy's gold is logged without the penalty for a missing end, so its zero is the subject's gold without it."""
    context = make_context(tmp_path, policies={"ppo": "one,two"}, top_k=0, stop_strings=())
    metrics(context, "one", [0.0, 1.0, 4.0], [8.0, 9.0, 10.0])
    metrics(context, "two", [0.0, 4.0, 9.0], [8.0, 10.0, 11.0])
    overoptimization.check(context)
    figures = overoptimization.run(context)["figures"]
    (row,) = figures["policies"]
    found = pools(context)
    raw = found["mean/gold"][:, 0]
    spread = (raw - 2.0 * ~found["ended"]).std()
    assert (row["policy"], row["runs"]) == ("ppo", 2)
    assert [point["root_kl"] for point in row["points"]] == [0, 1.5, 2.5]
    expected = (np.asarray([8.0, 9.5, 10.5]) - raw.mean()) / spread
    assert [point["gold"] for point in row["points"]] == pytest.approx(expected.tolist())
    metrics(context, "two", [], [])
    with pytest.raises(UserError, match="policies.ppo: two logged no rewards/gold beside objective/kl"):
        overoptimization.run(context)


def test_what_is_refused(tmp_path):
    source = f"{tmp_path}/scores.py"
    with pytest.raises(UserError, match='policies.* does not score by gold: add ".*scores.py:close" to its reward'):
        make_context(tmp_path, gold=f"{source}:close", policies={"ppo": "one"})
    twice = make_context(tmp_path, proxies={"a": f"{source}:far", "b": f"{source}:close,{source}:far"})
    with pytest.raises(UserError, match="names .*scores.py:far twice: its k has to be one"):
        overoptimization.check(twice)
    with pytest.raises(UserError, match="one has top_k 0 and stages.lab has 6, so their answers cannot be compared"):
        overoptimization.check(make_context(tmp_path, policies={"ppo": "one"}))
    other = make_context(tmp_path, policies={"ppo": "one"}, top_k=0, stop_strings=())
    other.experiment.stages.one.init = "two"
    with pytest.raises(UserError, match="one starts from two and the pools are sft's"):
        overoptimization.check(other)
    with pytest.raises(UserError, match="lab.gold: .*same scores every answer the same"):
        overoptimization.run(make_context(tmp_path, gold=f"{source}:same", missing_end_penalty=0.0))
    with pytest.raises(
        UserError, match="selection is 0.001 of 10 prompts, which leaves 0 to choose by and 10 to measure"
    ):
        overoptimization.run(make_context(tmp_path, selection=0.001))


def test_the_prompt_decides_its_part():
    records = [{"prompt": f"p{i}"} for i in range(400)]
    half = overoptimization.selection(records, 0.5)
    assert 150 < half.sum() < 250
    assert (overoptimization.selection(records[::-1], 0.5)[::-1] == half).all()
    assert (half | ~overoptimization.selection(records, 0.2)).all()  # a smaller part is inside the larger
