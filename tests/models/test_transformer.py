import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, Transformer, TransformerConfig
from rlhf_jax.models.dense import low_rank, matmul, project
from rlhf_jax.models.lora import TARGETS, init_adapters, merge, scaled
from rlhf_jax.models.roles import init_base
from rlhf_jax.models.transformer import output_kernel

SMALL = TransformerConfig(
    vocab_size=17, layers=2, width=24, heads=4, kv_heads=2, head_dim=10, ffn=36, context=64, norm_eps=1e-3
)
UNTIED = dataclasses.replace(SMALL, tie_embeddings=False)
LORA = LoraConfig(rank=3, alpha=6.0)
LENGTH = 9


def weights(config, seed=0):
    """Random parameters, large enough that every part of the decoder shows in the logits; norms are not 1."""
    params = jax.jit(partial(init_base, config))(key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.3) * rng.normal(size=leaf.shape).astype(np.float32), params)


def adapters_of(config, seed=0, lora=LORA):
    """Scaled adapters whose b is not zero."""
    adapters = jax.jit(partial(init_adapters, config, lora))(key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for leaf in adapters.values():
        leaf["b"] = (0.2 * rng.normal(size=leaf["b"].shape)).astype(np.float32)
    return scaled(adapters, lora)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, positions=None, segment_ids=None, adapters=None):
    model = Transformer(config)
    kwargs = {"positions": positions, "segment_ids": segment_ids, "adapters": adapters}
    return model.apply({"params": params}, tokens, **kwargs)


def random_tokens(rows, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, SMALL.vocab_size, (rows, length)).astype(np.int32)


# An independent forward pass: float64, one row and one head at a time, key-value heads repeated.


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, theta):
    """x (T, head_dim): the pair (x_i, x_{i + half}) turns by t theta^(-i / half)."""
    half = x.shape[1] // 2
    out = np.empty_like(x)
    for t in range(len(x)):
        for i in range(half):
            angle = t * theta ** (-i / half)
            a, b = x[t, i], x[t, i + half]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def forward_in_numpy(config, params, row):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, dim = params["embedding"][row], config.head_dim
    group = config.heads // config.kv_heads
    for layer in range(config.layers):
        p = {name: leaf[layer] for name, leaf in params["layers"].items()}
        h = norm(x, p["attention_norm"], config.norm_eps)
        outputs = []
        for head in range(config.heads):
            own, shared = slice(head * dim, (head + 1) * dim), slice(head // group * dim, (head // group + 1) * dim)
            q, k = rotate(h @ p["q"][:, own], config.rope_theta), rotate(h @ p["k"][:, shared], config.rope_theta)
            v = h @ p["v"][:, shared]
            scores = q @ k.T / np.sqrt(dim)
            scores[np.triu_indices(len(row), 1)] = -np.inf
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(probs / probs.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(outputs, -1) @ p["o"]
        h = norm(x, p["ffn_norm"], config.norm_eps)
        gate = h @ p["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"])) @ p["down"]
    x = norm(x, params["final_norm"], config.norm_eps)
    return x @ (params["embedding"].T if config.tie_embeddings else params["head"])


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_equals_a_float64_forward_pass_with_repeated_heads(config):
    params, tokens = weights(config), random_tokens(2)
    logits = logits_of(config, params, tokens)
    assert logits.dtype == jnp.float32
    expected = np.stack([forward_in_numpy(config, params, row) for row in tokens])
    assert expected.std() > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_times_the_output_kernel_are_the_logits():
    for config in (SMALL, UNTIED):
        params, tokens = weights(config), random_tokens(2)
        apply = partial(Transformer(config).apply, return_hidden=True)
        hidden = jax.jit(apply)({"params": params}, tokens)
        logits = logits_of(config, params, tokens)
        np.testing.assert_allclose(hidden @ output_kernel(config, params), logits, rtol=1e-5, atol=1e-5)


