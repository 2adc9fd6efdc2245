"""A tiny policy optimization in this process, put together from the stage's own parts, and the means to spoil it.

What a specimen patches is a function that the host calls, or, with `Patches.retrace`, one inside a compiled program.
"""

import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rlhf_jax.config import experiment
from rlhf_jax.config import stage as configured
from rlhf_jax.data.table import pad_prompts
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages import ppo as stage
from rlhf_jax.stages import ppo_roles
from rlhf_jax.stages.prompts import Prompts
from rlhf_jax.training import experience as experiences
from rlhf_jax.training import guards, loop
from rlhf_jax.training import ppo as updates
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.experience import Controllers, PPOConfig
from rlhf_jax.training.randomness import stage_key
from rlhf_jax.training.state import TrainState, fingerprint
from rlhf_jax.validation import validate

MODEL = TransformerConfig(
    vocab_size=13, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32, tie_embeddings=False
)
SPEC = RoleSpec(MODEL)
STOP_IDS = (8, 12)
COUNT, TEMPERATURE, PARTS = 6, 0.7, 2  # a temperature other than 1, so that one left out shows
SETTINGS = PPOConfig(epochs=1, minibatches=PARTS)
OPTIMIZER = optax.sgd(0.1)
IDS = [[(5 * i + j) % 13 for j in range(1, n + 1)] for i, n in enumerate((5, 2, 3, 1, 4, 5, 2, 3))]


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A known defect.

    Attributes:
      name: what goes wrong, the test's id.
      source: where it was found.
      inject: puts it into our code.
      check: raises where the defect is in, and is silent on our code as it stands.
      sign: regular expression of what it says.
    """

    name: str
    source: str
    inject: Callable[["Patches"], None]
    check: Callable[[], Any]
    sign: str


class Patches:
    """Changes to our code that end with the test."""

    def __init__(self, monkeypatch: Any):
        self.set = monkeypatch.setattr

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        """Puts `wrapper(original)` in the original's place."""
        self.set(owner, name, wrapper(getattr(owner, name)))

    def retrace(self, owner: Any, name: str) -> None:
        """Makes a compiled function read the patched code: a program of its own in its place."""
        inner = getattr(owner, name).__wrapped__

        @functools.wraps(inner)
        def traced(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        static = {"config", "spec", "sampling", "samples", "check_every", "parts", "stop_strings"}
        static &= set(inspect.signature(inner).parameters)
        self.set(owner, name, jax.jit(traced, static_argnames=sorted(static)))


def mesh() -> Any:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def reward(rollout: Any) -> Any:
    """The scores (B,) of a rollout: large tokens are good."""
    tokens, lengths = np.asarray(rollout.tokens), np.asarray(rollout.lengths)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.asarray((tokens * inside).sum(1) / lengths / 6.0 - 1.0, jnp.float32)


def tiny_context(**changes: Any) -> Any:
    """What `stages.ppo` reads of a stage's context."""
    fields = dict(batch_size=8, samples=1, rollout_parts=1, iterations=3, max_new_tokens=COUNT, top_k=0, top_p=1.0)
    fields |= dict(temperature=TEMPERATURE, stop_strings=(), decode_rows=0)
    evaluation = {"secrets": ""}
    config = ConfigDict({**fields, "evaluation": evaluation, **changes})
    return SimpleNamespace(config=config, seed=0, name="ppo", key=lambda purpose: stage_key(0, "ppo", purpose))


def tiny_prompts(count: int = len(IDS)) -> Prompts:
    """The prompts of a stage without its files."""
    prompts = object.__new__(Prompts)
    longest = max(map(len, IDS[:count]))
    prompts.rows, prompts.ids = pad_prompts(IDS[:count], longest), np.arange(100, 100 + count, dtype=np.int32)
    prompts.records = [{"prompt": ids} for ids in IDS[:count]]
    prompts.longest, prompts.widths, prompts.skipped = longest, [longest], 0
    return prompts


@cache
def start_weights() -> dict[str, Any]:
    """Policy and critic before training."""

    def base(seed: int) -> Any:
        params = jax.jit(lambda key: init_base(MODEL, key=key))(jax.random.key(seed))
        return {**params, "embedding": 30 * params["embedding"]}

    return {"policy": {"base": base(0)}, "value": {"base": base(1), "head": init_head(16, 0.3, key=jax.random.key(2))}}


def tiny_roles() -> ppo_roles.Roles:
    """Policy, critic and reference of a full fine-tuning; the judge is `reward`."""
    start, tokenizer = start_weights(), SimpleNamespace(stop_ids=STOP_IDS)
    judge = SimpleNamespace(
        roles={}, begin=lambda rollout, records: rollout, finish=lambda pending: (reward(pending[0]), {})
    )
    roles = [Role(SPEC, dict(start[name]), tokenizer) for name in ("policy", "value")]
    return ppo_roles.Roles(SETTINGS, *roles, reference=dict(start["policy"]), judge=judge)


@cache
def update_program() -> Any:
    """One for all specimens: those inside it are checked on its parts."""
    return updates.make_update(SETTINGS, SPEC, SPEC, OPTIMIZER)


def first_state(roles: ppo_roles.Roles) -> TrainState:
    params = jax.tree.map(jnp.copy, roles.trainable)  # donated
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params), experiences.init_controllers(SETTINGS))


