"""Decoding a token at a time, for every feature a family may switch on, equals running the whole sequence again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.stops import stop_table
from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.program import collectives
from rlhf_jax.distributed.sharding import tree_shardings
from rlhf_jax.models import Transformer, TransformerConfig
from rlhf_jax.models.config import RopeScaling
from rlhf_jax.models.roles import RoleSpec, base_axes, init_base
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.batches import answer_all
from rlhf_jax.rollout.generate import prepare_weights
from rlhf_jax.rollout.sampling import _border, draw, support_logits
from rlhf_jax.rollout.scoring import answer_logprobs

LLAMA = TransformerConfig(
    vocab_size=29, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=32, tie_embeddings=False
)
GPT2 = dict(
    positions="learned",
    norm="layer",
    qkv_bias=True,
    o_bias=True,
    ffn_bias=True,
    gated=False,
    activation="gelu_tanh",
    kv_heads=4,
)
GEMMA2 = dict(
    windows=(3, 0),
    norm_offset=1.0,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=4.0,
    tie_embeddings=True,
    query_scale=0.3,
    attention_softcap=2.0,
    logit_softcap=3.0,
)
GEMMA3 = dict(
    layers=3,
    windows=(2, 4, 0),
    local_rope_theta=50.0,
    rope_scaling=RopeScaling("linear", 3.0),
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    activation="gelu_tanh",
    embedding_scale=4.0,
    tie_embeddings=True,
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(LLAMA, **GPT2),
    "gpt_neox": dataclasses.replace(
        LLAMA, **{**GPT2, "positions": "rotary", "activation": "gelu"}, parallel=True, rotary_dims=4
    ),
    "windows": dataclasses.replace(LLAMA, layers=3, windows=(1, 3, 2)),  # all shorter than the longest prompt
    "gemma2": dataclasses.replace(LLAMA, **GEMMA2),
    "gemma3": dataclasses.replace(LLAMA, **GEMMA3),
    "llama3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 4.0, 16), qkv_bias=True),
    "yarn": dataclasses.replace(
        LLAMA, rope_scaling=RopeScaling("yarn", 2.0, 16, low=1.0, high=32.0, attention_factor=1.2), query_scale=0.5
    ),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 2.5), activation="relu"),
}
families = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Rope scalings share all but a table of frequencies with llama: their gradients are left to the slow run.
SLOW = {"linear", "llama3", "yarn"}
trained_families = pytest.mark.parametrize(
    "config", [pytest.param(c, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, c in CONFIGS.items()]
)

BATCH, WIDTH, COUNT = 4, 7, 9
LENGTHS = np.array([7, 1, 5, 2], np.int32)  # holes of 0, 6, 2 and 5 slots between prompt and answer
PROMPTS = np.random.default_rng(0).integers(1, 29, (BATCH, WIDTH)).astype(np.int32)
FREE = Sampling(max_new_tokens=COUNT, stop_ids=())
GREEDY = Sampling(max_new_tokens=COUNT, temperature=0.0, stop_ids=())


def weights(config, seed=0):
    """Random parameters, no bias zero and no norm neutral, large enough that every part shows in the logits."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(init_base, config), key=jax.random.key(0))
    neutral = {True: 1.0 - config.norm_offset, False: 0.0}

    def leaf(path, shape):
        name = path[-1].key
        is_norm = "norm" in name and not name.endswith("bias")
        return (neutral[is_norm] + 0.4 * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def sample(config, params, key=0, sampling=FREE, prompts=PROMPTS, lengths=LENGTHS, **settings):
    return generate(config, params, prompts, lengths, key=jax.random.key(key), sampling=sampling, **settings)


@partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, prepared=None):
    return Transformer(config).apply({"params": params}, tokens, prepared=prepared)


def joined(rollout):
    """(B, P + N): each row's answer directly after its prompt, by a loop."""
    rows = np.zeros((len(rollout.tokens), rollout.prompts.shape[1] + rollout.tokens.shape[1]), np.int32)
    for i, n in enumerate(np.asarray(rollout.prompt_lengths)):
        rows[i, :n], rows[i, n : n + rollout.tokens.shape[1]] = rollout.prompts[i, :n], rollout.tokens[i]
    return rows


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# A token at a time against the whole sequence.


