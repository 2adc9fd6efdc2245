"""Rotary positions (arXiv 2104.09864, halves convention), with the ways families stretch their frequencies."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.config import RopeScaling, TransformerConfig

Array = jax.Array
Table = tuple[Array, Array]


def frequencies(dims: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """(dims / 2,) float32: radians a position each pair of dimensions turns by."""
    base = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if scaling is None:
        out = base
    elif scaling.kind == "linear":
        out = base / scaling.factor
    elif scaling.kind == "llama3":
        rotations = scaling.original_context * base / (2 * math.pi)  # over the original context
        kept = np.clip((rotations - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        out = base * (kept + (1.0 - kept) / scaling.factor)
    else:  # yarn, arXiv 2309.00071 section 3.2: the ramp runs over dimensions, not over frequencies

        def dimension(rotations: float) -> float:
            return dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension(scaling.high), dimension(scaling.low)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        ramp = np.clip((np.arange(dims // 2) - first) / max(last - first, 0.001), 0.0, 1.0)
        out = base * (1.0 - ramp) + base / scaling.factor * ramp
    return np.asarray(out, np.float32)


def table(config: TransformerConfig, positions: Array, windowed: bool = False) -> Table | None:
    """Cosine and sine of every position, (B, T, 1, rotated / 2) float32; None where positions are learned.

    Args:
      positions: (B, T) int32.
      windowed: for the layers with a sliding window, which may turn at a rate of their own.
    """
    if config.positions != "rotary":
        return None
    dims = config.rotary_dims or config.head_dim
    own = windowed and config.local_rope_theta > 0
    scaling = None if own else config.rope_scaling
    turn = frequencies(dims, config.local_rope_theta if own else config.rope_theta, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * turn
    factor = scaling.attention_factor if scaling is not None else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos_sin: Table | None) -> Array:
    """Turns x (B, T, heads, head_dim) by a `table`; dimensions beyond the rotated ones stay."""
    if cos_sin is None:
        return x
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    rest = [x[..., 2 * half :].astype(jnp.float32)] if x.shape[-1] > 2 * half else []
    return jnp.concatenate(turned + rest, -1).astype(x.dtype)
