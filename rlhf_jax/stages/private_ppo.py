"""Private policy optimization: minibatches are drawn first, their union is rolled out, then each has its noisy steps.

So every step is exactly one Poisson-subsampled Gaussian (Wu et al., arXiv 2310.16960, with the sampling made exact):
who is in a minibatch hangs on coins alone, never on a rollout, and stays as it is. A prompt with all its answers is one
unit; one that is in two minibatches is answered for each.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlhf_jax.data.units import group_units
from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.objectives import adaptive_kl_step
from rlhf_jax.objectives.records import Objective, RecordLosses, microbatches
from rlhf_jax.privacy.gradient import Canaries, PrivateBatch, PrivateStep, private_gradient
from rlhf_jax.rollout import Rollout
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.ppo_roles import Roles
from rlhf_jax.stages.private import Private, Shape, digest, owners_of, place_array
from rlhf_jax.stages.prompts import Prompts
from rlhf_jax.training.constraint import constrained_costs, move
from rlhf_jax.training.experience import Experience, PPOConfig, make_experience
from rlhf_jax.training.ppo import ppo_objective
from rlhf_jax.training.shared import JittedStep
from rlhf_jax.training.state import TrainState, apply_gradient

Array = jax.Array
Metrics = dict[str, Array]


def begin_private(context: Context, prompts: Prompts) -> Private:
    """The stage's units, plan and keys; `batch_size` is how many answers an iteration is expected to have."""
    config = context.config
    owners = owners_of(context, prompts.records, config.data)["owners"].tolist()
    units = group_units(owners, config.privacy.contribution)
    whole = np.asarray([json.dumps(record, sort_keys=True) for record in prompts.records])  # what rewards may read
    contents = digest(prompts.rows["prompts"], prompts.rows["lengths"], prompts.ids, np.asarray(owners), whole)
    shape = Shape(
        iterations=config.iterations,
        units=config.batch_size // (config.minibatches * config.samples),
        accumulation=config.accumulation,
        minibatches=config.minibatches,
        uses=config.epochs,
        answers=config.samples,
    )
    return Private(context, units, contents, shape)


