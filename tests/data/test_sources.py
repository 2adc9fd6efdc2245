import gzip
import itertools
import json
import tracemalloc
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from rlhf_jax.data.records import read_records
from rlhf_jax.data.sources import Source, mixture_order, parse_sources, stream_records
from rlhf_jax.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(*words):
    return [{"text": word} for word in words]


# The data string.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.jsonl", [Source("a.jsonl")]),
        (" a.jsonl , b.csv", [Source("a.jsonl"), Source("b.csv")]),
        ("a.jsonl:0.3,b.jsonl:7", [Source("a.jsonl", weight=Fraction(3, 10)), Source("b.jsonl", weight=Fraction(7))]),
        ("owner/name@test", [Source("owner/name", "test")]),
        ("owner/name@test:.5", [Source("owner/name", "test", Fraction(1, 2))]),
        ("owner/name[a,b]@test", [Source("owner/name", "test", config="a,b")]),
        ("owner/name[x:y]", [Source("owner/name", config="x:y")]),
        ("runs@home/a.jsonl", [Source("runs@home/a.jsonl")]),
        ("a@b.jsonl", [Source("a@b.jsonl")]),
        ("12:30/a.jsonl", [Source("12:30/a.jsonl")]),
        ("prepare/sft.jsonl:2", [Source("prepare/sft.jsonl", weight=Fraction(2))]),
    ],
)
def test_a_data_string_names_its_sources(text, expected):
    assert list(parse_sources(text)) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a source is empty"),
        ("a.jsonl,", "a source is empty"),
        ("owner/name@", "a split is empty"),
        ("a.jsonl:much", 'weight "much" of "a.jsonl" is not a number'),
        ("a.jsonl:", 'weight "" of "a.jsonl" is not a number'),
        ("a.jsonl:nan", 'weight "nan" of "a.jsonl" is not a number'),
        ("a.jsonl:0,b.jsonl:1", 'weight 0 of "a.jsonl" is not positive'),
        ("a.jsonl:-1,b.jsonl:1", 'weight -1 of "a.jsonl" is not positive'),
        ("a.jsonl:1,b.jsonl", '"b.jsonl" has no weight and others have: give weights to all or to none'),
    ],
)
def test_a_wrong_data_string_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_sources(text)


# Mixtures.


@pytest.mark.parametrize("seed", range(8))
def test_every_prefix_of_a_mixture_holds_each_share_to_within_one_record(seed):
    rng = np.random.default_rng(seed)
    weights = [Fraction(int(w)) for w in rng.integers(1, [10, 1000][seed % 2], size=rng.integers(1, 12))]
    if seed == 0:  # taking the source that is furthest behind is a whole record off with these
        weights = [Fraction(w) for w in (16, 5, 3, 1, 25, 25)]
    taken = [0] * len(weights)
    for n, source in enumerate(itertools.islice(mixture_order(weights), 1000), 1):
        taken[source] += 1
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - n * weight / sum(weights)) < 1


