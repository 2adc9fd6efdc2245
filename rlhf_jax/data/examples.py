"""From records to token ids: what training reads, and the prompts and answers that generation sees.

One identity holds for strings and conversations: `completion_example(...).tokens` is
`prompt_ids(prompt) + answer_ids(prompt, answer)`. What is sampled continues exactly what was trained on.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from rlhf_jax.data.chat import encode_chat, encode_prompt_messages, render
from rlhf_jax.data.schemas import Message, Text
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One record's tokens, and which of them the loss counts. The first one is read only, never predicted."""

    tokens: list[int]
    counted: list[bool]

    @classmethod
    def counting_from(cls, tokens: list[int], start: int) -> "Example":
        """The loss counts the tokens from number `start` on."""
        return cls(tokens, [number >= start for number in range(len(tokens))])


def text_examples(tokenizer: Tokenizer, text: str, sequence_length: int) -> list[Example]:
    """A document as prefix tokens [eos], cut into pieces of at most `sequence_length` positions; all tokens count."""
    ids = [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos_id]
    starts = range(0, len(ids) - 1, sequence_length)
    return [Example.counting_from(ids[start : start + sequence_length + 1], 1) for start in starts]


def prompt_ids(tokenizer: Tokenizer, prompt: Text) -> list[int]:
    """What generation starts from: a string's ids after the tokenizer's prefix, or a conversation in its chat template
    through the words that ask for an answer."""
    if isinstance(prompt, str):
        return list(tokenizer.encode_prompt(prompt))
    return list(encode_prompt_messages(tokenizer, prompt))


def answer_ids(tokenizer: Tokenizer, prompt: Text, answer: Text) -> list[int]:
    """What generation should give after `prompt_ids`: a string's ids and eos, or what the chat template adds for the
    answer's messages through the token that ends the turn.

    Raises:
        UserError: the chat template does not continue its own prompt, or ends no turn.
    """
    return _answer(tokenizer, prompt, answer, prompt_ids(tokenizer, prompt))[0]


def completion_example(tokenizer: Tokenizer, prompt: Text, completion: Text, loss_on: str) -> Example:
    """`prompt_ids` and `answer_ids`; prompt and completion are tokenized apart, as generation sees them.

    `loss_on` "completion" counts the answer (of an answer of several messages the assistant's), "all" every token.
    """
    head = prompt_ids(tokenizer, prompt)
    tail, counted = _answer(tokenizer, prompt, completion, head)
    if loss_on == "completion":
        return Example(head + tail, [False] * len(head) + counted)
    return Example.counting_from(head + tail, 1)


def messages_example(tokenizer: Tokenizer, messages: list[Message], loss_on: str) -> Example:
    """A conversation in its chat template, through the token that ends its last turn.

    `loss_on` "completion" counts every assistant turn as the template marks it, mostly with the token that ends it;
    what follows the last one is left out. "all" counts every token.

    Raises:
        UserError: the chat template ends no turn, or (with "completion") does not tell which are the assistant's.
    """
    if loss_on == "all":
        ids = _template_ids(tokenizer, messages)
        return Example.counting_from(ids[: _turn_ends(tokenizer, ids, 0)[-1]], 1)
    ids, mask = encode_chat(tokenizer, messages)
    end = _turn_ends(tokenizer, ids, _last_marked(mask))[0]
    return Example(list(ids[:end]), [bool(x) for x in mask[:end]])


