"""The shape of a decoder: one config for every family."""

import dataclasses
import hashlib
import json
from typing import Any

from rlhf_jax.errors import UserError

CHOICES = {
    "positions": ("rotary", "learned"),
    "norm": ("rms", "layer"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "dots"),
    "attention": ("auto", "plain", "cudnn", "splash"),
}
HOW = ("dtype", "param_dtype", "remat", "attention")  # how it is computed, not what


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was first trained on.

    Attributes:
      kind: "linear" (positions / factor), "llama3" (Llama 3.1: low frequencies / factor, high ones kept, a ramp
        between), or "yarn" (arXiv 2309.00071).
      factor: how many times longer the context became.
      original_context: tokens of the first training; "llama3" and "yarn".
      low, high: rotations over the original context between which the ramp lies: `low_freq_factor` and
        `high_freq_factor` of "llama3" (1, 4), `beta_slow` and `beta_fast` of "yarn" (1, 32).
      attention_factor: multiplies sine and cosine; "yarn".
      truncate: whether "yarn" rounds the ramp's ends to whole dimensions.
    """

    kind: str
    factor: float
    original_context: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder's shape; hashable, so jitted functions take it as a static argument.

    `dtype` is what matrix products run in and `param_dtype` what parameters are kept in; softmax, norms' statistics and
    log-probabilities are float32. `remat` says what of a layer the backward pass recomputes: nothing, all of it
    ("full"), or all but its matrix products ("dots"). `attention` is the kernel; "auto" chooses by platform.
    """

    vocab_size: int
    family: str = "llama"  # whose checkpoint format it is written in: `families.FAMILIES`
    layers: int = 4
    width: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 512
    context: int = 256
    # positions
    positions: str = "rotary"  # "rotary" | "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dims: int = 0  # leading dimensions of a head that rotate; 0: all
    local_rope_theta: float = 0.0  # of layers with a window, never scaled; 0: theirs is that of the others
    # attention
    windows: tuple[int, ...] = ()  # a layer's sliding window, the token itself counted; 0: all before; (): 0 everywhere
    query_scale: float = 0.0  # what scores are multiplied by; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # scores become cap * tanh(scores / cap); 0: they stay
    qk_norm: bool = False  # RMS norm of each query and key head
    qkv_bias: bool = False
    o_bias: bool = False
    # norms and residual stream
    norm: str = "rms"  # "rms" | "layer" (with a bias)
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # a norm multiplies by norm_offset + its weight
    post_norms: bool = False  # norms after attention and feed-forward too
    parallel: bool = False  # attention and feed-forward read the same residual stream
    # feed-forward
    gated: bool = True
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh" | "relu"
    ffn_bias: bool = False
    # embeddings
    embedding_scale: float = 1.0
    tie_embeddings: bool = True
    logit_softcap: float = 0.0
    # how it is computed
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"  # "none" | "full" | "dots"
    attention: str = "auto"  # "auto" | "plain" | "cudnn" | "splash"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "context"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}: it must be at least 1")
        for field, valid in CHOICES.items():
            if getattr(self, field) not in valid:
                names = " or ".join(f'"{name}"' for name in valid)
                raise UserError(f'model.{field} is "{getattr(self, field)}": it must be {names}')
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is no multiple of model.kv_heads {self.kv_heads}: change one")
        rotated = self.rotary_dims or self.head_dim
        if self.positions == "rotary" and (rotated % 2 or rotated > self.head_dim):
            field = f"rotary_dims is {rotated} of head_dim" if self.rotary_dims else "head_dim is"
            raise UserError(f"model.{field} {self.head_dim}: rotary positions need it even, and within the head")
        if self.windows and len(self.windows) != self.layers:
            raise UserError(f"model.windows has {len(self.windows)} entries for {self.layers} layers: give one a layer")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TransformerConfig":
        """The config that `to_dict` wrote, also after a trip through JSON."""
        scaling = fields.get("rope_scaling")
        return cls(
            **{
                **fields,
                "rope_scaling": RopeScaling(**scaling) if scaling else None,
                "windows": tuple(fields.get("windows", ())),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def identity(self) -> str:
        """Hash of what decides the parameters' shapes and meaning."""
        fields = {k: v for k, v in self.to_dict().items() if k not in HOW}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.query_scale or self.head_dim**-0.5

    def window(self, layer: int) -> int:
        """The sliding window of a layer, 0 for none."""
        return self.windows[layer] if self.windows else 0

    @property
    def parameters(self) -> int:
        """Number of parameters, norms and biases included."""
        from rlhf_jax.models.leaves import base_leaves, count

        return count(base_leaves(self))

    def forward_flops(self, length: int, logits: bool = True) -> int:
        """Analytic FLOPs of one token's forward pass in a sequence of `length`, with or without logits.

        A causal token attends to `length` / 2 others on average; a sliding window counts for what it leaves of that.
        """
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = self.width * (2 * query + 2 * kv + (3 if self.gated else 2) * self.ffn)
        seen = 0.0  # tokens attended to, summed over layers
        for layer in range(self.layers):
            w = min(self.window(layer) or length, length)
            seen += w - w * w / (2 * length)  # w / 2 on average over the first w tokens, w for the others
        attention = 4 * query * seen  # QK^T and PV
        return 2 * (self.layers * matrices + (self.vocab_size * self.width if logits else 0)) + round(attention)
