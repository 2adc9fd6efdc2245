"""The shared decoder, its adapters and its heads."""

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.pretrained import load_pretrained, load_reward_model, save_pretrained
from rlhf_jax.models.transformer import Transformer

__all__ = [
    "LoraConfig",
    "Transformer",
    "TransformerConfig",
    "load_pretrained",
    "load_reward_model",
    "save_pretrained",
]
