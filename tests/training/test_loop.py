"""The loop never asks for more than the device can soon be done with."""

import jax
import jax.numpy as jnp

from rlhf_jax.training import loop
from rlhf_jax.training.state import TrainState


def test_the_host_is_a_few_iterations_ahead_of_the_device_at_most(tmp_path):
    """Twelve slow iterations that are logged at the end alone: so a signal waits for two or three, not for twelve."""
    asked, ahead = [], []

    @jax.jit
    def step(state):
        x = jax.lax.fori_loop(0, 400, lambda _, x: jnp.tanh(x @ x), state.params["x"])
        return state.replace(step=state.step + 1, params={"x": x}), {"loss/train": x[0, 0]}

    def advance(state, iteration):
        ahead.append(sum(not metrics["loss/train"].is_ready() for metrics in asked))
        state, metrics = step(state)
        asked.append(metrics)
        return state, metrics

    loop.run_loop(
        name="slow",
        folder=tmp_path,
        identity="identity",
        schedule=loop.Schedule(12, 100, 100, 100),
        state=TrainState(jnp.int32(0), {"x": jnp.eye(128)}, (), None),
        advance=advance,
        evaluate=None,
        metric="",
        higher_is_better=True,
        shown=(),
        learning_rate=lambda step: 1.0,
        tokens_each=1,
        flops_each=1.0,
        peak_flops=1.0,
        tensorboard=False,
    )
    assert 1 <= max(ahead) <= loop.IN_FLIGHT  # it runs ahead, so that the device never waits