@families
def test_every_greedy_token_is_the_one_the_whole_forward_pass_prefers(config):
    """By induction over the answer: given the same tokens before it, each token is the largest logit's."""
    params = weights(config)
    rollout = sample(config, params, sampling=GREEDY)
    logp = log_softmax(logits_of(config, params, joined(rollout)))
    for i, n in enumerate(LENGTHS):
        before = logp[i, n - 1 : n - 1 + COUNT]
        np.testing.assert_array_equal(rollout.tokens[i], before.argmax(-1))
        np.testing.assert_allclose(rollout.logprobs[i], before.max(-1), rtol=0, atol=1e-5)
    assert len(np.unique(rollout.tokens)) > 3


@families
def test_sampled_tokens_have_the_logprobs_of_the_whole_forward_pass(config):
    params = weights(config)
    rollout = sample(config, params, sampling=dataclasses.replace(FREE, temperature=1.7))
    logp = log_softmax(np.asarray(logits_of(config, params, joined(rollout)), np.float64) / 1.7)
    for i, n in enumerate(LENGTHS):
        expected = logp[i, n - 1 + np.arange(COUNT), rollout.tokens[i]]
        np.testing.assert_allclose(rollout.logprobs[i], expected, rtol=0, atol=1e-5)
    assert len(np.unique(rollout.tokens)) > 10


@families
def test_unrolled_on_prepared_weights_equals_the_scan(config):
    params = weights(config)
    tokens = np.random.default_rng(1).integers(0, 29, (3, 11)).astype(np.int32)
    scanned = logits_of(config, params, tokens)
    assert np.std(scanned) > 0.3
    for fuse in (True, False):
        prepared = jax.jit(partial(prepare_weights, config, fuse=fuse))(params, None)
        assert ("qkv" in prepared["layers"][0]) == fuse
        unrolled = logits_of(config, params, tokens, prepared)
        np.testing.assert_allclose(unrolled, scanned, rtol=0, atol=1e-5 * np.abs(scanned).max())


def test_sharded_layers_are_gathered_one_by_one():
    """A stack gathered as a whole and then cut is there twice for a while."""
    config = dataclasses.replace(LLAMA, layers=4, width=32)
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    at = tree_shardings(weights(config), base_axes(config), mesh)
    params = jax.device_put(weights(config), at)
    with jax.set_mesh(mesh):
        compiled = jax.jit(partial(prepare_weights, config)).lower(params, None).compile()
        prepared = compiled(params, None)
    gathered = [e.shape for e in collectives(compiled.as_text(), 4) if e.kind == "all-gather"]
    assert len(gathered) > 4 * config.layers
    assert not [shape for shape in gathered if f"[{config.layers}," in shape]
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(prepared))
    alone = jax.jit(partial(prepare_weights, config))(weights(config), None)
    jax.tree.map(np.testing.assert_array_equal, prepared, alone)


@trained_families
def test_gradients_are_finite_and_the_same_whatever_is_saved(config):
    params = weights(config)
    tokens = np.random.default_rng(1).integers(0, 29, (2, 8)).astype(np.int32)
    gradients = {}

    def loss(params, model):
        logits = model.apply({"params": params}, tokens)
        return jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), (tokens[..., None] + 1) % 29, -1))

    for remat in ("none", "full", "dots"):
        model = Transformer(dataclasses.replace(config, remat=remat))
        gradients[remat] = jax.tree.leaves_with_path(jax.jit(jax.grad(partial(loss, model=model)))(params))
    for remat in ("full", "dots"):
        for (path, plain), (_, leaf) in zip(gradients["none"], gradients[remat], strict=True):
            name = f"{remat} {jax.tree_util.keystr(path)}"
            largest = np.abs(plain).max()
            without_effect = "k_bias" in name and config.positions == "learned"  # the same for all keys of a query
            assert np.isfinite(leaf).all() and (largest > 1e-5 or without_effect), name
            np.testing.assert_allclose(leaf, plain, rtol=0, atol=1e-6 * max(1, largest), err_msg=name)


@pytest.mark.parametrize("config", [CONFIGS[name] for name in ("windows", "gemma3")], ids=["windows", "gemma3"])
def test_a_window_counts_positions_and_not_the_slots_of_the_hole(config):
    """Wider padding moves the answers' slots and leaves every position: nothing changes."""
    params = weights(config)
    wide = np.pad(PROMPTS, ((0, 0), (0, 6)), constant_values=3)
    narrow, padded = sample(config, params, sampling=GREEDY), sample(config, params, sampling=GREEDY, prompts=wide)
    np.testing.assert_array_equal(padded.tokens, narrow.tokens)
    np.testing.assert_allclose(padded.logprobs, narrow.logprobs, rtol=0, atol=1e-5)
    full = dataclasses.replace(config, windows=())
    assert (np.asarray(sample(full, params, sampling=GREEDY).tokens) != np.asarray(narrow.tokens)).any()


