import pytest

from rlhf_jax.data import read_records, write_records
from rlhf_jax.errors import UserError

GOOD = {"prompt": "a\n", "completion": "b\u2028é\n", "extra": 3}


def test_write_then_read_is_the_identity(tmp_path):
    path = tmp_path / "r.jsonl"
    write_records(path, [GOOD, {**GOOD, "prompt": ""}])
    assert read_records(path, "completion") == ([GOOD, {**GOOD, "prompt": ""}], 0)
    assert "é" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.jsonl"
    write_records(path, [GOOD])
    with pytest.raises(TypeError):
        write_records(path, [{"prompt": object()}])
    assert read_records(path, "completion") == ([GOOD], 0)


@pytest.mark.parametrize(
    "schema, line, message",
    [
        ("completion", b'{"prompt": "a", "completion": ', "malformed JSON"),
        ("completion", b'{"prompt": "\xff", "completion": "b"}', "malformed JSON .*UTF-8"),
        ("completion", b"[" * 100_000, "malformed JSON"),
        ("completion", b'["a", "b"]', "a JSON list, not an object"),
        ("completion", b'{"prompt": "a"}', 'field "completion" is missing: expected {prompt, completion}'),
        ("completion", b'{"prompt": "a", "completion": 3}', 'field "completion" is int, not a string'),
        ("completion", b'{"prompt": "a", "completion": null}', 'field "completion" is NoneType, not a string'),
        ("completion", b'{"prompt": "a", "completion": ""}', 'field "completion" is empty'),
        ("completion", b'{"prompt": "a", "completion": "\\ud800"}', 'field "completion" holds half a surrogate pair'),
        (
            "preference",
            b'{"prompt": "a", "chosen": "b"}',
            'field "rejected" is missing: expected {prompt, chosen, reject',
        ),
        ("preference", b'{"prompt": "a", "chosen": "", "rejected": "c"}', 'field "chosen" is empty'),
        ("prompt", b'{"text": "a"}', 'field "prompt" is missing'),
        ("text", b'{"text": ""}', 'field "text" is empty'),
    ],
)
def test_malformed_line_is_named_or_counted(tmp_path, schema, line, message):
    good = b'{"text": "t", "prompt": "p", "completion": "c", "chosen": "x", "rejected": "y"}\n'
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(UserError, match=f"bad.jsonl:3: .*{message}"):
        read_records(path, schema)
    records, skipped = read_records(path, schema, on_error="skip")
    assert (len(records), skipped) == (2, 1)


def test_file_without_records_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    with pytest.raises(UserError, match="absent.jsonl: no such file"):
        read_records(tmp_path / "absent.jsonl", "text")
    with pytest.raises(UserError, match="empty.jsonl: no record of schema {text} .*it is empty"):
        read_records(tmp_path / "empty.jsonl", "text")
    with pytest.raises(UserError, match="bad.jsonl: no record .*2 malformed"):
        read_records(tmp_path / "bad.jsonl", "text", on_error="skip")


def test_unknown_options_are_refused(tmp_path):
    path = tmp_path / "r.txt"
    path.write_text("x")
    with pytest.raises(UserError, match='unknown format ".txt": use one of .jsonl'):
        read_records(path, "text")
    with pytest.raises(UserError, match='unknown schema "chat"'):
        read_records(path, "chat")
    with pytest.raises(UserError, match='on_error is "ignore"'):
        read_records(path, "text", on_error="ignore")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_tables_hold_the_same_records(tmp_path, suffix):
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a\n", "NA"], "completion": ["12", "c, d\n"]})
    path = tmp_path / f"r.{suffix}"
    if suffix == "csv":
        pyarrow.csv.write_csv(table, path)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert read_records(path, "completion") == (table.to_pylist(), 0)
    with pytest.raises(UserError, match=f'r.{suffix}:.*: field "chosen" is missing'):
        read_records(path, "preference")


def test_csv_row_unlike_its_header_is_refused_with_the_line(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('text,n\n"two\nlines",1\nx,2\n')
    assert read_records(path, "text") == ([{"text": "two\nlines", "n": "1"}, {"text": "x", "n": "2"}], 0)
    for row in ("x", "x,1,2", '"open'):
        path.write_text(f'text,n\n"two\nlines",1\n{row}\n')
        with pytest.raises(UserError, match="r.csv:4: more or fewer values than the CSV header"):
            read_records(path, "text")
        assert read_records(path, "text", on_error="skip")[1] == 1
    path.write_bytes(b"text\n\xff\n")
    with pytest.raises(UserError, match="malformed CSV .*UTF-8"):
        read_records(path, "text")


def test_unreadable_table_is_a_user_error(tmp_path):
    path = tmp_path / "r.parquet"
    path.write_text("not parquet")
    with pytest.raises(UserError, match="r.parquet: cannot be read as parquet"):
        read_records(path, "text")
