"""A frozen base kept in 8 or 4 bits under adapters (QLoRA, arXiv 2305.14314).

Each matrix of the layers becomes a `qwix.QArray` of codes and float32 scales; embedding, output head, norms and biases
stay as they are. `dense.project` turns a layer's codes into numbers right before its product, forward and backward, so
no copy of the stack in full precision exists in training or scoring. A rollout makes one, once
(`rollout.generate.prepare_weights`), as merging adapters does.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rlhf_jax.config import NEEDS_QWIX
from rlhf_jax.distributed.sharding import tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import axes, base_leaves, layer_leaves, shapes

Array = jax.Array
KINDS = ("int8", "nf4")
TILE = 64  # input rows of an output channel that share a scale in nf4


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise UserError(NEEDS_QWIX) from None
    return qwix


def is_quantized(leaf: Any) -> bool:
    """Whether a kernel is a `qwix.QArray`; does not import qwix."""
    return hasattr(leaf, "qvalue")


def tile_of(d_in: int) -> int:
    """The largest divisor of d_in up to 64."""
    return next(size for size in range(min(TILE, d_in), 0, -1) if d_in % size == 0)


def _quantize(kernel: Array, kind: str) -> Any:
    """(layers, d_in, d_out) -> a QArray, layer by layer: what the search for codes takes is then one layer's."""
    qwix = _qwix()
    tiles = {0: tile_of(kernel.shape[1])} if kind == "nf4" else {}

    def layer(matrix: Array) -> Any:
        return qwix.quantize(matrix.astype(jnp.float32), kind, channelwise_axes=(1,), tiled_axes=tiles)

    return jax.lax.map(layer, kernel)


@partial(jax.jit, static_argnames=("kind", "at"))
def _quantize_at(kernel: Array, kind: str, at: tuple[NamedSharding, NamedSharding] | None) -> Any:
    out = _quantize(kernel, kind)
    if at is None:
        return out
    qvalue, scale = (jax.lax.with_sharding_constraint(x, s) for x, s in zip((out.qvalue, out.scale), at, strict=True))
    return dataclasses.replace(out, qvalue=qvalue, scale=scale)


def _matrices(config: TransformerConfig) -> list[str]:
    return [name for name, leaf in layer_leaves(config).items() if len(leaf.shape) == 2]


def quantize_base(config: TransformerConfig, base: dict[str, Any], kind: str) -> dict[str, Any]:
    """The base with the layers' matrices quantized; deterministic, and the same on any mesh.

    Args:
      base: plain parameters; what is not quantized is shared with the result.
      kind: "int8": codes -128 ... 127 with one scale an output channel and layer, absmax / 127.5, so that a weight is
        off by at most absmax / 255. "nf4": the 16 levels of 4-bit NormalFloat with one scale, the absmax, for each
        `tile_of(d_in)` input rows of a channel; a weight is off by at most half the widest gap, 0.152 absmax. TPUs pack
        two codes a byte; `nbytes` counts a byte each.

    Returns:
      The same tree with a `qwix.QArray` for each matrix: codes where the matrix lived, scales (layers, 1 or tiles,
      d_out) by the same axes where they divide.

    Raises:
      UserError: qwix is not installed.
    """
    _qwix()  # here, not in a trace, where JAX would add lines to its message
    layers, names = dict(base["layers"]), axes(base_leaves(config))["layers"]
    for name in _matrices(config):
        sharding, at = layers[name].sharding, None
        if isinstance(sharding, NamedSharding):
            like = jax.eval_shape(partial(_quantize, kind=kind), layers[name])
            at = tuple(jax.tree.leaves(tree_shardings(like, _spread(like, names[name]), sharding.mesh)))
        layers[name] = _quantize_at(layers[name], kind, at)
    return {**base, "layers": layers}


def quantized_shapes(config: TransformerConfig, kind: str) -> dict[str, Any]:
    """What `quantize_base` makes of the decoder's parameters, as a tree of `ShapeDtypeStruct`."""
    _qwix()
    whole = shapes(base_leaves(config), config.param_dtype)
    matrices = {name: whole["layers"][name] for name in _matrices(config)}
    small = jax.eval_shape(lambda kernels: {name: _quantize(x, kind) for name, x in kernels.items()}, matrices)
    return {**whole, "layers": {**whole["layers"], **small}}


def quantized_axes(config: TransformerConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Logical axes of a base, quantized or not; a scale has its matrix's axes."""
    names = axes(base_leaves(config))
    layers = {name: _spread(leaf, names["layers"][name]) for name, leaf in base["layers"].items()}
    return {**names, "layers": layers}


def _spread(leaf: Any, names: tuple[str | None, ...]) -> Any:
    return dataclasses.replace(leaf, qvalue=names, scale=names) if is_quantized(leaf) else names


def _levels(kind: str) -> Array | None:
    """The numbers that codes 0 ... 15 stand for, where codes are not numbers themselves."""
    if kind != "nf4":
        return None
    qwix = _qwix()
    return qwix.dequantize(qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(16), qtype=kind))


def plain(kernel: Any, dtype: Any) -> Array:
    """A kernel (..., d_in, d_out), quantized or not, as numbers of `dtype`; the product with the scale is float32's.

    What `qwix.dequantize` gives, bit for bit, without flattening the matrix: that would gather it on every device.
    """
    if not is_quantized(kernel):
        return kernel.astype(dtype)
    codes, scale = kernel.qvalue, kernel.scale
    levels = _levels(kernel.qtype)
    if levels is None:
        values = codes.astype(scale.dtype)
    else:  # selects, not a table look-up: a TPU gathers element by element
        number, values = codes.astype(jnp.int32), jnp.full(codes.shape, levels[0])
        for i in range(1, 16):
            values = jnp.where(number == i, levels[i], values)
    *lead, d_in, d_out = codes.shape
    tiles = scale.shape[-2]
    tiled = values.reshape(*lead, tiles, d_in // tiles, d_out) * scale[..., None, :]
    return tiled.reshape(codes.shape).astype(dtype)


def dequantized(base: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    """The base as plain arrays; its matrices in `dtype`, by default that of the embedding. A plain base itself."""
    if not any(is_quantized(leaf) for leaf in base["layers"].values()):
        return base  # roles share a base by identity
    dtype = base["embedding"].dtype if dtype is None else dtype
    layers = {name: plain(leaf, dtype) if is_quantized(leaf) else leaf for name, leaf in base["layers"].items()}
    return {**base, "layers": layers}


def cast_base(base: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The base with its plain leaves in `dtype`; codes and scales stay."""
    return jax.tree.map(lambda leaf: leaf if is_quantized(leaf) else leaf.astype(dtype), base, is_leaf=is_quantized)
