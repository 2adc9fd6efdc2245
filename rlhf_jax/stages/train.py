"""What every trainable stage hands to the loop: taken from its config once, here."""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhf_jax.stages.context import Context
from rlhf_jax.training.loop import Schedule, run_loop
from rlhf_jax.training.state import make_schedule
from rlhf_jax.training.throughput import peak_flops


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
) -> tuple[Any, dict[str, Any]]:
    """Runs the loop with the stage's schedule, checkpoints and learning rate; `run_loop` says what it returns."""
    config: ConfigDict = context.config
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
        advance=advance,
        evaluate=evaluate,
        metric=config.evaluation.metric,
        higher_is_better=config.evaluation.higher_is_better,
        shown=shown,
        learning_rate=make_schedule(config.optimizer, iterations * steps_each),
        tokens_each=tokens_each,
        flops_each=flops_each,
        peak_flops=peak_flops(),
        keep=config.checkpoint.keep,
        tensorboard=context.experiment.logging.tensorboard,
        watch=watch,
        anchors=anchors,
    )