def test_a_token_changes_no_earlier_logits():
    params, tokens = weights(SMALL), random_tokens(3)
    before = logits_of(SMALL, params, tokens)
    for at in (1, 5, LENGTH - 1):
        changed = tokens.copy()
        changed[:, at] = (changed[:, at] + 1) % SMALL.vocab_size
        after = logits_of(SMALL, params, changed)
        np.testing.assert_array_equal(after[:, :at], before[:, :at])
        assert (np.abs(after - before)[:, at:].max(-1) > 1e-4).all()  # and reaches all later ones


def test_right_padding_changes_nothing():
    params, tokens = weights(SMALL), random_tokens(3)
    wide = np.pad(tokens, ((0, 0), (0, 6)), constant_values=5)
    logits = logits_of(SMALL, params, tokens)
    np.testing.assert_allclose(logits_of(SMALL, params, wide)[:, :LENGTH], logits, rtol=1e-5, atol=1e-5)


def test_packed_records_read_as_if_alone():
    params = weights(SMALL)
    records = [random_tokens(1, n, seed=n)[0] for n in (5, 1, 7, 3)]
    row, segments, positions = np.full((1, 20), 3, np.int32), np.zeros((1, 20), np.int32), np.zeros((1, 20), np.int32)
    at = 0
    for segment, record in enumerate(records, 1):
        here = slice(at, at + len(record))
        row[0, here], segments[0, here], positions[0, here] = record, segment, np.arange(len(record))
        at += len(record)
    packed = np.asarray(logits_of(SMALL, params, row, positions, segments))
    assert np.isfinite(packed).all()  # the padding of segment 0 sees nothing, and stays finite
    at = 0
    for record in records:
        alone = forward_in_numpy(SMALL, params, record)
        np.testing.assert_allclose(packed[0, at : at + len(record)], alone, rtol=1e-4, atol=1e-4)
        at += len(record)


@pytest.mark.parametrize(
    "change",
    [pytest.param({}, marks=pytest.mark.slow), {"parallel": True, "windows": (0, 3)}, {"layers": 1, "remat": "full"}],
)
def test_states_at_some_positions_and_their_gradients_are_those_of_all(change):
    config = dataclasses.replace(SMALL, **change)
    params, tokens = weights(config), random_tokens(2)
    keep = np.asarray([[3, 0, LENGTH - 1, 3], [1, 2, 2, 5]], np.int32)

    def kept(params, inside):
        adapters = adapters_of(config)
        run = partial(Transformer(config).apply, {"params": params}, tokens, adapters=adapters, return_hidden=True)
        hidden = run(keep=keep) if inside else jnp.take_along_axis(run(), keep[:, :, None], axis=1)
        return jnp.sum(jnp.sin(hidden)), hidden

    differentiate = jax.jit(jax.grad(kept, has_aux=True), static_argnums=1)
    (gradient, hidden), (expected_gradient, expected) = (differentiate(params, inside) for inside in (True, False))
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), gradient, expected_gradient)


def test_a_cpu_computes_the_end_of_the_last_layer_at_the_kept_positions_alone():
    config = dataclasses.replace(SMALL, layers=1)

    def flops(keep):
        run = jax.jit(partial(Transformer(config).apply, return_hidden=True, keep=keep))
        return run.lower({"params": weights(config)}, random_tokens(2)).compile().cost_analysis()["flops"]

    saved = flops(None) - flops(np.zeros((2, 1), np.int32))
    products = 2 * (config.heads * config.head_dim * config.width + 3 * config.width * config.ffn)
    assert saved >= products * 2 * (LENGTH - 1)


def test_attention_sees_only_distances():
    """Rotary positions: shifting all positions by one amount changes nothing."""
    params, tokens = weights(SMALL), random_tokens(2)
    shifted = np.broadcast_to(np.arange(LENGTH) + 11, tokens.shape)
    default = logits_of(SMALL, params, tokens)
    np.testing.assert_allclose(logits_of(SMALL, params, tokens, shifted), default, rtol=1e-4, atol=1e-4)
    stretched = logits_of(SMALL, params, tokens, shifted * 2)
    assert np.abs(stretched - default).max() > 1e-2