def fim_example(tokenizer: Tokenizer, prompt: Text, completion: Text, cut: float, loss_on: str) -> Example:
    """Fill-in-the-middle, prefix-suffix-middle order: the completion's share `cut` is the middle, its rest the suffix.

    Raises:
        UserError: the tokenizer has no fill-in-the-middle tokens, or the record is a conversation.
    """
    marks = (tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id)
    if None in marks:
        raise UserError("fim_rate is above 0 but the tokenizer has no fill-in-the-middle tokens: set fim_rate=0")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError("fim_rate is above 0 but a record is a conversation, which has no middle: set fim_rate=0")
    prefix_id, suffix_id, middle_id = (int(mark) for mark in marks if mark is not None)
    at = max(1, round(cut * len(completion)))
    head = [
        *tokenizer.prefix,
        prefix_id,
        *tokenizer.encode(prompt),
        suffix_id,
        *tokenizer.encode(completion[at:]),
        middle_id,
    ]
    middle = [*tokenizer.encode(completion[:at]), tokenizer.eos_id]
    return Example.counting_from(head + middle, len(head) if loss_on == "completion" else 1)


def _answer(tokenizer: Tokenizer, prompt: Text, answer: Text, head: list[int]) -> tuple[list[int], list[bool]]:
    """Tokens of an answer after the prompt's `head`, and which of them the assistant writes."""
    if isinstance(prompt, str) and isinstance(answer, str):
        ids = [*tokenizer.encode(answer), tokenizer.eos_id]
        return ids, [True] * len(ids)
    assert not isinstance(prompt, str) and not isinstance(answer, str), "prompt and answer are of one kind"
    if len(answer) == 1:  # all of it is what the assistant writes
        both = _template_ids(tokenizer, [*prompt, *answer])
        mask, last = [1] * len(both), len(head)
    else:
        both, mask = encode_chat(tokenizer, [*prompt, *answer])
        last = _last_marked(mask)
    if list(both[: len(head)]) != head:
        raise UserError(
            "the chat template writes a prompt differently once its answer follows, so training would not match "
            "sampling: use a template whose generation prompt begins its assistant turn"
        )
    answered = slice(len(head), _turn_ends(tokenizer, both, last)[0])
    return list(both[answered]), [bool(x) for x in mask[answered]]


def _template_ids(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    return list(tokenizer.encode_rendered(render(tokenizer, messages, False)))


def _last_marked(mask: Sequence[int]) -> int:
    """Where the assistant's last turn has its last token."""
    if not any(mask):
        raise UserError("the chat template marks no token as the assistant's: use one with an assistant turn")
    return max(i for i, x in enumerate(mask) if x)


def _turn_ends(tokenizer: Tokenizer, ids: Sequence[int], start: int) -> list[int]:
    """Where turns end from token `start` on: after each stop token. What a template writes then (a newline, in ChatML)
    is not the turn's."""
    ends = [i + 1 for i in range(start, len(ids)) if ids[i] in tokenizer.stop_ids]
    if not ends:
        raise UserError(
            f"the chat template ends a turn with none of the tokenizer's stop ids {sorted(tokenizer.stop_ids)}, so "
            "no answer would ever end: end the assistant's turn with eos_token in the template"
        )
    return ends


# --- for people ------------------------------------------------------------------------------------------------------


def show_example(tokenizer: Tokenizer, example: Example, width: int = 400) -> str:
    """A line of counts and the decoded text on one line: what the loss leaves out stands in ⟦ ⟧.

    Newlines are escaped; bos, eos and other stop ids are named; a run of more than `width` characters is cut in
    its middle.
    """
    pairs = list(zip(example.tokens, example.counted, strict=True))
    parts = []
    for counts, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = _cut(_visible(tokenizer, [token for token, _ in run]), width)
        parts.append(text if counts else f"⟦{text}⟧")
    counted = sum(example.counted)
    return f"{len(pairs)} tokens: {len(pairs) - counted} masked in ⟦ ⟧, {counted} counted\n{''.join(parts)}"


def _visible(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = {tokenizer.bos_id: "<bos>"} | dict.fromkeys(tokenizer.stop_ids, "<stop>") | {tokenizer.eos_id: "<eos>"}
    runs = itertools.groupby(ids, key=lambda token: names.get(token))
    parts = (name * len(list(run)) if name else tokenizer.decode(list(run)) for name, run in runs)
    return "".join(parts).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return f"{text[: width // 2]} ... {len(text) - width // 2 * 2} characters ... {text[-(width // 2) :]}"
