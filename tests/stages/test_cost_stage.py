"""The cost stage: its rows, its objective against loops, and what it learns and reports of a separable task."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.roles import RoleSpec, hidden_states, init_base, split
from rlhf_jax.privacy.clipping import clipped_sum
from rlhf_jax.stages import cost
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.cost import cost_objective
from rlhf_jax.stages.cost_figures import held_out_figures
from rlhf_jax.stages.scorer import place_answers
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.gradient import plain_gradient
from rlhf_jax.validation import validate

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "data" / "fixtures" / "qwen")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64
)
SPEC = RoleSpec(CONFIG)
LORA = LoraConfig(2, 4.0, ("q", "v"), False)
MESH = make_mesh(1, 1, 1, jax.devices()[:1])
COLUMNS = ("tokens", "lengths", "first", "unsafe", "labelled")


def weights(seed=0, scale=1.0):
    head = init_head(CONFIG.width, scale, key=jax.random.key(seed + 1))
    return {"base": init_base(CONFIG, key=jax.random.key(seed)), "head": head}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_context(folder, data, **fields):
    """A cost stage on a tiny random model."""
    config = experiment()
    config.logging.update(every=100, tensorboard=False)
    config.stages.base = stage("sft", init="scratch", tokenizer="x", data="x")
    fields = {"batch_size": 8, "sequence_length": 48, "mesh": dict(data=1), **fields}
    config.stages.cost = stage("cost", init="base", data=data, **fields)
    validate(config)
    context = Context("cost", config, folder, "identity")
    context.folder.mkdir(parents=True, exist_ok=True)
    context.load = lambda reference, mesh: Role(SPEC, weights(), TOKENIZER)
    context.mesh = lambda: MESH
    return context


def rows_of(context, part="train"):
    role = Role(SPEC, weights(), TOKENIZER)
    data = context.config.data if part == "train" else context.config.evaluation.data
    return cost.make_rows(context, role, data, part)


# --- a task ----------------------------------------------------------------------------------------------------------


def answer(harm, number):
    """Unsafe from one bomb on; the second one makes it worse."""
    return f"{('no', 'a bomb', 'bomb bomb')[harm]} {number}"


def task(count, start, **without):
    """Pairs of answers of unlike harm: both safe labels, one, none; which comes first alternates."""
    records = []
    for i in range(start, start + count):
        harms = ((0, 1), (0, 2), (1, 2))[i % 3]
        harms = harms[:: 1 if i % 2 else -1]
        record = {"prompt": f"ask {i % 5}", "responses": [answer(harm, i % 7) for harm in harms]}
        record["safer_response_id"] = int(harms[1] < harms[0])
        record |= {f"is_response_{j}_safe": harm == 0 for j, harm in enumerate(harms)}
        record |= {f"response_{j}_harm_category": {"Bombs": harm > 0, "Loud": harm > 1} for j, harm in enumerate(harms)}
        record |= {f"response_{j}_severity_level": harm for j, harm in enumerate(harms)}
        records.append({name: value for name, value in record.items() if name not in without})
    return records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, figures) of a stage that learned the task."""
    folder = tmp_path_factory.mktemp("trained")
    data, held_out = write(folder / "train.jsonl", task(96, 0)), write(folder / "eval.jsonl", task(45, 1000))
    context = make_context(
        folder,
        data,
        epochs=4.0,
        optimizer=dict(learning_rate=1e-2),
        evaluation=dict(data=held_out, every=100),
    )
    return folder, cost.run(context)["figures"]


def test_a_separable_task_is_learned_on_both_sides_of_zero(trained):
    figures = trained[1]
    assert (figures["pairs"], figures["sign_labels"], figures["sign_labels_eval"]) == (96, 192, 90)
    assert figures["accuracy"] > 0.9 and figures["accuracy_low"] < figures["accuracy"]
    assert figures["sign_accuracy"] > 0.9 and figures["sign_accuracy_low"] > 0.8
    assert figures["cost_safe"] < 0 < figures["cost_unsafe"] and figures["cost_lowest"] <= figures["cost_safe"]
    share = figures["unsafe_share_at_zero"]
    assert share * figures["cost_unsafe"] + (1 - share) * figures["cost_safe"] == pytest.approx(0, abs=1e-6)
    assert 0 <= figures["expected_calibration_error"] < 0.3
    assert figures["loss/eval"] < 1.0 < figures["loss/eval_start"]
    assert "boundary" not in figures


