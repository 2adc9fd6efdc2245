import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, Transformer, TransformerConfig
from rlhf_jax.models.lora import init_adapters, scaled
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.sampling import draw, inverse_cdf, row_keys, support_logits
from rlhf_jax.rollout.scoring import answer_logprobs, join

CONFIG = TransformerConfig(
    vocab_size=19, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=32, tie_embeddings=False
)
BATCH, WIDTH, COUNT = 4, 6, 8
LENGTHS = np.array([6, 1, 4, 3], np.int32)
PROMPTS = np.where(np.arange(WIDTH) < LENGTHS[:, None], np.arange(1, 25).reshape(BATCH, WIDTH) % 19, 0).astype(np.int32)
FREE = Sampling(max_new_tokens=COUNT, stop_ids=())  # no token ends an answer
GREEDY = Sampling(max_new_tokens=COUNT, temperature=0.0, stop_ids=())


@pytest.fixture(scope="module")
def params():
    """A decoder with opinions: the untied head's logits have a deviation of about 2."""
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    return {**params, "embedding": 30 * params["embedding"], "head": 2 * params["head"]}


def sample(params, key=0, sampling=FREE, prompts=PROMPTS, lengths=LENGTHS, row_ids=None, adapters=None):
    row_ids = np.arange(BATCH) if row_ids is None else row_ids
    key = jax.random.key(key)
    return generate(CONFIG, params, prompts, lengths, key=key, sampling=sampling, row_ids=row_ids, adapters=adapters)


# Decoding against the full forward pass.


