import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import language_model, segment_totals, token_logprobs

BATCH, LENGTH, WIDTH, VOCAB = 3, 37, 5, 11
# LOGITS_AT_ONCE and the chunk it makes of 3 x 37 x 11 logits: one chunk, two (19 + 18), five (4 x 8 + 5)
CHUNKINGS = [(1 << 21, 37), (610, 19), (100, 8)]


@pytest.fixture(params=CHUNKINGS, ids=lambda p: f"chunk{p[1]}")
def chunk(request, monkeypatch):
    at_once, expected = request.param
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", at_once)
    assert language_model._chunk_length(BATCH, LENGTH, VOCAB, 1) == expected
    return expected


def problem(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    kernel = (scale * rng.normal(size=(WIDTH, VOCAB))).astype(np.float32)
    return hidden, kernel, rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def in_float64(hidden, kernel, targets, temperature):
    logp = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) / temperature)
    return np.take_along_axis(logp, targets[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_equals_a_float64_log_softmax(chunk, temperature):
    hidden, kernel, targets = problem()
    logprobs, entropy = jax.jit(lambda *args: token_logprobs(*args, temperature))(hidden, kernel, targets)
    expected_logprobs, expected_entropy = in_float64(hidden, kernel, targets, temperature)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-6)


def test_logits_of_thousands_neither_overflow_nor_lose_the_small_ones():
    hidden, kernel, targets = problem(scale=1000.0)
    logprobs, entropy = jax.jit(token_logprobs)(hidden, kernel, targets)
    expected_logprobs, _ = in_float64(hidden, kernel, targets, 1.0)
    assert expected_logprobs.min() < -4000
    assert np.isfinite(entropy).all() and (np.asarray(entropy) >= 0).all()
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=1e-6, atol=2e-3)  # a float32 ulp at 8192 is 1e-3


def test_bfloat16_states_are_scored_in_float32():
    hidden, kernel, targets = problem()
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    rounded = jnp.asarray(kernel, jnp.bfloat16)  # the product runs in the states' dtype, its sums in float32
    logprobs, entropy = jax.jit(token_logprobs)(hidden, kernel, targets)
    expected_logprobs, expected_entropy = in_float64(hidden, rounded, targets, 1.0)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-6)


def naive(hidden, kernel, targets, temperature):
    return naive_logprobs(hidden @ kernel / temperature, targets)


def naive_logprobs(logits, targets):
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_equal_those_of_the_naive_form(chunk, temperature):
    hidden, kernel, targets = problem(seed=1)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, BATCH, LENGTH)).astype(np.float32)

    def gradients(function):
        def combination(hidden, kernel):
            logprobs, entropy = function(hidden, kernel, targets, temperature)
            return jnp.sum(a * logprobs + b * entropy)

        return jax.jit(jax.grad(combination, argnums=(0, 1)))(hidden, kernel)

    for ours, expected in zip(gradients(token_logprobs), gradients(naive), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("softcap", [0.5, 3.0, 30.0])
def test_a_soft_cap_equals_one_in_float64(chunk, softcap, temperature):
    """The cap comes before the temperature."""
    hidden, kernel, targets = problem()
    score = jax.jit(lambda *args: token_logprobs(*args, temperature, softcap))
    logits = softcap * np.tanh(hidden.astype(np.float64) @ kernel.astype(np.float64) / softcap)
    logp = log_softmax(logits / temperature)
    logprobs, entropy = score(hidden, kernel, targets)
    expected = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, -(np.exp(logp) * logp).sum(-1), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(logprobs) - in_float64(hidden, kernel, targets, temperature)[0]).max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_gradients_through_a_soft_cap_equal_those_of_the_naive_form(chunk, softcap, temperature):
    hidden, kernel, targets = problem(seed=1)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, BATCH, LENGTH)).astype(np.float32)

    def naive_capped(hidden, kernel, targets):
        return naive_logprobs(softcap * jnp.tanh(hidden @ kernel / softcap) / temperature, targets)

    def gradients(function):
        def combination(hidden, kernel):
            logprobs, entropy = function(hidden, kernel, targets)
            return jnp.sum(a * logprobs + b * entropy)

        return jax.jit(jax.grad(combination, argnums=(0, 1)))(hidden, kernel)

    ours = gradients(lambda *args: token_logprobs(*args, temperature, softcap))
    for found, expected in zip(ours, gradients(naive_capped), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected).max() > 1e-2