def test_categories_and_severities_have_a_row_each(trained):
    figures = trained[1]
    assert [(row["category"], row["n"], row["unsafe"]) for row in figures["categories"]] == [
        ("Bombs", 60, 60),
        ("Loud", 30, 30),
    ]
    assert all(row["called_unsafe"] == row["sign_accuracy"] > 0.9 for row in figures["categories"])
    assert [(row["severity"], row["n"], row["unsafe"]) for row in figures["severities"]] == [
        (0, 30, 0),
        (1, 30, 30),
        (2, 30, 30),
    ]
    assert sum(row["n"] for row in figures["reliability"]) == 90


def turned(record):
    """The same record with its answers the other way round."""
    numbered = [name for name in record if "_0_" in name or "_1_" in name]
    other = {**record, "responses": record["responses"][::-1], "safer_response_id": 1 - record["safer_response_id"]}
    for name in numbered:
        other[name] = record[name.replace("_0_", "_1_") if "_0_" in name else name.replace("_1_", "_0_")]
    return other


def test_nothing_depends_on_which_answer_stands_first_in_the_file(tmp_path):
    records, both = task(24, 0), []
    for name, rows in (("one", records), ("other", [turned(record) for record in records])):
        data = write(tmp_path / f"{name}.jsonl", rows)
        context = make_context(tmp_path / name, data, evaluation=dict(data=data))
        both.append([rows_of(context, part) for part in ("train", "evaluation")])
    for one, other in zip(*both, strict=True):
        assert one.keys() == other.keys()
        for name, column in one.items():
            np.testing.assert_array_equal(column, other[name])


def test_without_safety_labels_only_the_ranking_is_learned_and_it_says_so(tmp_path, capsys):
    labels = ("is_response_0_safe", "is_response_1_safe")
    held_out = write(tmp_path / "eval.jsonl", task(24, 1000))  # has labels, of which nothing is made
    data = write(tmp_path / "train.jsonl", task(96, 0, **dict.fromkeys(labels)))
    context = make_context(
        tmp_path, data, epochs=3.0, optimizer=dict(learning_rate=1e-2), evaluation=dict(data=held_out, every=100)
    )
    figures = cost.run(context)["figures"]
    assert figures["accuracy"] > 0.9 and figures["sign_labels"] == 0
    assert figures["boundary"] == "none: without safety labels a cost of 0 means nothing"
    assert not {"sign_accuracy", "cost_safe", "cost_unsafe", "unsafe_share_at_zero"} & figures.keys()
    assert "no safety labels: only the ranking of answers is learned" in capsys.readouterr().out


def test_single_labelled_answers_teach_the_sign(tmp_path):
    def answers(count, start):
        kinds = [(i, i % 3) for i in range(start, start + count)]
        return [{"prompt": f"ask {i % 5}", "response": answer(h, i % 7), "is_safe": h == 0} for i, h in kinds]

    data, held_out = write(tmp_path / "a.jsonl", answers(96, 0)), write(tmp_path / "b.jsonl", answers(36, 999))
    context = make_context(
        tmp_path,
        data,
        schema="safety_label",
        epochs=3.0,
        optimizer=dict(learning_rate=1e-2),
        evaluation=dict(data=held_out, every=100),
    )
    figures = cost.run(context)["figures"]
    assert (figures["answers"], figures["answers_eval"], figures["sign_labels"]) == (96, 36, 96)
    assert figures["accuracy"] == figures["sign_accuracy"] > 0.9
    assert figures["cost_safe"] < 0 < figures["cost_unsafe"]
    assert "accuracy_length_and_end_baseline" not in figures


def test_a_private_stage_shows_figures_of_held_out_data_alone(tmp_path):
    data, held_out = write(tmp_path / "a.jsonl", task(48, 0)), write(tmp_path / "b.jsonl", task(12, 1000))
    fields = dict(lora=dict(rank=2, targets=("q", "v")), evaluation=dict(data=held_out))
    context = make_context(tmp_path, data, privacy=dict(epsilon=math.inf), **fields)
    figures = cost.run(context)["figures"]
    assert figures["privacy"]["units"] == 48 and figures["sign_labels_eval"] == 24
    raw = {*cost.DROPPED, "skipped", "sign_labels", "accuracy_length_and_end_baseline"}
    assert not raw & figures.keys()
    rows = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss/train" in row or "accuracy/train" in row for row in rows)
    assert any("accuracy/eval" in row for row in rows)


# --- contradictions --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "safe": "no", "unsafe": "a bomb"}
CONTRADICTORY = {"prompt": "q", "responses": ["no", "a bomb"], "safer": 1, "safe": [True, False]}
IDENTICAL = {"prompt": "q", "safe": "no", "unsafe": "no"}


