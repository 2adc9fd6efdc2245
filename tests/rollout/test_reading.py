"""Reading given text: against float64 logits, and against what decoding itself does and says."""

from functools import partial

import jax
import numpy as np
import pytest

from rlhf_jax.evaluation.extraction import first_divergence, greedily_extractable
from rlhf_jax.models import Transformer, TransformerConfig
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.objectives import language_model
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.reading import read_answers

CONFIG = TransformerConfig(
    vocab_size=19, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=32, tie_embeddings=False
)
BATCH, WIDTH, COUNT = 6, 5, 8
PROMPT_LENGTHS = np.array([5, 1, 4, 3, 2, 5], np.int32)
LENGTHS = np.array([8, 8, 5, 1, 7, 8], np.int32)
SCHEME = Sampling(COUNT, temperature=0.7, top_k=5, stop_ids=())
rng = np.random.default_rng(0)
PROMPTS, ANSWERS = (rng.integers(1, 19, (BATCH, width)).astype(np.int32) for width in (WIDTH, COUNT))


@pytest.fixture(scope="module")
def params():
    """A decoder with opinions: the untied head's logits have a deviation of about 2."""
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    return {**params, "embedding": 30 * params["embedding"], "head": 2 * params["head"]}


def read(params, answers=ANSWERS, lengths=LENGTHS, scheme=SCHEME):
    weights = {"base": params}
    return jax.device_get(read_answers(RoleSpec(CONFIG), weights, PROMPTS, PROMPT_LENGTHS, answers, lengths, scheme))


def test_every_fact_is_that_of_the_full_logits(params, monkeypatch):
    """Chunks of three positions, so that the last one is padded."""
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 6 * 19 * 8)
    monkeypatch.setattr(language_model, "_chunk_length", lambda *_: 3)
    read_answers.clear_cache()
    found = read(params)
    read_answers.clear_cache()
    forward = jax.jit(Transformer(CONFIG).apply)
    for i, (start, length) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
        row = np.concatenate([PROMPTS[i, :start], ANSWERS[i]])[None]
        row = np.pad(row, ((0, 0), (0, WIDTH + COUNT - row.shape[1])))
        every = np.asarray(forward({"params": params}, row), np.float64)[0, start - 1 :]
        for t in range(length):
            logits, target = every[t], ANSWERS[i, t]
            logp = logits - np.log(np.exp(logits).sum())
            p = np.exp(logp)
            kept = np.sort(logits)[-5:] / 0.7
            chosen = logits[target] / 0.7
            sampled = chosen - np.log(np.exp(kept).sum()) if chosen >= kept.min() - 1e-9 else -np.inf
            mean = (p * logp).sum()
            facts = {
                "logprobs": logp[target],
                "sampled": sampled,
                "gap": logits[target] - np.delete(logits, target).max(),
                "greedy": logits.argmax() == target,
                "rank": (logits > logits[target]).sum(),
                "mean": mean,
                "deviation": np.sqrt((p * (logp - mean) ** 2).sum()),
            }
            for name, value in facts.items():
                np.testing.assert_allclose(getattr(found, name)[i, t], value, rtol=1e-4, atol=1e-4, err_msg=name)
    beyond = np.arange(COUNT) >= LENGTHS[:, None]
    assert all((x[beyond] == 0).all() for x in found)
    assert np.isinf(found.sampled).any() and found.rank.max() > 9


def test_a_text_is_called_extractable_where_greedy_decoding_writes_it(params):
    """Its own answers, some of them spoilt at one token: from the token after it on they are its own no more."""
    greedy = Sampling(COUNT, temperature=0.0, stop_ids=())
    own = generate(CONFIG, params, PROMPTS, PROMPT_LENGTHS, key=jax.random.key(1), sampling=greedy)
    answers = np.array(own.tokens)
    answers[2:, 3] = (answers[2:, 3] + 1) % 19
    full = np.full(BATCH, COUNT, np.int32)
    flags = read(params, answers, full).greedy
    assert first_divergence(flags, full).tolist() == [8, 8, 3, 3, 3, 3]
    assert greedily_extractable(flags, full)[:, 0].tolist() == [True, True] + [False] * 4
    for split in (1, 5):  # the tokens before it join the prompt
        wide = np.zeros((BATCH, WIDTH + COUNT), np.int32)
        for i, n in enumerate(PROMPT_LENGTHS):
            wide[i, : n + split] = np.concatenate([PROMPTS[i, :n], answers[i, :split]])
        rest = Sampling(COUNT - split, temperature=0.0, stop_ids=())
        decoded = generate(CONFIG, params, wide, PROMPT_LENGTHS + split, key=jax.random.key(1), sampling=rest)
        same = (np.asarray(decoded.tokens) == answers[:, split:]).all(1)
        assert same.tolist() == greedily_extractable(flags, full)[:, split].tolist()


def test_the_scheme_s_log_probabilities_are_those_of_sampling(params):
    rollout = generate(CONFIG, params, PROMPTS, PROMPT_LENGTHS, key=jax.random.key(2), sampling=SCHEME)
    full = np.full(BATCH, COUNT, np.int32)
    found = read(params, np.array(rollout.tokens), full)
    np.testing.assert_allclose(found.sampled, rollout.logprobs, rtol=0, atol=1e-4)
    greedy = read(params, np.array(rollout.tokens), full, Sampling(COUNT, temperature=0.0, stop_ids=()))
    assert (np.isfinite(greedy.sampled) == greedy.greedy).all() and not greedy.greedy.all()
