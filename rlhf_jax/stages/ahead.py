"""A stage's own programs on roles without arrays, to be compiled ahead of time for devices that are not here.

They are the jitted functions that the stage's `run` calls, lowered for batches of the config's shape.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.config import is_function, is_private, score_sources
from rlhf_jax.data.poisson import recommended_batch
from rlhf_jax.distributed.sharding import ROLLOUT, batch_sharding, replicated, shapes_at
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import Weights, scaled_adapters, split, training_passes, weight_axes, without_heads
from rlhf_jax.objectives.records import Objective
from rlhf_jax.privacy.clipping import choose_backend
from rlhf_jax.privacy.gradient import PrivateBatch, PrivateStep, private_gradient
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages.abstract import Abstract, made_of
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.cost import cost_objective
from rlhf_jax.stages.footprint import Decoder, cache_bytes, remade
from rlhf_jax.stages.ppo import ppo_config
from rlhf_jax.stages.ppo_roles import Roles, assemble
from rlhf_jax.stages.preference import preference_config
from rlhf_jax.stages.prompts import make_sampler
from rlhf_jax.stages.reward import reward_objective
from rlhf_jax.stages.train import prepare
from rlhf_jax.training.artifacts import Role, continue_role
from rlhf_jax.training.experience import init_controllers, make_experience
from rlhf_jax.training.gradient import GradientFunction, plain_gradient
from rlhf_jax.training.language_model import sft_objective
from rlhf_jax.training.ppo import (
    make_single_update,
    make_update,
    score_logprobs,
    score_rewards,
    score_shared,
    score_together,
    score_values,
)
from rlhf_jax.training.preference import preference_gradient
from rlhf_jax.training.state import TrainState, init_state, make_optimizer, state_shardings

STEPS = 1000  # of the schedule, whose shape no program's size depends on
ANSWERING = ("best_of_n", "annotate", "overoptimization")  # kinds that decode and train nothing
SEGMENTS = 8  # records that a packed row is taken to hold
UNITS = 1_000_000  # of a private stage's data, for the room that its batches leave
Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a stage.

    Attributes:
      name: what a stage calls it for.
      lower: () -> what is compiled.
      arguments: what it is given.
      flops: analytic, of all devices together, what the backward pass computes anew counted.
      useful: those without it.
      read: bytes of memory that a device reads one step after the other (decoding), which bounds its time; else 0.
      cache: bytes of keys and values on a device, part of its temporary memory.
      calls: in one iteration of the stage.
    """

    name: str
    lower: Callable[[], Any]
    arguments: Tree
    flops: float
    useful: float
    read: float = 0.0
    cache: float = 0.0
    calls: int = 1


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a stage keeps on the devices while it trains, {what: a tree}, and its programs."""

    kept: dict[str, Tree]
    programs: list[Program]


def bytes_on_device(tree: Tree) -> int:
    """What shapes with their shardings take on one device, each object counted once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


