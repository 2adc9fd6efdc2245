"""Stop strings as an automaton over tokens: one table lookup a sampled token, whatever token boundaries they cross."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.tokenizer_base import Tokenizer, check_vocabulary
from rlhf_jax.errors import UserError

__all__ = ["check_vocabulary", "stop_table"]


def stop_table(tokenizer: Tokenizer, strings: Sequence[str], vocab_size: int | None = None) -> np.ndarray:
    """The automaton of Aho and Corasick (1975) over the UTF-8 bytes of `strings`, composed over each token's bytes.

    Args:
        strings: an answer ends with the token in which the first of them is complete, also where bytes follow it there.
        vocab_size: the model's embedding rows, None for the tokenizer's own.

    Returns:
        (states, vocab_size) int16: state s, after token v, becomes table[s, v]. State 0 is the start; states - 1 means
        a stop string has been completed, and stays. Special tokens and rows beyond the tokenizer keep the state.

    Raises:
        UserError: an empty stop string, one that no tokens of this tokenizer spell, one too long for int16 states, or
            ids beyond `vocab_size`.
    """
    if isinstance(strings, str) or not all(isinstance(string, str) for string in strings):
        raise UserError(f"stop_strings is {strings!r}: give a list of strings")
    if any(not string for string in strings):
        raise UserError("stop_strings has an empty string, which ends every answer before it begins: leave it out")
    rows = tokenizer.vocab_size if vocab_size is None else vocab_size
    check_vocabulary(tokenizer, rows, "stop_strings")
    spellings = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    for string in strings:
        if not _reachable(_over_tokens(_over_bytes([string]), spellings, rows)):
            raise UserError(f"stop_strings: no tokens of {tokenizer.path} spell {string!r}: leave it out")
    return _over_tokens(_over_bytes(strings), spellings, rows)


def _over_bytes(strings: Sequence[str]) -> np.ndarray:
    """(states, 256) int16: the automaton over bytes, state 0 the start and the last state absorbing.

    Raises:
        UserError: more states than int16 counts.
    """
    try:
        patterns = [string.encode() for string in strings]
    except UnicodeEncodeError as error:
        raise UserError(
            f"stop_strings has {error.object!r}, which is not Unicode (a lone surrogate): mend it"
        ) from error
    children: list[dict[int, int]] = [{}]  # the trie of all patterns; node 0 is its root
    complete = [False]
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                complete.append(False)
            node = children[node][byte]
        complete[node] = True
    if len(children) >= np.iinfo(np.int16).max:
        raise UserError(f"stop_strings come to {len(children)} bytes together: give shorter or fewer ones")

    goto = np.zeros((len(children), 256), np.int32)
    queue = deque([(0, 0)])  # breadth first: a node, and the longest proper suffix of it that is a node too
    while queue:
        node, suffix = queue.popleft()
        complete[node] = complete[node] or complete[suffix]
        goto[node] = goto[suffix] if node else 0
        for byte, child in children[node].items():
            queue.append((child, goto[suffix, byte] if node else 0))
            goto[node, byte] = child
    # States: the nodes that complete nothing, in the order of the trie, then one for all that do.
    kept = np.flatnonzero(~np.array(complete))
    state_of = np.full(len(children), len(kept))
    state_of[kept] = np.arange(len(kept))
    absorbing = np.full((1, 256), len(kept))
    return np.concatenate([state_of[goto[kept]], absorbing]).astype(np.int16)


def _over_tokens(step: np.ndarray, spellings: Sequence[bytes], rows: int) -> np.ndarray:
    """(states, rows) int16: the automaton `step` (states, 256) run over each token's bytes."""
    lengths = np.array([len(spelling) for spelling in spellings])
    order = np.argsort(-lengths, kind="stable")  # longest first: those with a byte at place i are the first few
    text = np.zeros((len(spellings), int(lengths.max(initial=0))), np.uint8)
    for row, index in enumerate(order):
        text[row, : lengths[index]] = np.frombuffer(spellings[index], np.uint8)
    states = np.repeat(
        np.arange(len(step), dtype=np.int16)[:, None], len(spellings), axis=1
    )  # (states, tokens) by order
    for place in range(text.shape[1]):
        count = int(np.searchsorted(-lengths[order], -place))  # tokens longer than `place` bytes
        states[:, :count] = step[states[:, :count], text[:count, place]]
    table = np.repeat(np.arange(len(step), dtype=np.int16)[:, None], rows, axis=1)
    table[:, order] = states
    return table


def _reachable(table: np.ndarray) -> bool:
    """Whether some tokens lead from state 0 to the last state."""
    found, waiting = {0}, [0]
    while waiting:
        following = set(np.unique(table[waiting.pop()]).tolist()) - found
        found |= following
        waiting += following
    return len(table) - 1 in found
