"""Policy, reference and value in one pass give what each gives by itself, and equal roles have no distance at all."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.sharding import replicated, tree_shardings
from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, base_axes, hidden_states, init_base
from rlhf_jax.rollout.scoring import answer_logprobs, answer_values, scores_together, stacked_hidden_states

CONFIG = TransformerConfig(
    vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=32, tie_embeddings=False
)
CONFIGS = {
    "llama": CONFIG,
    "remat": dataclasses.replace(CONFIG, remat="full", attention="splash"),
    "gemma": dataclasses.replace(
        CONFIG,
        windows=(3, 0),
        local_rope_theta=50.0,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        embedding_scale=4.0,
        tie_embeddings=True,
        attention_softcap=5.0,
        logit_softcap=4.0,
    ),
}
LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "v", "o", "up"))
BATCH, WIDTH, COUNT = 8, 5, 6
MESHES = {"one_device": None, "mesh": (2, 2, 2)}
on_meshes = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)


def cases(default, *grid):
    """Every combination of names, those not in `default` marked slow."""
    marks = {case: [] if case in default else [pytest.mark.slow] for case in itertools.product(*grid)}
    return [pytest.param(*case, id="-".join(case), marks=mark) for case, mark in marks.items()]


def adapters_of(config, seed):
    """Unscaled adapters whose b is not zero."""
    adapters = jax.jit(partial(init_adapters, config, LORA))(key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for leaf in adapters.values():
        leaf["b"] = (0.3 * rng.normal(size=leaf["b"].shape)).astype(np.float32)
    return adapters


def problem(config):
    """A base, adapters of three roles, a value head, and the fields of a rollout with answers of 1 ... N tokens."""
    rng = np.random.default_rng(0)
    base = jax.jit(partial(init_base, config))(key=jax.random.key(0))
    base = jax.tree.map(lambda leaf: leaf + np.float32(0.2) * rng.normal(size=leaf.shape).astype(np.float32), base)
    adapters = {role: adapters_of(config, seed) for seed, role in enumerate(("policy", "reference", "value"))}
    head = {"kernel": rng.normal(size=(16, 1)).astype(np.float32), "bias": np.float32([0.3])}
    fields = (
        rng.integers(0, 32, (BATCH, WIDTH)).astype(np.int32),
        rng.integers(1, WIDTH + 1, BATCH).astype(np.int32),
        rng.integers(0, 32, (BATCH, COUNT)).astype(np.int32),
        np.resize([6, 1, 3, 5], BATCH).astype(np.int32),
    )
    return base, adapters, head, fields


def place(config, base, rest, shape):
    """The base sharded by the training table and everything else whole, on a mesh of that shape."""
    if shape is None:
        return None, base, rest
    mesh = make_mesh(*shape)
    base = jax.device_put(base, tree_shardings(base, base_axes(config), mesh))
    return mesh, base, jax.device_put(rest, replicated(mesh))


def under(mesh, function, *args):
    if mesh is None:
        return jax.jit(function)(*args)
    with jax.set_mesh(mesh):
        return jax.jit(function)(*args)


@pytest.mark.parametrize(
    "name, mesh", cases({("llama", "mesh"), ("gemma", "one_device"), ("remat", "one_device")}, CONFIGS, MESHES)
)
def test_together_equals_each_role_alone(name, mesh):
    config, mesh = CONFIGS[name], MESHES[mesh]
    spec, temperature = RoleSpec(config, LORA), 0.7
    base, adapters, head, fields = problem(config)
    mesh, base_there, rest = place(config, base, (adapters, head, fields), mesh)

    def together(base, adapters, head, fields):
        return scores_together(spec, base, adapters, head, *fields, temperature)

    scores = under(mesh, together, base_there, *rest)
    logprobs, ref_logprobs = (
        jax.jit(partial(answer_logprobs, spec, temperature=temperature))(
            {"base": base, "adapters": adapters[role]}, *fields
        )
        for role in ("policy", "reference")
    )
    values = jax.jit(partial(answer_values, spec))({"base": base, "adapters": adapters["value"], "head": head}, *fields)
    expected = {
        "logprobs": logprobs[0],
        "ref_logprobs": ref_logprobs[0],
        "entropy": logprobs[1],
        "values": values,
    }
    for name, alone in expected.items():
        found = getattr(scores, name)
        assert found.shape == (BATCH, COUNT) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5, err_msg=name)
        assert (np.asarray(found)[np.arange(COUNT) >= fields[3][:, None]] == 0).all()
    inside = np.arange(COUNT) < fields[3][:, None]
    assert np.abs(scores.logprobs - scores.ref_logprobs)[inside].mean() > 0.1  # the roles differ


@pytest.mark.parametrize(
    "name, mesh, dtype",
    cases(
        {("llama", "mesh", "float32"), ("gemma", "one_device", "bfloat16"), ("remat", "mesh", "bfloat16")},
        CONFIGS,
        MESHES,
        ("float32", "bfloat16"),
    ),
)
def test_equal_adapters_have_a_kl_of_exactly_nothing(name, mesh, dtype):
    """A policy at its start: not within a tolerance, for every estimator of the distance grows from this."""
    config, mesh = CONFIGS[name], MESHES[mesh]
    spec = RoleSpec(dataclasses.replace(config, dtype=dtype), LORA)
    base, adapters, head, fields = problem(config)
    adapters["reference"] = jax.tree.map(np.copy, adapters["policy"])
    mesh, base, rest = place(config, base, (adapters, head, fields), mesh)

    def together(base, adapters, head, fields):
        return scores_together(spec, base, adapters, head, *fields, 1.0)

    scores = under(mesh, together, base, *rest)
    np.testing.assert_array_equal(scores.logprobs, scores.ref_logprobs)
    assert (np.asarray(scores.logprobs)[:, 0] < 0).all()


@on_meshes
def test_stacked_roles_have_the_hidden_states_of_each(mesh):
    spec = RoleSpec(CONFIG, LORA)
    base, adapters, _, fields = problem(CONFIG)
    tokens = np.concatenate([fields[0], fields[2]], axis=1)
    mesh, base_there, (there, tokens_there) = place(CONFIG, base, (list(adapters.values()), tokens), mesh)
    stacked = under(mesh, lambda *args: stacked_hidden_states(spec, *args), base_there, there, tokens_there)
    assert stacked.shape == (3, *tokens.shape, 16)
    alone = jax.jit(partial(hidden_states, spec))
    for found, own in zip(stacked, adapters.values(), strict=True):
        expected = alone({"base": base, "adapters": own}, tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_roles_share_their_reads_of_the_base():
    """Three roles take as many matrix products as one: each reads a base matrix once, for all rows of all roles."""
    spec = RoleSpec(CONFIG, LORA)
    base, adapters, _, fields = problem(CONFIG)

    def products(function, *args):
        return jax.jit(partial(function, spec)).lower(*args).as_text().count("stablehlo.dot_general")

    one = products(hidden_states, {"base": base, "adapters": adapters["policy"]}, fields[0])
    three = products(stacked_hidden_states, base, list(adapters.values()), fields[0])
    assert one == three > 7
