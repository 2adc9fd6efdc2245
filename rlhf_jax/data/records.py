"""Records in files: read with every field checked, written atomically as JSON Lines."""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

SCHEMAS = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "preference": ("prompt", "chosen", "rejected"),
}
MAY_BE_EMPTY = ("prompt",)  # the model then starts from bos alone
Row = bytes | dict[Any, Any]  # a line of JSON, or a table's row


def read_records(path: str | Path, schema: str, on_error: str = "raise") -> tuple[list[dict[str, Any]], int]:
    """Records of `path` (.jsonl, .parquet, .csv, .arrow), fields beyond the schema kept.

    Args:
        schema: "text" {text}, "completion" {prompt, completion}, "prompt" {prompt} or "preference" {prompt, chosen,
            rejected}; every field is a string, and only a prompt may be empty.
        on_error: "raise" stops at the first malformed record; "skip" leaves malformed ones out.

    Returns:
        The records in file order, and the number skipped. Blank lines of JSON Lines are not records.

    Raises:
        UserError: with file and line (JSON Lines, CSV) or record number; also where no record remains.
    """
    path = Path(path)
    if schema not in SCHEMAS:
        raise UserError(f'unknown schema "{schema}": use one of {", ".join(SCHEMAS)}')
    if on_error not in ("raise", "skip"):
        raise UserError(f'on_error is "{on_error}": use "raise" or "skip"')
    if not path.is_file():
        raise UserError(f"{path}: no such file: give a file of records ({', '.join(READERS)})")
    if path.suffix not in READERS:
        raise UserError(f'{path}: unknown format "{path.suffix}": use one of {", ".join(READERS)}')
    records: list[dict[str, Any]] = []
    skipped = 0
    for where, row in READERS[path.suffix](path):
        try:
            records.append(_checked_record(row, schema, where))
        except UserError:
            if on_error == "raise":
                raise
            skipped += 1
    if not records:
        found = f"{skipped} malformed" if skipped else "it is empty"
        raise UserError(f"{path}: no record of schema {_expected(schema)} ({found}): give at least one")
    return records, skipped


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines in UTF-8. The file appears complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, "rb") as stream:  # bytes: only "\n" ends a line, whatever else the text holds
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every value a string as written. A row shorter or longer than the header has the key None."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                if None in row.values():
                    row[None] = []
                yield f"{path}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}:{reader.line_num + 1}: malformed CSV ({error}): write it in UTF-8") from error


def _table_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import datasets  # slow to import

    try:
        if path.suffix == ".arrow":
            rows = datasets.Dataset.from_file(str(path), in_memory=True).to_list()
        else:
            with tempfile.TemporaryDirectory() as cache:
                rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
    except Exception as error:  # each format's reader raises its own kinds
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({error}): write the file again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: record {number}", row


def _checked_record(row: Row, schema: str, where: str) -> dict[str, Any]:
    expected = f"expected {_expected(schema)}"
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: malformed JSON ({error}): {expected}, one object a line, in UTF-8") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object: {expected}")
    if None in row:
        raise UserError(f"{where}: more or fewer values than the CSV header has names: {expected}, quoted")
    for field in SCHEMAS[schema]:
        if field not in row:
            raise UserError(f'{where}: field "{field}" is missing: {expected}')
        value = row[field]
        if not isinstance(value, str):
            raise UserError(f'{where}: field "{field}" is {type(value).__name__}, not a string: {expected}')
        if not value and field not in MAY_BE_EMPTY:
            raise UserError(f'{where}: field "{field}" is empty: {expected} with text in it')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f'{where}: field "{field}" holds half a surrogate pair: write it as valid UTF-8') from error
    return row


def _expected(schema: str) -> str:
    return "{" + ", ".join(SCHEMAS[schema]) + "} of strings"


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
}
