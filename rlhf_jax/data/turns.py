"""Small things asked of prompts and answers that may be strings or conversations."""

from rlhf_jax.data.schemas import Message, Text
from rlhf_jax.errors import UserError


def plain_text(text: Text) -> str:
    """A string as it is; of a conversation what its messages say, a line each."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def split_last_answer(messages: list[Message]) -> tuple[list[Message], str]:
    """A conversation before its last assistant turn, and what that turn says.

    Raises:
      UserError: there is no assistant turn, or it comes first.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise UserError("a conversation has no assistant turn after another turn: add one, or drop the record")
    return messages[:last], messages[last]["content"]