class _Batches:
    """Shapes of batches on a mesh."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.shards = mesh, mesh.shape["data"] * mesh.shape["fsdp"]

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, like: Tree) -> Tree:
        """A tree of which every device has a copy."""
        at = replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like)

    def of(self, like: Tree, rows: int) -> Tree:
        """A traced tree: its leaves of `rows` rows as a batch, the others whole."""
        batch, whole = batch_sharding(self.mesh), replicated(self.mesh)

        def place(x: Any) -> jax.ShapeDtypeStruct:
            at = batch if x.ndim and x.shape[0] == rows else whole
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

        return jax.tree.map(place, like)

    @property
    def key(self) -> Any:
        return self.whole(jax.eval_shape(lambda: jax.random.key(0)))


def programs_of(context: Context, abstract: Abstract, mesh: Mesh) -> Programs | None:
    """The programs of a stage of a kind that trains or decodes; None of others."""
    kind, batches = context.config.kind, _Batches(mesh)
    if kind == "ppo":
        roles = _abstract_roles(context, ppo_config(context.config), abstract, batches)  # keys are made on this CPU
        make = partial(_policy, context, roles, batches)
    elif kind in STEPS_OF:
        role, reference = abstract.start(context.name), context.config.get("reference", "")
        other = abstract.load(reference) if reference not in ("", context.config.init) else role
        make = partial(_trained, context, role, other, batches)
    elif kind in ANSWERING:
        role = abstract.load(context.config.get("subject") or context.config.policy)
        make = partial(_answers, context, role, batches)
    else:
        return None
    with jax.set_mesh(mesh):
        made = make()
    return Programs(made.kept, [dataclasses.replace(p, lower=partial(_on, mesh, p.lower)) for p in made.programs])


def _on(mesh: Mesh, lower: Callable[[], Any]) -> Any:
    with jax.set_mesh(mesh):
        return lower()


# --- stages of one step ----------------------------------------------------------------------------------------------


def _answers_columns(batches: _Batches, rows: int, width: int, members: int = 1) -> dict[str, Any]:
    """Columns of pairs of answers, as `scorer.place_answers` puts them."""
    wide = (rows, members) if members > 1 else (rows,)
    return {
        "tokens": batches.rows(*wide, 2, width),
        "lengths": batches.rows(*wide, 2),
        "weight": batches.rows(*wide, dtype=jnp.float32),
    }


def _sft(context: Context, role: Role, batches: _Batches, rows: int) -> tuple[Objective, Any, int, bool]:
    config, width = context.config, context.config.sequence_length
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: batches.rows(rows, width) for name in names}
    batch["loss_mask"] = batches.rows(rows, width, dtype=jnp.float32)
    packed = config.packing and not is_private(config)
    return sft_objective(role.spec, SEGMENTS if packed else 1), batch, width, True


def _reward(context: Context, role: Role, batches: _Batches, rows: int) -> tuple[Objective, Any, int, bool]:
    width = context.config.sequence_length
    batch = _answers_columns(batches, rows, width, role.spec.members)
    return reward_objective(role.spec), batch, 2 * width * role.spec.members, False


def _cost(context: Context, role: Role, batches: _Batches, rows: int) -> tuple[Objective, Any, int, bool]:
    config, width, members = context.config, context.config.sequence_length, role.spec.members
    wide = (rows, members) if members > 1 else (rows,)
    batch = _answers_columns(batches, rows, width, members) | {
        "first": batches.rows(*wide),
        "unsafe": batches.rows(*wide, 2, dtype=jnp.bool_),
        "labelled": batches.rows(*wide, dtype=jnp.bool_),
    }
    objective = cost_objective(role.spec, loss_on=config.loss_on, regularization=config.regularization)
    return objective, batch, 2 * width * members, False


def _preference(context: Context, role: Role, batches: _Batches, rows: int) -> tuple[Any, Any, int, bool]:
    width = context.config.sequence_length
    batch = {
        "tokens": batches.rows(rows, 2, width),
        "answers": batches.rows(rows, 2, width),
        "lengths": batches.rows(rows, 2),
        "prompt_lengths": batches.rows(rows),
        "weight": batches.rows(rows, dtype=jnp.float32),
    }
    if context.config.precompute_reference:
        batch["reference"] = batches.rows(rows, 2, dtype=jnp.float32)
    return None, batch, 2 * width, True


# Kind -> (the objective, its batch, positions of a row, whether it reads logits) of so many rows.
STEPS_OF: dict[str, Callable[..., tuple[Any, Any, int, bool]]] = {
    "sft": _sft,
    "reward": _reward,
    "cost": _cost,
    "preference": _preference,
}


def _private_gradient(
    context: Context, role: Role, objective: Objective, positions: int
) -> tuple[GradientFunction, int]:
    """The private gradient of a stage, as `Private.gradient` makes it, and the rows its batches have room for."""
    config, privacy = context.config, context.config.privacy
    micro = config.batch_size // config.accumulation
    units = privacy.physical_batch or recommended_batch(UNITS, config.batch_size / UNITS, micro)
    units = -(-units // micro) * micro
    trainable, _ = split(role.spec, role.weights)
    step = PrivateStep(
        clip_norm=privacy.clip_norm,
        noise_multiplier=1.0,
        expected_batch=config.batch_size,
        backend=privacy.backend or choose_backend(trainable, role.spec.config, privacy.contribution * positions),
        accumulation=units // micro,
        units_rows=privacy.contribution,
        released=(("loss/train", privacy.loss_bound),) if privacy.released_share else (),
        released_share=privacy.released_share,
    )
    return private_gradient(objective, step), units


def _trained(context: Context, role: Role, reference: Role, batches: _Batches) -> Programs:
    """The step of a stage that trains one role on records; `reference` is a preference stage's."""
    config = context.config
    columns = STEPS_OF[config.kind]
    objective, batch, positions, logits = columns(context, role, batches, config.batch_size)
    frozen_reference: dict[str, Any] = {}
    rows = config.batch_size
    if config.kind == "preference":
        settings = preference_config(config)
        reads = settings.has_reference and not config.precompute_reference
        gradient = preference_gradient(
            settings, role.spec, reference.spec if reads else None, accumulation=config.accumulation
        )
        frozen_reference = {
            "reference": reference.weights if reads else {},
            "coefficients": batches.whole(settings.coefficients),
        }
    elif is_private(config):
        gradient, units = _private_gradient(context, role, objective, positions)
        rows = units * config.privacy.contribution
        _, batch, _, _ = columns(context, role, batches, rows)
        batch = PrivateBatch(batch, batches.rows(units, dtype=jnp.bool_), batches.key)
    else:
        gradient = plain_gradient(objective, config.accumulation)
    state, frozen, step = prepare(context, role, gradient, STEPS, batches.mesh)
    given = {"policy": frozen, **frozen_reference} if frozen_reference else frozen
    passes, shape = training_passes(role.spec), role.spec.config
    forward = rows * positions * shape.forward_flops(config.sequence_length, logits)
    program = Program(
        "step",
        partial(step.lower, state, given, batch),
        (state, given, batch),
        flops=(passes + remade(shape)) * forward,
        useful=passes * forward,
    )
    kept = {"weights": (state.params, frozen), "optimizer": state.opt_state}
    if frozen_reference:
        kept["reference"] = frozen_reference["reference"]
    return Programs(kept, [program])


