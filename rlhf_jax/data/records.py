"""Records in files: read with every field checked, written atomically as JSON Lines."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.data.schemas import SCHEMAS
from rlhf_jax.data.sources import stream_records

__all__ = ["SCHEMAS", "read_records", "write_records"]


def read_records(source: str | Path, schema: str, on_error: str = "raise") -> tuple[list[dict[str, Any]], int]:
    """All records of a file (a `Path`) or a data string, normalized: `stream_records` in one list.

    Args:
        schema: one of `SCHEMAS`; `schemas.normalize_record` says what each must hold.
        on_error: "raise" stops at the first malformed record; "skip" leaves malformed ones out.

    Returns:
        The records in order, fields beyond the schema kept, and the number skipped. Blank lines of JSON Lines are not
        records.

    Raises:
        UserError: with file and line (JSON Lines, CSV) or record number; also where no record remains.
    """
    stream = stream_records(source, schema, on_error)
    records = list(stream)
    return records, stream.skipped


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines in UTF-8. The file appears complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)
