"""How easily a text is got out of a model, from one reading of it (`rollout.reading`): nothing is decoded here.

Arrays are (N, T) on the host, one row a text, one column a token; `lengths` (N,) says how many count.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from rlhf_jax.rollout.reading import Reading

Array = np.ndarray


def _inside(x: Array, lengths: Array) -> Array:
    return np.arange(x.shape[1]) < np.asarray(lengths)[:, None]


def first_divergence(greedy: Array, lengths: Array) -> Array:
    """The first token that greedy decoding does not choose, (N,) int; the length where it chooses all."""
    wrong = ~np.asarray(greedy, bool) & _inside(greedy, lengths)
    return np.where(wrong.any(1), wrong.argmax(1), lengths)


def greedily_extractable(greedy: Array, lengths: Array) -> Array:
    """Whether greedy decoding gives all of the text from each token on, were the tokens before it the prompt.

    Every split into prefix and suffix from one pass: a reverse cumulative and.

    Returns:
      (N, T) bool, [i, s] for the suffix that begins with token s; False beyond each length.
    """
    inside = _inside(greedy, lengths)
    right = np.asarray(greedy, bool) | ~inside
    return np.logical_and.accumulate(right[:, ::-1], axis=1)[:, ::-1] & inside


def window_logprobs(logprobs: Array, starts: Array, ends: Array) -> Array:
    """The log-probability (N,) float64 of tokens starts (N,) up to ends (N,), given all before them.

    A window that holds a token of probability 0 has -inf.
    """
    place = np.arange(logprobs.shape[1])
    window = (place >= np.asarray(starts)[:, None]) & (place < np.asarray(ends)[:, None])
    return np.where(window, np.asarray(logprobs, np.float64), 0.0).sum(1)


# --- discoverable extraction ----------------------------------------------------------------------------------------


def log_tries(log_p: Array, p: float) -> Array:
    """log10 of the tries after which a text of log-probability `log_p` came up with probability `p` at least once.

    The least whole n with 1 - (1 - e^log_p)^n >= p, and n >= 1; inf for a text of probability 0. In logarithms
    throughout: e^-100 is no float32, and its n no integer that fits one.

    Reference: Hayes et al. (2024), "Measuring memorization through probabilistic discoverable extraction", 2410.19482.
    """
    log_p = np.asarray(log_p, np.float64)
    # log(-log(1 - e^x)): the miss rate of one try; below e^-30 it is x itself
    log_miss = np.where(log_p < -30, log_p, np.log(-np.log1p(-np.exp(np.clip(log_p, -30, -1e-16)))))
    exact = (math.log(-math.log1p(-p)) - log_miss) / math.log(10)
    whole = np.log10(np.maximum(np.ceil(10 ** np.minimum(exact, 15) - 1e-9), 1))
    return np.where(exact < 15, whole, exact)


def discoverable_shares(log_p: Array, tries: Sequence[int], probabilities: Sequence[float]) -> Array:
    """The share of texts that `tries` samples bring up with each probability: (tries, probabilities) float64."""
    needed = np.stack([log_tries(log_p, p) for p in probabilities], axis=-1)  # (N, probabilities)
    return np.stack([(needed <= math.log10(n) + 1e-12).mean(0) for n in tries])


# --- membership scores: larger is more like a text of the training data ----------------------------------------------


def mean_logprob(logprobs: Array, lengths: Array) -> Array:
    """Minus the loss, (N,) nats per token."""
    return np.where(_inside(logprobs, lengths), logprobs, 0.0).sum(1) / lengths


def zlib_score(logprobs: Array, lengths: Array, texts: Sequence[str]) -> Array:
    """Log-probability by the bytes that zlib makes of the text, (N,) (Carlini et al. 2021)."""
    sizes = np.asarray([len(zlib.compress(text.encode())) for text in texts])
    return np.where(_inside(logprobs, lengths), logprobs, 0.0).sum(1) / sizes


def min_k(values: Array, lengths: Array, share: float = 0.2) -> Array:
    """The mean (N,) of the least `share` of each text's values, at least one of them.

    Of log-probabilities it is Min-K% (Shi et al. 2024); of (logprob - mean) / deviation Min-K%++ (Zhang et al. 2024).
    """
    ordered = np.sort(np.where(_inside(values, lengths), values, np.inf), axis=1)
    count = np.maximum(1, (share * np.asarray(lengths)).astype(int))
    kept = np.arange(values.shape[1]) < count[:, None]
    return np.where(kept, ordered, 0.0).sum(1) / count


def min_k_plus(logprobs: Array, mean: Array, deviation: Array, lengths: Array, share: float = 0.2) -> Array:
    """Min-K%++ (N,): log-probabilities against what the model draws at each place, in standard deviations."""
    return min_k((logprobs - mean) / np.maximum(deviation, 1e-6), lengths, share)


def exposure(log_p: Array, candidates: Array) -> Array:
    """log2 |R| - log2 rank of each text among random ones of its kind, (N,); at most log2 |R| (Carlini et al. 2019).

    Args:
      log_p: (N,) log-probability of each text.
      candidates: (C,) of random texts that were never planted; |R| is C + 1, the text itself being one.
    """
    above = len(candidates) - np.searchsorted(np.sort(candidates), log_p, side="left")
    return math.log2(len(candidates) + 1) - np.log2(above + 1)


def membership_scores(
    reading: Reading, lengths: Array, texts: Sequence[str], reference: Reading | None = None
) -> dict[str, Array]:
    """Score name -> (N,), of each text by one model's reading of it; and against a reference model's, where given."""
    logprobs, mean, deviation = (np.asarray(x) for x in (reading.logprobs, reading.mean, reading.deviation))
    scores = {
        "loss": mean_logprob(logprobs, lengths),
        "zlib": zlib_score(logprobs, lengths, texts),
        "Min-K%": min_k(logprobs, lengths),
        "Min-K%++": min_k_plus(logprobs, mean, deviation, lengths),
    }
    if reference is not None:
        scores["reference"] = scores["loss"] - mean_logprob(np.asarray(reference.logprobs), lengths)
    return scores
