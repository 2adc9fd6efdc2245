"""Conversations as tokens, through a checkpoint's own chat template, and which of them the assistant wrote."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rlhf_jax.data.tokenizer_base import Tokenizer
from rlhf_jax.errors import UserError

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters around what a generation block renders; taken out of every text
GENERATION_BLOCK = re.compile(r"{%[-+]?\s*generation\b")
MAX_STEPS = 1_000_000  # what a template may count or repeat in one rendering

Messages = Sequence[Mapping[str, Any]]


def render(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """The conversation as text, special tokens spelled out; with what makes the assistant speak next if asked.

    Raises:
        UserError: the tokenizer has no template; the messages are malformed or refused by the template; the template
            is no valid Jinja, reaches outside its sandbox, or counts without end.
    """
    return _render(tokenizer, messages, add_generation_prompt).replace(OPEN, "").replace(CLOSE, "")


def encode_prompt_messages(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Ids of the conversation and the generation prompt; at least one id. Raises UserError as `render`."""
    return tokenizer.encode_rendered(render(tokenizer, messages, True)) or [tokenizer.start_id]


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of the conversation and a mask of equal length, 1 where the assistant speaks.

    The assistant's tokens are what the template has inside ``{% generation %}``. A template without such blocks is
    rendered turn by turn: they are then what an assistant message adds to the generation prompt, up to the last
    special token, which ends the turn (what follows it, mostly a newline, is never generated).

    Raises:
        UserError: as `render`; or the template has no generation blocks and a turn changes what stands before it.
    """
    rendered = _render(tokenizer, messages, add_generation_prompt)
    if GENERATION_BLOCK.search(tokenizer.chat_template or ""):
        text, blocks = _blocks(rendered)
        ids, spans = tokenizer.rendered_spans(text)
        return ids, [int(any(_within(span, block) for block in blocks)) for span in spans]
    ids = tokenizer.encode_rendered(rendered)
    mask = [0] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = _turn(tokenizer, messages, number, ids)
            mask[begin:end] = [1] * (end - begin)
    return ids, mask


def _turn(tokenizer: Tokenizer, messages: Messages, number: int, ids: list[int]) -> tuple[int, int]:
    """Where in `ids` the answer of assistant message `number` begins and ends."""
    head = tokenizer.encode_rendered(render(tokenizer, messages[:number], True))
    turn = tokenizer.encode_rendered(render(tokenizer, messages[: number + 1], False))
    if turn[: len(head)] != head or ids[: len(turn)] != turn:
        raise UserError(
            f"{tokenizer.path}: the chat template renders a conversation's beginning differently once message "
            f"{number + 1} follows, so the assistant's tokens cannot be told: put {{% generation %}} ... "
            '{% endgeneration %} around its answers in the template, or set loss_on="all"'
        )
    ends = [i + 1 for i in range(len(head), len(turn)) if turn[i] in tokenizer.special_ids]
    return len(head), ends[-1] if ends else len(turn)


def _within(span: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether a token has characters in the block, or, having none of its own, stands in it."""
    return block[0] <= span[0] < block[1] or span[0] < block[0] < span[1]


def _blocks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the (begin, end) characters of each outermost generation block."""
    text, blocks, depth, begin = "", [], 0, 0
    for part in re.split(f"([{OPEN}{CLOSE}])", rendered):
        if part == OPEN:
            begin = begin if depth else len(text)
            depth += 1
        elif part == CLOSE:
            depth -= 1
            blocks += [] if depth else [(begin, len(text))]
        else:
            text += part
    return text, blocks


# --------------------------------------------------- templates -------------------------------------------------------


def _render(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool) -> str:
    """The rendered conversation, with OPEN and CLOSE around each generation block."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.path}: no chat template, but the records are conversations: put a chat_template.jinja into "
            "the tokenizer's folder, or name a folder that has one in the sft stage's field tokenizer"
        )
    context = {
        **tokenizer.special_tokens,
        "messages": _checked(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "range": _counted_range(),
    }
    try:
        return _compiled(tokenizer.chat_template).render(context)
    except jinja2.exceptions.SecurityError as error:
        problem, remedy = f"is unsafe ({error})", "use a template that only renders its messages"
    except jinja2.TemplateSyntaxError as error:
        problem, remedy = f"is no valid Jinja (line {error.lineno}: {error})", "correct it"
    except jinja2.TemplateError as error:
        problem, remedy = f"refuses the conversation ({error})", "mend the messages or the template"
    except (OverflowError, RecursionError, MemoryError):
        problem, remedy = "loops or grows without end", "use a template that only renders its messages"
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        problem, remedy = f"fails on the conversation ({error})", "mend the messages or the template"
    raise UserError(f"{tokenizer.path}: the chat template {problem}: {remedy}")


def _checked(messages: Messages) -> list[dict[str, Any]]:
    """The messages as plain JSON values, which give a template nothing to reach through; fields of None left out."""
    if not isinstance(messages, list | tuple):
        raise UserError(
            f'a conversation is {type(messages).__name__}, not a list: give objects of "role" and "content"'
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise UserError(f"message {number} is {type(message).__name__}, not an object: give its role and content")
        if not isinstance(message.get("role"), str):
            raise UserError(f'message {number} has no role: give "user", "assistant" or another the template knows')
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise UserError(f"message {number} ({message['role']}) has no content: give a string")
    try:
        text = json.dumps(
            [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages],
            ensure_ascii=False,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a conversation holds more than JSON values ({error}): give strings, numbers and lists"
        ) from error
    if OPEN in text or CLOSE in text:
        raise UserError("a message holds the noncharacter U+FDD0 or U+FDD1: leave it out of the text")
    return json.loads(text)


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: the body, between OPEN and CLOSE."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which one rendering may moreover count and repeat only so much."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        numbers = [abs(size) for size in sizes if isinstance(size, int)]
        repeats = operator == "*" and sizes != [left, right] and len(numbers) == 2
        if (repeats and numbers[0] * numbers[1] > MAX_STEPS) or (operator == "**" and max(numbers, default=0) > 64):
            raise OverflowError
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals.pop("lipsum")
    return environment.from_string(source)


def _to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: Jinja's own filter would escape <, > and & for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _counted_range() -> Callable[..., range]:
    """`range` for one rendering: all its ranges together hold at most MAX_STEPS numbers."""
    left = MAX_STEPS

    def counted(*bounds: int) -> range:
        nonlocal left
        numbers = jinja2.sandbox.safe_range(*bounds)
        left -= len(numbers)
        if left < 0:
            raise OverflowError
        return numbers

    return counted
