"""Where records come from: files, folders and hub data sets, alone or mixed, read as a stream.

A data string is SOURCE[,SOURCE...] and a source NAME[@SPLIT][:WEIGHT], as in
"prepare/sft.jsonl", "helpful.jsonl.gz:0.7,harmless.jsonl.gz:0.3" or "Anthropic/hh-rlhf@test".
"""

import csv
import dataclasses
import gzip
import itertools
import json
import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlhf_jax.data.schemas import FORMS, SCHEMAS, Record, normalize_record
from rlhf_jax.errors import UserError

GRAMMAR = 'write SOURCE[,SOURCE...], each NAME[@SPLIT][:WEIGHT], as in "a.jsonl:0.7,owner/name@test:0.3"'
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ROWS_AT_ONCE = 1024  # of a Parquet file
JSON_PIECE = 1 << 20  # characters of a JSON list read at once
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, zlib.error)  # pyarrow's errors are among them
Rows = Iterator[tuple[str, Any]]  # (where, a line of JSON as bytes or a table's row)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a data string."""

    name: str  # a file, a folder or a hub name
    split: str = "train"
    weight: Fraction | None = None
    config: str | None = None  # of a hub data set


def parse_sources(text: str) -> tuple[Source, ...]:
    """The sources that a data string names.

    >>> [(s.name, s.split, float(s.weight)) for s in parse_sources("a.jsonl:3,owner/name@test:1")]
    [('a.jsonl', 'train', 3.0), ('owner/name', 'test', 1.0)]

    Raises:
        UserError: an empty source, or weights that are not positive numbers or not on every source.
    """
    sources = tuple(_parse_source(part.strip(), text) for part in re.split(r",(?![^\[\]]*\])", text))
    bare = [source.name for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        raise UserError(f'data "{text}": "{bare[0]}" has no weight and others have: give weights to all or to none')
    return sources


def _parse_source(part: str, text: str) -> Source:
    head, colon, weight = part.rpartition(":")
    if not colon or re.search(r"[/\]]", weight):
        head, weight = part, ""
    name, at, split = head.rpartition("@")
    if not at or "/" in split or _format_of(split):
        name, split = head, "train"
    share = None
    if head != part:
        try:
            share = Fraction(weight)
        except ValueError as error:
            raise UserError(f'data "{text}": weight "{weight}" of "{name}" is not a number: {GRAMMAR}') from error
        if share <= 0:
            raise UserError(f'data "{text}": weight {weight} of "{name}" is not positive: give one above 0')
    bracketed = re.fullmatch(r"(.+)\[([^\[\]]+)\]", name)
    name, config = bracketed.groups() if bracketed else (name, None)
    if not name or not split:
        raise UserError(f'data "{text}": a {"split" if name else "source"} is empty: {GRAMMAR}')
    return Source(name, split, share, config)


class RecordStream(Iterator[Record]):
    """An iterator of normalized records. `skipped` counts the malformed ones left out so far."""

    def __init__(self, records: Iterable[Record], tally: Counter):
        self._records, self._tally = iter(records), tally

    def __next__(self) -> Record:
        return next(self._records)

    @property
    def skipped(self) -> int:
        return self._tally["skipped"]


def stream_records(
    data: str | Path,
    schema: str,
    on_error: str = "raise",
    *,
    resolve: Callable[[str], Path | None] | None = None,
    limit: int | None = None,
) -> RecordStream:
    """Records of one or more sources, read as they are asked for: no source is ever held whole.

    Without weights the sources follow each other. With weights they are mixed by `mixture_order`, so that every prefix
    of the stream holds each source's share to within one record; the stream ends when the source whose turn it is has
    no record left, so it may read a part only of the others.

    Args:
        data: a data string; or a `Path`, one file or folder whatever its name holds.
        schema: one of `SCHEMAS`; `schemas.normalize_record` says what each must hold.
        on_error: "raise" stops at the first malformed record; "skip" leaves malformed ones out and counts them.
        resolve: gives the path of a name that is not the user's own ("prepare/sft.jsonl"), or None.
        limit: the most records to give.

    Raises:
        UserError: at once, where a source is not there, is of an unknown format or has no such split; while reading,
            where a record is malformed (with file and line, or record number) or a source has no good one.
    """
    if schema not in SCHEMAS:
        raise UserError(f'unknown schema "{schema}": use one of {", ".join(SCHEMAS)}')
    if on_error not in ("raise", "skip"):
        raise UserError(f'on_error is "{on_error}": use "raise" or "skip"')
    sources = (Source(str(data)),) if isinstance(data, Path) else parse_sources(data)
    tally: Counter = Counter()
    streams = []
    for source in sources:
        path = resolve(source.name) if resolve is not None else None
        if isinstance(data, Path):
            path = data
        streams.append(_normalized(source.name, _open_rows(source, path), schema, on_error == "skip", tally))
    weights = [source.weight for source in sources if source.weight is not None]
    records = _mixed(streams, weights) if weights else itertools.chain.from_iterable(streams)
    return RecordStream(itertools.islice(records, limit), tally)


def mixture_order(weights: Sequence[Fraction]) -> Iterator[int]:
    """An endless order of source numbers: of its first n, source i has n w_i / sum(w) to within less than one.

    With p_i its share, source i's j-th turn (from 0) must come after place j / p_i and by place (j + 1) / p_i, rounded
    up. Such an order exists (Baruah et al., Proportionate progress, 1996), so taking the earliest deadline among the
    turns that may come finds one.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    parts = [int(weight * scale) for weight in weights]
    whole, taken = sum(parts), [0] * len(parts)
    for length in itertools.count(1):
        ready = (i for i, part in enumerate(parts) if length * part > taken[i] * whole)
        chosen = min(ready, key=lambda i: -(-(taken[i] + 1) * whole // parts[i]))
        taken[chosen] += 1
        yield chosen


def _mixed(streams: Sequence[Iterator[Record]], weights: Sequence[Fraction]) -> Iterator[Record]:
    for number in mixture_order(weights):
        record = next(streams[number], None)
        if record is None:
            return
        yield record


def _normalized(name: str, rows: Rows, schema: str, skip: bool, tally: Counter) -> Iterator[Record]:
    good = bad = 0
    for where, row in rows:
        try:
            record = normalize_record(row, schema, where)
        except UserError:
            if not skip:
                raise
            bad += 1
            tally["skipped"] += 1
            continue
        good += 1
        yield record
    if not good:
        found = f"{bad} malformed" if bad else "it is empty"
        raise UserError(f"{name}: no record of schema {FORMS[schema]} ({found}): give at least one")


# --- rows of a source ------------------------------------------------------------------------------------------------


def _open_rows(source: Source, resolved: Path | None) -> Rows:
    """Checks that a source is there and returns its rows."""
    path = resolved or Path(source.name).expanduser()
    if path.is_dir():
        return _data_set_rows(str(path), _load_folder(path, source.config), source.split)
    if path.is_file():
        if _format_of(path.name) is None:
            raise UserError(f'{path}: unknown format "{path.suffix}": use one of {", ".join(READERS)}')
        if source.config or source.split != "train":
            extra = f"[{source.config}]" if source.config else f"@{source.split}"
            raise UserError(f"{path}{extra}: a file is one split and has no configs: leave out {extra}")
        return _file_rows(path)
    if resolved is None and HUB_NAME.fullmatch(source.name) and _format_of(source.name) is None:
        return _data_set_rows(source.name, _load_hub(source.name, source.config), source.split)
    raise UserError(
        f"{path}: no such file: give a file of records ({', '.join(READERS)}), a folder, or a hub name owner/name"
    )


def _format_of(name: str) -> str | None:
    return next((ending for ending in READERS if name.endswith(ending)), None)


def _file_rows(path: Path) -> Rows:
    ending = _format_of(path.name)
    assert ending is not None
    try:
        yield from READERS[ending](path)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as {ending[1:]} ({error}): write the file again") from error


def _json_lines(path: Path) -> Rows:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):  # bytes: only "\n" ends a line, whatever else the text holds
            if line.strip():
                yield f"{path}:{number}", line


def _json_list(path: Path) -> Rows:
    """Elements of a list; as much text is held as a piece, or the longest element, takes."""
    decode, number, text, at, ended = json.JSONDecoder().raw_decode, 0, "", 0, False
    with open(path, encoding="utf-8-sig") as stream:
        while not ended:
            piece = stream.read(max(JSON_PIECE, len(text) - at))
            text, at, ended = text[at:] + piece, 0, not piece
            while mark := re.compile(r"\s*,\s*" if number else r"\s*\[\s*").match(text, at):
                try:
                    value, end = decode(text, mark.end())
                except (ValueError, RecursionError):
                    break  # cut by the end of the piece, or malformed
                if end == len(text) and not ended:
                    break  # a number may go on
                number, at = number + 1, end
                yield f"{path}: record {number}", value
    if not re.compile(r"\s*\]\s*" if number else r"\s*(\[\s*\]\s*)?").fullmatch(text, at):
        place = f"after record {number}" if number else "at its start"
        raise UserError(f"{path}: not a JSON list {place}: mend it, or name it .jsonl if it holds one object a line")


def _csv_rows(path: Path) -> Rows:
    """Every value a string as written. A row shorter or longer than the header has the key None."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                if None in row.values():
                    row[None] = []  # type: ignore[index]
                yield f"{path}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{path}:{reader.line_num + 1}: malformed CSV ({error}): write it in UTF-8, or as JSON Lines"
            ) from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet  # slow to import

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _batch_rows(path, file.iter_batches(ROWS_AT_ONCE))