def test_remat_changes_no_value_and_no_gradient():
    params, tokens = weights(SMALL), random_tokens(2)

    def loss(config, params):
        return jnp.sum(jnp.sin(Transformer(config).apply({"params": params}, tokens)))

    remat = dataclasses.replace(SMALL, remat="full")
    plain, ours = (jax.jit(jax.value_and_grad(partial(loss, config)))(params) for config in (SMALL, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain)
    # A remat of whole layers, around those of norms and activations.
    prints = [str(jax.make_jaxpr(partial(loss, config))(params)).count("remat") for config in (remat, SMALL)]
    assert prints[0] > prints[1] > 0


def test_bfloat16_products_give_float32_logits():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params, tokens = weights(SMALL), random_tokens(2)
    logits, exact = logits_of(config, params, tokens), logits_of(SMALL, params, tokens)
    hidden = jax.eval_shape(partial(Transformer(config).apply, return_hidden=True), {"params": params}, tokens)
    assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)
    # bfloat16 keeps 8 bits: the mean error is of that order, and not of float32's
    error = np.abs(logits - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 2.0**-5
    gradient = jax.grad(lambda p: jnp.sum(Transformer(config).apply({"params": p}, tokens)))
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(gradient, params))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("config", [SMALL, UNTIED, TransformerConfig(vocab_size=50)], ids=["tied", "untied", "default"])
def test_parameters_are_counted(config):
    shapes = jax.eval_shape(partial(init_base, config), key=jax.random.key(0))
    assert config.parameters == sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_forward_flops_by_hand(config):
    # products of one token, multiply and add counted apart:
    # a layer: q 24x40, k and v 24x20, o 40x24, gate, up and down 24x36: 960 + 2 * 480 + 960 + 3 * 864 = 5472
    # output: 24 x 17 = 408, tied or not; attention: 4 heads x 10 x (QK^T and PV) over length / 2 = 25 tokens
    matrices = 2 * (2 * 5472 + 408)
    attention = 2 * (2 * 2 * 4 * 10 * 25)
    assert config.forward_flops(50) == matrices + attention


def test_identity_names_shape_and_meaning_but_not_precision():
    assert dataclasses.replace(SMALL, dtype="bfloat16", remat="full").identity == SMALL.identity
    for change in ({"layers": 3}, {"rope_theta": 5e5}, {"norm_eps": 1e-6}, {"tie_embeddings": False}, {"context": 32}):
        assert dataclasses.replace(SMALL, **change).identity != SMALL.identity


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 4, "kv_heads": 3}, r"heads 4 .*\bkv_heads 3"),
        ({"head_dim": 9}, "head_dim is 9"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"dtype": "float23"}, "float23"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


# The dense product and the adapters beside it.


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_matmul_and_its_gradients_equal_jnp(shape):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=shape).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)
    c = rng.normal(size=(*shape[:-1], 7)).astype(np.float32)
    ours = jax.value_and_grad(lambda x, w: jnp.sum(c * jnp.sin(matmul(x, w))), argnums=(0, 1))(x, w)
    expected = jax.value_and_grad(lambda x, w: jnp.sum(c * jnp.sin(x @ w)), argnums=(0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


def test_bfloat16_matmul_sums_in_float32():
    # 1 + 4095 / 4096 in bfloat16 sums sticks at 1; in float32 it is exact and rounds to 2 once
    x = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 4095), 2.0**-12)], axis=1).astype(jnp.bfloat16)
    w = jnp.ones((4096, 1), jnp.bfloat16)
    assert matmul(x, w).dtype == jnp.bfloat16 and float(matmul(x, w)[0, 0]) == 2.0
    gradient = jax.grad(lambda w: matmul(x.T, w).astype(jnp.float32).sum())(jnp.ones((1, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and float(gradient[0, 0]) == 2.0


def test_projection_adds_bias_and_adapter():
    rng = np.random.default_rng(1)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 7), (7,)))
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 2), (2, 7)))
    np.testing.assert_allclose(
        project(x, kernel, bias, {"a": a, "b": b}), x @ (kernel + a @ b) + bias, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("members", [1, 2, 3, 6])
def test_stacked_low_rank_equals_separate_calls(members):
    rng = np.random.default_rng(2)
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 4, 5), (members, 5, 2), (members, 2, 7)))
    together, each = low_rank(x, a, b), 6 // members
    for i in range(members):
        mine = slice(i * each, (i + 1) * each)
        np.testing.assert_allclose(together[mine], x[mine] @ a[i] @ b[i], rtol=1e-5, atol=1e-5)


