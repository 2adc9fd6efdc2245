"""Closed forms of what a job's programs take and do on a mesh of any size: a plan without devices and a compiler.

Weights, optimizer and caches are counted exactly, array by array. What a program has beside them for a while is counted
by its largest arrays; `python -m rlhf_jax.bench scaling` checks it against compiled programs.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from rlhf_jax.distributed.chips import Chip
from rlhf_jax.distributed.sharding import ROLLOUT, TRAINING, Table, tree_shardings
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.leaves import axes, base_leaves, count, shapes
from rlhf_jax.models.lora import LoraConfig, adapter_axes, init_adapters

# Arrays of a layer that are alive at once, in bfloat16 columns of its width and of its inner products, by what the TPU
# compiler reports of an 8B: of a forward pass, and of a backward pass that makes the layer anew.
FORWARD = (4.0, 4.0)
BACKWARD = (18.0, 4.6)


@dataclasses.dataclass(frozen=True)
class Needs:
    """One program.

    Attributes:
      temporary: bytes that a device has beside what the job keeps.
      flops, useful: of all devices, with and without what the backward pass makes anew.
      read: bytes of memory that a device reads one step after the other.
      sent: bytes that leave a device.
    """

    name: str
    temporary: float
    flops: float
    useful: float
    read: float = 0.0
    sent: float = 0.0

    def seconds(self, chip: Chip, devices: int) -> float:
        """The least time, by what bounds it most."""
        return max(roofline(self.flops, self.read, self.sent, chip, devices).values())


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A job: bytes a device keeps by what they are, and its programs."""

    kept: dict[str, float]
    programs: list[Needs]

    @property
    def memory(self) -> float:
        """The most that a device has at once, in bytes."""
        return sum(self.kept.values()) + max(program.temporary for program in self.programs)


def roofline(flops: float, read: float, sent: float, chip: Chip, devices: int) -> dict[str, float]:
    """The least seconds by what bounds them; `sent` bytes leave each device along one axis of the torus."""
    return {
        "compute": flops / (devices * chip.flops),
        "memory": read / chip.bandwidth,
        "network": sent / chip.link if chip.link else 0.0,
    }


def bytes_per_device(like: Any, names: Any, mesh: Any, table: Table = TRAINING) -> int:
    """What a tree takes on one device when it is placed as in training, or by another table."""
    at = tree_shardings(like, names, mesh, table)
    each = jax.tree.map(lambda s, sharding: math.prod(sharding.shard_shape(s.shape)) * s.dtype.itemsize, like, at)
    return sum(jax.tree.leaves(each))


def cache_bytes(shape: TransformerConfig, rows: int, tokens: int, tensor: int) -> int:
    """Keys and values of so many rows on a device; heads that do not divide over `tensor` are on each."""
    heads = shape.kv_heads // tensor if shape.kv_heads % tensor == 0 else shape.kv_heads
    return rows * tokens * shape.layers * 2 * heads * shape.head_dim * jnp.dtype(shape.dtype).itemsize


def remade(shape: TransformerConfig) -> float:
    """Forward passes that a backward pass makes anew."""
    return {"none": 0.0, "dots": 0.1, "full": 1.0}[shape.remat]