# --- decoding --------------------------------------------------------------------------------------------------------


def _prompt_width(context: Context, shape: TransformerConfig) -> int:
    """The widest prompts: those of the largest bucket, else what the context leaves for them."""
    return max(context.config.prompt_buckets, default=shape.context - context.config.max_new_tokens)


def _rollout(context: Context, role: Role, weights: Weights, batches: _Batches, prompts: int, samples: int) -> Program:
    """The decoding of so many prompts, by the stage's own sampler."""
    config, shape, mesh = context.config, role.spec.config, batches.mesh
    width = _prompt_width(context, shape)
    decode = make_sampler(context, role, mesh)
    batch = {
        "prompts": batches.rows(prompts, width),
        "lengths": batches.rows(prompts),
        "row_ids": batches.rows(prompts),
    }
    adapters = None
    if role.spec.lora is not None:
        like = jax.eval_shape(lambda w: scaled_adapters(role.spec, w), weights)
        adapters = shapes_at(like, jax.tree.map(lambda leaf: leaf.sharding, weights["adapters"]))
    arguments = weights["base"], batch, batches.key, adapters
    program = jax.jit(lambda base, batch, key, adapters: decode(base, batch, key, samples, adapters))
    tokens = width + config.max_new_tokens
    at_once = min(config.decode_rows or prompts * samples, prompts * samples)
    cache = cache_bytes(shape, math.ceil(at_once / batches.shards), tokens, mesh.shape["tensor"])
    rounds = prompts * samples / at_once
    flops = prompts * samples * tokens * shape.forward_flops(tokens)
    read = rounds * config.max_new_tokens * (Decoder(shape, dict(mesh.shape)).base(shape.dtype, ROLLOUT) + cache)
    return Program("rollout", partial(program.lower, *arguments), arguments, flops, flops, read=read, cache=cache)