def test_logits_far_beyond_the_soft_cap_pass_no_gradient_and_no_nan():
    hidden, kernel, targets = problem(scale=1000.0)

    def total(hidden):
        logprobs, entropy = token_logprobs(hidden, kernel, targets, 1.0, 2.0)
        return jnp.sum(logprobs) + jnp.sum(entropy), logprobs

    gradient, logprobs = jax.jit(jax.grad(total, has_aux=True))(hidden)
    assert np.isfinite(gradient).all() and np.isfinite(logprobs).all()
    saturated = (np.abs(hidden @ kernel) > 50).all(-1)  # every logit is +-2
    assert saturated.sum() > 10 and (np.asarray(gradient)[saturated] == 0).all()
    lowest = -4 - np.log(VOCAB)  # of a token at -2 while all others are at 2
    assert (np.asarray(logprobs) > lowest).all()


def test_no_program_holds_all_logits(monkeypatch):
    batch, length, width, vocab = 4, 256, 8, 512
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", batch * length * vocab // 16)
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    all_logits = batch * length * vocab

    def compiled(function):
        def loss(hidden, kernel, targets):
            logprobs, entropy = function(hidden, kernel, targets, 1.0)
            return jnp.sum(logprobs) + jnp.sum(entropy)

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        arrays = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
        largest = max(int(np.prod([int(n) for n in dims.split(",")])) for dims in arrays)
        return largest, program.memory_analysis().temp_size_in_bytes

    largest, temporary = compiled(naive)
    assert largest >= all_logits and temporary >= 4 * all_logits  # what the check below would catch
    largest, temporary = compiled(token_logprobs)
    assert largest <= all_logits // 16
    assert temporary < 4 * all_logits // 2


def test_segment_totals_sum_each_record_of_a_packed_row():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(4, 20)).astype(np.float32)
    segment_ids = np.sort(rng.integers(0, 5, (4, 20)), axis=1).astype(np.int32)  # 0 is padding, 4 is in no column
    segment_ids[3] = 0
    expected = np.zeros((4, 3))
    for row in range(4):
        for t in range(20):
            if 1 <= segment_ids[row, t] <= 3:
                expected[row, segment_ids[row, t] - 1] += values[row, t]
    np.testing.assert_allclose(segment_totals(values, segment_ids, 3), expected, rtol=1e-5, atol=1e-6)


def test_segment_totals_keep_garbage_on_padding_out():
    values = np.array([[1.0, 2.0, np.nan, np.inf]], np.float32)
    segment_ids = np.array([[1, 1, 0, 0]], np.int32)
    np.testing.assert_array_equal(segment_totals(values, segment_ids, 2), [[3.0, 0.0]])


def spread(shape):
    return jax.sharding.Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("temperature, softcap", [(1.0, 0.0), (0.7, 3.0)])
def test_over_several_devices_chunks_of_the_vocabulary_give_the_same(shape, chunks, temperature, softcap, monkeypatch):
    """Also where neither width nor vocabulary divides over the devices; values, entropies and both gradients."""
    rng = np.random.default_rng(3)
    batch, length, width, vocab = 4, 9, 6, 20 if shape != (1, 1, 2) else 19
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((batch, length, width), (width, vocab)))
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    weigh = rng.normal(size=(2, batch, length)).astype(np.float32)

    def total(hidden, kernel):
        logprobs, entropy = token_logprobs(hidden, kernel, targets, temperature, softcap)
        return jnp.sum(weigh[0] * logprobs + weigh[1] * entropy), (logprobs, entropy)

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    expected = run(hidden, kernel)
    at_once = batch * length * vocab // (np.prod(shape) * chunks)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE_SPREAD", int(at_once))
    jax.clear_caches()
    mesh = spread(shape)
    with jax.set_mesh(mesh):
        assert language_model._chunks(batch, length, vocab).vocabulary >= chunks
        found = run(hidden, kernel)
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5, atol=2e-5)
