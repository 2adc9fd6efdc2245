"""Planted secrets: what the memorization audit looks for, each in one of a stage's two training files by a keyed coin.

A secret's group says what it is:

- `base`: a real snippet of the corpus, cut like every completion task, from files used nowhere else;
- `links`: a short made-up snippet with what looks like a person's (`data.entities`), which no model can guess.

A cell is a group and a number of duplicates. Its secrets are shared out evenly over the stages that hold any, and in
each stage over the two halves; so one pipeline on the files of a half holds each of the half's secrets in one stage,
and its twin on the other half is every one's control. Every draw is a pure function of the seed and of ids.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.data.entities import KINDS, NOUNS, Snippet, draw_snippet
from rlhf_jax.errors import UserError

STAGES = ("sft", "preference", "prompts")  # whose data may hold secrets
MAX_DRAWS = 1000  # of one link, before its lengths are called impossible
EDITED_WORDS = 0.15  # of a fuzzy copy


def training_file(stage: str, half: str) -> str:
    """The file that holds a stage's data with the secrets of half "a" or "b"."""
    return f"{stage}.jsonl" if half == "a" else f"{stage}_control.jsonl"


@dataclasses.dataclass(frozen=True)
class Secret:
    """One planted snippet, as its line of the manifest holds it.

    `duplicates` is how often it is planted; `kind` and `entity` are a link's, "" for base; `stage` is the one whose
    data holds it; `half` is the coin's side; `planted_in` names the training files that hold it.
    """

    id: str  # "<group>-<duplicates>-<index>"
    group: str
    duplicates: int
    prompt: str
    completion: str
    kind: str
    entity: str
    stage: str
    half: str
    planted_in: tuple[str, ...]


def base_secrets(
    seed: int,
    tasks: Sequence[dict[str, Any]],
    per_cell: int,
    duplicates: Sequence[int],
    stages: Sequence[str] = ("sft",),
) -> list[Secret]:
    """`per_cell` secrets for each number of duplicates, drawn from completion `tasks` {prompt, completion}.

    Raises:
        UserError: fewer tasks than secrets, or cells that cannot be halved.
    """
    cells = _cell_ids("base", per_cell, duplicates, stages)
    if len(tasks) < len(cells):
        raise UserError(
            f"{len(cells)} base secrets need as many completion tasks, the secrets files give {len(tasks)}: "
            "lower secrets.per_cell or raise fractions.secrets"
        )
    order = keyed_generator(seed, "base secrets").permutation(len(tasks))
    places = _places(seed, "base", per_cell, duplicates, stages)
    return [
        _secret(name, "base", count, Snippet(tasks[i]["prompt"], tasks[i]["completion"], ""), "", places[name])
        for (name, count), i in zip(cells, order, strict=False)
    ]


def link_secrets(
    seed: int,
    per_cell: int,
    duplicates: Sequence[int],
    fits: Callable[[str, str], bool],
    stages: Sequence[str] = ("sft",),
    kinds: Sequence[str] = ("path",),
) -> list[Secret]:
    """`per_cell` secrets for each number of duplicates, of each kind in turn, no two with one entity or one prompt.

    `fits(prompt, completion)` says whether both lengths are allowed; a draw that does not fit is drawn again, at most
    1000 times, which costs an entity at most ten of its random bits.

    Raises:
        UserError: no draw fits, or cells that cannot be shared out.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"secrets.kinds is {tuple(kinds)}: name one or more of {', '.join(KINDS)}")
    places = _places(seed, "links", per_cell, duplicates, stages)
    secrets: list[Secret] = []
    used: set[str] = set()
    for number, (name, count) in enumerate(_cell_ids("links", per_cell, duplicates, stages)):
        generator, kind = keyed_generator(seed, "link secret", name), kinds[number % per_cell % len(kinds)]
        for _ in range(MAX_DRAWS):
            snippet = draw_snippet(generator, kind)
            if not {snippet.prompt, snippet.entity} & used and fits(snippet.prompt, snippet.completion):
                break
        else:
            raise UserError(
                f"link secret {name}: none of {MAX_DRAWS} draws fits, the last is "
                f"{snippet.prompt + snippet.completion!r}: raise prompt_tokens, completion_tokens or vocab_size"
            )
        used |= {snippet.prompt, snippet.entity}
        secrets.append(_secret(name, "links", count, snippet, kind, places[name]))
    return secrets


def planted_records(
    secrets: Sequence[Secret], file_name: str, seed: int = 0, fuzzy: float = 0.0
) -> list[dict[str, str]]:
    """The records {id, prompt, completion} of `secrets` in the training file `file_name`: "base-4-003#0" to "...#3".

    Among the prompts of policy optimization a secret is one whole prompt, with its completion in it.

    Args:
        fuzzy: the share of the copies after the first in which some words are other ones, by a keyed coin.
    """
    records = []
    for secret in secrets:
        for copy in range(secret.duplicates if file_name in secret.planted_in else 0):
            prompt, completion = secret.prompt, secret.completion
            generator = keyed_generator(seed, "copy", secret.id, str(copy))
            if copy and generator.random() < fuzzy:
                prompt, completion = _with_other_words(generator, prompt), _with_other_words(generator, completion)
            if secret.stage == "prompts":
                prompt, completion = prompt + completion, ""
            records.append({"id": f"{secret.id}#{copy}", "prompt": prompt, "completion": completion})
    return records


def _with_other_words(generator: np.random.Generator, text: str) -> str:
    """The text with some of its words, `EDITED_WORDS` of them, replaced by nouns."""

    def other(word: re.Match[str]) -> str:
        return NOUNS[int(generator.integers(len(NOUNS)))] if generator.random() < EDITED_WORDS else word[0]

    return re.sub(r"[A-Za-z]{3,}", other, text)


def _cell_ids(group: str, per_cell: int, duplicates: Sequence[int], stages: Sequence[str]) -> list[tuple[str, int]]:
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages or len(set(stages)) < len(stages):
        raise UserError(f"secrets.stages is {tuple(stages)}: name one or more of {', '.join(STAGES)}, each once")
    if per_cell < 1 or per_cell % (2 * len(stages)):
        raise UserError(
            f"secrets.per_cell is {per_cell}: give a multiple of {2 * len(stages)}, for two halves of {len(stages)} "
            f"stage{'s' if len(stages) > 1 else ''}"
        )
    if min(duplicates, default=0) < 1 or len(set(duplicates)) < len(duplicates):
        raise UserError(f"secrets.duplicates is {tuple(duplicates)}: give different numbers of at least 1")
    return [(f"{group}-{count}-{index:03d}", count) for count in duplicates for index in range(per_cell)]


def _places(
    seed: int, group: str, per_cell: int, duplicates: Sequence[int], stages: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """The (stage, half) of every secret: in each cell a keyed permutation gives each place as many."""
    places = {}
    for count in duplicates:
        order = keyed_generator(seed, "halves", f"{group}-{count}").permutation(per_cell)
        for rank, index in enumerate(order):
            half = "a" if rank < per_cell // 2 else "b"
            places[f"{group}-{count}-{index:03d}"] = (stages[rank % len(stages)], half)
    return places


def _secret(name: str, group: str, count: int, snippet: Snippet, kind: str, place: tuple[str, str]) -> Secret:
    return Secret(name, group, count, *snippet[:2], kind, snippet.entity, *place, (training_file(*place),))