def watched_run() -> None:
    """Two iterations of the stage, under all its guards; a warning of the watch is an error here."""
    program = mock.patch.object(stage, "make_update", lambda *given: update_program())
    with jax.set_mesh(mesh()), program:
        context, roles, prompts = tiny_context(), tiny_roles(), tiny_prompts()
        frozen = {"reference": roles.reference}
        anchors = {name: fingerprint(weights) for name, weights in frozen.items()}
        sample = stage._sampler(context, roles, mesh())
        roll_out = stage._rollouts(context, roles, prompts, sample, stage._in_order(context, len(prompts)), mesh())
        learn = stage._learner(context, roles, None, OPTIMIZER, None)
        checks = experiment().checks
        checks.length_floor = 0.4  # at its default answers of 4 tokens could not fall below it
        watch = guards.Watch("ppo", SETTINGS, checks, "float32", 20.0, lambda text: None)
        advance = stage._iteration(context, roles, roll_out, learn, watch)
        state = first_state(roles)
        for iteration in range(2):
            state, metrics = advance(state, iteration)
            state = after_update(roles, state)
            watch(iteration + 1, metrics)
        guards.check_unchanged("ppo", anchors, frozen)
    assert not watch.warnings, watch.warnings


def after_update(roles: ppo_roles.Roles, state: TrainState) -> TrainState:
    """The state; a specimen puts here what becomes of it and of the roles."""
    return state


# --- a stage of a few numbers that is cut and goes on -----------------------------------------------------------------


@jax.jit
def _advance(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    kl_coef = state.controllers.kl_coef
    params = jax.tree.map(lambda x: x - kl_coef, state.params)
    controllers = state.controllers.replace(kl_coef=kl_coef * 1.5)
    return state.replace(step=state.step + 1, params=params, controllers=controllers), {"objective/kl_coef": kl_coef}


def reference_weights(start: Any, folder: Path) -> Any:
    """What a stage takes for its reference: the weights that it started from."""
    return start


def small_state() -> TrainState:
    zero = jnp.zeros((), jnp.float32)
    return TrainState(jnp.int32(0), {"table": jnp.arange(6.0)}, (), Controllers(jnp.float32(0.1), zero, zero, zero))


def run_small_stage(folder: Path, iterations: int) -> dict[str, Any]:
    """Goes on from the folder's newest checkpoint to `iterations`, and returns the parameters."""
    state = small_state()
    anchors = {"reference": fingerprint(reference_weights(state.params, folder))}
    params, _ = loop.run_loop(
        name="small",
        folder=folder,
        identity="identity",
        schedule=loop.Schedule(iterations, 1, 1, 2),
        state=state,
        advance=lambda state, iteration: _advance(state),
        evaluate=None,
        metric="",
        higher_is_better=True,
        shown=(),
        learning_rate=lambda step: 1.0,
        tokens_each=1,
        flops_each=1.0,
        peak_flops=1.0,
        tensorboard=False,
        anchors=anchors,
    )
    return jax.device_get(params)


def small_stage_is_cut_and_goes_on() -> None:
    """Two iterations, and from their checkpoint two more."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run_small_stage(Path(folder) / "whole", 4)
        run_small_stage(Path(folder) / "cut", 2)
        resumed = run_small_stage(Path(folder) / "cut", 4)
    assert np.array_equal(resumed["table"], whole["table"]), "a resumed run does not end as one that was never cut"


# --- a configuration --------------------------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {}  # of the ppo stage; a specimen's own


def experiment_with(**changes: Any) -> ConfigDict:
    """An experiment with a ppo stage."""
    config = experiment()
    config.stages.sft = configured("sft", init="scratch", tokenizer="tokenizer.model", data="sft.jsonl")
    config.stages.reward = configured("reward", init="sft", data="pairs.jsonl")
    config.stages.ppo = configured("ppo", init="sft", reward="reward", data="prompts.jsonl", **changes)
    return config


def configuration_is_checked() -> None:
    validate(experiment_with(**CHANGES))
