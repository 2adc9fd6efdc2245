"""Truths of draws, data order and schedules, and of what the reference starts from."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
from harness import MODEL, STOP_IDS
from truths import experience_of, same, synthetic

from rlhf_jax.distributed.sharding import batch_sharding
from rlhf_jax.models import LoraConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout import sampling as sampling_module
from rlhf_jax.stages import ppo as stage
from rlhf_jax.stages import ppo_roles
from rlhf_jax.stages import train as train_module
from rlhf_jax.training import guards
from rlhf_jax.training.artifacts import Role

# --- draws and data ---------------------------------------------------------------------------------------------------


def _requests(prompts: int) -> tuple[list[Any], list[np.ndarray]]:
    """(key, row ids) that three rollouts of 8 answers ask the sampler for."""
    asked = []

    def sample(policy: Any, batch: dict[str, jax.Array], key: jax.Array, samples: int) -> Any:
        asked.append((tuple(np.asarray(jax.random.key_data(key)).tolist()), np.asarray(batch["row_ids"])))
        return SimpleNamespace()

    context, roles = harness.tiny_context(), harness.tiny_roles()
    draw = stage._in_order(context, prompts)
    roll_out = stage._rollouts(context, roles, harness.tiny_prompts(prompts), sample, draw, harness.mesh())
    for iteration in range(context.config.iterations):
        roll_out({}, iteration)
    return [list(column) for column in zip(*asked, strict=True)]  # type: ignore[return-value]


def rollouts_have_keys_of_their_own() -> None:
    keys, _ = _requests(8)
    assert len(set(keys)) == len(keys), "two rollouts have one key"


def prompt_that_comes_twice_is_answered_anew() -> None:
    _, row_ids = _requests(3)
    assert all(len(set(ids)) == len(ids) for ids in row_ids), "a prompt that comes twice in a rollout has one answer"


def rows_are_drawn_apart() -> None:
    """Eight times one prompt, by the sampler of the stage."""
    with jax.set_mesh(harness.mesh()):
        rows = {"prompts": np.full((8, 5), 3, np.int32), "lengths": np.full(8, 5, np.int32)}
        batch = jax.device_put({**rows, "row_ids": np.arange(8, dtype=np.int32)}, batch_sharding(harness.mesh()))
        roles = harness.tiny_roles()
        sample = stage._sampler(harness.tiny_context(), roles, harness.mesh())
        rollout = sample(roles.policy.weights, batch, jax.random.key(0))
    assert len(np.unique(np.asarray(rollout.tokens), axis=0)) > 1, "rows of one prompt have one answer"


def tokens_come_as_often_as_their_logprobs_say() -> None:
    logits, rows = jnp.asarray([0.5, 0.1, -0.2, 0.3, -0.6]), 4096
    with jax.disable_jit():
        keys = sampling_module.row_keys(jax.random.key(0), jnp.arange(rows))
        draw = sampling_module.draw(jnp.tile(logits, (rows, 1)), Sampling(), keys, jnp.int32(0))
    tokens, logprobs = (np.asarray(x) for x in draw)
    for token, probability in enumerate(np.asarray(jax.nn.softmax(logits))):
        deviation = np.sqrt(probability * (1 - probability) / rows)
        share = np.mean(tokens == token)
        assert abs(share - probability) < 5 * deviation, f"token {token} comes with {share:.3f}, not {probability:.3f}"
        same(np.exp(logprobs[tokens == token]), probability, "a reported log-probability is another token's")


def epoch_reads_every_record_once() -> None:
    order = stage.DataOrder(24, seed=5)
    batches = [order.batch(step, 8) for step in range(3)]
    assert sorted(np.concatenate(batches)) == list(range(24)), "an epoch does not read every record once"


def order_is_its_seeds() -> None:
    one, other = (stage.DataOrder(24, seed=5).batch(0, 24) for _ in range(2))
    assert (one == other).all(), "one seed has two orders"


def learning_rate_decays_over_steps() -> None:
    """The rate that the loop logs is at its end after the last optimizer step, and not before."""
    given = harness.experiment_with().stages.ppo
    given.optimizer.update(schedule="linear", warmup=0.0, final=0.1, learning_rate=1.0)
    context = SimpleNamespace(config=given, name="ppo", folder=None, identity="", experiment=harness.experiment_with())
    with mock.patch.object(train_module, "run_loop", lambda **given: given["learning_rate"]):
        rate: Any = train_module.train(
            context, None, None, None, iterations=3, steps_each=4, shown=(), tokens_each=1, flops_each=1.0
        )
    assert float(rate(11)) > float(rate(12)) == np.float32(0.1), "the rate ends before the last optimizer step"


# --- the reference -----------------------------------------------------------------------------------------------


def reference_is_where_the_policy_starts() -> None:
    """Under adapters that an earlier stage trained: the watch sees the KL before any update."""
    spec, start = RoleSpec(MODEL, LoraConfig(rank=2)), harness.start_weights()
    policy, value = (init_adapters(MODEL, spec.lora, key=jax.random.key(i)) for i in (5, 6))
    policy = {target: {**leaf, "b": leaf["b"] + 0.3} for target, leaf in policy.items()}
    own = {"base": start["policy"]["base"], "adapters": policy}
    critic = {"base": own["base"], "adapters": value, "head": start["value"]["head"]}
    tokenizer: Any = SimpleNamespace(stop_ids=STOP_IDS)
    judge: Any = SimpleNamespace(roles={})
    roles = ppo_roles.Roles(harness.SETTINGS, Role(spec, own, tokenizer), Role(spec, critic, tokenizer), own, judge)
    assert roles.together
    rollout, _, scores = synthetic()
    read = roles.score(roles.acting(roles.trainable), rollout, 1)
    rollout = rollout.replace(logprobs=read.logprobs)
    _, metrics, _ = experience_of(harness.SETTINGS, rollout, read, scores)
    still = {"val/first_ratio_error": 0.0, "optimizer/gradient_norm": 1.0}
    watch = guards.Watch("ppo", harness.SETTINGS, harness.experiment_with().checks, "float32", 20.0, print)
    watch(1, {**metrics, **still})