# Several answers to a prompt.


def test_samples_of_a_prompt_lie_together_and_the_first_is_the_single_one():
    params = weights(LLAMA)
    row_ids = np.array([5, 900_000, 17, 2], np.int32)
    single = sample(LLAMA, params, row_ids=row_ids)
    several = sample(LLAMA, params, row_ids=row_ids, samples=3)
    assert several.tokens.shape == several.logprobs.shape == (3 * BATCH, COUNT)
    np.testing.assert_array_equal(several.prompts, np.repeat(PROMPTS, 3, axis=0))
    np.testing.assert_array_equal(several.prompt_lengths, np.repeat(LENGTHS, 3))
    np.testing.assert_array_equal(several.tokens[::3], single.tokens)
    np.testing.assert_allclose(several.logprobs[::3], single.logprobs, rtol=0, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(several.tokens)}) == 3 * BATCH
    logp = log_softmax(logits_of(LLAMA, params, joined(several)))  # of its own prompt, each of them
    for i, n in enumerate(np.repeat(LENGTHS, 3)):
        expected = logp[i, n - 1 + np.arange(COUNT), several.tokens[i]]
        np.testing.assert_allclose(several.logprobs[i], expected, rtol=0, atol=1e-5)


def test_samples_belong_to_the_row_id_and_not_to_their_number_or_slot():
    params = weights(LLAMA)
    row_ids, order = np.array([5, 900_000, 17, 2], np.int32), np.array([2, 0, 3, 1])
    three = np.asarray(sample(LLAMA, params, row_ids=row_ids, samples=3).tokens).reshape(BATCH, 3, COUNT)
    five = sample(
        LLAMA, params, row_ids=row_ids[order], samples=5, prompts=PROMPTS[order], lengths=LENGTHS[order]
    ).tokens
    np.testing.assert_array_equal(np.asarray(five).reshape(BATCH, 5, COUNT)[:, :3], three[order])


