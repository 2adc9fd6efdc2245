import importlib.util
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models import attention
from rlhf_jax.models.attention import NEGATIVE, attend, causal_mask, choose, self_attention

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 20, 4, 2, 12  # neither length nor head_dim a multiple of 128
SCALE = 0.4
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 3]], [7, 9, 4], axis=1).astype(np.int32)  # padding last; none


def inputs(rows=ROWS, length=LENGTH, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(attention, q, k, v):
    """The output and the gradients to q, k, v of a loss that weighs every entry differently, float32."""

    def loss(q, k, v):
        out = attention(q, k, v).astype(jnp.float32)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def assert_same(attention, reference, arguments, tolerance=1e-5):
    """Largest error of each of output, dq, dk, dv over the reference's largest entry (or 1: some dq are zero)."""
    for name, one, other in zip(
        ("out", "dq", "dk", "dv"),
        value_and_gradients(attention, *arguments),
        value_and_gradients(reference, *arguments),
        strict=True,
    ):
        assert np.isfinite(one).all(), name
        assert np.abs(one - other).max() <= tolerance * max(1.0, np.abs(other).max()), name


def partial(implementation, **settings):
    return lambda q, k, v: self_attention(q, k, v, scale=SCALE, implementation=implementation, **settings)


CASES = {
    "causal": {},
    "window": dict(window=5),
    "window_of_one": dict(window=1),
    "softcap": dict(softcap=2.0),
    "packed": dict(segment_ids=SEGMENTS),
    "all": dict(window=5, softcap=2.0, segment_ids=SEGMENTS),
}
cases = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


# The plain one.


@cases
def test_plain_equals_loops_in_float64(settings):
    q, k, v = inputs()
    window, softcap = settings.get("window", 0), settings.get("softcap", 0.0)
    segments = settings.get("segment_ids", np.ones((ROWS, LENGTH), np.int32))
    out = np.asarray(partial("plain", **settings)(q, k, v))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, i, h in np.ndindex(ROWS, LENGTH, HEADS):
        kv = h // (HEADS // KV_HEADS)
        seen = [j for j in range(i + 1) if (not window or i - j < window) and segments[b, i] == segments[b, j]]
        scores = SCALE * k[b, seen, kv] @ q[b, i, h]
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        probs = np.exp(scores - scores.max())
        expected = probs @ v[b, seen, kv] / probs.sum()
        np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-5, atol=1e-5)


def test_a_query_that_may_look_nowhere_stays_finite():
    q, k, v = inputs()
    mask = causal_mask(LENGTH).at[:, 3].set(False)
    arrays = value_and_gradients(lambda q, k, v: attend(q, k, v, mask, scale=SCALE, softcap=2.0), q, k, v)
    assert all(np.isfinite(x).all() for x in arrays) and np.isfinite(NEGATIVE)


def test_scores_and_softmax_are_float32_under_bfloat16():
    """512 equal keys: a bfloat16 softmax sum would stop counting at 256."""
    q, k, v = (jnp.ones((1, 512, 1, 8), jnp.bfloat16) for _ in range(3))
    out = self_attention(q, k, v, scale=1.0, implementation="plain")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=2**-8)


# The fused ones equal it. Splash is interpreted here; cuDNN's arguments are tried on XLA's implementation.


@cases
def test_splash_equals_plain(settings):
    assert_same(partial("splash", **settings), partial("plain", **settings), inputs())


@pytest.mark.parametrize("heads, kv_heads, length", [(3, 3, 128), (4, 1, 20), (4, 2, 300)])
def test_splash_equals_plain_for_other_shapes(heads, kv_heads, length):
    """Multi-head, one key-value head, and several blocks with a window that leaves some out."""
    arguments = inputs(1, length, heads, kv_heads)
    assert_same(partial("splash", window=150), partial("plain", window=150), arguments)


@pytest.mark.parametrize("settings", [CASES[name] for name in ("causal", "window", "packed")])
def test_library_arguments_equal_plain(settings):
    window, segment_ids = settings.get("window", 0), settings.get("segment_ids")

    def library(q, k, v):
        return attention._library_attention(q, k, v, SCALE, window, segment_ids, "xla")

    assert_same(library, partial("plain", **settings), inputs())


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("settings", [CASES[name] for name in ("causal", "window", "packed")])
def test_cudnn_equals_plain(settings):
    arguments = inputs(head_dim=64, dtype=jnp.bfloat16)
    assert_same(partial("cudnn", **settings), partial("plain", **settings), arguments, tolerance=2e-2)


@pytest.mark.parametrize("implementation", ["plain", "splash"])
def test_a_row_of_padding_gives_finite_values_and_gradients(implementation):
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[0, :5] = 1
    attention = partial(implementation, segment_ids=segments, window=3, softcap=2.0)
    assert all(np.isfinite(x).all() for x in value_and_gradients(attention, *inputs()))


def test_a_cached_kernel_holds_no_tracer():
    """The first trace, a second one, and one inside checkpointed layers share a kernel."""
    q, k, v = inputs()
    splash = partial("splash")

    def layers(q, k, v):
        layer = jax.checkpoint(lambda x, _: (splash(x, k, v), None))
        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0])

    first = jax.jit(splash)(q, k, v)
    np.testing.assert_array_equal(first, jax.jit(lambda q: splash(q, k, v))(q))
    assert np.isfinite(jax.jit(jax.grad(layers))(q, k, v)).all()


