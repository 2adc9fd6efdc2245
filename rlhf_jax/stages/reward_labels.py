"""A reward model on labelled texts: rows that are beginnings of texts, and the logistic loss of their labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.data.examples import Example, show_example
from rlhf_jax.data.order import without_padding
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import place_batch
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.objectives.records import Objective, RecordLosses
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import owners_of

Texts = dict[str, np.ndarray]


def label_objective(spec: RoleSpec) -> Objective:
    """-log sigmoid(score) of a positive text, -log sigmoid(-score) of a negative one: losses and weights (B,).

    The score, read at a row's last token, so becomes the log-odds of the label.
    """

    def objective(trainable: Any, frozen: Any, batch: dict[str, jax.Array]) -> RecordLosses:
        scores = last_scores(spec, {**frozen, **trainable}, batch["tokens"], batch["lengths"])
        weight, signed = batch["weight"], jnp.where(batch["positive"], scores, -scores)
        losses, count = jax.nn.softplus(-signed) * weight, weight.sum()
        metrics = {
            "loss/train": (losses.sum(), count),
            "accuracy/train": (jnp.sum((signed > 0) * weight), count),
        }
        return RecordLosses(losses, weight, metrics)

    return objective


def labelled_texts(
    context: Context, spec: RoleSpec, tokenizer: Tokenizer, data: str, limit: int | None = None
) -> Texts:
    """Texts cut to the longest window, with their labels; with a `limit` spread evenly over the data.

    Returns {"tokens": (n, T) int32, "lengths": (n,) int32, "positive": (n,) bool, "ids": (n,) str, "skipped": the
    malformed records left out}. A text that fits ends with eos, as an answer does.
    """
    records, skipped = context.spread_records(data, "label", limit)
    longest = min(context.config.sequence_length, spec.config.context)
    rows = [_whole_text(tokenizer, record)[:longest] for record in records]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return {
        "tokens": tokens,
        "lengths": np.asarray([len(ids) for ids in rows], np.int32),
        "positive": np.asarray([record["label"] for record in records]),
        "ids": np.asarray([str(record.get("id", i)) for i, record in enumerate(records)]),
        "skipped": np.asarray(skipped),
        **(owners_of(context, records, data) if limit is None else {}),
    }


def _whole_text(tokenizer: Tokenizer, record: dict[str, Any]) -> list[int]:
    return [*tokenizer.encode_prompt(record["text"]), tokenizer.eos_id]


def window_length(context: Context, record_id: str, epoch: int) -> int:
    """How many tokens of a text are judged: uniform from a quarter of `sequence_length` to all of it.

    The draw is keyed by the record's id and the epoch: another batch, or another record, never changes it.
    """
    longest = context.config.sequence_length
    draw = keyed_generator(context.seed, context.name, "window", record_id, str(epoch))
    return int(draw.integers(max(1, longest // 4), longest + 1))


def place_windows(
    context: Context, texts: Texts, rows: np.ndarray, epochs: np.ndarray, mesh: Mesh
) -> dict[str, jax.Array]:
    """A batch of windows, the beginnings of texts; a row number of -1 is a padding row of weight 0."""

    def load(mine: np.ndarray) -> dict[str, np.ndarray]:
        wanted = rows[mine]
        named = zip(texts["ids"][wanted], epochs[mine], strict=True)
        drawn = [window_length(context, str(name), int(epoch)) for name, epoch in named]
        lengths = np.minimum(texts["lengths"][wanted], drawn).astype(np.int32)
        inside = np.arange(texts["tokens"].shape[1]) < lengths[:, None]
        batch = {
            "tokens": np.where(inside, texts["tokens"][wanted], 0),
            "lengths": lengths,
            "positive": texts["positive"][wanted],
            "weight": np.ones(len(wanted), np.float32),
        }
        return without_padding(batch, wanted, lengths=1)

    return place_batch(len(rows), load, mesh)


def show_window(context: Context, tokenizer: Tokenizer, record: dict[str, Any], number: int) -> str:
    """The beginning of record `number` that is judged first, decoded; its last token is where the score is read."""
    length = window_length(context, str(record.get("id", number)), 0)
    return show_example(tokenizer, Example.counting_from(_whole_text(tokenizer, record)[:length], 0))
