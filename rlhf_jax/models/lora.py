"""Low-rank adapters over named projections (Hu et al., arXiv 2106.09685; rsLoRA, arXiv 2312.03732).

An adapter tree is {projection: {"a": (layers, d_in, rank), "b": (layers, rank, d_out)}}: a role owns one, while the
base it reads stays frozen and shared. Every leaf takes one more leading axis (record, role or ensemble member). The
scale is folded into `b` by `scaled`, so the model itself knows neither alpha nor rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import layer_leaves
from rlhf_jax.models.quantized import dequantized, is_quantized, plain

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections carry adapters, of what rank and scale; a target the decoder lacks (`gate`) is left out."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False

    @classmethod
    def of(cls, fields: Any) -> "LoraConfig | None":
        """Of a stage's `lora` fields; None when every weight trains."""
        return cls(fields.rank, fields.alpha, tuple(fields.targets), fields.rslora) if fields.rank else None

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def init_adapters(config: TransformerConfig, lora: LoraConfig, *, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters: a ~ N(0, 1/d_in), b = 0, so the role starts as its base. Float32."""
    leaves = layer_leaves(config)
    out = {}
    for i, target in enumerate(sorted(lora.targets)):
        if target not in leaves:
            continue
        d_in, d_out = leaves[target].shape
        a = jax.random.normal(jax.random.fold_in(key, i), (config.layers, d_in, lora.rank), jnp.float32)
        out[target] = {"a": a * d_in**-0.5, "b": jnp.zeros((config.layers, lora.rank, d_out), jnp.float32)}
    return out


def adapter_axes(config: TransformerConfig, adapters: dict[str, Any]) -> dict[str, Any]:
    """Logical axes of an adapter tree without a leading axis."""
    axes = {target: layer_leaves(config)[target].axes for target in adapters}
    return {t: {"a": ("layers", axes[t][0], "rank"), "b": ("layers", "rank", axes[t][1])} for t in adapters}


def scaled(adapters: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The adapters as the model takes them, the scale folded into b."""
    return {t: {"a": leaf["a"], "b": leaf["b"] * lora.scale} for t, leaf in adapters.items()}


def merge(params: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """Base weights with (scaled) adapters added in: W + a @ b in float32, then in the base's dtype; plain arrays."""
    layers = dict(params["layers"])
    for target, leaf in adapters.items():
        kernel = layers[target]
        added = plain(kernel, jnp.float32) + jnp.einsum("ldr,lro->ldo", leaf["a"], leaf["b"])
        layers[target] = added.astype(params["embedding"].dtype if is_quantized(kernel) else kernel.dtype)
    return dequantized({**params, "layers": layers})
