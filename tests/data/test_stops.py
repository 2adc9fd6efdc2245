import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data.stops import check_vocabulary, stop_table
from rlhf_jax.errors import UserError

TOKENS = [b"", *(bytes([byte]) for byte in b"abn#: \n"), b"ab", b"\n\n", b"\n\nQ", b"aab", b"###", b"n#"]
TOKENS += [bytes([byte]) for byte in "é🎉".encode()] + ["é".encode(), b"a\xf0\x9f", b"\x8e\x89b"]


def tokenizer_of(tokens):
    return SimpleNamespace(vocab_size=len(tokens), token_bytes=lambda index: tokens[index], path="t.model")


def ends(tokens, ids, strings):
    """The oracle: the number of tokens after which some stop string is in the text, None if never."""
    text = b""
    for count, index in enumerate(ids, 1):
        text += tokens[index]
        if any(string.encode() in text for string in strings):
            return count
    return None


def run(table, ids):
    state = 0
    for count, index in enumerate(ids, 1):
        state = table[state, index]
        if state == len(table) - 1:
            return count
    return None


@pytest.mark.parametrize(
    "strings",
    [
        ["\n\n"],
        ["ab", "aab", "b"],
        ["aaab", "ab#", "n#n"],
        ["ab#n", "b#"],  # inside one another
        ["aaab", "ab#n", "b"],
        ["abab:", "bab#"],  # overlapping themselves and each other
        ["###", "\n\nQ", "é🎉", "🎉b"],
        ["é"],
        [],
    ],
)
def test_automaton_ends_where_a_search_of_the_text_ends(strings):
    table = stop_table(tokenizer_of(TOKENS), strings)
    assert table.dtype == np.int16 and table.shape[1] == len(TOKENS)
    generator = random.Random(0)
    found = 0
    for _ in range(2000):
        ids = [generator.randrange(len(TOKENS)) for _ in range(generator.randrange(1, 30))]
        expected = ends(TOKENS, ids, strings)
        assert run(table, ids) == expected
        found += expected is not None
    assert (0 < found < 2000) if strings else found == 0


def test_a_hand_worked_table():
    # States: nothing, "a", done. Tokens: none, a, b, "xaby" (done in its middle), "ba".
    table = stop_table(tokenizer_of([b"", b"a", b"b", b"xaby", b"ba"]), ["ab"])
    assert table.tolist() == [[0, 1, 0, 2, 1], [1, 1, 2, 2, 2], [2, 2, 2, 2, 2]]


def test_the_last_state_absorbs_and_special_tokens_keep_the_state():
    table = stop_table(tokenizer_of(TOKENS), ["ab", "###"], vocab_size=len(TOKENS) + 7)
    states = np.arange(len(table))
    assert np.all(table[-1] == len(table) - 1)
    assert np.array_equal(table[:, 0], states)
    assert table.shape == (len(table), len(TOKENS) + 7)
    assert np.all(table[:, len(TOKENS) :] == states[:, None])


@pytest.mark.parametrize(
    "strings, problem",
    [
        ("stop", "give a list of strings"),
        (["a", 1], "give a list of strings"),
        (["a", ""], "an empty string, which ends every answer"),
        (["ab", "zebra"], "no tokens of t.model spell 'zebra'"),
        (["a\ud800"], "not Unicode"),
        (["a" * 40_000], "40001 bytes together"),
    ],
)
def test_bad_stop_strings_are_refused(strings, problem):
    with pytest.raises(UserError, match=problem):
        stop_table(tokenizer_of(TOKENS), strings)


def test_a_string_hidden_behind_a_shorter_one_is_not_refused():
    assert run(stop_table(tokenizer_of([b"a", b"b"]), ["ab", "abb"]), [0, 1]) == 2


def test_a_vocabulary_beyond_the_embedding_is_refused():
    with pytest.raises(UserError, match=f"has {len(TOKENS)} ids but the model's embedding has 3 rows"):
        stop_table(tokenizer_of(TOKENS), ["ab"], vocab_size=3)
    check_vocabulary(tokenizer_of(TOKENS), len(TOKENS), "here")


def test_a_large_vocabulary_takes_seconds():
    generator = random.Random(0)
    words = [b" " * 128, *(bytes([byte]) for byte in range(256))]
    words += [generator.randbytes(generator.randrange(1, 12)) for _ in range(128_000 - len(words))]
    begin = time.monotonic()
    table = stop_table(tokenizer_of(words), ["<|end|>", "\n\nUser:", "###"])
    assert table.shape == (16, 128_000)
    assert time.monotonic() - begin < 20  # under 1 s where nothing else runs