def test_greedy_decoding_equals_a_full_forward_pass_for_every_token(params):
    forward = jax.jit(Transformer(CONFIG).apply)
    rollout = sample(params, sampling=GREEDY)
    for i, n in enumerate(LENGTHS):
        row = np.zeros((1, WIDTH + COUNT), np.int32)
        row[0, :n] = PROMPTS[i, :n]
        for t in range(n, n + COUNT):
            logits = np.asarray(forward({"params": params}, row), np.float64)[0, t - 1]
            row[0, t] = logits.argmax()
            logp = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            np.testing.assert_allclose(rollout.logprobs[i, t - n], logp, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(rollout.tokens[i], row[0, n : n + COUNT])
    assert len(np.unique(rollout.tokens)) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_gives_the_logprobs_of_decoding(params, temperature):
    sampling = Sampling(max_new_tokens=COUNT, temperature=temperature, stop_ids=(3, 5, 7))
    rollout = sample(params, key=1, sampling=sampling)
    assert 1 <= rollout.lengths.min() < rollout.lengths.max()
    fields = rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths
    score = jax.jit(answer_logprobs, static_argnums=(0, 6))
    logprobs, entropy = score(RoleSpec(CONFIG), {"base": params}, *fields, temperature)
    np.testing.assert_allclose(logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    beyond = np.arange(COUNT) >= np.asarray(rollout.lengths)[:, None]
    assert (np.asarray(logprobs)[beyond] == 0).all() and (np.asarray(entropy)[beyond] == 0).all()
    assert (np.asarray(logprobs)[~beyond] < 0).all() and (np.asarray(entropy)[~beyond] > 0).all()


def test_prompt_padding_changes_no_answer(params):
    garbage = np.where(np.arange(WIDTH) < LENGTHS[:, None], PROMPTS, 13)
    wide = np.pad(garbage, ((0, 0), (0, 5)), constant_values=11).astype(np.int32)
    narrow, padded = sample(params, key=2), sample(params, key=2, prompts=wide)
    np.testing.assert_array_equal(padded.tokens, narrow.tokens)
    np.testing.assert_allclose(padded.logprobs, narrow.logprobs, rtol=0, atol=1e-5)


# Randomness.


def test_an_answer_belongs_to_its_row_id_not_to_its_slot(params):
    row_ids = np.array([70, 3, 1_000_003, 8])
    before = sample(params, key=3, row_ids=row_ids)
    order = np.array([2, 0, 3, 1])
    after = sample(params, key=3, row_ids=row_ids[order], prompts=PROMPTS[order], lengths=LENGTHS[order])
    for field in ("tokens", "logprobs", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(after, field), np.asarray(getattr(before, field))[order])


def test_other_rows_have_no_influence(params):
    before = sample(params, key=3)
    prompts, lengths, row_ids = (PROMPTS + 1) % 19, np.array([2, 6, 4, 5], np.int32), np.array([9, 8, 2, 7])
    prompts[2] = PROMPTS[2]  # row 2 alone stays
    after = sample(params, key=3, prompts=prompts, lengths=lengths, row_ids=row_ids)
    np.testing.assert_array_equal(after.tokens[2], before.tokens[2])
    np.testing.assert_array_equal(after.logprobs[2], before.logprobs[2])
    assert (after.tokens[3] != before.tokens[3]).any()


def test_default_row_ids_are_the_slots(params):
    key = jax.random.key(4)
    default = generate(CONFIG, params, PROMPTS, LENGTHS, key=key, sampling=FREE)
    np.testing.assert_array_equal(default.tokens, sample(params, key=4).tokens)


def test_answers_change_with_row_id_and_key_and_repeat_without(params):
    same = np.tile(PROMPTS[:1], (BATCH, 1))
    draws = partial(sample, params, prompts=same, lengths=np.full(BATCH, WIDTH, np.int32))
    rows = np.asarray(draws(key=5).tokens)
    assert len({tuple(row) for row in rows}) == BATCH  # one prompt, four row ids
    assert len({tuple(row) for row in np.asarray(draws(key=5, row_ids=np.full(BATCH, 2)).tokens)}) == 1
    np.testing.assert_array_equal(draws(key=5).tokens, rows)
    assert (np.asarray(draws(key=6).tokens) != rows).any(axis=1).all()


# Ends.


def test_any_stop_token_ends_an_answer_and_is_counted(params):
    free = np.asarray(sample(params, key=7).tokens)
    logprobs = np.asarray(sample(params, key=7).logprobs)
    stops = (int(free[0, 2]), int(free[2, 5]), int(free[3, 0]))
    rollout = sample(params, key=7, sampling=Sampling(max_new_tokens=COUNT, stop_ids=stops))
    seen = set()
    for i in range(BATCH):
        at = [t for t in range(COUNT) if free[i, t] in stops]
        length = at[0] + 1 if at else COUNT
        seen |= {int(free[i, at[0]])} if at else set()
        assert (int(rollout.lengths[i]), bool(rollout.ended[i])) == (length, bool(at))
        np.testing.assert_array_equal(rollout.tokens[i, :length], free[i, :length])
        np.testing.assert_array_equal(rollout.tokens[i, length:], 0)
        np.testing.assert_array_equal(rollout.logprobs[i, :length], logprobs[i, :length])
        np.testing.assert_array_equal(rollout.logprobs[i, length:], 0.0)
    assert len(seen) > 1  # more than one of the stop tokens did it


def test_without_a_stop_token_an_answer_fills_its_width(params):
    rollout = sample(params, key=7)
    np.testing.assert_array_equal(rollout.lengths, COUNT)
    assert not rollout.ended.any()


def test_a_stop_token_at_the_last_position_has_ended(params):
    free = np.asarray(sample(params, key=7).tokens)
    row = next(i for i in range(BATCH) if free[i, -1] not in free[i, :-1])
    rollout = sample(params, key=7, sampling=Sampling(max_new_tokens=COUNT, stop_ids=(int(free[row, -1]),)))
    assert int(rollout.lengths[row]) == COUNT and bool(rollout.ended[row])


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("case", ["at once", "in between", "never"])
def test_the_loop_stops_with_the_last_answer(params, monkeypatch, case, every):
    free = np.asarray(sample(params, key=7).tokens)
    stops = {"at once": tuple(range(19)), "in between": tuple(int(token) for token in free[:, 4]), "never": ()}[case]
    steps = []

    def counted(*args):
        jax.debug.callback(lambda position: steps.append(int(position)), args[-1])
        return draw(*args)

    monkeypatch.setattr(importlib.import_module("rlhf_jax.rollout.generate"), "draw", counted)
    sampling = Sampling(max_new_tokens=COUNT, stop_ids=stops)
    settings = dict(key=jax.random.key(7), sampling=sampling, check_every=every)
    anew = jax.jit(lambda *args: generate.__wrapped__(CONFIG, *args, **settings))
    rollout = anew(params, PROMPTS, LENGTHS)
    jax.effects_barrier()
    longest = {"at once": 1, "in between": 5, "never": COUNT}[case]
    assert int(rollout.lengths.max()) <= longest
    blocks = -(-(int(rollout.lengths.max()) - 1) // every)  # after the first token, `every` at a time
    assert sorted(steps) == list(range(1 + blocks * every))


# The draw.


@partial(jax.jit, static_argnums=(1, 2))
def one_step(logits, sampling, draws, position=0):
    """Draws of `draws` rows that share their logits (V,)."""
    keys = row_keys(jax.random.key(0), jnp.arange(draws))
    return draw(jnp.tile(logits, (draws, 1)), sampling, keys, position)


def expected_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Kept and renormalized probabilities by sorting, in float64."""
    scaled_logits = np.asarray(logits, np.float64) / temperature
    probs = np.exp(scaled_logits - scaled_logits.max())
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    mass = 0.0
    for token in order:
        if mass >= top_p:
            probs[token] = 0
        mass += probs[token]
    return probs / probs.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_kept_distribution(setting):
    logits = np.random.default_rng(0).normal(size=70).astype(np.float32)  # two blocks of the draw
    probs = expected_distribution(logits, **setting)
    tokens, logprobs = one_step(logits, Sampling(**setting), 4000)
    tokens = np.asarray(tokens)
    assert (probs[tokens] > 0).all()
    np.testing.assert_allclose(logprobs, np.log(probs[tokens]), rtol=1e-5, atol=1e-5)
    kept = np.asarray(support_logits(jnp.asarray(logits)[None], Sampling(**setting)))[0] > -np.inf
    np.testing.assert_array_equal(kept, probs > 0)
    common = probs > 5 / 4000
    counts = np.bincount(tokens, minlength=70)
    observed, expected = counts[common], 4000 * probs[common]
    if (~common & kept).any():  # the rare ones together
        observed, expected = (
            np.append(observed, counts[~common].sum()),
            np.append(expected, 4000 * probs[~common].sum()),
        )
    if len(observed) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_positions_and_rows_draw_independent_numbers():
    first, second = (np.asarray(one_step(np.zeros(4), Sampling(), 1000, position=t)[0]) for t in (0, 1))
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3
    table = np.zeros((4, 4))
    np.add.at(table, (first[:-1], first[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_greedy_takes_the_largest_and_reports_temperature_one():
    logits = np.random.default_rng(1).normal(size=30).astype(np.float32)
    tokens, logprobs = one_step(logits, Sampling(temperature=0.0), 3)
    assert (np.asarray(tokens) == logits.argmax()).all()
    np.testing.assert_allclose(logprobs, np.log(expected_distribution(logits).max()), rtol=1e-5)


ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize("vocab", [3, 64, 65, 200])
def test_inverse_cdf_equals_a_search_in_exact_arithmetic(vocab):
    """Probabilities and uniforms are multiples of 2^-12: every sum is exact, so every token is decided."""
    rng = np.random.default_rng(vocab)
    rows = 500
    counts = np.stack([rng.multinomial(4096, rng.dirichlet(np.full(vocab, 0.1))) for _ in range(rows)])
    uniform = rng.integers(0, 4096, rows)
    uniform[:2] = 0, 4095
    expected = [np.searchsorted(np.cumsum(c), u, side="right") for c, u in zip(counts, uniform, strict=True)]
    tokens = jax.jit(inverse_cdf)(jnp.asarray(counts / 4096, jnp.float32), jnp.asarray(uniform / 4096, jnp.float32))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, ALMOST_ONE])
def test_a_token_without_probability_is_never_drawn(uniform):
    rng = np.random.default_rng(2)
    probs = rng.uniform(0.1, 1.0, (400, 300)) ** 4 * (rng.random((400, 300)) < 0.05)
    probs[:, :64], probs[:, 128:192], probs[:, 256:] = 0, 0, 0  # whole blocks: the first, a middle one, the last
    probs[:, 100] = 1e-3
    probs[0], probs[1], probs[2] = np.eye(300)[0], np.eye(300)[299], np.eye(300)[150]
    probs = (probs / probs.sum(1, keepdims=True)).astype(np.float32)
    tokens = np.asarray(jax.jit(inverse_cdf)(jnp.asarray(probs), jnp.full(400, uniform, jnp.float32)))
    assert (probs[np.arange(400), tokens] > 0).all()
    assert tokens[:3].tolist() == [0, 299, 150]
    if uniform == 0.0:
        np.testing.assert_array_equal(tokens, (probs > 0).argmax(1))
    if uniform == ALMOST_ONE:  # 2^-24 of the mass is less than any kept token's
        np.testing.assert_array_equal(tokens, 299 - (probs[:, ::-1] > 0).argmax(1))


def test_rounding_at_a_block_border_draws_no_token_without_probability():
    """There `target - before` may round below 0, which the empty head of the block would pass."""
    rng = np.random.default_rng(3)
    probs = rng.uniform(0.1, 1.0, (4000, 192)).astype(np.float32)
    probs.reshape(4000, 3, 64)[:, :, :5] = 0
    probs /= probs.sum(1, keepdims=True)
    border = probs[:, :128].sum(1, dtype=np.float64).astype(np.float32)
    tokens = np.asarray(jax.jit(inverse_cdf)(jnp.asarray(probs), jnp.asarray(border)))
    assert (probs[np.arange(4000), tokens] > 0).all()
    assert set(tokens.tolist()) <= {127, 133}  # the last token before the border, the first after it


@pytest.mark.parametrize(
    "setting", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"max_new_tokens": 0}], ids=str
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


# Adapters, programs, rows.


def adapters_of(seed):
    lora = LoraConfig(rank=2, alpha=4.0)
    adapters = jax.jit(partial(init_adapters, CONFIG, lora))(key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for leaf in adapters.values():
        leaf["b"] = (0.3 * rng.normal(size=leaf["b"].shape)).astype(np.float32)
    return scaled(adapters, lora)


@pytest.mark.parametrize("members", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stacked_adapters_answer_as_each_alone(params, members):
    each = [adapters_of(seed) for seed in range(members)]
    together = sample(params, key=8, adapters=jax.tree.map(lambda *x: np.stack(x), *each))
    base, group = sample(params, key=8), BATCH // members
    for i in range(members):
        alone, mine = sample(params, key=8, adapters=each[i]), slice(i * group, (i + 1) * group)
        np.testing.assert_array_equal(together.tokens[mine], alone.tokens[mine])
        np.testing.assert_allclose(together.logprobs[mine], alone.logprobs[mine], rtol=0, atol=1e-4)
        assert (np.asarray(together.tokens[mine]) != np.asarray(base.tokens[mine])).any()


def test_new_keys_prompts_and_weights_of_one_shape_compile_nothing(params):
    sampling = Sampling(max_new_tokens=3, stop_ids=(4,))
    sample(params, key=0, sampling=sampling)
    programs = generate._cache_size()
    for key in range(1, 4):
        moved = jax.tree.map(lambda leaf, key=key: leaf + 0.01 * key, params)
        sample(moved, key=key, sampling=sampling, prompts=(PROMPTS + key) % 19, lengths=np.roll(LENGTHS, key))
    assert generate._cache_size() == programs
    sample(params, key=0, sampling=Sampling(max_new_tokens=3, stop_ids=(5,)))
    assert generate._cache_size() == programs + 1  # what the count would show


def test_join_puts_each_answer_directly_after_its_prompt():
    rng = np.random.default_rng(3)
    prompts, answers = rng.integers(1, 50, (6, 5)), rng.integers(1, 50, (6, 3))
    lengths = np.array([5, 1, 3, 4, 2, 5])
    expected = np.zeros((6, 8), int)
    for i, n in enumerate(lengths):
        expected[i, :n], expected[i, n : n + 3] = prompts[i, :n], answers[i]
    np.testing.assert_array_equal(jax.jit(join)(prompts, lengths, answers), expected)