def equations(jaxpr, into_loops=True):
    """Every equation of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation
        if into_loops or equation.primitive.name not in ("while", "scan"):
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner), into_loops)


def test_the_samples_share_one_prefill():
    """Outside the loop both programs run the same matrix products, of the same shapes."""
    params = weights(LLAMA)

    def products(samples):
        run = partial(generate.__wrapped__, LLAMA, key=jax.random.key(0), sampling=FREE, samples=samples)
        jaxpr = jax.make_jaxpr(run)(params, PROMPTS, LENGTHS).jaxpr
        outside = [e for e in equations(jaxpr, into_loops=False) if e.primitive.name == "dot_general"]
        inside = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        return [[v.aval.shape for v in e.invars] for e in outside], [[v.aval.shape for v in e.invars] for e in inside]

    (once, _), (thrice, every) = products(1), products(3)
    assert once == thrice and [(BATCH, WIDTH, 16), (16, 48)] in once  # query, key and value: 24 + 12 + 12 columns
    assert sum(shapes[0][0] == 3 * BATCH for shapes in every) > 5 * LLAMA.layers  # a step's


# Ends.


class Spelling:
    """A tokenizer as far as `stop_table` looks: token i spells `texts[i]`."""

    path = "spelling"

    def __init__(self, texts):
        self.texts, self.vocab_size = texts, len(texts)

    def token_bytes(self, index):
        return self.texts[index].encode()


TEXTS = ["", "a", "b", "c", "ab", "ba", "cab", "é", "bc", "aa", "ca b", "aca", "d", "e", " a", "b c"]
STRINGS = ["abba", "cc", "éa", "aab"]  # across tokens, within one, over two bytes of a character, overlapping


@pytest.fixture(scope="module")
def spoken():
    """A decoder over 16 tokens whose free answers are varied, 16 prompts, and the automaton of STRINGS."""
    config = dataclasses.replace(LLAMA, vocab_size=16, layers=1)
    prompts = np.random.default_rng(1).integers(0, 16, (16, 3)).astype(np.int32)
    lengths = np.resize([3, 1, 2], 16).astype(np.int32)
    run = partial(sample, config, weights(config), prompts=prompts, lengths=lengths)
    return run, stop_table(Spelling(TEXTS), STRINGS)


def first_end(tokens, stop_ids):
    """Tokens until the first stop, by searching the text after every token; None where nothing ends it."""
    for length in range(1, len(tokens) + 1):
        text = "".join(TEXTS[token] for token in tokens[:length])
        if tokens[length - 1] in stop_ids or any(string in text for string in STRINGS):
            return length
    return None


@pytest.mark.parametrize("stop_ids", [(), (12, 0)], ids=["strings", "strings_and_ids"])
def test_rows_end_where_a_search_of_their_text_says(spoken, stop_ids):
    run, table = spoken
    count = 24
    settings = Sampling(count, temperature=4.0, stop_ids=stop_ids)
    free = np.asarray(run(sampling=dataclasses.replace(settings, stop_ids=())).tokens)
    rollout = run(sampling=settings, stop_table=table)
    ends = [first_end(row.tolist(), stop_ids) for row in free]
    by_id = sum(end is not None and free[i, end - 1] in stop_ids for i, end in enumerate(ends))
    assert sum(end is not None for end in ends) - by_id > 3  # by a string
    assert by_id > 3 if stop_ids else len(set(ends)) > 3
    for i, end in enumerate(ends):
        length = count if end is None else end
        assert (int(rollout.lengths[i]), bool(rollout.ended[i])) == (length, end is not None)
        np.testing.assert_array_equal(rollout.tokens[i, :length], free[i, :length])
        assert not np.asarray(rollout.tokens[i, length:]).any() and not np.asarray(rollout.logprobs[i, length:]).any()


def test_how_often_the_end_is_looked_for_changes_nothing(spoken):
    run, table = spoken
    settings = Sampling(11, temperature=4.0, stop_ids=(12,))
    rollouts = [run(sampling=settings, stop_table=table, check_every=every) for every in (1, 3, 8)]
    assert len(np.unique(rollouts[0].lengths)) > 1
    for rollout in rollouts[1:]:
        for field in ("tokens", "lengths", "ended"):
            np.testing.assert_array_equal(getattr(rollout, field), getattr(rollouts[0], field))
        np.testing.assert_allclose(rollout.logprobs, rollouts[0].logprobs, rtol=0, atol=1e-6)  # another program


# The kept set, without a sort.


def border_by_sorting(logits, weight, target):
    """The largest logit so that those at or above it weigh `target`, one row; -inf where all together do not."""
    for border in sorted(set(logits.tolist()), reverse=True):
        if weight[logits >= border].sum(dtype=np.float64) >= target:
            return border
    return -np.inf


def awkward_logits():
    """(12, 40) float32: random ones, and rows of ties, -inf, both zeros, huge and tiny numbers of both signs."""
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(12, 40)).astype(np.float32)
    logits[1] = np.round(2 * logits[1])  # ties
    logits[2] = 1.5  # nothing but a tie
    logits[3, ::2] = -np.inf
    logits[4, 1:] = -np.inf
    logits[5] = -np.abs(logits[5]) - 10
    logits[6] = rng.permutation([3e38, -3e38] * 20)
    logits[7] *= np.float32(1e38)
    logits[8] = rng.choice(np.array([0.0, -0.0, 1.0, -1.0], np.float32), 40)
    logits[9] *= np.float32(1e-30)
    logits[10] = np.round(logits[10]) * 50
    logits[11] = np.linspace(-1, 1, 40)[::-1]
    return logits


@pytest.mark.parametrize("top_k", [1, 2, 7, 39, 40, 1000])
def test_top_k_keeps_what_a_sort_keeps_and_ties(top_k):
    logits = awkward_logits()
    kept = np.asarray(jax.jit(partial(support_logits, sampling=Sampling(top_k=top_k)))(logits))
    kth = np.sort(logits, axis=1)[:, ::-1][:, min(top_k, 40) - 1]
    np.testing.assert_array_equal(kept, np.where(logits >= kth[:, None], logits, -np.inf))


@pytest.mark.parametrize("target", [1, 100, 511, 512, 1000, 1023, 1024, 1025])
def test_the_border_of_a_weight_is_that_of_a_sort(target):
    """Weights of whole 1/1024: every sum is exact, at the target itself too."""
    logits = awkward_logits()
    weight = np.random.default_rng(5).multinomial(1024, np.full(40, 1 / 40), 12).astype(np.float32) / 1024
    border = jax.jit(_border)(logits, weight, target / 1024)
    expected = [border_by_sorting(row, w, target / 1024) for row, w in zip(logits, weight, strict=True)]
    kept = logits >= np.asarray(border)
    np.testing.assert_array_equal(kept, logits >= np.array(expected, np.float32)[:, None])


@pytest.mark.parametrize("top_p", [1e-6, 0.37, 0.9, 0.999])
def test_top_p_keeps_what_a_sort_keeps(top_p):
    logits = np.concatenate([awkward_logits(), 3 * np.random.default_rng(6).normal(size=(20, 40))]).astype(np.float32)
    kept = np.asarray(jax.jit(partial(support_logits, sampling=Sampling(top_p=top_p)))(logits))
    probs = np.exp(log_softmax(logits))
    expected = [border_by_sorting(row, p, top_p) for row, p in zip(logits, probs, strict=True)]
    np.testing.assert_array_equal(kept, np.where(logits >= np.array(expected)[:, None], logits, -np.inf))


def test_no_draw_sorts_the_vocabulary():
    keys = jax.random.split(jax.random.key(0), 3)
    for sampling in (Sampling(), Sampling(top_k=5), Sampling(temperature=0.7, top_k=5, top_p=0.9)):
        jaxpr = jax.make_jaxpr(lambda logits, sampling=sampling: draw(logits, sampling, keys, 0))(jnp.zeros((3, 500)))
        names = {equation.primitive.name for equation in equations(jaxpr.jaxpr)}
        assert "cumsum" in names and not names & {"sort", "top_k", "approx_top_k"}


# Batches of one width.


def test_buckets_change_no_answer_and_compile_one_program_a_width():
    config = dataclasses.replace(LLAMA, **GEMMA3)
    params = weights(config)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(1, 29, n).tolist() for n in (3, 9, 1, 4, 12, 5, 4, 2, 8, 11, 6)]
    row_ids = rng.permutation(100)[: len(prompts)].astype(np.int32)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    settings = dict(key=jax.random.key(2), sampling=Sampling(6, stop_ids=(3, 5)), batch_size=4, mesh=mesh, name="test")

    def answers(**more):
        with jax.set_mesh(mesh):
            return answer_all(RoleSpec(config), {"base": params}, prompts, row_ids, **settings, **more)

    plain = answers()
    assert 1 <= plain[1].min() < plain[1].max() and not plain[2].all()
    programs = generate._cache_size()
    bucketed = answers(buckets=(8, 4, 64))  # 64 holds no more than the longest prompt's own width, 12
    assert generate._cache_size() == programs + 2  # widths 4 and 8; 12 there is
    for one, other in zip(bucketed, plain, strict=True):
        np.testing.assert_array_equal(one, other)


# bfloat16.


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_neox")), "gemma3"]
)
def test_bfloat16_decodes_and_scores_near_float32(name):
    """Within a few of bfloat16's relative steps, 2^-7, of the largest logit; within a fraction of one on average."""
    config = CONFIGS[name]
    half = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), weights(config))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # the same numbers
    rollout = sample(half, params)
    assert rollout.logprobs.dtype == jnp.float32 and np.isfinite(rollout.logprobs).all()
    fields = rollout.prompts, rollout.prompt_lengths, rollout.tokens, rollout.lengths
    score = jax.jit(answer_logprobs, static_argnums=(0, 6))
    halved, entropy = score(RoleSpec(half), {"base": params}, *fields, 1.0)
    expected, _ = score(RoleSpec(config), {"base": exact}, *fields, 1.0)
    assert halved.dtype == entropy.dtype == jnp.float32
    eps = float(jnp.finfo(jnp.bfloat16).eps)  # 2^-7
    size = np.abs(logits_of(config, exact, joined(rollout))).max()
    for logprobs in (halved, rollout.logprobs):
        error = np.abs(logprobs - expected)
        assert 0 < error.mean() < 0.5 * eps * size and error.max() < 5 * eps * size


def test_logits_of_bfloat16_states_keep_float32s_precision():
    """Sums in float32 are not rounded on their way to the softmax: what draws a token is what scores it."""
    config = dataclasses.replace(LLAMA, dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), weights(config))
    apply = jax.jit(Transformer(config).apply, static_argnames="return_hidden")
    logits, hidden = (apply({"params": params}, PROMPTS, return_hidden=hidden) for hidden in (False, True))
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["head"], np.float64)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
