"""Checkpoint formats: each family's tensors and keys of config.json in one table, for both directions.

A family's table maps the leaves of `leaves.base_leaves` to modules of the stored checkpoint. A leaf `NAME` is the
module's `weight`, a leaf `NAME_bias` its `bias`; `{i}` stands for the layer. A `Layout` says how the leaf lies in the
stored tensor: torch's Linear keeps (d_out, d_in), and GPT-2 and GPT-NeoX keep query, key and value in one tensor.

    tensors(config)           # every leaf -> the stored tensor it lies in
    stored_tensors(config)    # every stored tensor -> the leaves that make it up

`family_json.py` turns a config.json into a `TransformerConfig` and back by the same table.
"""

import dataclasses
import math
import mmap
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import Leaf, base_leaves

Json = dict[str, Any]
Spans = tuple[tuple[int, int], ...]  # (start, stop) along each dimension
CHUNK = 1 << 22  # bytes read at once where a tensor is cast or transposed on its way


class Stored(Protocol):
    """A tensor in a file, or in memory: what reads it is basic slicing."""

    def __getitem__(self, index: Any) -> np.ndarray: ...


# Tensors


def _buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros on pages of their own: a CPU device takes them as they are, and letting go gives them back at once."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf (d_in, d_out), or (d_out,), lies in its stored tensor.

    Attributes:
      transposed: stored (d_out, d_in), as torch's Linear does.
      part, parts: the stored d_out holds `parts` leaves of one size, of which this is number `part`.
      block: the parts alternate every `block` outputs (GPT-NeoX: every head); 0: each is in one piece.
    """

    transposed: bool = False
    part: int = 0
    parts: int = 1
    block: int = 0

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole stored tensor."""
        out = (*leaf[:-1], leaf[-1] * self.parts)
        return out[::-1] if self.transposed else out

    def runs(self, start: int, stop: int, size: int, most: int) -> Iterator[tuple[slice, slice]]:
        """Outputs start ... stop of `size` as (slice of the leaf, slice of the stored), at most `most` outputs each."""
        block = self.block or size
        while start < stop:
            head, inside = divmod(start, block)
            count = min(stop - start, block - inside, most)
            at = (head * self.parts + self.part) * block + inside
            yield slice(start, start + count), slice(at, at + count)
            start += count

    def read(self, stored: Stored, spans: Spans, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The part of a leaf of `shape` that lies in `spans`, in `dtype`; beside it about `CHUNK` bytes are held."""
        *rows, (left, right) = spans
        (top, bottom) = rows[0] if rows else (0, 1)
        out = _buffer(tuple(stop - start for start, stop in spans), dtype)
        across, down = right - left, bottom - top
        most = max(1, CHUNK // 4 // max(1, down if self.transposed else across))  # stored rows in one chunk
        most_across, most_down = (most, down) if self.transposed or not rows else (across, most)
        for first in range(top, bottom, max(1, most_down)):
            last = min(bottom, first + most_down)
            for mine, theirs in self.runs(left, right, shape[-1], most_across):
                here = slice(mine.start - left, mine.stop - left)
                if not rows:
                    out[here] = stored[theirs]
                elif self.transposed:
                    out[first - top : last - top, here] = stored[theirs, first:last].T
                else:
                    out[first - top : last - top, here] = stored[first:last, theirs]
        return out

    def write(self, whole: np.ndarray, leaf: np.ndarray) -> None:
        """Puts a whole leaf into its place in the stored tensor."""
        size = leaf.shape[-1]
        for mine, theirs in self.runs(0, size, size, size):
            if self.transposed and leaf.ndim == 2:
                whole[theirs] = leaf[:, mine].T
            else:
                whole[..., theirs] = leaf[..., mine]


PLAIN = Layout()
LINEAR = Layout(transposed=True)
BY_HEAD = -1  # a block that `tensors` replaces by the config's head_dim


class Module(NamedTuple):
    path: str
    layout: Layout = PLAIN


class Tensor(NamedTuple):
    """Where a leaf is stored: `name` has `{i}` for the layer."""

    name: str
    layout: Layout


_LLAMA = {
    "embedding": Module("model.embed_tokens"),
    "attention_norm": Module("model.layers.{i}.input_layernorm"),
    "q": Module("model.layers.{i}.self_attn.q_proj", LINEAR),
    "k": Module("model.layers.{i}.self_attn.k_proj", LINEAR),
    "v": Module("model.layers.{i}.self_attn.v_proj", LINEAR),
    "o": Module("model.layers.{i}.self_attn.o_proj", LINEAR),
    "ffn_norm": Module("model.layers.{i}.post_attention_layernorm"),
    "gate": Module("model.layers.{i}.mlp.gate_proj", LINEAR),
    "up": Module("model.layers.{i}.mlp.up_proj", LINEAR),
    "down": Module("model.layers.{i}.mlp.down_proj", LINEAR),
    "final_norm": Module("model.norm"),
    "head": Module("lm_head", LINEAR),
}
_HEAD_NORMS = {
    "q_norm": Module("model.layers.{i}.self_attn.q_norm"),
    "k_norm": Module("model.layers.{i}.self_attn.k_norm"),
}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_norm": Module("model.layers.{i}.post_attention_layernorm"),
    "ffn_norm": Module("model.layers.{i}.pre_feedforward_layernorm"),
    "post_ffn_norm": Module("model.layers.{i}.post_feedforward_layernorm"),
}
_GPT2 = {  # its Conv1D keeps (d_in, d_out), query | key | value side by side
    "embedding": Module("transformer.wte"),
    "positions": Module("transformer.wpe"),
    "attention_norm": Module("transformer.h.{i}.ln_1"),
    "q": Module("transformer.h.{i}.attn.c_attn", Layout(part=0, parts=3)),
    "k": Module("transformer.h.{i}.attn.c_attn", Layout(part=1, parts=3)),
    "v": Module("transformer.h.{i}.attn.c_attn", Layout(part=2, parts=3)),
    "o": Module("transformer.h.{i}.attn.c_proj"),
    "ffn_norm": Module("transformer.h.{i}.ln_2"),
    "up": Module("transformer.h.{i}.mlp.c_fc"),
    "down": Module("transformer.h.{i}.mlp.c_proj"),
    "final_norm": Module("transformer.ln_f"),
    "head": Module("lm_head", LINEAR),
}
_GPT_NEOX = {  # a head's query, key and value, then those of the next head
    "embedding": Module("gpt_neox.embed_in"),
    "attention_norm": Module("gpt_neox.layers.{i}.input_layernorm"),
    "q": Module("gpt_neox.layers.{i}.attention.query_key_value", Layout(True, part=0, parts=3, block=BY_HEAD)),
    "k": Module("gpt_neox.layers.{i}.attention.query_key_value", Layout(True, part=1, parts=3, block=BY_HEAD)),
    "v": Module("gpt_neox.layers.{i}.attention.query_key_value", Layout(True, part=2, parts=3, block=BY_HEAD)),
    "o": Module("gpt_neox.layers.{i}.attention.dense", LINEAR),
    "ffn_norm": Module("gpt_neox.layers.{i}.post_attention_layernorm"),
    "up": Module("gpt_neox.layers.{i}.mlp.dense_h_to_4h", LINEAR),
    "down": Module("gpt_neox.layers.{i}.mlp.dense_4h_to_h", LINEAR),
    "final_norm": Module("gpt_neox.final_layer_norm"),
    "head": Module("embed_out", LINEAR),
}

# Configs

_KEYS = {  # our field -> key of config.json
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
SOFTCAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
_GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "ffn": "n_inner",
    "context": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
_GPT_NEOX_KEYS = {
    **{field: key for field, key in _KEYS.items() if field not in ("kv_heads", "head_dim")},
    **_ATTENTION_BIAS,
    "norm_eps": "layer_norm_eps",
    "parallel": "use_parallel_residual",
}
_GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh"}
_LAYER_NORMS = {"norm": "layer", "gated": False, "ffn_bias": True}


@dataclasses.dataclass(frozen=True)
class Family:
    """One checkpoint format.

    Attributes:
      causal, classifier: names of the architectures with an output kernel and with a scalar head.
      prefix: what names of tensors start with; a checkpoint of the bare decoder leaves it out.
      modules: leaf -> its module.
      keys: field -> key of config.json.
      defaults: what an absent key means in this family.
      fixed: fields that are the same in the whole family.
      activation: the key of the activation's name, and its default.
      windows: which layers have a sliding window: "none", "all", or by "types" (a list, or a rule for it).
      theta: key of the rotary base in older files.
      query_scalar: config.json has `query_pre_attn_scalar`.
      scaled_embedding: embeddings are multiplied by sqrt(width).
      refused: flags that change the mathematics to what the decoder does not do.
    """

    causal: str
    classifier: str
    prefix: str
    modules: dict[str, Module]
    keys: dict[str, str]
    defaults: Json
    fixed: Json = dataclasses.field(default_factory=dict)
    activation: tuple[str, str] = ("hidden_act", "silu")
    windows: str = "none"
    theta: str = "rope_theta"
    query_scalar: bool = False
    scaled_embedding: bool = False
    refused: tuple[str, ...] = ()


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "transformer.",
        _GPT2,
        _GPT2_KEYS,
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {**_LAYER_NORMS, "positions": "learned", "qkv_bias": True, "o_bias": True},
        activation=("activation_function", "gelu_new"),
        refused=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        "gpt_neox.",
        _GPT_NEOX,
        _GPT_NEOX_KEYS,
        {
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        _LAYER_NORMS,
        activation=("hidden_act", "gelu"),
        theta="rotary_emb_base",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "model.",
        _LLAMA,
        {**_KEYS, **_ATTENTION_BIAS, "ffn_bias": "mlp_bias"},
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        "model.",
        _LLAMA,
        _KEYS,
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        "GemmaForSequenceClassification",
        "model.",
        _LLAMA,
        {**_KEYS, **_ATTENTION_BIAS},
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "head_dim": 256},
        _GEMMA,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        scaled_embedding=True,
        refused=("use_bidirectional_attention",),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        "model.",
        _GEMMA2,
        {**_KEYS, **_ATTENTION_BIAS, **SOFTCAPS},
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "head_dim": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        {**_GEMMA, "post_norms": True},
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows="types",
        query_scalar=True,
        scaled_embedding=True,
        refused=("use_bidirectional_attention",),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        "model.",
        {**_GEMMA2, **_HEAD_NORMS},
        {**_KEYS, **_ATTENTION_BIAS, **SOFTCAPS},
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "head_dim": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        {**_GEMMA, "post_norms": True, "qk_norm": True},
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows="types",
        query_scalar=True,
        scaled_embedding=True,
        refused=("use_bidirectional_attention",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        "model.",
        _LLAMA,
        _KEYS,
        {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 4096},
        {"qkv_bias": True},
        windows="types",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        "model.",
        {**_LLAMA, **_HEAD_NORMS},
        {**_KEYS, **_ATTENTION_BIAS},
        {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "head_dim": 128,
            "sliding_window": 4096,
        },
        {"qk_norm": True},
        windows="types",
    ),
}
SUPPORTED = ", ".join(FAMILIES)
SCORE = "score.weight"  # the classifiers' head, (labels, width)

_BUFFERS = re.compile(r"(\.inv_freq|\.(attn|attention)\.(bias|masked_bias))$")


def family_of(config: TransformerConfig) -> Family:
    """The family a config is of.

    Raises:
      UserError: there is none of that name.
    """
    if config.family not in FAMILIES:
        raise UserError(f'model.family is "{config.family}": checkpoints are written as one of {SUPPORTED}')
    return FAMILIES[config.family]


def module_of(config: TransformerConfig, leaf: str) -> Module:
    """The module a leaf or its bias is stored in, its layout made definite."""
    modules = family_of(config).modules
    if leaf.removesuffix("_bias") not in modules:
        raise UserError(f'the family "{config.family}" has no {leaf}: set model.family to one that does')
    path, layout = modules[leaf.removesuffix("_bias")]
    return Module(path, dataclasses.replace(layout, block=config.head_dim) if layout.block == BY_HEAD else layout)


def _tensor(config: TransformerConfig, leaf: str) -> Tensor:
    path, layout = module_of(config, leaf)
    if leaf.endswith("_bias"):
        return Tensor(f"{path}.bias", dataclasses.replace(layout, transposed=False))
    return Tensor(f"{path}.weight", layout)


def tensors(config: TransformerConfig) -> dict[str, Any]:
    """A tree like `base_leaves`, with the `Tensor` a leaf is stored in in place of the leaf."""
    leaves = base_leaves(config)
    outer = {name: _tensor(config, name) for name in leaves if name != "layers"}
    return {**outer, "layers": {name: _tensor(config, name) for name in leaves["layers"]}}


class Piece(NamedTuple):
    """A leaf's part in a stored tensor; `layer` None for a leaf outside the layers."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    layout: Layout


def stored_tensors(config: TransformerConfig) -> dict[str, list[Piece]]:
    """Every tensor a checkpoint of `config` holds, in order, with the leaves that make it up."""
    leaves, where = base_leaves(config), tensors(config)
    out: dict[str, list[Piece]] = {}

    def add(name: str, leaf: Leaf, tensor: Tensor, layer: int | None) -> None:
        shape = leaf.shape if layer is None else leaf.shape[1:]
        out.setdefault(tensor.name.format(i=layer), []).append(Piece(name, layer, shape, tensor.layout))

    first: list[str] = [name for name in ("embedding", "positions") if name in leaves]
    for name in first:
        add(name, leaves[name], where[name], None)
    for layer in range(config.layers):
        for name, leaf in leaves["layers"].items():
            add(name, leaf, where["layers"][name], layer)
    for name in [name for name in leaves if name not in (*first, "layers")]:
        add(name, leaves[name], where[name], None)
    return out


def canonical_name(family: Family, name: str) -> str | None:
    """The name a stored tensor has in the table, with or without the family's prefix; None for a buffer."""
    if _BUFFERS.search(name):
        return None
    bare = name.removeprefix(family.prefix)
    if bare.split(".")[0] in ("lm_head", "embed_out"):  # GPT-NeoX's is called by either name
        return f"{family.modules['head'].path}.weight"
    return bare if bare == SCORE else family.prefix + bare
