"""A role is a base, adapters and a head: policy, reference, value and reward differ in nothing else.

Weights are a dict {"base": ..., "adapters": ..., "head": ...}, the last two where the role has them. Roles with the
same base share its arrays. With adapters the base is frozen; without them it trains.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import axes, base_leaves
from rlhf_jax.models.lora import LoraConfig, adapter_axes, merge, scaled
from rlhf_jax.models.quantized import dequantized, quantized_axes
from rlhf_jax.models.transformer import Transformer

Array = jax.Array
Weights = dict[str, Any]
HEADS = ("head", "cost_head")  # the second one of a policy that is its own critic of rewards and costs


@dataclasses.dataclass(frozen=True)
class RoleSpec:
    """What is static about a role.

    Attributes:
      config: the decoder's shape.
      lora: its adapters' settings; None: every weight trains.
      answer_mark: token a reward role reads between prompt and answer; None: nothing.
      base: what the frozen base's matrices are kept in: "" (plain arrays), "int8" or "nf4" (`models.quantized`).
      members: of an ensemble: its adapters and heads have a leading axis of so many; 1: none.
    """

    config: TransformerConfig
    lora: LoraConfig | None = None
    answer_mark: int | None = None
    base: str = ""
    members: int = 1


def init_base(config: TransformerConfig, *, key: Array) -> dict[str, Any]:
    """Random parameters of the decoder, in the config's param_dtype."""
    return nn.unbox(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


def base_axes(config: TransformerConfig) -> dict[str, Any]:
    """Logical axes of the decoder's parameters, a tuple a leaf."""
    return axes(base_leaves(config))


def weight_axes(spec: RoleSpec, weights: Weights) -> Weights:
    """Logical axes of a role's weights, for those parts that `weights` has."""
    parts: Weights = dict.fromkeys(HEADS, heads.AXES)
    if "base" in weights:
        parts["base"] = quantized_axes(spec.config, weights["base"])
    if "adapters" in weights:
        parts["adapters"] = adapter_axes(spec.config, weights["adapters"])
    if spec.members > 1:
        own = {name: part for name, part in parts.items() if name != "base"}
        parts |= jax.tree.map(lambda axes: (None, *axes), own, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {name: parts[name] for name in weights}


def member_parts(weights: Weights) -> tuple[Weights, Weights]:
    """(what each member of an ensemble has of its own, with the leading axis; what they share)."""
    own = {name: part for name, part in weights.items() if name != "base"}
    return own, {name: part for name, part in weights.items() if name == "base"}


def over_members(function: Callable[..., Any], spec: RoleSpec, weights: Weights, *others: Any) -> Any:
    """`function(spec, weights, *others)` of every member of an ensemble in one pass, members in front of what it gives.

    `others` have a leading axis of members too.
    """
    own, shared = member_parts(weights)
    one = dataclasses.replace(spec, members=1)
    return jax.vmap(lambda mine, *rest: function(one, {**shared, **mine}, *rest))(own, *others)


def member(spec: RoleSpec, weights: Weights, number: int) -> tuple[RoleSpec, Weights]:
    """One member of an ensemble as a role of its own, on the same base; a role that is none is itself."""
    if spec.members == 1:
        return spec, weights
    own, shared = member_parts(weights)
    return dataclasses.replace(spec, members=1), {**shared, **jax.tree.map(lambda leaf: leaf[number], own)}


def split(spec: RoleSpec, weights: Weights) -> tuple[Weights, Weights]:
    """(trainable, frozen) parts: a frozen base under adapters, else everything trains."""
    frozen = {"base"} if spec.lora else set()
    return (
        {name: part for name, part in weights.items() if name not in frozen},
        {name: part for name, part in weights.items() if name in frozen},
    )


def without_heads(weights: Weights) -> Weights:
    """The parts of a role that make a language model."""
    return {name: part for name, part in weights.items() if name not in HEADS}


def training_passes(spec: RoleSpec) -> int:
    """Cost of a training step in forward passes: 3, or 2 over a frozen base, which needs no weight gradients."""
    return 2 if spec.lora else 3


def scaled_adapters(spec: RoleSpec, weights: Weights) -> dict[str, Any] | None:
    """The role's adapters as the decoder takes them, or None."""
    return scaled(weights["adapters"], spec.lora) if spec.lora else None


def merged_base(spec: RoleSpec, weights: Weights) -> dict[str, Any]:
    """The base with the role's adapters added in, as plain arrays."""
    adapters = scaled_adapters(spec, weights)
    return dequantized(weights["base"]) if adapters is None else merge(weights["base"], adapters)


def hidden_states(spec: RoleSpec, weights: Weights, tokens: Array, **kwargs: Any) -> Array:
    """Final hidden states (B, T, width) of the role on tokens (B, T); keywords as `Transformer` takes them."""
    model: Any = Transformer(spec.config)
    adapters = scaled_adapters(spec, weights)
    return model.apply({"params": weights["base"]}, tokens, adapters=adapters, return_hidden=True, **kwargs)
