"""Answers as another model's tokenizer and template write them: text is encoded again, ids are never passed on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.chat import render
from rlhf_jax.data.examples import answer_ids, prompt_ids
from rlhf_jax.data.schemas import Message, Text
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.rollout.generate import Rollout
from rlhf_jax.rollout.scoring import last_scores

BUCKET = 64  # rows are padded to a multiple of it, so few widths are compiled


def answer_text(sampler: Tokenizer, answer: Sequence[int], ended: bool) -> str:
    """The text of an answer without the stop token that ended it."""
    return sampler.decode(answer[:-1] if ended and answer[-1] in sampler.stop_ids else answer)


def reencode(
    sampler: Tokenizer, reader: Tokenizer, prompt: Text, answer: Sequence[int], ended: bool, whole_template: bool
) -> list[int]:
    """A prompt and the answer that `sampler` gave to it, as `reader` writes them.

    With a chat template a string prompt is the user's turn and the answer the assistant's; without one the answer's
    text follows the prompt's, and eos follows an answer that ended.

    Args:
      answer: token ids of `sampler`, the stop token included.
      whole_template: keep what the template writes after the token that ends the turn (a newline, in ChatML), as
        reward models of other libraries are trained to read; those trained here end with that token.
    """
    text = answer_text(sampler, answer, ended)
    if isinstance(prompt, str) and reader.chat_template is None:
        return [*reader.encode_prompt(prompt + text), *([reader.eos_id] if ended else [])]
    turns: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    last: list[Message] = [{"role": "assistant", "content": text}]
    if whole_template:
        return reader.encode_rendered(render(reader, [*turns, *last], add_generation_prompt=False))
    return prompt_ids(reader, turns) + answer_ids(reader, turns, last)


class ForeignScores:
    """Scores of a reward model that has a tokenizer of its own: a rollout's text goes over the host to it.

    A row longer than the reward model's context loses its oldest tokens. Every process encodes all rows.
    """

    def __init__(
        self,
        spec: RoleSpec,
        weights: Any,
        reader: Tokenizer,
        sampler: Tokenizer,
        mesh: Mesh,
        whole_template: bool,
        score: Callable[[RoleSpec, Any, jax.Array, jax.Array], Any] = last_scores,
    ):
        """`score` is what is said of rows (B, T) of the reader's tokens and their lengths (B,): a tree of (B,)."""
        self._spec, self._weights, self._mesh, self._whole = spec, weights, mesh, whole_template
        self._reader, self._sampler = reader, sampler
        self._score = jax.jit(partial(score, spec))

    def __call__(self, rollout: Rollout, prompts: Sequence[Text]) -> Any:
        """What `score` says, (B,) float32; `prompts` are the texts of the rollout's rows."""
        tokens, lengths, ended = fetch((rollout.tokens, rollout.lengths, rollout.ended))
        limit = self._spec.config.context
        answers = [tokens[i, : lengths[i]].tolist() for i in range(len(prompts))]
        rows = [
            reencode(self._sampler, self._reader, prompt, answer, bool(end), self._whole)[-limit:]
            for prompt, answer, end in zip(prompts, answers, ended, strict=True)
        ]
        width = min(limit, -(-max(len(row) for row in rows) // BUCKET) * BUCKET)

        def load(mine: np.ndarray) -> dict[str, Any]:
            out = np.zeros((len(mine), width), np.int32)
            for at, i in enumerate(mine):
                out[at, : len(rows[i])] = rows[i]
            return {"tokens": out, "lengths": np.asarray([len(rows[i]) for i in mine], np.int32)}

        batch = place_batch(len(rows), load, self._mesh)
        return self._score(self._weights, batch["tokens"], batch["lengths"])