# On a mesh.


@pytest.mark.parametrize(
    "shape, rows, heads, kv_heads",
    [
        ((2, 2, 2), 4, 4, 2),  # everything divides
        ((1, 2, 4), 2, 8, 2),  # key-value heads are repeated for four devices
        ((2, 2, 2), 3, 3, 1),  # nothing divides
    ],
)
def test_splash_on_a_mesh_equals_plain_on_one_device(shape, rows, heads, kv_heads):
    mesh = make_mesh(*shape)
    arguments = inputs(rows, heads=heads, kv_heads=kv_heads)
    segments = np.resize(SEGMENTS, (rows, LENGTH))
    expected = value_and_gradients(partial("plain", segment_ids=segments, window=6), *arguments)
    with jax.set_mesh(mesh):
        found = value_and_gradients(partial("splash", segment_ids=segments, window=6), *arguments)
        assert np.isfinite(partial("splash")(*arguments)).all()  # unpacked rows have no segments to split
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_splash_stays_sharded():
    mesh = make_mesh(2, 2, 2)
    at = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
    arguments = [jax.device_put(x, at) for x in inputs(4)]
    with jax.set_mesh(mesh):
        program = jax.jit(partial("splash")).lower(*arguments).compile()
    assert program.output_shardings.is_equivalent_to(at, 4)
    assert "all-gather" not in program.as_text() and "all-reduce" not in program.as_text()


COMPILE = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from rlhf_jax.distributed import make_mesh
from rlhf_jax.models.attention import self_attention

mesh = make_mesh(1, 4, 4, devices=topologies.get_topology_desc("v5e:4x4", "tpu").devices)
rows = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
whole = NamedSharding(mesh, P(("data", "fsdp"), None, None, None))

def collectives(length, heads, kv_heads, head_dim, kv_at, **settings):
    q = jax.ShapeDtypeStruct((8, length, heads, head_dim), jnp.bfloat16, sharding=rows)
    k = jax.ShapeDtypeStruct((8, length, kv_heads, head_dim), jnp.bfloat16, sharding=kv_at)
    ids = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def forward(q, k, v, ids):
        return self_attention(q, k, v, scale=head_dim**-0.5, segment_ids=ids, **settings)

    def loss(*args):
        return jnp.sum(jnp.square(forward(*args).astype(jnp.float32)))

    found = []
    for program in (forward, jax.grad(loss, (0, 1, 2))):
        with jax.set_mesh(mesh):
            text = jax.jit(program).lower(q, k, k, ids).compile().as_text()
        kernels = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
        moved = re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?[(]", text)
        found += [kernels, sorted(set(moved))]
    return found

print(collectives(640, 8, 4, 128, rows, softcap=50.0))
print(collectives(500, 8, 4, 64, rows, window=256))
print(collectives(256, 8, 2, 80, whole)[:2])
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_splash_compiles_for_a_tpu_slice_without_moving_activations():
    """`auto` on a topology's mesh is the Pallas kernel: one forward, three with the backward pass, no communication."""
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # libtpu refuses the CPU's
    environment = {**given, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["[1, [], 3, []]", "[1, [], 3, []]", "[1, []]"]


# Which one runs.


def test_auto_takes_the_platforms_kernel_where_it_can():
    def auto(platform, dtype=jnp.bfloat16, head_dim=64, length=256, **more):
        return choose("auto", platform, dtype, head_dim, length, **more)

    assert auto("cpu") == "plain"
    assert auto("tpu") == auto("tpu", jnp.float32, 80, 200, softcap=50.0, segmented=True) == "splash"
    assert auto("tpu", length=127) == "plain"
    assert auto("gpu", capability=8.0) == auto("gpu", jnp.float16, capability=9.0, segmented=True) == "cudnn"
    assert auto("gpu", capability=9.0, head_dim=256) == "cudnn"
    for obstacle in (
        dict(capability=0.0),  # no NVIDIA GPU
        dict(capability=7.5),
        dict(dtype=jnp.float32),
        dict(head_dim=60),
        dict(head_dim=256, capability=8.0),
        dict(softcap=50.0),
        dict(segmented=True, length=255),
    ):
        assert auto("gpu", **{"capability": 9.0, **obstacle}) == "plain"


def test_plain_is_plain_everywhere():
    assert {choose("plain", platform, jnp.bfloat16, 64, 256) for platform in ("cpu", "gpu", "tpu")} == {"plain"}


@pytest.mark.parametrize(
    "implementation, platform, dtype, says",
    [
        ("cudnn", "cpu", jnp.bfloat16, 'model.attention is "cudnn", which needs an NVIDIA GPU'),
        ("cudnn", "gpu", jnp.float32, "bfloat16 or float16, not float32"),
        ("splash", "gpu", jnp.bfloat16, "a TPU kernel"),
        ("flash", "gpu", jnp.bfloat16, '"plain" or "cudnn"'),
    ],
)
def test_a_kernel_asked_for_by_name_is_never_replaced_in_silence(implementation, platform, dtype, says):
    with pytest.raises(UserError, match=says):
        choose(implementation, platform, dtype, 64, 256, capability=9.0)
