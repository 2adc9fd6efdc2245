"""The train state, its optimizer, and where its leaves live on the mesh."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlhf_jax.distributed.sharding import replicated, shapes_at, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.training.gradient import GradientFunction
from rlhf_jax.training.shared import JittedStep

Tree = Any


class TrainState(struct.PyTreeNode):
    """All that training changes. `step` counts optimizer steps."""

    step: Any  # () int32
    params: Tree  # the trainable part of the roles' weights
    opt_state: Tree
    controllers: Tree = ()  # what steers the loss besides: KL coefficient, reward statistics


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate over optimizer steps: linear warm-up, then cosine, linear or constant."""
    shape = _schedule_shape(config, steps)
    return lambda step: config.learning_rate * shape(step)


def _schedule_shape(config: ConfigDict, steps: int) -> optax.Schedule:
    """`make_schedule` over its peak."""
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=config.final),
        "linear": optax.linear_schedule(1.0, config.final, rest),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(1.0 / warmup, 1.0, warmup - 1), after], [warmup])


def decays(params: Tree) -> Tree:
    """True on matrices; norms, biases and scalars are never decayed (stacked norms and biases are (layers, width))."""

    def matrix(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        name = path[-1].key
        return not (name.endswith(("norm", "bias")) or leaf.ndim < 2)

    return jax.tree_util.tree_map_with_path(matrix, params)


def make_optimizer(config: ConfigDict, steps: int, param_dtype: str = "float32") -> optax.GradientTransformation:
    """The optimizer of a stage's `optimizer` sub-config.

    Every one clips by the global norm first, decays decoupled from the gradient (`decays` says what) and follows
    `make_schedule`, whose peak is part of the state (`scale_by_rate`). By `name`:
      adamw: arXiv 1711.05101, by `b1`, `b2`, `eps`; `moment_dtype` keeps the first moment in another dtype;
        `tf_epsilon` places eps as TensorFlow does (`scale_by_tf_adam`).
      adafactor: arXiv 1804.04235 without first moment and without learning rates relative to the parameters, so that
        `learning_rate` means what it means for adamw. A matrix's second moment is kept as one row and one column; its
        decay 1 - t^-0.8 stops at `b2` (arXiv 2106.04560). `b1`, `eps` and `moment_dtype` have no part in it.

    Args:
      steps: optimizer steps of the whole schedule.
      param_dtype: what the parameters are kept in; other than float32, `with_float32_master` is put around it all.

    Raises:
      UserError: an unknown name or moment_dtype.
    """
    name, moment_dtype = config.get("name", "adamw"), config.get("moment_dtype", "")
    if moment_dtype not in ("", "bfloat16"):
        raise UserError(f'optimizer.moment_dtype is "{moment_dtype}": it must be "" (float32) or "bfloat16"')
    descend = scale_by_rate(config.learning_rate, _schedule_shape(config, steps))
    if name == "adamw":
        scale = scale_by_tf_adam if config.get("tf_epsilon") else optax.scale_by_adam
        optimizer = optax.chain(
            scale(config.b1, config.b2, config.eps, mu_dtype=moment_dtype or None),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            descend,
        )
    elif name == "adafactor":
        if moment_dtype:
            raise UserError(
                f'optimizer.moment_dtype is "{moment_dtype}", but adafactor has no first moment: set it to ""'
            )
        optimizer = optax.chain(
            optax.scale_by_factored_rms(decay_rate_fn=_growing_decay(config.b2)),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            descend,
        )
    else:
        raise UserError(f'optimizer.name is "{name}": it must be "adamw" or "adafactor"')
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer if param_dtype == "float32" else with_float32_master(optimizer)


def over_members(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for each member of an ensemble, whose leaves have the members in front: none is clipped by another."""

    def update(grads: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        return jax.vmap(inner.update)(grads, state, params)

    return optax.GradientTransformation(jax.vmap(inner.init), update)


class RateState(NamedTuple):
    """State of `scale_by_rate`."""

    count: Any  # () int32, steps done
    learning_rate: Any  # () float32, the schedule's peak


def scale_by_rate(learning_rate: float, shape: optax.Schedule) -> optax.GradientTransformation:
    """Updates times -learning_rate * shape(steps done).

    The rate is read from the state: it is no constant of the step's program, which stages of other rates share.
    """

    def init(params: Tree) -> RateState:
        return RateState(jnp.zeros((), jnp.int32), jnp.float32(learning_rate))

    def update(updates: Tree, state: RateState, params: Tree = None) -> tuple[Tree, RateState]:
        step = -state.learning_rate * shape(state.count)
        scaled = jax.tree.map(lambda update: step.astype(update.dtype) * update, updates)
        return scaled, RateState(optax.safe_increment(state.count), state.learning_rate)

    return optax.GradientTransformation(init, update)


def scale_by_tf_adam(b1: float, b2: float, eps: float, mu_dtype: Any = None) -> optax.GradientTransformation:
    """Adam as TensorFlow writes it: sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), with m and v not corrected.

    Optax and PyTorch add eps to the corrected root, sqrt(v / (1 - b2^t)); here eps counts 1 / sqrt(1 - b2^t) times as
    much, so the first steps are smaller where gradients are. The 2019 PPO was run with it (eps 1e-5).
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        _, state = adam.update(grads, state, params)
        t = state.count.astype(jnp.float32)
        first, second = 1.0 - b1**t, jnp.sqrt(1.0 - b2**t)
        scaled = jax.tree.map(lambda m, v: second / first * m / (jnp.sqrt(v) + eps), state.mu, state.nu)
        return scaled, state

    return optax.GradientTransformation(adam.init, update)


def _growing_decay(limit: float) -> Any:
    """Adafactor's decay of the second moment at step t = 0, 1, ...: min(1 - (t + 1)^-exponent, limit)."""

    def decay(step: jax.Array, exponent: float) -> jax.Array:
        return jnp.minimum(1.0 - (step + 1.0) ** -exponent, limit)

    return decay


class MasterState(NamedTuple):
    """State of `with_float32_master`."""

    master: Tree  # the parameters in float32; nothing in place of those that are float32 anyway
    inner: Tree  # the inner optimizer's state


def with_float32_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` in float32 on parameters kept in a shorter dtype.

    A bfloat16 parameter has 8 bits: a step of less than 1/256 of it is rounded away, and training stalls. So the state
    keeps the float32 parameters; gradients are cast to float32, `inner` and its moments see nothing else, and the
    update returned is the difference, in float32, that makes `optax.apply_updates` land on the rounded master. It does
    so to the bit unless a step shrinks a parameter more than 2^16-fold; what is then off is put right by the next step.
    """

    def whole(master: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda p, m: p if p.dtype == jnp.float32 else m, params, master)

    def init(params: Tree) -> MasterState:
        wide = optax.tree_utils.tree_cast(params, jnp.float32)
        master = jax.tree.map(lambda p, w: optax.MaskedNode() if p.dtype == jnp.float32 else w, params, wide)
        return MasterState(master, inner.init(wide))

    def update(grads: Tree, state: MasterState, params: Tree = None) -> tuple[Tree, MasterState]:
        before = whole(state.master, params)
        updates, inner_state = inner.update(optax.tree_utils.tree_cast(grads, jnp.float32), state.inner, before)
        after = optax.apply_updates(before, updates)

        def move(p: jax.Array, update: jax.Array, target: jax.Array) -> jax.Array:
            if p.dtype == jnp.float32:
                return update
            bits = jnp.finfo(p.dtype)  # reduce_precision: a cast there and back is one that XLA may leave out
            return jax.lax.reduce_precision(target, bits.nexp, bits.nmant) - p.astype(jnp.float32)

        moves = jax.tree.map(move, params, updates, after)
        kept = jax.tree.map(lambda p, a: optax.MaskedNode() if p.dtype == jnp.float32 else a, params, after)
        return moves, MasterState(kept, inner_state)

    return optax.GradientTransformation(init, update)


def state_shardings(
    params: Tree, axes: Tree, optimizer: optax.GradientTransformation, mesh: Mesh, controllers: Tree = ()
) -> TrainState:
    """The shardings of a `TrainState`: whatever `optimizer` makes of a parameter's axes lives where they do.

    A moment or master copy has its parameter's sharding, a factored moment that of the axes it kept, all else is whole
    on every device. JAX itself says which is which: on a mesh of explicit axes shardings are part of the types, and
    `eval_shape` carries them through `optimizer.init`.
    """
    at = tree_shardings(params, axes, mesh)
    explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def typed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(explicit, sharding.spec))

    with jax.sharding.use_abstract_mesh(explicit):
        opt_state = jax.eval_shape(optimizer.init, jax.tree.map(typed, params, at))

    def placed(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, leaf.sharding.spec if leaf.sharding is not None else PartitionSpec())

    steering = jax.tree.map(lambda _: replicated(mesh), controllers)
    return TrainState(replicated(mesh), at, jax.tree.map(placed, opt_state), steering)


def init_state(
    params: Tree,
    axes: Tree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    controllers: Tree = (),
    learning_rate: float | None = None,
) -> TrainState:
    """A fresh state on the mesh. `params` are copied: the state is donated step by step, its source is not.

    Of `params` that are shapes (`ShapeDtypeStruct`) it is one of shapes, with their places.

    Args:
      learning_rate: that of `make_optimizer`, to be an argument of this program too; None leaves it a constant of it.
    """

    def create(params: Tree, controllers: Tree, rate: jax.Array | None) -> TrainState:
        copied = jax.tree.map(jnp.copy, (params, controllers))
        opt_state = optimizer.init(params)
        if rate is not None:
            held = optax.tree_utils.tree_get(opt_state, "learning_rate")  # one a member of an ensemble
            opt_state = optax.tree_utils.tree_set(opt_state, learning_rate=jnp.broadcast_to(rate, held.shape))
        return TrainState(jnp.zeros((), jnp.int32), copied[0], opt_state, copied[1])

    shardings = state_shardings(params, axes, optimizer, mesh, controllers)
    rate = None if learning_rate is None else np.float32(learning_rate)
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        like = jax.eval_shape(create, params, controllers, rate)
        return shapes_at(like, shardings)
    return jax.jit(create, out_shardings=shardings)(params, controllers, rate)


def apply_gradient(
    state: TrainState, grads: Tree, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; also the norms, in float32, of gradient (before clipping), update and parameters."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        f"optimizer/{name}_norm": optax.tree_utils.tree_norm(optax.tree_utils.tree_cast(tree, jnp.float32))
        for name, tree in (("gradient", grads), ("update", updates), ("parameter", params))
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), norms


def make_step(gradient: GradientFunction, optimizer: optax.GradientTransformation, shardings: TrainState) -> JittedStep:
    """The jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated."""

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradient(state.params, frozen, batch)
        state, norms = apply_gradient(state, grads, optimizer)
        return state, metrics | norms

    return JittedStep(step, (shardings, None))


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
    """16 hexadecimal digits that identify weights, the same on any mesh (integer sums; not cryptographic).

    They are of the values as float32, of names and of shapes, not of dtypes: bfloat16 weights and their float32 copy
    are the same model, whichever of the two a role is loaded in. Rounding weights to bfloat16 changes them.
    """
    names = [jax.tree_util.keystr(path) + str(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    words = bytes(jax.device_get(_fingerprint_words(tree)))
    return hashlib.sha256("".join(names).encode() + words).hexdigest()[:16]
