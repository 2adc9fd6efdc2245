import hashlib
import json
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.data.examples import Example, completion_example, fim_example, text_examples
from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.table import TableWriter, build_table, load_table, make_rows, pack, pad_prompts
from rlhf_jax.errors import UserError
from rlhf_jax.training.metrics import MetricsLog, cut_back
from rlhf_jax.training.randomness import order_seed, record_ids, stage_key

BOS, EOS, PREFIX, SUFFIX, MIDDLE = 1, 2, 3, 4, 5


def characters(text):
    """'a' is 10, 'b' 11, ..."""
    return [10 + ord(c) - ord("a") for c in text]


TOKENIZER = SimpleNamespace(
    encode=characters,
    encode_prompt=lambda text: [BOS, *characters(text)],
    prefix=(BOS,),
    eos_id=EOS,
    fim_prefix_id=PREFIX,
    fim_suffix_id=SUFFIX,
    fim_middle_id=MIDDLE,
)


# The order.


@pytest.mark.parametrize("records, size", [(12, 4), (10, 4), (3, 8)])
def test_every_epoch_is_a_permutation_of_its_own(records, size):
    order = DataOrder(records, seed=5)
    stream = np.concatenate([order.batch(step, size) for step in range(4 * records)])
    epochs = stream[: len(stream) // records * records].reshape(-1, records)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(records), (len(epochs), 1)))
    if records > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 0.9 * len(epochs)
    else:
        assert {tuple(epoch) for epoch in epochs[:64]} == {
            (0, 1, 2),
            (0, 2, 1),
            (1, 0, 2),
            (1, 2, 0),
            (2, 0, 1),
            (2, 1, 0),
        }
    numbers = np.concatenate([order.epochs(step, size) for step in range(4 * records)])
    np.testing.assert_array_equal(numbers, [i // records for i in range(len(stream))])


def test_a_batch_is_a_function_of_seed_and_step():
    sequential = DataOrder(50, seed=3)
    batches = [sequential.batch(step, 7) for step in range(30)]
    for step in (29, 0, 13, 13):  # a fresh object, in any order
        np.testing.assert_array_equal(DataOrder(50, seed=3).batch(step, 7), batches[step])
    others = [DataOrder(50, seed=seed).batch(0, 50) for seed in range(6)]
    assert len({tuple(order) for order in others}) == 6


def test_batches_of_another_size_read_the_same_stream():
    order = DataOrder(11, seed=0)
    in_sixes = np.concatenate([order.batch(step, 6) for step in range(4)])
    in_fours = np.concatenate([order.batch(step, 4) for step in range(6)])
    np.testing.assert_array_equal(in_sixes, in_fours)


def test_keys_and_seeds_differ_by_all_they_are_for():
    def words(*args):
        return tuple(jax.random.key_data(stage_key(*args)).tolist())

    names = [
        (0, "sft", "dropout"),
        (1, "sft", "dropout"),
        (0, "ppo", "dropout"),
        (0, "sft", "init"),
        (0, "init", "sft"),
    ]
    assert len({words(*name) for name in names}) == len(names)
    assert words(0, "sft", "init") == words(0, "sft", "init")
    assert len({order_seed(seed, stage) for seed in range(3) for stage in ("sft", "ppo")}) == 6


def test_record_ids_are_the_first_31_bits_of_a_hash():
    ids = record_ids(["a", "b"])
    expected = [int(hashlib.sha256(text).hexdigest()[:8], 16) % 2**31 for text in (b"a", b"b")]
    assert ids.dtype == np.int32 and ids.tolist() == expected


# Packing and rows.


@pytest.mark.parametrize("seed", range(4))
def test_packed_rows_hold_every_record_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 200)
    rows = pack(lengths, 32)
    assert sorted(record for row in rows for record in row) == list(range(200))
    assert max(lengths[row].sum() for row in rows) <= 32
    assert pack(lengths.copy(), 32) == rows
    # best-fit decreasing needs at most 11/9 of the best and 1 more (Johnson, 1973); the best is at least the volume
    assert len(rows) <= 11 / 9 * max(np.ceil(lengths.sum() / 32), (lengths > 16).sum()) + 1


def test_packing_by_hand():
    # 7, 6, 3, 3, 1 into 10: 7; 6; 3 fits 7 best (10 full); 3 to 6 (9); 1 to 9 (10)
    assert pack(np.array([3, 7, 1, 6, 3]), 10) == [[1, 0], [3, 4, 2]]


def table_of(examples, folder):
    build_table(folder, examples)
    return load_table(folder)


def random_examples(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 13, 20)
    return [Example(rng.integers(1, 50, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in lengths]


def test_a_table_is_read_as_it_was_written(tmp_path):
    examples = random_examples()
    table = table_of(examples, tmp_path / "table")
    assert len(table) == 20 and not (tmp_path / "table.tmp").exists()
    for i, example in enumerate(examples):
        assert table.tokens[table.offsets[i] : table.offsets[i + 1]].tolist() == example.tokens
        assert table.counted[table.offsets[i] : table.offsets[i + 1]].tolist() == example.counted
        assert table.lengths[i] == len(example.tokens) - 1


def test_a_table_is_mapped_with_its_types(tmp_path):
    table = table_of(random_examples(), tmp_path / "table")
    for name, dtype in (("tokens", np.int32), ("offsets", np.int64), ("counted", np.uint8)):
        assert getattr(table, name).dtype == dtype and isinstance(getattr(table, name), np.memmap)


@pytest.mark.parametrize("fault", ["raised", "none", "short", "uncounted"])
def test_a_table_appears_whole_or_not_at_all(tmp_path, fault):
    def examples():
        yield from random_examples() if fault != "none" else ()
        if fault == "raised":
            raise UserError("record 21 is malformed")
        yield from {"short": [Example([1], [True])], "uncounted": [Example([1, 2], [True])]}.get(fault, [])

    (tmp_path / "table.tmp").mkdir()
    (tmp_path / "table.tmp" / "left.npy").write_text("by a run that was cut")
    with pytest.raises(UserError if fault == "raised" else ValueError):
        build_table(tmp_path / "table", examples())
    assert list(tmp_path.iterdir()) == []
    build_table(tmp_path / "table", random_examples())
    assert sorted(p.name for p in (tmp_path / "table").iterdir()) == ["counted.npy", "offsets.npy", "tokens.npy"]


def test_a_table_is_written_in_constant_memory(tmp_path):
    example = Example.counting_from(list(range(1000)), 500)
    tracemalloc.start()
    with TableWriter(tmp_path / "table") as writer:
        for _ in range(10_000):  # 50 MB on disk
            writer.append(example)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    table = load_table(tmp_path / "table")
    assert len(table) == 10_000 and table.offsets[-1] == len(table.tokens) == len(table.counted) == 10**7
    assert table.tokens[-1000:].tolist() == example.tokens and table.counted[-1000:].sum() == 500


def test_rows_equal_the_loop(tmp_path):
    examples = random_examples(1)
    table = table_of(examples, tmp_path / "table")
    plan = [*pack(table.lengths, 16), []]
    width = 18
    expected = {
        name: np.zeros((len(plan), width)) for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    }
    for i, records in enumerate(plan):
        at = 0
        for segment, record in enumerate(records):
            tokens = examples[record].tokens
            for t in range(len(tokens) - 1):
                expected["tokens"][i, at] = tokens[t]
                expected["targets"][i, at] = tokens[t + 1]
                expected["segment_ids"][i, at] = segment + 1
                expected["positions"][i, at] = t
                expected["loss_mask"][i, at] = examples[record].counted[t + 1]
                at += 1
    rows = make_rows(table, plan, width)
    assert set(rows) == set(expected)
    for name, field in expected.items():
        np.testing.assert_array_equal(rows[name], field, err_msg=name)
        assert rows[name].dtype == (np.float32 if name == "loss_mask" else np.int32)
    assert rows["loss_mask"].sum() == sum(sum(e.counted[1:]) for e in examples)


def test_prompts_are_padded_right_and_filled_up_with_the_first():
    out = pad_prompts([[7, 8], [9]], 3, rows=4)
    np.testing.assert_array_equal(out["prompts"], [[7, 8, 0], [9, 0, 0], [7, 8, 0], [7, 8, 0]])
    np.testing.assert_array_equal(out["lengths"], [2, 1, 2, 2])
    assert out["prompts"].dtype == out["lengths"].dtype == np.int32
    np.testing.assert_array_equal(pad_prompts([[7, 8], [9]], 2)["prompts"], [[7, 8], [9, 0]])


# Examples.


def test_a_completion_alone_counts_or_all_does(tmp_path):
    example = completion_example(TOKENIZER, "ab", "cde", "completion")
    assert example == Example.counting_from([BOS, 10, 11, 12, 13, 14, EOS], 3)
    assert completion_example(TOKENIZER, "ab", "cde", "all") == Example.counting_from(example.tokens, 1)
    row = make_rows(table_of([example], tmp_path / "table"), [[0]], 8)
    counted = row["targets"][0][row["loss_mask"][0] == 1].tolist()
    assert counted == [12, 13, 14, EOS]  # the completion and its end, nothing of the prompt


@pytest.mark.parametrize("length, pieces", [(100, 1), (9, 1), (8, 2), (4, 3), (3, 3), (1, 9)])
def test_pieces_of_a_text_have_every_token_as_a_target_once(tmp_path, length, pieces):
    text = "abcdefgh"
    examples = text_examples(TOKENIZER, text, length)
    assert len(examples) == pieces  # of 9 targets
    table = table_of(examples, tmp_path / "table")
    assert table.lengths.max() <= length and table.lengths.min() >= 1
    rows = make_rows(table, [[i] for i in range(len(examples))], length)
    targets = [row[mask == 1].tolist() for row, mask in zip(rows["targets"], rows["loss_mask"], strict=True)]
    assert sum(targets, []) == [*characters(text), EOS]
    assert rows["tokens"][0, 0] == BOS


@pytest.mark.parametrize("cut, middle", [(0.5, 2), (0.25, 1), (0.0, 1), (1.0, 4)])
def test_fill_in_the_middle_is_prefix_suffix_middle(cut, middle):
    completion = characters("cdef")
    example = fim_example(TOKENIZER, "ab", "cdef", cut, "completion")
    head = [BOS, PREFIX, 10, 11, SUFFIX, *completion[middle:], MIDDLE]
    assert example.tokens == [*head, *completion[:middle], EOS]
    assert [t for t, counts in zip(example.tokens, example.counted, strict=True) if counts] == [
        *completion[:middle],
        EOS,
    ]
    assert fim_example(TOKENIZER, "ab", "cdef", cut, "all") == Example.counting_from(example.tokens, 1)


def test_fill_in_the_middle_needs_its_tokens():
    without = SimpleNamespace(**{**vars(TOKENIZER), "fim_middle_id": None})
    with pytest.raises(UserError, match="fim_rate"):
        fim_example(without, "ab", "cdef", 0.5, "completion")


# The log.


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in steps)


@pytest.mark.parametrize(
    "text, step, kept",
    [
        (lines(1, 2, 3, 4), 2, lines(1, 2)),
        (lines(1, 2, 3), 9, lines(1, 2, 3)),
        (lines(1, 2, 3), 0, ""),
        (lines(5, 10, 15), 12, lines(5, 10)),
        (lines(1, 2) + '{"step": 3, "lo', 9, lines(1, 2)),
        (lines(1) + '{"step": 2, "lo' + lines(2, 3), 9, lines(1)),
        (lines(1) + '{"step": 2, "loss": NaN}\n', 2, lines(1) + '{"step": 2, "loss": NaN}\n'),
        (lines(1, 2).rstrip("\n"), 2, lines(1, 2)),
        (lines(1) + "\0\0\0", 2, lines(1)),
        ("", 3, ""),
    ],
)
def test_the_log_is_cut_back_to_the_restored_step(tmp_path, text, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    cut_back(path, step)
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_log_is_cut_back_to_none(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_continued_log_holds_every_step_once(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, runs in ((whole, [(0, range(1, 7))]), (cut, [(0, range(1, 5)), (3, range(4, 7))])):
        folder.mkdir()
        for restored, steps in runs:
            log = MetricsLog(folder, restored, tensorboard=False)
            for step in steps:
                log.write(step, {"loss": np.float32(step) / 4, "tokens": np.int32(step)})
            log.close()
    text = (cut / "metrics.jsonl").read_text()
    assert text == (whole / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [list(row) for row in rows] == [["step", "loss", "tokens"]] * 6
    assert [row["step"] for row in rows] == list(range(1, 7))
