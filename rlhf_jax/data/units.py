"""Privacy units: which records belong together, and which units two data sets share."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError

Record = dict[str, Any]
SHORTEST_BEGINNING = 32  # characters: a shorter text that begins another one is chance


class Units(NamedTuple):
    """The units of a stage's rows.

    Attributes:
      names: each unit's own, in the order of its first row.
      rows: (units, contribution) int64 row numbers, -1 where a unit has fewer.
    """

    names: list[str]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def unit_of(record: Record, number: int, field: str, where: str) -> str:
    """The unit of record `number` (from 0): the value of its field, or without a field the record itself.

    Raises:
      UserError: the record lacks the field; `where` names the option and the data.
    """
    if not field:
        return str(number)
    if record.get(field) is None or record[field] == "":
        raise UserError(
            f'{where}: record {number + 1} has no field "{field}", which is to name its privacy unit: '
            f"add it, or name one of {', '.join(sorted(record))}"
        )
    return str(record[field])


def group_units(owners: Sequence[str], contribution: int) -> Units:
    """The rows of each unit, at most `contribution` of them: those whose hash is least, whatever other units hold.

    Args:
      owners: each row's unit.
    """
    members: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        members.setdefault(owner, []).append(row)
    rows = np.full((len(members), contribution), -1, np.int64)
    for number, (owner, own) in enumerate(members.items()):
        kept = own
        if len(own) > contribution:
            by_hash = sorted(range(len(own)), key=lambda i: hashlib.sha256(f"{owner}/{i}".encode()).digest())
            kept = sorted(own[i] for i in by_hash[:contribution])
        rows[number, : len(kept)] = kept
    return Units(list(members), rows)


def normalized_prompt(record: Record) -> str:
    """What two records about the same thing share, however a stage reads them: the prompt, or the whole text.

    Lower case, letters and digits alone; of a conversation the turns before the last answer.
    """
    text = record.get("prompt", record.get("text"))
    if text is None:
        text = record["messages"][:-1]
    if not isinstance(text, str):
        text = " ".join(str(turn.get("content") or "") for turn in text if turn.get("role") != "system")
    return re.sub(r"\W+", " ", text.lower()).strip()


def shared_units(ours: Sequence[tuple[str, str]], theirs: Sequence[tuple[str, str]], by_name: bool) -> set[str]:
    """The units of one data set (`ours`) that are in another one too.

    Args:
      ours, theirs: (unit, normalized prompt) of every record.
      by_name: both name their units by one field: the same name is the same unit. Otherwise the same prompt is, or a
        prompt that another one begins with (a document, and its beginning as a prompt).
    """
    if by_name:
        return {name for name, _ in ours} & {name for name, _ in theirs}
    names: dict[str, set[str]] = {}
    for name, text in ours:
        names.setdefault(text, set()).add(name)
    others = {text for _, text in theirs}
    shared: set[str] = set()
    beginnings: list[str] = []  # of the text at hand, each the beginning of the next
    for text in sorted(names.keys() | others):
        while beginnings and not text.startswith(beginnings[-1]):
            beginnings.pop()
        beginnings.append(text)
        for beginning in beginnings:
            if beginning == text or len(beginning) >= SHORTEST_BEGINNING:
                for one, other in ((beginning, text), (text, beginning)):
                    if other in others:
                        shared |= names.get(one, set())
    return shared