class Drawn:
    """Each iteration's minibatches as the rows of one rollout.

    Slot i of minibatch k stands at i * minibatches + k, so that a minibatch is spread over all devices.
    """

    def __init__(self, context: Context, private: Private, mesh: Mesh):
        self._private, self._mesh, self._count = private, mesh, context.config.minibatches

    def rows(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts (n,), -1 for padding, and the minibatch (n,) each is drawn for: a prompt's draws differ by it."""
        drawn = [self._private.draw(k)[0] for k in self._numbers(iteration)]
        by_unit = [rows.reshape(self._private.physical_batch, -1) for rows in drawn]
        when = [np.full_like(rows, k) for k, rows in zip(self._numbers(iteration), by_unit, strict=True)]
        return np.stack(by_unit, 1).reshape(-1), np.stack(when, 1).reshape(-1)

    def present(self, iteration: int) -> Array:
        """(units * minibatches,) bool on the mesh."""
        each = [self._private.draw(k)[1] for k in self._numbers(iteration)]
        return place_array(np.stack(each, 1).reshape(-1), self._mesh)

    def real(self, iteration: int) -> Array:
        """(units * minibatches * contribution,) bool on the mesh: rows that are no padding."""
        return place_array(self.rows(iteration)[0] >= 0, self._mesh)

    def canaries(self, iteration: int) -> Array | None:
        """(units * minibatches * contribution,) int32 on the mesh, where the stage runs to be audited."""
        if self._private.canaries is None:
            return None
        each = [self._private.drawn_canaries(k) for k in self._numbers(iteration)]
        by_unit = [rows.reshape(self._private.physical_batch, -1) for rows in each]
        return place_array(np.stack(by_unit, 1).reshape(-1), self._mesh)

    def keys(self, iteration: int) -> list[Array]:
        """The noise keys of all steps of an iteration, minibatch by minibatch, use by use."""
        steps = len(self._private.keys) // (self._private.iterations)
        return self._private.keys[iteration * steps : (iteration + 1) * steps]

    def _numbers(self, iteration: int) -> range:
        return range(iteration * self._count, (iteration + 1) * self._count)


def private_step(context: Context, private: Private, roles: Roles, positions: int) -> PrivateStep:
    """The numbers of a noisy step on policy and critics; KL, score and cost are what may be released beside it.

    `positions`: of a prompt with its answer.
    """
    fields = context.config.privacy
    bounds = {"policy": fields.clip_norm, "value": fields.critic_clip_norm}
    if roles.settings.constraint:
        bounds["cost_value"] = fields.critic_clip_norm
    clip_norm = bounds if fields.critic_clip_norm else fields.clip_norm
    figures = [("objective/kl", fields.kl_bound), ("objective/scores", fields.score_bound)]
    if roles.settings.constraint:
        figures.append(("safety/cost", fields.cost_bound))
    return private.step(clip_norm, roles.trainable, roles.policy.spec.config, positions, figures)


def _of_real_rows(objective: Objective) -> Objective:
    """The objective on {"rows", "real"}: what fills the places of a unit that has fewer rows counts nothing."""

    def counted(trainable: Any, frozen: Any, batch: dict[str, Any]) -> RecordLosses:
        out, real = objective(trainable, frozen, batch["rows"]), batch["real"]
        return RecordLosses(jnp.where(real, out.losses, 0.0), jnp.where(real, out.weights, 0.0), out.metrics)

    return counted


def make_private_update(
    config: PPOConfig,
    policy: RoleSpec,
    value: RoleSpec | None,
    step: PrivateStep,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    canaries: Canaries | None = None,
    cost_value: RoleSpec | None = None,
) -> JittedStep:
    """The jitted `(state, frozen, experience, scores, present, keys, real, canary, costs) -> (state, metrics)`: one
    rollout's steps.

    Minibatches come one after the other, each with all its uses. Metrics are what was released, means over the steps;
    an adaptive coefficient follows the released KL, and lambda the released cost. The state is donated.

    Args of the update:
      experience: rows of `Drawn.rows`, each `answers` times; scores, costs: (B,) as the sources gave them, to be
        released.
      present: of `Drawn.present`; keys: (minibatches * epochs,) of `Drawn.keys`; canary: of `Drawn.canaries`.
    """
    objective = ppo_objective(config, policy, value, cost_value)
    gradient = private_gradient(_of_real_rows(objective), step, canaries)

    def update(
        state: TrainState,
        frozen: Any,
        experience: Experience,
        scores: Array,
        present: Array,
        keys: Array,
        real: Array,
        canary: Array | None = None,
        costs: Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        constants = {**frozen, "kl_coef": state.controllers.kl_coef}
        units = len(present)
        kl = jnp.sum(experience.logprobs - experience.ref_logprobs, axis=-1)
        real = jnp.repeat(real, len(scores) // len(real))
        counted = real.reshape(units, -1)
        figures = {"objective/kl": kl, "objective/scores": scores}
        if config.constraint and costs is not None:
            figures["safety/cost"] = constrained_costs(config.constraint, costs, config.samples)
        figures = {name: x.reshape(units, -1).mean(-1, where=counted) for name, x in figures.items()}

        def split(x: Array) -> Array:  # (units * rows, ...) -> (minibatches, units / minibatches * rows, ...)
            parts = microbatches(x.reshape(units, -1, *x.shape[1:]), config.minibatches)
            return parts.reshape(config.minibatches, -1, *x.shape[1:])

        def one(state: TrainState, inputs: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
            rows, here, own, keys = inputs
            rows = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), rows)

            def use(state: TrainState, key: Array) -> tuple[TrainState, Metrics]:
                grads, metrics = gradient(state.params, constants, PrivateBatch(rows, here, key, own))
                state, norms = apply_gradient(state, grads, optimizer)
                return state, metrics | norms

            return jax.lax.scan(use, state, keys)

        rows: Any = {"rows": experience, "real": real}
        if canary is not None:
            rows = {"rows": rows, "canary": jnp.repeat(canary, len(scores) // len(canary))}
        batches = jax.tree.map(split, (rows, present, figures))
        state, stacked = jax.lax.scan(one, state, (*batches, keys.reshape(config.minibatches, config.epochs)))
        metrics = {
            name: x.reshape(-1, x.shape[-1]) if name.startswith("audit/") else x.mean() for name, x in stacked.items()
        }
        metrics["objective/kl_coef"] = constants["kl_coef"]
        if config.kl_controller == "adaptive":
            answers = round(config.minibatches * step.expected_batch * config.samples)
            moved = adaptive_kl_step(
                constants["kl_coef"], metrics["objective/kl"], config.kl_target, config.kl_horizon, answers
            )
            state = state.replace(controllers=state.controllers.replace(kl_coef=moved))
        if config.constraint:
            lagrangian = state.controllers.lagrangian
            metrics["safety/lambda"] = lagrangian.multiplier
            metrics["safety/violation"] = metrics["safety/cost"] - config.constraint.bound
            lagrangian = move(config.constraint, lagrangian, metrics["safety/violation"])
            state = state.replace(controllers=state.controllers.replace(lagrangian=lagrangian))
        return state, metrics

    return JittedStep(update, None if shardings is None else (shardings, None))


@jax.jit
def _scores_of_rows(scores: Array, real: Array) -> Array:
    """Scores (B,), 0 of padding; `real`: of `Drawn.real`."""
    return jnp.where(jnp.repeat(real, len(scores) // len(real)), scores, 0.0)


def make_private_iteration(
    context: Context,
    roles: Roles,
    roll_out: Callable[..., tuple[Rollout, list[Any]]],
    private: Private,
    drawn: Drawn,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    positions: int,
):
    """The function (state, iteration) -> (state, metrics): the union of the minibatches rolled out, scored and learned.

    Nothing raw leaves it: neither metrics nor guards read the rollout.
    """
    settings, policy = roles.settings, roles.policy.spec
    value, cost_value = roles.critic_specs
    step = private_step(context, private, roles, positions)
    update = make_private_update(settings, policy, value, step, optimizer, shardings, private.canaries, cost_value)
    parts = settings.minibatches * settings.accumulation

    def advance(state: Any, iteration: int) -> tuple[Any, Metrics]:
        acting = roles.acting(state.params)
        rollout, pending = roll_out(acting["policy"], iteration)
        read = roles.score(acting, rollout, parts)
        scores, _, costs = roles.finish(pending)
        real = drawn.real(iteration)
        scores = _scores_of_rows(scores, real)  # a padding row was judged as some record
        costs = None if costs is None else _scores_of_rows(costs, real)
        experience, _, _ = make_experience(settings, rollout, read, scores, state.controllers, None, costs)
        keys, present = jnp.stack(drawn.keys(iteration)), drawn.present(iteration)
        canaries = drawn.canaries(iteration)
        return update(state, roles.frozen, experience, scores, present, keys, real, canaries, costs)

    return advance