def _answers(context: Context, role: Role, batches: _Batches) -> Programs:
    """The decoding of a stage that only answers prompts."""
    config = context.config
    weights = {"base": role.weights["base"], **({"adapters": role.weights["adapters"]} if role.spec.lora else {})}
    samples = config.get("samples", 1) if config.kind != "overoptimization" else 1
    prompts = config.batch_size // samples
    return Programs({"weights": weights}, [_rollout(context, role, weights, batches, prompts, samples)])


# --- policy optimization ---------------------------------------------------------------------------------------------


def _abstract_roles(context: Context, settings: Any, abstract: Abstract, batches: _Batches) -> Roles:
    config, start = context.config, abstract.load(context.config.init)

    def continued(role: Role, key: jax.Array) -> Role:
        return made_of(partial(continue_role, lora=context.lora(), compute=config.compute, key=key), role, batches.mesh)

    def head(*given: Any, key: jax.Array) -> Any:
        return batches.whole(jax.eval_shape(partial(init_head, *given), key=key))

    def judge(sources: Sequence[str]) -> Any:
        roles = {source: abstract.load(source) for source in sources if not is_function(source)}
        return SimpleNamespace(roles=roles, foreign=dict.fromkeys(roles, False), posteriors={})

    judges = [judge(score_sources(config))]
    if settings.constraint:
        judges.append(judge([config.constraint.cost]))
    policy = continued(start, context.key("adapters"))
    return assemble(context, settings, start, policy, judges, continued, head)


