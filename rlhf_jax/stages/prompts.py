"""A stage's prompts: tokenized, padded batch by batch, each with the identity that keys its draws; and the sampler."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.examples import prompt_ids
from rlhf_jax.data.order import without_padding
from rlhf_jax.data.stops import stop_table
from rlhf_jax.data.table import pad_prompts
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import place_batch, replicated
from rlhf_jax.errors import UserError
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.rollout.batches import bucket_widths, check_lengths, narrowest
from rlhf_jax.rollout.refill import generate_refilled
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.randomness import record_ids

EPOCH_STRIDE = 7919  # moves a record's draw identity from one epoch to the next


def text_prefixes(
    tokenizer: Tokenizer, records: list[dict[str, Any]], numbers: np.ndarray, fewest: int, most: int
) -> tuple[list[int], list[dict[str, Any]], list[list[int]]]:
    """The beginnings of texts as prompts, each of `fewest` to `most` tokens, as many as its record's number says.

    Returns:
      the kept records' places, themselves with "prompt" set, and their token ids with the tokenizer's prefix. A text
      of fewer than `fewest` tokens is left out.
    """
    head = len(tokenizer.prefix)
    places, kept, ids = [], [], []
    for place, (record, number) in enumerate(zip(records, numbers, strict=True)):
        wanted = fewest + int(number) % (most - fewest + 1)
        tokens = list(tokenizer.encode_prompt(record["text"]))
        if len(tokens) - head < fewest:
            continue
        tokens = tokens[: head + wanted]
        places.append(place)
        kept.append({**record, "prompt": tokenizer.decode(tokens[head:])})
        ids.append(tokens)
    return places, kept, ids


class Prompts:
    """Tokenized prompts of a data string, padded batch by batch to the narrowest bucket that holds them.

    Attributes:
      records: the normalized records, `record["prompt"]` a text or a conversation.
      rows: {"prompts": (n, longest), "lengths": (n,)}; ids: (n,) int32 identities that key the draws.
      skipped: records left out: malformed ones, texts shorter than the shortest prefix, and (with on_error "skip")
        prompts that leave no room for the answer.
    """

    def __init__(self, context: Context, tokenizer: Tokenizer, room: int, data: str, limit: int | None = None):
        """`room`: the decoder's context in tokens."""
        config = context.config
        read = context.spread_records if config.schema == "text" else context.records  # collections are often sorted
        records, self.skipped = read(data, config.schema, limit)
        self.ids = record_ids([str(r.get("id", i)) for i, r in enumerate(records)])
        if config.schema == "text":
            places, self.records, ids = text_prefixes(tokenizer, records, self.ids, *config.prefix_tokens)
            self.skipped, self.ids = self.skipped + len(records) - len(places), self.ids[places]
        else:
            self.records, ids = records, [prompt_ids(tokenizer, record["prompt"]) for record in records]
        if not ids:
            raise UserError(f"{data}: no text has {config.prefix_tokens[0]} tokens: lower prefix_tokens")
        if config.on_error == "skip":
            ids = self._those_that_fit(ids, room - config.max_new_tokens, data)
        check_lengths(ids, config.max_new_tokens, room, data)
        self.longest = max(len(x) for x in ids)
        self.widths = bucket_widths(config.prompt_buckets, self.longest)
        self.rows = pad_prompts(ids, self.longest)

    def _those_that_fit(self, ids: list[list[int]], longest: int, data: str) -> list[list[int]]:
        """The prompts of at most `longest` tokens; the others leave the records."""
        fit = [i for i, x in enumerate(ids) if len(x) <= longest]
        if not fit:
            raise UserError(
                f"{data}: none of {len(ids)} prompts has {longest} tokens or fewer, what the context leaves for them: "
                "lower max_new_tokens, or give shorter prompts"
            )
        self.skipped += len(ids) - len(fit)
        self.records, self.ids = [self.records[i] for i in fit], self.ids[fit]
        return [ids[i] for i in fit]

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, rows: np.ndarray, epochs: np.ndarray, mesh: Mesh, width: int | None = None) -> dict[str, jax.Array]:
        """{"prompts", "lengths", "row_ids"} on the mesh; a record's draws differ from epoch to epoch.

        A row number of -1 is padding: a prompt of one token, the same whatever the records are.
        """
        width = width or narrowest(self.widths, self.rows["lengths"][rows].max())

        def load(mine: np.ndarray) -> dict[str, np.ndarray]:
            wanted = rows[mine]
            row_ids = (self.ids[wanted].astype(np.int64) + EPOCH_STRIDE * epochs[mine]) % (1 << 31)
            batch = {
                "prompts": self.rows["prompts"][wanted, :width],
                "lengths": self.rows["lengths"][wanted],
                "row_ids": row_ids.astype(np.int32),
            }
            return without_padding(batch, wanted, lengths=1)

        return place_batch(len(rows), load, mesh)


def check_decode_rows(context: Context, samples: int) -> None:
    """Raises a UserError where `decode_rows` do not divide over the devices, or do not hold one prompt's answers."""
    rows = context.config.decode_rows
    context.check_rows("decode_rows", rows)
    mesh = context.mesh()
    least = samples * mesh.shape["data"] * mesh.shape["fsdp"]
    if rows and rows < least:
        raise UserError(
            f"stages.{context.name}.decode_rows is {rows}, and {samples} answers to a prompt on each device are "
            f"{least} rows: make it at least {least}, or 0"
        )


def check_stop_strings(context: Context, tokenizer: Tokenizer | None) -> None:
    """Raises a UserError where a stage's `stop_strings` are none that its tokenizer, if it is there yet, can end at."""
    if context.config.stop_strings and tokenizer is not None:
        stop_table(tokenizer, context.config.stop_strings)


def make_sampler(context: Context, role: Role, mesh: Mesh) -> Callable[..., Rollout]:
    """The function (base, placed prompts, key, samples=1, adapters=None) -> `Rollout`, by the stage's decoding fields.

    The role gives shape and tokenizer; its weights are the arguments, `adapters` scaled as `generate` takes them.
    Of more answers than `decode_rows` so many are decoded at once, the same ones up to rounding.
    """
    config, shape, tokenizer = context.config, role.spec.config, role.tokenizer
    fields = config.max_new_tokens, config.temperature, config.top_k, config.top_p
    sampling = Sampling(*fields, stop_ids=tokenizer.stop_ids)
    table = None
    if config.stop_strings:
        table = jax.device_put(stop_table(tokenizer, config.stop_strings, shape.vocab_size), replicated(mesh))

    def sample(
        base: Any, batch: dict[str, jax.Array], key: jax.Array, samples: int = 1, adapters: Any = None
    ) -> Rollout:
        given = shape, base, batch["prompts"], batch["lengths"]
        named: dict[str, Any] = dict(
            key=key,
            sampling=sampling,
            row_ids=batch["row_ids"],
            adapters=adapters,
            samples=samples,
            stop_table=table,
        )
        if 0 < config.decode_rows < len(batch["lengths"]) * samples:
            return generate_refilled(*given, **named, slots=config.decode_rows).rollout
        return generate(*given, **named)

    return sample
