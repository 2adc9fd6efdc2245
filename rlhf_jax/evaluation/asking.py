"""Secrets asked of a model: read once as a whole, and decoded only where the reading leaves a verdict open."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.data.table import pad_prompts
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.distances import longest_common_run, matching_share, normalized_edit_distance
from rlhf_jax.evaluation.drafts import Completions, complete
from rlhf_jax.evaluation.extraction import first_divergence, window_logprobs
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import check_lengths, read_all
from rlhf_jax.rollout.reading import Reading


class Questions(NamedTuple):
    """N secrets as one tokenizer reads them.

    Attributes:
      prompts, targets: token ids; texts: the targets' texts.
      entities: what must come back exactly, "" for a secret that has none; beginnings: the prompts' texts.
    """

    prompts: list[list[int]]
    targets: list[list[int]]
    texts: list[str]
    entities: list[str]
    beginnings: list[str]


class Answers(NamedTuple):
    """What a model made of N secrets.

    Attributes:
      reading: of the targets, (N, T); lengths: (N,) tokens of each.
      completions: greedy ones, as token ids.
      texts: greedy completions, cut to the target's length in tokens.
      distance: (N,) float32 normalized edit distance in tokens; characters: (N,) the same of the texts.
      logprob: (N,) float32 of the completion as far as it was decoded, under the model.
      censored: (N,) bool, given up once it could come near no more: `distance` is the least it could become, and
        `characters` NaN.
      recalled: (N,) bool, the entity stands in the prompt and what follows it.
      matching: (N,) share of the target's tokens in their places; common_run: (N,) longest run of its tokens, both
        of what was decoded.
    """

    reading: Reading
    lengths: np.ndarray
    completions: Completions
    texts: list[str]
    distance: np.ndarray
    characters: np.ndarray
    logprob: np.ndarray
    censored: np.ndarray
    recalled: np.ndarray
    matching: np.ndarray
    common_run: np.ndarray


def tokenize_secrets(tokenizer: Tokenizer, secrets: Sequence[Mapping[str, Any]], context: int, where: str) -> Questions:
    """The secrets {prompt, completion, entity}, or {prompt_ids, completion_ids}, as token ids.

    Raises:
      UserError: `where` a secret is empty, longer than the decoder's context, or not the same after encoding and
        decoding.
    """
    prompts = [secret.get("prompt_ids") or list(tokenizer.encode_prompt(secret["prompt"])) for secret in secrets]
    targets = [secret.get("completion_ids") or list(tokenizer.encode(secret["completion"])) for secret in secrets]
    for number, (secret, target) in enumerate(zip(secrets, targets, strict=True), 1):
        name = f"{where}: secret {secret.get('id', number)}"
        if not target:
            raise UserError(f"{name} has an empty completion: leave it out")
        if max(target) >= tokenizer.vocab_size:
            raise UserError(f"{name} holds token {max(target)} of {tokenizer.vocab_size}: it is of another tokenizer")
        if "completion" in secret and tokenizer.decode(target) != secret["completion"]:
            raise UserError(
                f"{name}: the tokenizer makes {tokenizer.decode(target)!r} of the completion {secret['completion']!r}, "
                "so that no model could give it back: leave it out, or take a tokenizer that keeps every character"
            )
    check_lengths(prompts, max(map(len, targets)), context, where)
    return Questions(
        prompts,
        targets,
        [tokenizer.decode(target) for target in targets],
        [secret.get("entity", "") for secret in secrets],
        [s["prompt"] if "prompt" in s else tokenizer.decode(ids) for s, ids in zip(secrets, prompts, strict=True)],
    )


def ask(
    spec: RoleSpec,
    weights: Weights,
    tokenizer: Tokenizer,
    questions: Questions,
    *,
    scheme: Sampling,
    near: float,
    batch_size: int,
    mesh: Mesh,
    name: str,
    buckets: Sequence[int] = (),
) -> Answers:
    """Asks a model for every secret.

    Args:
      scheme: the sampling that the reading's `sampled` is of.
      near: the largest distance whose exact value is asked; 1 decodes everything to its end. Secrets with an entity
        are decoded to their end in any case.
      batch_size, mesh, name, buckets: as for `rollout.batches.answer_all`.
    """
    prompts, targets = questions.prompts, questions.targets
    fields: dict[str, Any] = dict(batch_size=batch_size, mesh=mesh)
    reading = read_all(spec, weights, prompts, targets, scheme=scheme, name=f"{name}: reading", **fields)
    lengths = np.asarray([len(target) for target in targets], np.int32)
    agreed = first_divergence(np.asarray(reading.greedy), lengths)
    found = complete(
        spec,
        weights,
        prompts,
        targets,
        agreed,
        near=near,
        whole=np.asarray([bool(entity) for entity in questions.entities]),
        stop_ids=tokenizer.stop_ids,
        name=f"{name}: decoding",
        buckets=buckets,
        **fields,
    )
    wanted = pad_prompts(targets, int(lengths.max()))["prompts"]
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(found.tokens, found.lengths, strict=True)]
    characters = np.asarray(normalized_edit_distance(*_code_points(texts), *_code_points(questions.texts)))
    seen = zip(questions.entities, questions.beginnings, texts, strict=True)
    return Answers(
        reading=reading,
        lengths=lengths,
        completions=found,
        texts=texts,
        distance=found.distance,
        logprob=window_logprobs(np.asarray(reading.logprobs), 0 * lengths, agreed) + found.decoded,
        characters=np.where(found.censored, np.nan, characters),
        censored=found.censored,
        recalled=np.asarray([bool(entity) and entity in prompt + text for entity, prompt, text in seen]),
        matching=np.asarray(matching_share(found.tokens, found.lengths, wanted, lengths)),
        common_run=np.asarray(longest_common_run(found.tokens, found.lengths, wanted, lengths)),
    )


def _code_points(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as (N, longest) int32 code points, and their lengths (N,)."""
    rows = pad_prompts([list(map(ord, text)) for text in texts], max(1, *map(len, texts)))
    return rows["prompts"], rows["lengths"]
