"""What trainable stages share: how many steps, a role's state and step, the loop, the figures of held-out records."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.data.order import DataOrder
from rlhf_jax.evaluation import wilson
from rlhf_jax.models.roles import Weights, split, weight_axes
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.gradient import GradientFunction, member_gradients
from rlhf_jax.training.loop import Schedule, run_loop
from rlhf_jax.training.randomness import order_seed
from rlhf_jax.training.state import (
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    over_members,
    state_shardings,
)
from rlhf_jax.training.throughput import peak_flops

Place = Callable[[np.ndarray, np.ndarray], Any]


def steps_of(config: ConfigDict, records: int) -> int:
    """Steps of `batch_size` records that make `epochs` over all of them, at least one."""
    return max(1, math.ceil(config.epochs * records / config.batch_size))


def ordered(context: Context, count: int, place: Place, members: int = 1) -> Callable[[int], Any]:
    """The function iteration -> its batch of `batch_size` of `count` rows, by the stage's order.

    `place` is the function (row numbers, the epoch each is read in) -> the batch of these rows on the mesh; a padding
    row, number -1, has the weight 0 in it. Numbers are (B,), or (B, members): an ensemble's members have their own
    orders, the first one that of the stage without the others.
    """
    size, names = context.config.batch_size, [context.name, *(f"{context.name}/{i}" for i in range(1, members))]
    orders = [DataOrder(count, order_seed(context.seed, name)) for name in names]

    def batch(iteration: int) -> Any:
        rows = np.stack([order.batch(iteration, size) for order in orders], axis=1)
        return place(rows if members > 1 else rows[:, 0], orders[0].epochs(iteration, size))

    return batch


class Prepared(NamedTuple):
    """A role about to be trained.

    Attributes:
      state: on the mesh; its parameters are a copy of what trains of the role's weights.
      frozen: the other part of the weights, the arrays themselves.
      step: the jitted (state, frozen, batch) -> (state, metrics); donates the state, hands its `frozen` and batch to
        the gradient as they are.
    """

    state: TrainState
    frozen: Weights
    step: Any


def prepare(context: Context, role: Role, gradient: GradientFunction, steps: int, mesh: Mesh) -> Prepared:
    """The state and the step of a role that trains by `gradient`, with the stage's optimizer over `steps` steps."""
    trainable, frozen = split(role.spec, role.weights)
    axes = weight_axes(role.spec, trainable)
    config = context.config.optimizer
    optimizer = make_optimizer(config, steps, param_dtype=role.spec.config.param_dtype)
    if role.spec.members > 1:
        gradient, optimizer = member_gradients(gradient), over_members(optimizer)
    step = make_step(gradient, optimizer, state_shardings(trainable, axes, optimizer, mesh))
    state = init_state(trainable, axes, optimizer, mesh, learning_rate=config.learning_rate)
    return Prepared(state, frozen, step)


def train(
    context: Context,
    state: Any,
    advance: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]],
    evaluate: Callable[[Any, int], dict[str, Any]] | None,
    *,
    iterations: int,
    shown: tuple[str, ...],
    tokens_each: int,
    flops_each: float,
    steps_each: int = 1,
    watch: Callable[[int, dict[str, jax.Array]], str] | None = None,
    anchors: dict[str, str] | None = None,
    account: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs the loop with the stage's schedule, checkpoints and learning rate; `run_loop` says what it returns.

    Args:
      account: of a private stage: (iteration, metrics) -> the metrics with what it has spent.
    """
    config: ConfigDict = context.config

    def accounted(state: Any, iteration: int) -> tuple[Any, dict[str, Any]]:
        state, metrics = advance(state, iteration)
        return state, account(iteration, metrics)  # type: ignore[misc]

    return run_loop(
        name=context.name,
        folder=context.folder,
        identity=context.identity,
        schedule=Schedule(
            iterations,
            max(1, context.experiment.logging.every // steps_each),
            config.evaluation.every,
            config.checkpoint.every,
            steps_each,
        ),
        state=state,
        advance=accounted if account else advance,
        evaluate=evaluate,
        metric=config.evaluation.metric,
        higher_is_better=config.evaluation.higher_is_better,
        shown=(*shown, "privacy/epsilon"),
        learning_rate=make_schedule(config.optimizer, iterations * steps_each),
        tokens_each=tokens_each,
        flops_each=flops_each,
        peak_flops=peak_flops(),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        tensorboard=context.experiment.logging.tensorboard,
        watch=watch,
        anchors=anchors,
    )


def accuracy_figures(noun: str, count: int, summary: dict[str, Any]) -> dict[str, Any]:
    """Loss, and accuracy with its interval, on `count` held-out records called `noun`; `summary` is that of `train`."""
    first, result = summary["first"], summary["result"]
    low, high = wilson(round(result["accuracy/eval"] * count), count)
    return {
        f"{noun}_eval": count,
        "loss/eval": result["loss/eval"],
        "loss/eval_start": first["loss/eval"],
        "accuracy": result["accuracy/eval"],
        "accuracy_low": low,
        "accuracy_high": high,
    }