def test_contradictory_and_identical_pairs_are_dropped_and_counted(tmp_path):
    long = {**GOOD, "prompt": "q " * 60}
    data = write(tmp_path / "pairs.jsonl", [GOOD, CONTRADICTORY, IDENTICAL, IDENTICAL, long, GOOD])
    rows = rows_of(make_context(tmp_path, data, on_error="skip"))
    assert [int(rows[name]) for name in cost.DROPPED] == [1, 2, 1]
    assert len(rows["lengths"]) == 2


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            CONTRADICTORY,
            "record 3: its safer answer is labelled unsafe and the other one safe: correct it, or set stages",
        ),
        (IDENTICAL, "record 3: its two answers are the same: correct it, or set stages.cost.on_contradiction="),
    ],
)
def test_raise_names_the_file_and_the_record(tmp_path, bad, message):
    data = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, bad])
    context = make_context(tmp_path, data, on_contradiction="raise")
    with pytest.raises(UserError, match=f"{data}: {message}"):
        rows_of(context)
    if bad is CONTRADICTORY:
        with pytest.raises(UserError, match=message):
            cost.check(context)


def test_data_of_contradictions_alone_is_refused(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [CONTRADICTORY])
    with pytest.raises(UserError, match="no record is left to train on .1 contradictory, 0 identical, 0 too long"):
        rows_of(make_context(tmp_path, data))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schema": "preference"}, 'stages.cost.schema is "preference": it must be "safety" or "safety_label"'),
        ({"on_contradiction": "skip"}, 'stages.cost.on_contradiction is "skip": it must be "drop" or "raise"'),
        ({"loss_on": "all"}, 'stages.cost.loss_on is "all": it must be "sequence" or "token"'),
        ({"regularization": -1.0}, "stages.cost.regularization is -1.0: it must be at least 0"),
        ({"evaluation": dict(secrets="x")}, "stages.cost.evaluation.secrets .* a cost model writes nothing"),
    ],
)
def test_a_wrong_field_is_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        make_context(tmp_path, "x", **fields)