def test_a_mixture_by_hand_ends_with_its_first_exhausted_source(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", texts("a0", "a1", "a2", "a3", "a4"))
    b = write_lines(tmp_path / "b.jsonl", texts("b0", "b1"))
    # shares 2/3 and 1/3: turns of a are due by 2, 3, 5, 6, 8, those of b by 3, 6; after seven records a has no sixth
    read = [record["text"] for record in stream_records(f"{a}:2,{b}:1", "text")]
    assert read == ["a0", "a1", "b0", "a2", "a3", "b1", "a4"]
    assert read == [record["text"] for record in stream_records(f"{a}:0.2,{b}:0.1", "text")]
    assert read[:3] == [record["text"] for record in stream_records(f"{a}:2,{b}:1", "text", limit=3)]


def test_sources_without_weights_follow_each_other(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", texts("a0", "a1"))
    b = write_lines(tmp_path / "b.jsonl", [{"text": 3}, *texts("b0")])
    stream = stream_records(f"{a},{b}", "text", "skip")
    assert stream.skipped == 0
    assert (list(stream), stream.skipped) == (texts("a0", "a1", "b0"), 1)
    with pytest.raises(UserError, match='b.jsonl:1: field "text" is int'):
        list(stream_records(f"{a},{b}", "text"))
    assert list(stream_records(f"{a},{b}", "text", limit=2)) == texts("a0", "a1")
    write_lines(tmp_path / "b.jsonl", [{"text": 3}])
    with pytest.raises(UserError, match="b.jsonl: no record of schema {text} .*1 malformed"):
        list(stream_records(f"{a},{b}", "text", "skip"))


# Files.


def test_names_of_stages_are_resolved(tmp_path):
    write_lines(tmp_path / "made.jsonl", texts("a"))
    resolve = {"prepare/sft.jsonl": tmp_path / "made.jsonl", "prepare/none.jsonl": tmp_path / "none.jsonl"}.get
    assert list(stream_records("prepare/sft.jsonl", "text", resolve=resolve)) == texts("a")
    with pytest.raises(UserError, match="made.jsonl@test: a file is one split"):
        stream_records("prepare/sft.jsonl@test", "text", resolve=resolve)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        stream_records("prepare/none.jsonl", "text", resolve=resolve)


def test_a_path_is_one_file_whatever_its_name_holds(tmp_path):
    path = tmp_path / "a,b@c:d.jsonl"
    write_lines(path, texts("a"))
    assert read_records(path, "text") == (texts("a"), 0)


def test_every_format_gives_the_same_records(tmp_path):
    records = [{"prompt": "a\n", "completion": f"{i}, é\n"} for i in range(3000)]
    table = pyarrow.Table.from_pylist(records)
    paths = {ending: tmp_path / f"r.{ending}" for ending in ("jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow")}
    write_lines(paths["jsonl"], records)
    paths["jsonl.gz"].write_bytes(gzip.compress(paths["jsonl"].read_bytes()))
    paths["json"].write_text(json.dumps(records, indent=1))
    pyarrow.csv.write_csv(table, paths["csv"])
    pyarrow.parquet.write_table(table, paths["parquet"], row_group_size=1700)
    with pyarrow.ipc.new_file(paths["arrow"], table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    for path in paths.values():
        assert read_records(path, "completion") == (records, 0), path
        assert list(stream_records(str(path), "completion", limit=5)) == records[:5]


def test_a_malformed_record_of_any_format_is_named(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}]
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in rows)))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    for name, where in (("r.jsonl.gz", "r.jsonl.gz:2"), ("r.json", "r.json: record 2"), ("r.parquet", "record 2")):
        with pytest.raises(UserError, match=f'{where}: field "text" is NoneType, not a string'):
            read_records(tmp_path / name, "text")
        assert read_records(tmp_path / name, "text", "skip") == (texts("a", "b"), 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no record of schema"),
        ("[]", "no record of schema"),
        ('{"text": "a"}', "not a JSON list at its start"),
        ('[{"text": "a"}', "not a JSON list after record 1"),
        ('[{"text": "a"},]', "not a JSON list after record 1"),
        ('[{"text": "a"}, {"text": }]', "not a JSON list after record 1"),
        ('[{"text": "a"}] x', "not a JSON list after record 1"),
        ("[1234]", "record 1: a JSON int, not an object"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "r.json", "text")


@pytest.mark.parametrize("piece", [1, 2, 7, 50])
def test_a_list_cut_anywhere_gives_its_elements(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("rlhf_jax.data.sources.JSON_PIECE", piece)
    records = [{"text": "x" * n, "n": n, "l": [1.5, {"é": '],[}"'}]} for n in range(1, 30)]
    for text in (json.dumps(records), json.dumps(records, indent=2) + "\n", json.dumps(records, separators=(",", ":"))):
        (tmp_path / "r.json").write_text(text)
        assert read_records(tmp_path / "r.json", "text") == (records, 0)
    (tmp_path / "r.json").write_text('[123456, {"text": "a"}]')
    assert read_records(tmp_path / "r.json", "text", "skip") == (texts("a"), 1)


def test_a_damaged_file_is_a_user_error(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for damaged in (whole[:-20], b"no gzip", whole[:40] + b"\xff" * 20 + whole[60:]):
        (tmp_path / "r.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="r.jsonl.gz: cannot be read as jsonl.gz"):
            read_records(tmp_path / "r.jsonl.gz", "text")
    for ending in ("parquet", "arrow"):
        (tmp_path / f"r.{ending}").write_bytes(b"ARROW1 or PAR1, but neither")
        with pytest.raises(UserError, match=f"r.{ending}: cannot be read as {ending}"):
            read_records(tmp_path / f"r.{ending}", "text")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_streaming_holds_a_small_part_of_a_source(tmp_path, ending):
    path, count, text = tmp_path / f"r.{ending}", 25_000, "word " * 400  # 50 MB of text
    if ending in ("parquet", "arrow"):
        schema = pyarrow.schema({"text": pyarrow.string()})
        batch = pyarrow.RecordBatch.from_pydict({"text": [text] * 1000}, schema)
        opened = pyarrow.parquet.ParquetWriter if ending == "parquet" else pyarrow.ipc.new_stream
        with opened(path, schema) as writer:
            for _ in range(count // 1000):
                writer.write_batch(batch)
    else:
        line = json.dumps({"text": text}).encode()
        with gzip.open(path, "wb", 1) if ending == "jsonl.gz" else open(path, "wb") as file:
            if ending == "json":
                file.write(b"[" + b", ".join([line] * count) + b"]")
            else:
                for _ in range(count):
                    file.write(line + b"\n")
    arrow_before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    most_arrow = 0
    for number, _ in enumerate(stream_records(str(path), "text"), 1):
        if number % 500 == 0:
            most_arrow = max(most_arrow, pyarrow.total_allocated_bytes() - arrow_before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == count
    assert peak + most_arrow < 10e6


# Folders and the hub.


def test_a_folder_is_read_by_its_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", texts("a", "b"))
    write_lines(folder / "test.jsonl", texts("c"))
    assert list(stream_records(str(folder), "text")) == texts("a", "b")
    assert list(stream_records(f"{folder}@test", "text")) == texts("c")
    with pytest.raises(UserError, match='set: no split "dev": write .*set@train or .*set@test'):
        stream_records(f"{folder}@dev", "text")
    with pytest.raises(UserError, match='set@test: record 1: field "prompt" is missing'):
        list(stream_records(f"{folder}@test", "prompt"))
    (folder / "train.jsonl").write_text('{"text": "a"}\n{bad\n')
    with pytest.raises(UserError, match="set.*by its own name"):
        list(stream_records(str(folder), "text"))


def test_a_saved_data_set_is_read(tmp_path):
    parts = {name: datasets.Dataset.from_list(texts(name)) for name in ("train", "test")}
    parts["test"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert list(stream_records(str(tmp_path / "one"), "text")) == texts("test")
    assert list(stream_records(f"{tmp_path / 'two'}@test", "text")) == texts("test")
    assert list(stream_records(str(tmp_path / "two"), "text")) == texts("train")


def test_a_folder_without_data_is_refused(tmp_path):
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "notes.weird").write_text("x")
    for name in ("empty", "other"):
        with pytest.raises(UserError, match=f"{name}: no data set can be read from this folder .*: give one"):
            stream_records(str(tmp_path / name), "text")


def test_a_hub_name_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.IterableDatasetDict({"test": datasets.Dataset.from_list(texts("a")).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(stream_records("owner/name[en]@test", "text")) == texts("a")
    assert asked == [(("owner/name", "en"), {"streaming": True})]
    with pytest.raises(UserError, match='owner/name: no split "train": write owner/name@test'):
        stream_records("owner/name", "text")


def test_a_hub_name_out_of_reach_is_refused_with_the_mend(monkeypatch):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error: Exception = ConnectionError("no\nroute")
    with pytest.raises(UserError, match='"owner/name": .*no route.*: check the name and the network, or download it'):
        stream_records("owner/name", "text")
    error = ValueError("Config name is missing. Pick one of en, de")
    with pytest.raises(UserError, match=r"Pick one of en, de: name a configuration as \"owner/name\[config\]\""):
        stream_records("owner/name", "text")


@pytest.mark.parametrize("name", ["absent", "a/b/c", "data/absent.jsonl", "data/absent.json"])
def test_what_is_neither_file_nor_hub_name_is_no_such_file(name):
    with pytest.raises(UserError, match=f"{name}: no such file: give .*, a folder, or a hub name"):
        stream_records(name, "text")


# Real data.


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data on this machine")
def test_real_files_are_read():
    reviews = stream_records(str(SHARED / "imdb" / "test.jsonl.gz"), "text", limit=200)
    assert sum(len(record["text"]) > 100 for record in reviews) > 190
    tasks = stream_records(str(SHARED / "code-infilling" / "HumanEval-SingleLineInfilling.jsonl.gz"), "prompt")
    assert sum(1 for _ in tasks) == 1033
    names = [SHARED / "hh-rlhf" / f"{name}.jsonl.gz" for name in ("helpful-base", "harmless-base")]
    mixed = stream_records(f"{names[0]}:3,{names[1]}:1", "preference", limit=400)
    helpful = {record["chosen"] for record in stream_records(str(names[0]), "preference")}
    assert 299 <= sum(record["chosen"] in helpful for record in mixed) <= 303  # a few answers are in both
