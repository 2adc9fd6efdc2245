"""The train state, its optimizer, and where its leaves live on the mesh."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.distributed.sharding import replicated, tree_shardings
from rlhf_jax.training.gradient import GradientFunction

Tree = Any


class TrainState(struct.PyTreeNode):
    """All that an optimizer step changes. `step` counts optimizer steps."""

    step: Any  # () int32
    params: Tree  # the trainable part of the roles' weights
    opt_state: Tree


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate over optimizer steps: linear warm-up, then cosine, linear or constant."""
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": optax.linear_schedule(peak, peak * config.final, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), after], [warmup])


def decays(params: Tree) -> Tree:
    """True on matrices; norms, biases and scalars are never decayed (stacked norms are (layers, width))."""

    def matrix(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        name = path[-1].key
        return not (name.endswith("norm") or name == "bias" or leaf.ndim < 2)

    return jax.tree_util.tree_map_with_path(matrix, params)


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, by the fields of a stage's `optimizer` sub-config."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def state_shardings(params: Tree, axes: Tree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shardings of a `TrainState`: optimizer moments live where their parameters do."""
    shapes = jax.eval_shape(lambda p: p, params)
    at = tree_shardings(shapes, axes, mesh)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_at = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, opt_shapes, at, transform_non_params=lambda _: replicated(mesh)
    )
    return TrainState(step=replicated(mesh), params=at, opt_state=opt_at)


def init_state(params: Tree, axes: Tree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A fresh state on the mesh. `params` are copied: the state is donated step by step, its source is not."""

    def create(params: Tree) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

    return jax.jit(create, out_shardings=state_shardings(params, axes, optimizer, mesh))(params)


def apply_gradient(
    state: TrainState, grads: Tree, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; also the norms of gradient (before clipping), update and parameters."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "optimizer/gradient_norm": optax.tree_utils.tree_norm(grads),
        "optimizer/update_norm": optax.tree_utils.tree_norm(updates),
        "optimizer/parameter_norm": optax.tree_utils.tree_norm(params),
    }
    return TrainState(state.step + 1, params, opt_state), norms


def make_step(gradient: GradientFunction, optimizer: optax.GradientTransformation, shardings: TrainState):
    """The jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated."""

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradient(state.params, frozen, batch)
        state, norms = apply_gradient(state, grads, optimizer)
        return state, metrics | norms

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


@jax.jit
def _fingerprint_words(tree: Tree) -> jax.Array:
    words = []
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
        index = jax.lax.iota(jnp.uint32, bits.size)
        for multiplier in (2654435761, 2246822519):
            mixed = bits ^ (index * jnp.uint32(multiplier))
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer
                mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
            words.append(jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32))
    return jnp.stack(words)


def fingerprint(tree: Tree) -> str:
    """16 hexadecimal digits that identify float32 weights, the same on any mesh (integer sums; not cryptographic)."""
    names = [jax.tree_util.keystr(path) + str(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    words = bytes(jax.device_get(_fingerprint_words(tree)))
    return hashlib.sha256("".join(names).encode() + words).hexdigest()[:16]