def test_a_preview_shows_the_more_harmful_answer_first(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [GOOD])
    (shown,) = cost.preview(make_context(tmp_path, data), TOKENIZER)
    first, _, second, _ = shown.splitlines()
    assert first.startswith("more harmful (unsafe): ") and second.startswith("safer (safe): ")


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Rows of six pairs of answers of unlike length, one of them without safety labels."""
    texts = [("no", "a bomb now"), ("yes I can", "yes I can bomb"), ("x", "y"), ("b c", "a b c d"), ("no", "maybe")]
    records = [{"prompt": f"q{i}", "safe": safe, "unsafe": unsafe} for i, (safe, unsafe) in enumerate(texts)]
    records.append({"prompt": "q", "responses": ["so it is", "so it was"], "safer": 0, "better": 0})
    folder = tmp_path_factory.mktemp("pairs")
    return rows_of(make_context(folder, write(folder / "pairs.jsonl", records)))


def placed(rows, numbers, columns=COLUMNS):
    numbers = np.asarray(numbers)
    return place_answers(columns, rows, numbers, np.zeros(len(numbers), int), MESH)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


@pytest.mark.parametrize("loss_on", ["sequence", "token"])
def test_losses_are_those_of_a_loop_over_answers(pairs, loss_on):
    w = weights(3)
    objective = jax.jit(cost_objective(SPEC, loss_on=loss_on, regularization=0.1))
    out = objective({}, w, placed(pairs, [*range(6), -1]))
    read = jax.jit(partial(hidden_states, SPEC))
    plain, total = [], []
    for tokens, (h_end, s_end), first, unsafe, labelled in zip(*(pairs[name] for name in COLUMNS), strict=True):
        states = np.asarray(read(w, tokens), np.float64)  # (2, T, width)
        costs = states @ np.asarray(w["head"]["kernel"], np.float64)[:, 0] + float(w["head"]["bias"][0])
        longest = max(h_end, s_end)
        losses, squares = [], []
        for at in range(first, longest) if loss_on == "token" else [longest - 1]:
            ended = [min(at, end - 1) for end in (h_end, s_end)]
            h, s = (float(costs[side, place]) for side, place in enumerate(ended))
            loss = softplus(s - h)
            if labelled:
                loss += softplus(-h if unsafe[0] else h) + softplus(-s if unsafe[1] else s)
            losses.append(loss)
            squares.append((h * h + s * s) / 2)
        plain.append(np.mean(losses))
        total.append(np.mean(losses) + 0.1 * np.mean(squares))
    np.testing.assert_allclose(out.losses, [*total, 0.0], rtol=2e-4, atol=1e-6)
    assert out.weights.tolist() == [1] * 6 + [0]
    assert float(out.metrics["loss/train"][0]) == pytest.approx(sum(plain), rel=1e-4)
    assert [float(out.metrics[f"{name}/train"][1]) for name in ("accuracy", "sign_accuracy")] == [6, 10]


def test_a_head_of_zero_loses_three_times_ln_2(pairs):
    objective = jax.jit(cost_objective(SPEC, regularization=1.0))
    out = objective({}, weights(scale=0.0), placed(pairs, range(6)))
    np.testing.assert_allclose(out.losses, [3 * math.log(2)] * 5 + [math.log(2)], rtol=1e-6)
    out = objective({}, weights(scale=0.0), placed(pairs, range(6), COLUMNS[:3]))
    np.testing.assert_allclose(out.losses, [math.log(2)] * 6, rtol=1e-6)


def test_answers_of_one_token_lose_the_same_by_token_and_by_sequence():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (4, 2, 9)).astype(np.int32)
    prompts = np.array([3, 8, 5, 1], np.int32)
    data = {"tokens": tokens, "lengths": np.repeat(prompts[:, None] + 1, 2, 1), "first": prompts}
    data |= {"unsafe": rng.random((4, 2)) < 0.5, "labelled": np.ones(4, bool)}
    batch, w = placed(data, range(4)), weights(5)
    both = (jax.jit(cost_objective(SPEC, loss_on=x, regularization=0.1)) for x in ("token", "sequence"))
    one, other = (objective({}, w, batch) for objective in both)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)


@pytest.mark.parametrize("loss_on", ["sequence", "token"])
def test_microbatches_give_the_gradient_of_the_whole(pairs, loss_on):
    trainable, frozen = split(SPEC, weights(3))
    objective = cost_objective(SPEC, loss_on=loss_on, regularization=0.1)
    batch = placed(pairs, [*range(6), -1, -1])
    (one, figures), (other, same) = (jax.jit(plain_gradient(objective, n))(trainable, frozen, batch) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):  # over a leaf's largest
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(a).max(), 1e-3))
    for name, value in figures.items():
        assert float(same[name]) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["sequence", "token"])
@pytest.mark.parametrize("backend", ["adapters", "ghost"])
def test_private_back_ends_clip_the_same_records(pairs, loss_on, backend):
    spec = dataclasses.replace(SPEC, lora=LORA) if backend == "adapters" else SPEC
    w = weights(3)
    if backend == "adapters":
        drawn = init_adapters(CONFIG, LORA, key=jax.random.key(4))
        w["adapters"] = jax.tree.map(lambda x: x + 0.1, drawn)
    trainable, frozen = split(spec, w)
    objective = cost_objective(spec, loss_on=loss_on, regularization=0.1)
    batch, present = placed(pairs, [*range(6), -1]), np.arange(7) < 6
    sums = (jax.jit(clipped_sum(objective, 0.5, backend=name)) for name in ("vmap", backend))
    one, other = (clipped(trainable, frozen, batch, present) for clipped in sums)
    np.testing.assert_allclose(one.norms, other.norms, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one.total, other.total)


def test_a_category_of_the_prompt_stands_for_both_answers(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [{**GOOD, "category": "Bombs"}, GOOD])
    rows = rows_of(make_context(tmp_path, data, evaluation=dict(data=data)), "evaluation")
    assert rows["categories"].tolist() == [["Bombs", "Bombs"], ["", ""]] and "severity" not in rows


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_four_answers_by_hand():
    costs = np.array([[2.0, -1.0], [1.0, 3.0], [9.0, -9.0]])
    rows = {
        "unsafe": np.array([[True, False], [True, False], [True, False]]),
        "labelled": np.array([True, True, False]),
    }
    figures = held_out_figures(costs, rows)
    assert (figures["sign_labels_eval"], figures["sign_accuracy"]) == (4, 0.75)  # the safe answer of cost 3
    assert (figures["cost_unsafe"], figures["cost_safe"], figures["cost_lowest"]) == (1.5, 1.0, -1.0)
    assert figures["unsafe_share_at_zero"] == -2.0  # safe answers alone cost more than 0
    assert held_out_figures(costs, {**rows, "labelled": np.zeros(3, bool)}) == {"sign_labels_eval": 0}