class Decoder:
    """A decoder on a mesh of sizes {"data", "fsdp", "tensor"}: what its parts take on one device."""

    def __init__(self, shape: TransformerConfig, sizes: dict[str, int]):
        self.shape, self.sizes = shape, sizes
        self.mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        self.devices = math.prod(sizes.values())
        self.shards, self.tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
        self.leaves = base_leaves(shape)
        self.item = jnp.dtype(shape.dtype).itemsize
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        matrices = 3 if shape.gated else 2
        self.inner = query + 2 * kv + matrices * shape.ffn  # columns of a layer's products but those of its width
        self.layer = shape.width * (2 * query + 2 * kv + matrices * shape.ffn)  # numbers

    def base(self, dtype: str, table: Table = TRAINING) -> int:
        return bytes_per_device(shapes(self.leaves, dtype), axes(self.leaves), self.mesh, table)

    def prepared(self) -> float:
        """Bytes of the weights as decoding reads them; a gathered embedding that is the output kernel too, laid out for
        that once more."""
        shape, weights = self.shape, self.base(self.shape.dtype, ROLLOUT)
        again = shape.tie_embeddings and self.sizes["fsdp"] > 1
        return weights + (shape.vocab_size * shape.width * self.item / self.tensor if again else 0)

    def adapters(self, lora: LoraConfig) -> int:
        """Bytes of adapters in float32."""
        like = jax.eval_shape(partial(init_adapters, self.shape, lora), key=jax.random.key(0))
        return bytes_per_device(like, adapter_axes(self.shape, like), self.mesh)

    def optimizer(self, weights: float, dtype: str) -> float:
        """Bytes of AdamW's float32 moments beside trained weights of so many bytes, of a float32 copy too."""
        numbers = weights / jnp.dtype(dtype).itemsize
        return numbers * (8 if dtype == "float32" else 12)

    def gathered(self) -> float:
        """A layer's matrices as a program reads them, where they are sharded."""
        return self.layer * self.item / self.tensor if self.sizes["fsdp"] > 1 else 0.0

    def head(self) -> float:
        """The output kernel as products with it want it laid out."""
        return self.shape.vocab_size * self.shape.width * self.item / self.sizes["fsdp"] / self.tensor

    def columns(self, tokens: float, alive: tuple[float, float]) -> float:
        """Bytes of one layer's arrays of so many positions on a device."""
        return tokens * self.item * (alive[0] * self.shape.width + alive[1] * self.inner / self.tensor / 3)

    def forward(self, tokens: float) -> float:
        return self.gathered() + self.columns(tokens, FORWARD)

    def backward(self, tokens: float, roles: int = 1) -> float:
        """Of one layer, beside what the forward passes of so many roles left: inputs of layers that are made anew."""
        layers = roles * self.shape.layers
        if self.shape.remat != "full":
            return layers * self.columns(tokens, BACKWARD)
        inputs = layers * tokens * self.shape.width * self.item
        return inputs + self.gathered() + self.columns(tokens, BACKWARD)

    def gathering(self) -> float:
        """Bytes that leave a device when every weight is gathered once."""
        fsdp = self.sizes["fsdp"]
        return count(self.leaves) * self.item / self.tensor * (fsdp - 1) / fsdp

    def summing(self, tokens: float, times: float) -> float:
        """Bytes that leave a device in sums over `tensor` of a layer's output, `times` in each layer."""
        share = 2 * (self.tensor - 1) / self.tensor
        return times * self.shape.layers * tokens * self.shape.width * self.item * share

    def reducing(self) -> float:
        """Bytes that leave a device when a float32 gradient is summed over `fsdp`, and over `data` once sharded."""
        fsdp, data = self.sizes["fsdp"], self.sizes["data"]
        whole = 4 * count(self.leaves) / self.tensor
        return whole * (fsdp - 1) / fsdp + 2 * whole / fsdp * (data - 1) / data


def training(
    shape: TransformerConfig,
    sizes: dict[str, int],
    *,
    rows: int,
    tokens: int,
    accumulation: int,
    lora: LoraConfig | None,
) -> Footprint:
    """A step of supervised training: all weights (kept in `shape.param_dtype`), or adapters."""
    on = Decoder(shape, sizes)
    piece = rows / accumulation / on.shards * tokens  # positions of a device at once
    forward = rows * tokens * shape.forward_flops(tokens)
    weights = on.base(shape.param_dtype)
    if lora is None:
        own = weights / jnp.dtype(shape.param_dtype).itemsize
        gradients = own * ((4 if accumulation > 1 else 0) + on.item)
        kept = {"weights": float(weights), "optimizer": on.optimizer(weights, shape.param_dtype)}
        sent = accumulation * (2 * on.gathering() + on.reducing() + on.summing(piece, 6))
        passes = 3
    else:
        own = on.adapters(lora)
        gradients = 2.0 * own
        kept = {"weights": weights + own, "optimizer": on.optimizer(own, "float32")}
        sent = accumulation * (2 * on.gathering() + on.summing(piece, 6))
        passes = 2
    program = Needs(
        "step",
        gradients + on.backward(piece) + on.head(),
        (passes + remade(shape)) * forward,
        passes * forward,
        sent=sent,
    )
    return Footprint(kept, [program])


