"""Attention of a whole sequence to itself (training, scoring), and the plain attention every path must equal.

`attend` is the definition: scores, mask, softmax in float32. `self_attention` computes the same, causal and inside
segments, without the (T, T) scores in memory where a fused kernel exists: cuDNN's on NVIDIA GPUs, the splash Pallas
kernel on TPUs (a causal flash attention that skips blocks the mask empties).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask_info
from jax.sharding import PartitionSpec

from rlhf_jax.errors import UserError

Array = jax.Array
NEGATIVE = -1e30  # finite: a fully masked row must stay free of NaN
IMPLEMENTATIONS = ("auto", "plain", "cudnn", "splash")
LANES = 128  # of a TPU's vector registers: the splash kernel's blocks are multiples of it
LARGEST_BLOCK = 512  # of the splash kernel: queries by keys, in VMEM
RESIDUALS = "attention"  # the splash kernel's output and normalizer, for `jax.checkpoint` policies that save by name


@jax.custom_vjp
def softmax(x: Array) -> Array:
    """Softmax over the last axis; its backward pass keeps nothing but the result."""
    return jax.nn.softmax(x, axis=-1)


def _softmax_forward(x: Array) -> tuple[Array, Array]:
    probs = jax.nn.softmax(x, axis=-1)
    return probs, probs


def _softmax_backward(probs: Array, g: Array) -> tuple[Array]:
    return (probs * (g - jnp.sum(g * probs, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def attend(q: Array, k: Array, v: Array, mask: Array, *, scale: float, softcap: float = 0.0) -> Array:
    """Grouped-query attention, scores and softmax in float32.

    Args:
      q: (B, T, heads, head_dim); head h reads key-value head h // (heads / kv_heads).
      k, v: (B, S, kv_heads, head_dim).
      mask: (B or 1, T, S) bool, True where a query may look. A query that may look nowhere gets a finite, meaningless
        row.
      scale: what scores are multiplied by.
      softcap: scores become softcap * tanh(scores / softcap) before the mask; 0: they stay.

    Returns:
      (B, T, heads, head_dim) in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head_dim) * scale
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    probs = softmax(jnp.where(mask[:, None, None], scores, NEGATIVE)).astype(q.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", probs, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, head_dim)


def causal_mask(length: int, window: int = 0, segment_ids: Array | None = None) -> Array:
    """(B or 1, T, T) bool: key j is visible to query i iff 0 <= i - j < window (0: no limit), in the same segment.

    Padding is segment 0 and sees padding: no query sees nothing.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask = (distance >= 0)[None]
    if window:
        mask = mask & (distance < window)[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def self_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    segment_ids: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """Causal attention of a sequence to itself.

    Args:
      q: (B, T, heads, head_dim); head h reads key-value head h // (heads / kv_heads).
      k, v: (B, T, kv_heads, head_dim).
      scale: what scores are multiplied by.
      softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
      window: key j is visible to query i iff 0 <= i - j < window; 0: no limit. Static.
      segment_ids: (B, T) int32, 0 on padding: a token sees only its own segment.
      implementation: "auto" | "plain" | "cudnn" | "splash" (interpreted on a CPU, for tests); see `choose`.

    Returns:
      (B, T, heads, head_dim) in q's dtype. Padding gets finite, meaningless rows.

    Raises:
      UserError: the implementation asked for by name can't run here.
    """
    length, head_dim = q.shape[1], q.shape[3]
    platform, segmented = current_platform(), segment_ids is not None
    chosen = choose(
        implementation,
        platform,
        q.dtype,
        head_dim,
        length,
        softcap=softcap,
        segmented=segmented,
        capability=_capability(),
    )
    if chosen == "splash":
        return _splash(q, k, v, scale, softcap, window, segment_ids, interpret=platform != "tpu")
    if chosen == "cudnn":
        return _library_attention(q, k, v, scale, window, segment_ids, "cudnn")
    return attend(q, k, v, causal_mask(length, window, segment_ids), scale=scale, softcap=softcap)


def choose(
    implementation: str,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    length: int,
    *,
    softcap: float = 0.0,
    segmented: bool = False,
    capability: float = 0.0,
) -> str:
    """The implementation that runs: "plain", "cudnn" or "splash".

    Args:
      implementation: what is asked for; "auto" takes the fused kernel of the platform where there is one.
      platform: "cpu" | "gpu" | "tpu".
      dtype, head_dim, length: of the queries.
      softcap, segmented: whether scores are capped, and whether the rows are packed.
      capability: the GPU's compute capability (9.0 on a Hopper), 0 where it is none of NVIDIA's.

    Raises:
      UserError: the implementation asked for by name can't run here.
    """
    if implementation not in IMPLEMENTATIONS:
        names = " or ".join(f'"{name}"' for name in IMPLEMENTATIONS)
        raise UserError(f'model.attention is "{implementation}": it must be {names}')
    obstacle = _cudnn_obstacle(platform, dtype, head_dim, length, softcap, segmented, capability)
    if implementation == "auto":
        if platform == "tpu" and length >= LANES:  # below a block the kernel would mostly work on padding
            return "splash"
        return "plain" if obstacle else "cudnn"
    if implementation == "cudnn" and obstacle:
        raise UserError(f'model.attention is "cudnn", which needs {obstacle}: use "auto" or "plain"')
    if implementation == "splash" and platform not in ("tpu", "cpu"):
        raise UserError(f'model.attention is "splash", a TPU kernel, on {platform}: use "auto"')
    return implementation


def _cudnn_obstacle(
    platform: str, dtype: jnp.dtype, head_dim: int, length: int, softcap: float, segmented: bool, capability: float
) -> str:
    """What cuDNN's flash attention needs and does not have here, or ""."""
    largest = 256 if capability >= 9 else 128
    if platform != "gpu" or capability < 8:
        return f"an NVIDIA GPU of compute capability 8.0 or more, not {platform} of {capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {jnp.dtype(dtype).name} (model.dtype)"
    if head_dim % 8 or head_dim > largest:
        return f"a head_dim that is a multiple of 8 up to {largest}, not {head_dim}"
    if softcap:
        return f"no softcap, not {softcap}"
    if segmented and length % 2:  # the mask of segments travels as a bias, whose gradient kernel wants even lengths
        return f"an even length of packed rows, not {length}"
    return ""


def current_platform() -> str:
    """The platform of the active mesh's devices (a topology's, compiled ahead of time), else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


@functools.cache
def _capability() -> float:
    """The compute capability of this process's NVIDIA GPUs; 0.0 without them."""
    try:
        return float(jax.local_devices(backend="cuda")[0].compute_capability)
    except (RuntimeError, AttributeError):  # no such backend in this process
        return 0.0


def _library_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int,
    segment_ids: Array | None,
    implementation: Literal["cudnn", "xla"],
) -> Array:
    """`jax.nn.dot_product_attention` on `self_attention`'s arguments; "cudnn", or "xla" where a test has no GPU."""
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )


