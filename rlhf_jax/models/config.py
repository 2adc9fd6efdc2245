"""The shape of a decoder."""

import dataclasses
import hashlib
import json
from typing import Any

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder's shape; hashable, so jitted functions take it as a static argument.

    `dtype` is what matrix products run in; parameters, softmax, norms' statistics and log-probabilities are float32.
    `remat` recomputes a layer's activations in the backward pass.
    """

    vocab_size: int
    layers: int = 4
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    context: int = 256
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for field in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "context"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}: it must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f'model.dtype is "{self.dtype}": it must be "float32" or "bfloat16"')
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is no multiple of model.kv_heads {self.kv_heads}: change one")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: rotary positions need it even")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def identity(self) -> str:
        """Hash of what decides the parameters' shapes and meaning."""
        fields = {k: v for k, v in self.to_dict().items() if k not in ("dtype", "remat")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parameters(self) -> int:
        """Number of parameters, norms included."""
        qkv = self.width * self.head_dim * (self.heads + 2 * self.kv_heads)
        layer = qkv + self.heads * self.head_dim * self.width + 3 * self.width * self.ffn + 2 * self.width
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return self.layers * layer + embeddings + self.width

    def forward_flops(self, length: int, logits: bool = True) -> int:
        """Analytic FLOPs of one token's forward pass at mean causal context `length` / 2, with or without logits."""
        embeddings = self.vocab_size * self.width
        norms = (2 * self.layers + 1) * self.width
        matrices = self.parameters - norms - embeddings * (1 if self.tie_embeddings else 2)
        attention = 2 * self.layers * self.heads * self.head_dim * length  # QK^T and PV, half of them masked
        return 2 * (matrices + (embeddings if logits else 0)) + attention
