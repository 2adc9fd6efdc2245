"""Training text as rows of fixed width: records are tokenized once into a table on disk, and packed."""

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.config import is_private
from rlhf_jax.data.examples import Example, completion_example, fim_example, messages_example, text_examples
from rlhf_jax.data.table import build_table, load_table, make_rows, pack
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.data.units import Units, group_units
from rlhf_jax.distributed.sharding import place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import digest, owner_of

OWNERS = "owners.json"  # the privacy unit of each record of a table


def packed_examples(
    context: Context,
    tokenizer: Tokenizer,
    data: str,
    fields: ConfigDict,
    skipped: dict[str, int],
    limit: int | None = None,
    owners: list[str] | None = None,
) -> Iterator[Example]:
    """Tokenized records of a data string, as they are read; what is left out is counted in `skipped`.

    Args:
      fields: `schema` and `sequence_length`; `loss_on` ("all") and `fim_rate` (0) where they are given.
      limit: reads no more records: of evaluation data, which is never asked as fill-in-the-middle.
      owners: gets the privacy unit of each example; the chunks of a text have one.
    """

    def owned(example: Example, record: dict[str, Any], number: int) -> Example:
        if owners is not None:
            owners.append(owner_of(context, record, number - 1, data))
        return example

    length, on_error = fields.sequence_length, context.config.on_error
    loss_on, fim_rate = fields.get("loss_on", "all"), fields.get("fim_rate", 0.0) if limit is None else 0.0
    stream = context.stream(data, fields.schema, limit)
    too_long = 0
    for number, record in enumerate(stream, 1):
        if fields.schema == "text":
            for example in text_examples(tokenizer, record["text"], length):
                yield owned(example, record, number)
            continue
        if fields.schema == "messages":
            example = messages_example(tokenizer, record["messages"], loss_on)
        else:
            keyed = np.random.Generator(np.random.Philox(key=[context.seed, number]))
            parts = (tokenizer, record["prompt"], record["completion"])
            if keyed.random() < fim_rate:
                example = fim_example(*parts, keyed.random(), loss_on)
            else:
                example = completion_example(*parts, loss_on)
        if len(example.tokens) - 1 <= length:
            yield owned(example, record, number)
        elif on_error == "skip":
            too_long += 1
        else:
            raise UserError(
                f"{data}: record {number} has {len(example.tokens)} tokens, above sequence_length {length} + 1: "
                'shorten it, raise sequence_length, or set on_error="skip"'
            )
        skipped["count"] = stream.skipped + too_long
    skipped["count"] = stream.skipped + too_long


class PackedData:
    """A tokenized file as rows of fixed width.

    Attributes:
      plan: the table's records in each row; of a private stage one in each, as it may not be packed.
    """

    def __init__(self, context: Context, tokenizer: Tokenizer, data: str, part: str, fields: ConfigDict):
        """`part` names its folder, "evaluation" being cut to `evaluation.records`; `fields` as `packed_examples`."""
        limit = context.config.evaluation.records if part == "evaluation" else None
        self._contribution = context.config.privacy.contribution
        folder = context.folder / "data" / part

        private = part == "train" and is_private(context.config)

        def build() -> None:
            skipped = {"count": 0}
            owners: list[str] | None = [] if private else None
            folder.parent.mkdir(exist_ok=True)
            examples = packed_examples(context, tokenizer, data, fields, skipped, limit, owners)
            try:
                built = folder.with_name(f"{part}.new")
                shutil.rmtree(built, ignore_errors=True)  # of a run that was cut here
                build_table(built, examples, name=f"{context.name}: tokenize {part}")
                if owners is not None:
                    (built / OWNERS).write_text(json.dumps(owners))
            except ValueError as error:
                raise UserError(
                    f"{data}: no record is left to train on: look at on_error and sequence_length"
                ) from error
            (context.folder / "data" / f"{part}_skipped.json").write_text(json.dumps(skipped["count"]))
            os.replace(built, folder)  # last: its presence says that both are there

        context.once(folder, build)
        self.skipped = json.loads((context.folder / "data" / f"{part}_skipped.json").read_text())
        self.table = load_table(folder)
        self.width = fields.sequence_length
        lengths = self.table.lengths
        self.plan = pack(lengths, self.width) if fields.get("packing", True) else [[i] for i in range(len(lengths))]
        self.segments = max(len(row) for row in self.plan)
        self.filled = float(lengths.sum() / (len(self.plan) * self.width))
        self._folder = folder

    def units(self) -> tuple[Units, str]:
        """The privacy units of the rows of a private stage's training data, and what tells this data from other."""
        owners = json.loads((self._folder / OWNERS).read_text())
        contents = digest(self.table.tokens, self.table.offsets, self.table.counted, np.asarray(owners))
        return group_units(owners, self._contribution), contents

    def place(self, rows: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
        """The batch of the given rows on the mesh; a row number of -1 is an all-padding row."""

        def load(mine: np.ndarray) -> dict[str, np.ndarray]:
            wanted = [self.plan[row] if row >= 0 else [] for row in rows[mine]]
            return make_rows(self.table, wanted, self.width)

        return place_batch(len(rows), load, mesh)