def test_an_adapter_a_record_equals_each_record_alone():
    params, tokens = weights(SMALL), random_tokens(3)
    each = [adapters_of(SMALL, seed) for seed in range(3)]
    together = logits_of(SMALL, params, tokens, None, None, stack(each))
    for i in range(3):
        alone = logits_of(SMALL, params, tokens[i : i + 1], None, None, each[i])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_two_roles_in_one_pass_equal_two_passes():
    params, tokens = weights(SMALL), random_tokens(3)
    each = [adapters_of(SMALL, seed) for seed in range(2)]
    together = logits_of(SMALL, params, np.concatenate([tokens, tokens]), None, None, stack(each))
    for role in range(2):
        alone = logits_of(SMALL, params, tokens, None, None, each[role])
        np.testing.assert_allclose(together[3 * role : 3 * role + 3], alone, rtol=1e-4, atol=1e-4)
    assert np.abs(together[:3] - together[3:]).max() > 1e-1


def test_gradients_of_record_adapters_are_the_gradients_of_each_record():
    params, tokens, adapters = weights(SMALL), random_tokens(3), adapters_of(SMALL)

    def losses(adapters, tokens):
        logp = jax.nn.log_softmax(Transformer(SMALL).apply({"params": params}, tokens, adapters=adapters))
        return -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1).sum()

    together = jax.jit(jax.grad(losses))(stack([adapters] * 3), tokens)
    one = jax.jit(jax.grad(losses))
    alone = stack([one(adapters, tokens[i : i + 1]) for i in range(3)])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), together, alone)


def test_merged_adapters_are_the_same_function():
    params, tokens = weights(SMALL), random_tokens(2)
    for targets in (TARGETS, ("q", "down")):
        adapters = adapters_of(SMALL, lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
        assert set(adapters) == set(targets)
        beside = logits_of(SMALL, params, tokens, None, None, adapters)
        within = logits_of(SMALL, merge(params, adapters), tokens)
        np.testing.assert_allclose(within, beside, rtol=1e-4, atol=1e-4)
        assert np.abs(beside - logits_of(SMALL, params, tokens)).max() > 1e-1


def test_fresh_adapters_leave_the_function_as_it_is():
    params, tokens = weights(SMALL), random_tokens(2)
    fresh = jax.jit(partial(init_adapters, SMALL, LORA))(key=jax.random.key(3))
    assert all(np.abs(leaf["a"]).max() > 0 for leaf in fresh.values())  # so that b has a gradient
    base = logits_of(SMALL, params, tokens)
    np.testing.assert_array_equal(logits_of(SMALL, params, tokens, None, None, scaled(fresh, LORA)), base)


def test_scale_is_alpha_over_rank_or_its_root():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0
    shapes = jax.eval_shape(partial(init_adapters, SMALL, LORA), key=jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    for leaf in scaled(adapters, LoraConfig(rank=3, alpha=12.0)).values():
        assert (leaf["a"] == 1).all() and (leaf["b"] == 4).all()