def policy(
    shape: TransformerConfig,
    sizes: dict[str, int],
    *,
    rows: int,
    prompt: int,
    answer: int,
    pieces: int,
    epochs: int,
    lora: LoraConfig | None,
    constrained: bool = False,
) -> Footprint:
    """An iteration of PPO with a critic, a reference and a reward model; `constrained`: a cost model and its critic.

    Args:
      rows: answers of an iteration, one to a prompt, decoded at once.
      pieces: minibatches times accumulation.
      lora: adapters of every role on one base; None: each role has weights of its own.
    """
    on = Decoder(shape, sizes)
    tokens, trained, judges = prompt + answer, 2 + constrained, 1 + constrained
    forward = rows * tokens * shape.forward_flops(tokens)
    piece = rows / pieces / on.shards * tokens
    weights, held = on.base(shape.param_dtype), math.ceil(rows / on.shards)
    if lora is None:
        own = weights / jnp.dtype(shape.param_dtype).itemsize
        kept = {
            "policy and critics": float(trained * weights),
            "reference and judges": float((1 + judges) * weights),
            "optimizer": trained * on.optimizer(weights, shape.param_dtype),
        }
        gradients, passes, reading = trained * own * (4 + on.item), 3, 2 * trained
        reduced = trained * on.reducing()
    else:
        own = on.adapters(lora)
        roles = trained + 1 + judges
        kept = {
            "base": float(weights),
            "adapters": float(roles * own),
            "optimizer": trained * on.optimizer(own, "float32"),
        }
        gradients, passes, reading, reduced = 2.0 * trained * own, 2, 2 * trained, 0.0
    prepared, cache = on.prepared(), cache_bytes(shape, held, tokens, on.tensor)
    together = trained + 1 if lora else 1
    one_pass = pieces * (on.gathering() + on.summing(piece, 2))
    return Footprint(
        kept,
        [
            Needs(
                "rollout",
                prepared + cache + on.columns(held * prompt, FORWARD),
                forward,
                forward,
                read=answer * (on.base(shape.dtype, ROLLOUT) + cache),  # of an embedding only rows
                sent=on.gathering() + on.summing(held * tokens, 2),
            ),
            Needs(
                "scores",
                on.forward(piece * together) + on.head(),
                (trained + 1) * forward,
                (trained + 1) * forward,
                sent=(1 if lora else trained + 1) * pieces * on.gathering()
                + pieces * on.summing(piece, 2 * (trained + 1)),
            ),
            Needs("judges", on.forward(piece), judges * forward, judges * forward, sent=judges * one_pass),
            Needs(
                "update",
                gradients + on.backward(piece, trained) + on.head(),
                epochs * trained * (passes + remade(shape)) * forward,
                epochs * trained * passes * forward,
                sent=epochs * pieces * (reading * on.gathering() + reduced + on.summing(piece, 8 * trained)),
            ),
        ],
    )


def of_stage(config: Any, shape: TransformerConfig, sizes: dict[str, int], lora: LoraConfig | None) -> Footprint:
    """The footprint of an sft or ppo stage of that config, on a mesh of other sizes than the config's own."""
    if config.kind == "ppo":
        return policy(
            shape,
            sizes,
            rows=config.batch_size,
            prompt=max(config.prompt_buckets),
            answer=config.max_new_tokens,
            pieces=config.minibatches * config.accumulation,
            epochs=config.epochs,
            lora=lora,
            constrained=bool(config.constraint.cost),
        )
    tokens, accumulation = config.sequence_length, config.accumulation
    return training(shape, sizes, rows=config.batch_size, tokens=tokens, accumulation=accumulation, lora=lora)