def _arrow_rows(path: Path) -> Rows:
    """Of the stream format, which `datasets` writes, or the file format, told by its first bytes."""
    import pyarrow.ipc  # slow to import

    with open(path, "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(path)) as mapped:
        if is_file:
            reader = pyarrow.ipc.open_file(mapped)
            yield from _batch_rows(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
        else:
            yield from _batch_rows(path, pyarrow.ipc.open_stream(mapped))


def _batch_rows(path: Path, batches: Iterable[Any]) -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield f"{path}: record {number}", row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_list,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


# --- folders and the hub ---------------------------------------------------------------------------------------------


def _load_folder(path: Path, config: str | None) -> dict[str, Iterable[Any]]:
    """The splits of a folder that `datasets` saved, or that holds files it reads."""
    import datasets  # slow to import

    try:
        if (path / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(path)))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        return dict(datasets.load_dataset(str(path), config, streaming=True))
    except Exception as error:  # its loaders raise their own kinds
        raise UserError(
            f"{path}: no data set can be read from this folder ({error}): give one that holds files of records "
            f"({', '.join(READERS)}) or that datasets' save_to_disk wrote"
        ) from error


def _load_hub(name: str, config: str | None) -> dict[str, Iterable[Any]]:
    import datasets  # slow to import

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries end in the one line below
    try:
        return dict(datasets.load_dataset(name, config, streaming=True))
    except ValueError as error:  # a configuration that is not there, or none where one is needed
        raise UserError(f'"{name}": {error}: name a configuration as "{name}[config]"') from error
    except Exception as error:  # network, permission, no such data set: each its own kind
        raise UserError(
            f'"{name}": no file or folder here, and not read from the hub ({error}): check the name and the network, '
            "or download it and give its folder"
        ) from error


def _data_set_rows(name: str, splits: dict[str, Iterable[Any]], split: str) -> Rows:
    if split not in splits:
        raise UserError(f'{name}: no split "{split}": write {" or ".join(f"{name}@{s}" for s in splits)}')
    return _numbered_rows(f"{name}@{split}", splits[split])


def _numbered_rows(name: str, rows: Iterable[Any]) -> Rows:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{name}: record {number}", row
    except Exception as error:  # each format's reader raises its own kinds
        raise UserError(
            f"{name}: cannot be read after record {number} ({error}): mend that file, or give it by its own name"
        ) from error
