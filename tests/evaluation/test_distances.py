import numpy as np

from rlhf_jax.evaluation import edit_distance, normalized_edit_distance
from rlhf_jax.evaluation.distances import longest_common_run, matching_share


def levenshtein(a, b):
    """The textbook dynamic program."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def random_pairs(count, a_width, b_width, vocabulary, seed=0):
    """Tokens and lengths of `count` pairs, the tokens after the lengths being random ids like all others."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, vocabulary, (count, a_width), dtype=np.int32)
    b = rng.integers(0, vocabulary, (count, b_width), dtype=np.int32)
    return a, rng.integers(0, a_width + 1, count, np.int32), b, rng.integers(0, b_width + 1, count, np.int32)


def test_equals_the_textbook_program_on_random_pairs():
    a, a_lengths, b, b_lengths = random_pairs(1000, 12, 9, vocabulary=3)
    a_lengths[:2], b_lengths[1:3] = 0, 0  # an empty a, both empty, an empty b
    expected = [levenshtein(x[:n], y[:m]) for x, n, y, m in zip(a, a_lengths, b, b_lengths, strict=True)]
    distance = edit_distance(a, a_lengths, b, b_lengths)
    assert distance.dtype == np.int32
    np.testing.assert_array_equal(distance, expected)


def test_padding_has_no_influence():
    a, a_lengths, b, b_lengths = random_pairs(50, 10, 10, vocabulary=4, seed=1)
    expected = edit_distance(a, a_lengths, b, b_lengths)
    wide_a, wide_b = (np.pad(x, ((0, 0), (0, 6)), constant_values=7) for x in (a, b))
    np.testing.assert_array_equal(edit_distance(wide_a, a_lengths, wide_b, b_lengths), expected)


def test_normalized_by_the_longer_length():
    a = np.array([[1, 2, 3, 4], [1, 2, 0, 0], [5, 5, 5, 5], [1, 2, 3, 4]], np.int32)
    b = np.array([[1, 2, 3, 4], [3, 4, 5, 0], [6, 6, 6, 6], [1, 3, 4, 0]], np.int32)
    a_lengths, b_lengths = np.array([4, 2, 0, 4], np.int32), np.array([4, 3, 0, 3], np.int32)
    distance = normalized_edit_distance(a, a_lengths, b, b_lengths)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, [0.0, 1.0, 0.0, 0.25])  # the third pair is empty on both sides


def common_run(a, b):
    """The longest run in both, by trying them all."""
    runs = {tuple(a[i:j]) for i in range(len(a)) for j in range(i + 1, len(a) + 1)}
    return max((len(run) for run in runs if any(tuple(b[i : i + len(run)]) == run for i in range(len(b)))), default=0)


def test_the_longest_common_run_is_that_of_all_runs():
    a, a_lengths, b, b_lengths = random_pairs(1000, 10, 8, vocabulary=3, seed=2)
    a_lengths[:2], b_lengths[1:3] = 0, 0
    found = longest_common_run(a, a_lengths, b, b_lengths)
    expected = [common_run(x[:n], y[:m]) for x, n, y, m in zip(a, a_lengths, b, b_lengths, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 5


def test_the_matching_share_counts_tokens_in_their_places():
    a, a_lengths, b, b_lengths = random_pairs(1000, 10, 12, vocabulary=3, seed=3)
    b_lengths = np.maximum(b_lengths, 1)
    a[:50, :10], a_lengths[:50], b_lengths[:50] = b[:50, :10], 10, 9  # verbatim, and more
    found = matching_share(a, a_lengths, b, b_lengths)
    pairs = zip(a, a_lengths, b, b_lengths, strict=True)
    expected = [sum(p == q for p, q in zip(x[:n], y[:m], strict=False)) / m for x, n, y, m in pairs]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(found)[:50] == 1).all()
