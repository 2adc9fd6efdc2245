"""A SentencePiece tokenizer of records of text, with the special tokens and settings of `prepare`'s.

Writes `tokenizer.model` into the stage's folder; an sft stage reads it by tokenizer="NAME/tokenizer.model".
"""

from collections.abc import Iterator
from typing import Any

from rlhf_jax.data.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.stages.context import Context

HELD_OUT_EVERY = 50  # the last of every so many records is measured on, never trained on


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    context.check_data("text")


def run(context: Context) -> dict[str, Any]:
    """Trains on the records' texts, in their order, until `max_bytes` of them are read; returns the stage's figures.

    Raises:
        UserError: the texts are too few for `vocab_size`, or a record is malformed.
    """
    config, path = context.config, context.folder / "tokenizer.model"
    stream = context.stream(config.data, "text")
    read = {"records": 0, "bytes": 0}
    held_out: list[str] = []

    def texts() -> Iterator[str]:
        for number, record in enumerate(stream, 1):
            size = len(record["text"].encode())
            if read["bytes"] + size > config.max_bytes:
                return
            if number % HELD_OUT_EVERY == 0:
                held_out.append(record["text"])
                continue
            read["records"] += 1
            read["bytes"] += size
            yield record["text"]

    train_tokenizer(texts(), path, config.vocab_size)
    tokenizer = load_tokenizer(path)
    figures: dict[str, Any] = {
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "records": read["records"],
        "bytes": read["bytes"],
        "skipped": stream.skipped,
    }
    if held_out:
        tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        figures["records_held_out"] = len(held_out)
        figures["bytes_per_token"] = sum(len(text.encode()) for text in held_out) / tokens
    return {"figures": figures, "samples": []}