def _splash(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    softcap: float,
    window: int,
    segment_ids: Array | None,
    interpret: bool,
) -> Array:
    """The splash kernel; under a mesh each device runs it on its own rows and heads.

    A compiler can't split a Pallas call, so the mesh is dealt with by hand: rows over data and fsdp, heads over tensor,
    an axis where it divides. Where tensor does not divide the key-value heads they are repeated until it does, so that
    every device holds those its query heads read.
    """

    def kernel(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return _splash_rows(q, k, v, scale, softcap, window, segment_ids, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, segment_ids)
    heads, kv_heads, tensor = q.shape[2], k.shape[2], mesh.shape["tensor"]
    rows = ("data", "fsdp") if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    across = None if heads % tensor else "tensor"
    if across:
        repeats = next(n for n in range(1, heads // kv_heads + 1) if _fits(heads, kv_heads * n, tensor))
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    spec = PartitionSpec(rows, None, across, None)
    return jax.shard_map(
        kernel, in_specs=(spec, spec, spec, PartitionSpec(rows, None)), out_specs=spec, check_vma=False
    )(q, k, v, segment_ids)


def _fits(heads: int, kv_heads: int, tensor: int) -> bool:
    """Whether `tensor` devices can each hold some query heads and exactly the key-value heads those read."""
    return heads % kv_heads == 0 and kv_heads % tensor == 0


def _splash_rows(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    softcap: float,
    window: int,
    segment_ids: Array | None,
    interpret: bool,
) -> Array:
    """The splash kernel on one device's rows and heads, the length padded to whole blocks."""
    length, heads = q.shape[1], q.shape[2]
    padded = -(-length // LANES) * LANES
    extra = padded - length

    def prepare(x: Array) -> Array:  # (B, T, H, D) -> (B, H, padded T, D)
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, extra), (0, 0)))

    kernel = _splash_kernel(heads, padded, window if window < padded else 0, softcap, interpret)
    q, k, v = prepare(q * scale), prepare(k), prepare(v)
    if segment_ids is None:  # what is padded on comes last, where no real query looks
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, extra)))
        out = jax.vmap(kernel)(q, k, v, splash_kernel.SegmentIds(ids, ids))
    return jnp.swapaxes(out[:, :, :length], 1, 2)


@functools.lru_cache(maxsize=64)
def _splash_kernel(heads: int, length: int, window: int, softcap: float, interpret: bool) -> Any:
    """The kernel (q (H, T, D), k, v (KV, T, D), segment ids or none) -> (H, T, D), T a multiple of `LANES`.

    Made from JAX's parts rather than by its `make_splash_mha`, which puts the block masks on the active mesh's devices:
    here they stay numpy, so that the kernel can be cached (a tracer would leak) and compiled for absent devices.
    """
    block = next(size for size in range(min(LARGEST_BLOCK, length), 0, -LANES) if length % size == 0)
    blocks = splash_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    shape = (length, length)
    mask = splash_mask.LocalMask(shape, (window - 1, 0), 0) if window else splash_mask.CausalMask(shape)
    every_head = splash_mask.MultiHeadMask([mask] * heads)
    forward, mask_function = splash_mask_info.process_mask(every_head, (block, block))
    backward, _ = splash_mask_info.process_mask_dkv(every_head, (block, block))
    return splash_kernel.SplashAttentionKernel(
        forward,
        forward,  # of the gradient to q, which walks the blocks in the same order
        backward,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESIDUALS,
        mask_function=mask_function,
        interpret=interpret,
    )