def _policy(context: Context, roles: Roles, batches: _Batches) -> Programs:
    """Rollout, scores and update of a ppo stage."""
    config, mesh, settings = context.config, batches.mesh, roles.settings
    shape = roles.policy.spec.config
    optimizer = make_optimizer(config.optimizer, STEPS, param_dtype=shape.param_dtype)
    names = {name: weight_axes(role.spec, roles.trainable[name]) for name, role in roles.trained().items()}
    controllers = jax.eval_shape(lambda: init_controllers(settings))
    shardings = state_shardings(roles.trainable, names, optimizer, mesh, controllers)
    state = init_state(roles.trainable, names, optimizer, mesh, controllers, config.optimizer.learning_rate)
    acting = roles.acting(state.params)
    prompts = config.batch_size // (config.samples * config.rollout_parts)
    rollout = _rollout(context, roles.policy, without_heads(acting["policy"]), batches, prompts, config.samples)
    rollout = dataclasses.replace(rollout, calls=config.rollout_parts)
    answers = _answers_of(context, roles, batches)
    parts = settings.minibatches * settings.accumulation
    tokens = config.batch_size * (_prompt_width(context, shape) + config.max_new_tokens)
    forward = tokens * shape.forward_flops(tokens // config.batch_size)
    programs = [rollout]
    for name, lower, given, passes in _scores(roles, acting, answers, parts, bool(config.stop_strings)):
        programs.append(Program(name, lower, given, passes * forward, passes * forward))
    lower, given = _update(settings, roles, state, answers, optimizer, shardings, batches)
    passes = settings.epochs * sum(training_passes(role.spec) for role in roles.trained().values())
    again = settings.epochs * len(roles.trained()) * remade(shape)
    programs.append(Program("update", lower, given, (passes + again) * forward, passes * forward))
    kept = {
        "policy": acting["policy"],
        **{name: weights for name, weights in acting.items() if name != "policy"},
        "reference": roles.reference,
        **{f"{what} model": [role.weights for role in judge.roles.values()] for what, judge in roles.judges().items()},
        "optimizer": state.opt_state,
    }
    return Programs(kept, programs)


def _answers_of(context: Context, roles: Roles, batches: _Batches) -> Rollout:
    """A whole rollout's shapes."""
    config, shape = context.config, roles.policy.spec.config
    rows, width, new = config.batch_size, _prompt_width(context, shape), config.max_new_tokens
    return Rollout(
        prompts=batches.rows(rows, width),
        prompt_lengths=batches.rows(rows),
        tokens=batches.rows(rows, new),
        lengths=batches.rows(rows),
        ended=batches.rows(rows, dtype=jnp.bool_),
        logprobs=batches.rows(rows, new, dtype=jnp.float32),
        sampling=Sampling(new, config.temperature, stop_ids=roles.policy.tokenizer.stop_ids),
        dead=batches.rows(rows, dtype=jnp.float32),
    )


def _scores(
    roles: Roles, acting: dict[str, Weights], rollout: Rollout, parts: int, stop_strings: bool
) -> Iterator[tuple[str, Any, Tree, int]]:
    """(name, lowering, arguments, forward passes) of what reads a rollout, as `Roles.score` and the judges do."""
    spec = roles.policy.spec
    if roles.together:
        adapters = {name: acting[name]["adapters"] for name in acting} | {"reference": roles.reference["adapters"]}
        cost_head = acting["cost_value"]["head"] if roles.cost_value else None
        given = (roles.policy.weights["base"], adapters, acting["value"]["head"], rollout)
        lower = partial(score_together.lower, spec, *given, parts, cost_head)
        yield "scores", lower, (*given, cost_head), len(adapters)
    else:
        policy = (acting["policy"], rollout)
        if roles.settings.shares_critic:
            yield "scores of the policy", partial(score_shared.lower, spec, *policy, parts), policy, 1
        reference = (roles.reference, rollout)
        yield "log-probabilities", partial(score_logprobs.lower, spec, *reference, parts), reference, 2
        for name, role in list(roles.trained().items())[1:]:
            critic = (acting[name], rollout)
            yield f"values ({name})", partial(score_values.lower, role.spec, *critic, parts), critic, 1
    for what, judge in roles.judges().items():
        for role in judge.roles.values():
            judged = (role.weights, rollout)
            lower = partial(score_rewards.lower, role.spec, *judged, parts, stop_strings)
            yield f"{what}s", lower, judged, role.spec.members


def _update(
    settings: Any,
    roles: Roles,
    state: TrainState,
    rollout: Rollout,
    optimizer: Any,
    shardings: TrainState,
    batches: _Batches,
) -> tuple[Any, Tree]:
    """(lowering, arguments) of the update of a scored rollout."""
    policy, rows, new = roles.policy.spec, rollout.tokens.shape[0], rollout.tokens.shape[1]
    value, cost_value = roles.critic_specs
    column, scores = batches.rows(rows, new, dtype=jnp.float32), batches.rows(rows, dtype=jnp.float32)
    costs = scores if settings.constraint else None
    if settings.single:
        update = make_single_update(settings, policy, value, optimizer, shardings, 1, cost_value)
        given: tuple[Any, ...] = (state, roles.frozen, rollout, column, scores, {}, None, costs)
        return partial(update.lower, *given), given
    update = make_update(settings, policy, value, optimizer, shardings, 1, cost_value)
    read = RoleScores(column, column, column, column, column if settings.constraint else None)
    experience, _, _ = jax.eval_shape(
        partial(make_experience, settings), rollout, read, scores, state.controllers, None, costs
    )
    experience = batches.of(experience, rows)
    given = (state, roles.frozen, experience, batches.whole(jax.ShapeDtypeStruct((), jnp.float32)), batches.key)
    return partial(update.lower, *given), given
