"""Truths of private stages: keys, batches, claims, the ledger, an iteration of policy optimization, and refusals."""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from truths_update import bigram, bigram_weights

from rlhf_jax.config import stage as configured
from rlhf_jax.data import poisson
from rlhf_jax.data.units import group_units
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import adaptive_kl_step
from rlhf_jax.privacy import noise
from rlhf_jax.privacy.accounting import epsilon
from rlhf_jax.rollout import Rollout, Sampling
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages import ledger, ppo, private, private_ppo, provenance
from rlhf_jax.stages.context import Context
from rlhf_jax.training import ppo as updates
from rlhf_jax.training.experience import init_controllers
from rlhf_jax.training.state import TrainState

# --- keys, batches and claims -----------------------------------------------------------------------------------------


def ppo_experiment(**privacy: Any) -> Any:
    """A private ppo stage with what it is fed by, all but its prompts public."""
    config = harness.experiment_with(whiten_advantages=False)
    config.privacy.public = ("sft.jsonl", "pairs.jsonl", "tokenizer.model")
    config.stages.ppo.privacy.update(
        **{"epsilon": 50.0, "delta": 0.01, "noise_multiplier": 2.0, "physical_batch": 20, "backend": "vmap", **privacy}
    )
    return config


@contextmanager
def workdir(config: Any = None, *, names: tuple[str, ...] = ("ppo",)) -> Iterator[Any]:
    """The function (shape, units, digest="data", stage="ppo") -> a `Private` of that work directory."""
    config = config or ppo_experiment(epsilon=math.inf, noise_multiplier=0.0)
    with tempfile.TemporaryDirectory() as folder:

        def begin(shape: private.Shape, units: int, digest: str = "data", name: str = "ppo") -> private.Private:
            context = Context(name, config, Path(folder), "identity")
            context.progress = lambda message: None  # type: ignore[method-assign]
            context.folder.mkdir(exist_ok=True)
            return private.Private(context, group_units([str(i) for i in range(units)], 1), digest, shape)

        begin.folder = Path(folder)  # type: ignore[attr-defined]
        yield begin


def words(keys: Any) -> list[tuple[int, ...]]:
    return [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys]


SHAPE = private.Shape(iterations=6, units=5, accumulation=1, minibatches=2, uses=2)


def every_noisy_step_has_a_key() -> None:
    with workdir() as begin:
        keys = words(begin(SHAPE, 20).keys)
    assert len(keys) == 24 == len(set(keys)), "two steps have one noise"


def stages_have_keys_of_their_own() -> None:
    config = ppo_experiment(epsilon=math.inf, noise_multiplier=0.0)
    config.stages.sft.privacy.update(**config.stages.ppo.privacy.to_dict())
    fixed = mock.patch.object(private.secrets, "token_hex", lambda size: "nonce")
    with workdir(config) as begin, fixed:
        one, other = (begin(SHAPE, 20, name=name) for name in ("ppo", "sft"))
        assert words(one.keys) != words(other.keys), "two stages have one noise"


def runs_have_keys_of_their_own() -> None:
    """A stage that was deleted and begun anew."""
    with workdir() as begin:
        one = words(begin(SHAPE, 20).keys)
        assert words(begin(SHAPE, 20).keys) == one, "a run that goes on has another noise"
        shutil.rmtree(begin.folder / "ppo")
        assert words(begin(SHAPE, 20).keys) != one, "two runs have one noise"


def batch_sizes_are_binomial() -> None:
    """Of 20 units at rate 0.05, 36 % of the batches are empty; a size has the variance 20 q (1 - q)."""
    batches = poisson.PoissonBatches(20, 0.05, 20, (1, 2))
    sizes = np.array([batches.batch(step)[1].sum() for step in range(2000)])
    assert abs(sizes.var() / 0.95 - 1) < 0.2, f"batch sizes vary by {sizes.var():.2f}, not by 0.95"
    assert abs(np.mean(sizes == 0) - 0.358) < 0.05, f"{np.mean(sizes == 0):.2f} of the batches are empty, not 0.36"


def claim_counts(uses: int, room: int) -> Any:
    """Epsilon as claimed, and of the steps, uses, units and room that the stage really takes."""

    def check() -> None:
        shape = dataclasses.replace(SHAPE, uses=uses)
        with workdir(ppo_experiment(physical_batch=room)) as begin:
            run = begin(shape, 20)
            claim = json.loads((begin.folder / "ppo" / private.CLAIM_FILE).read_text())["claim"]
            step = run.step(1.0, {}, harness.MODEL, 1, [])
            spent = epsilon(
                sampling_rate=step.expected_batch / 20,
                noise_multiplier=step.gradient_noise,
                steps=run.iterations * shape.minibatches,
                uses=len(run.keys) // (run.iterations * shape.minibatches),
                physical_batch=len(run.draw(0)[1]),
                records=20,
                delta=0.01,
            )
        assert claim["epsilon"] >= spent - 1e-9, f"{claim['epsilon']:.2f} is claimed and {spent:.2f} is spent"

    return check


def other_data_is_refused() -> None:
    rows = {"tokens": np.arange(6).reshape(3, 2), "owners": np.array(["a", "b", "c"])}
    context: Any = SimpleNamespace(config=ppo_experiment().stages.ppo)
    one, other = (private.units_of(context, {**rows, "tokens": rows["tokens"] + i})[1] for i in range(2))
    with workdir() as begin:
        begin(SHAPE, 20, one)
        begin(SHAPE, 20, one)
        try:
            begin(SHAPE, 20, other)
        except UserError:
            return
    raise AssertionError("a private stage goes on with other data")


# --- the ledger -------------------------------------------------------------------------------------------------------


def ledger_of(folder: Path, begin: Any, config: Any, digest: str = "data") -> dict[str, Any]:
    begin(SHAPE, 20, digest)
    contexts = {name: Context(name, config, folder, "") for name in ("sft", "ppo")}
    written = ledger.Ledger(folder, config, contexts).write()
    assert written is not None
    return written


def prompts_at(folder: Path, config: Any) -> None:
    """Private supervised and prompt data about the same things, in other words' records."""
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Thing {i}?", "id": i}) + "\n" for i in range(20)))
    rows = (json.dumps({"prompt": f"thing  {i + 10}", "completion": "Yes."}) + "\n" for i in range(20))
    (folder / "s.jsonl").write_text("".join(rows))
    config.stages.ppo.data, config.stages.sft.data = str(folder / "p.jsonl"), str(folder / "s.jsonl")
    config.stages.ppo.schema, config.stages.sft.schema = "prompt", "completion"


def deleted_run_is_remembered() -> None:
    config = ppo_experiment()
    with workdir(config) as begin:
        prompts_at(begin.folder, config)
        once = ledger_of(begin.folder, begin, config)["claim"]["epsilon"]
        shutil.rmtree(begin.folder / "ppo")
        twice = ledger_of(begin.folder, begin, config)["claim"]["epsilon"]
    assert twice > 1.1 * once, "a run whose stage was deleted is forgotten"


def shared_units_are_found() -> None:
    config = ppo_experiment()
    config.stages.sft.privacy.update(**config.stages.ppo.privacy.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        prompts_at(Path(folder), config)
        contexts = {name: Context(name, config, Path(folder), "") for name in ("sft", "ppo")}
        try:
            ledger.Ledger(Path(folder), config, contexts).overlaps()
        except UserError as error:
            assert "share 10 privacy unit(s)" in str(error), str(error)
            return
    raise AssertionError("two stages about the same prompts are taken to be disjoint")


# --- an iteration of private policy optimization, by a table in the decoder's place -----------------------------------

ANSWERS, PPO_CLIP = 4, 0.01  # of each minibatch


def recorder() -> optax.GradientTransformation:
    """Moves nothing and keeps the gradient of every step: (count, (8, numbers))."""

    def init(params: Any) -> Any:
        return jnp.int32(0), jnp.zeros((8, sum(leaf.size for leaf in jax.tree.leaves(params))))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        count, kept = state
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(grads)])
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, kept.at[count].set(flat))

    return optax.GradientTransformation(init, update)


@contextmanager
def iteration(minibatches: int = 1, uses: int = 1, *, noisy: bool = False, **changes: Any) -> Iterator[Any]:
    """The function (scores (rows,), present=all, seed=0) -> (gradients (steps, numbers), metrics, KL coefficient).

    Rollout and its scoring are random numbers; everybody is drawn into every minibatch, each of `ANSWERS` units. The
    secret root and the run's nonce are fixed here, so that what is seen once is seen always.
    """
    config = ppo_experiment(clip_norm=PPO_CLIP, released_share=0.25 if noisy else 0.0, physical_batch=ANSWERS)
    config.stages.ppo.update(minibatches=minibatches, epochs=uses, estimator="reinforce++", samples=1, **changes)
    config.stages.ppo.batch_size = ANSWERS * minibatches
    if not noisy:
        config.stages.ppo.privacy.update(epsilon=math.inf, noise_multiplier=0.0)
    settings, rows = ppo.ppo_config(config.stages.ppo), ANSWERS * minibatches
    rng = np.random.default_rng(0)
    logprobs, ref = (jnp.asarray(-np.abs(rng.normal(size=(rows, harness.COUNT))), jnp.float32) for _ in range(2))
    tokens, prompts = (jnp.asarray(rng.integers(1, 13, (rows, n)), jnp.int32) for n in (harness.COUNT, 5))
    full, wide = jnp.full(rows, harness.COUNT), jnp.full(rows, 5)
    rollout = Rollout(prompts, wide, tokens, full, jnp.ones(rows, bool), logprobs, Sampling(harness.COUNT))
    read = RoleScores(logprobs, ref, jnp.abs(logprobs), jnp.zeros_like(logprobs))
    roles: Any = SimpleNamespace(
        settings=settings, policy=SimpleNamespace(spec=harness.SPEC), critic_specs=(None, None),
        trainable={}, frozen={"policy": {}}, finish=lambda pending: (pending, {}, None),
        acting=lambda params: params, score=lambda acting, rollout, parts: read,
    )  # fmt: skip
    given: dict[str, Any] = {}
    shape = private.Shape(3, ANSWERS, 1, minibatches, uses)
    mesh, table = harness.mesh(), mock.patch.object(updates, "answer_logprobs", bigram)
    root = mock.patch.object(noise, "new_root", lambda: (1, 2))
    nonce = mock.patch.object(private.secrets, "token_hex", lambda size: "0" * 2 * size)
    with workdir(config) as begin, table, root, nonce, jax.set_mesh(mesh):
        side = begin(shape, ANSWERS)
        drawn = private_ppo.Drawn(SimpleNamespace(config=config.stages.ppo), side, mesh)
        drawn.present = lambda number: jnp.asarray(given["present"])  # type: ignore[method-assign]
        roll_out = lambda weights, number: (rollout, jnp.asarray(given["scores"], jnp.float32))  # noqa: E731
        context: Any = SimpleNamespace(config=config.stages.ppo)
        advance = private_ppo.make_private_iteration(context, roles, roll_out, side, drawn, recorder(), None, 1)

        def run(scores: Any, present: Any = None, number: int = 0) -> tuple[np.ndarray, dict[str, Any], float]:
            given.update(scores=scores, present=np.ones(rows, bool) if present is None else present)
            params = bigram_weights()
            state = TrainState(jnp.int32(0), params, recorder().init(params), init_controllers(settings))
            state, metrics = advance(state, number)
            kept = np.asarray(state.opt_state[1], np.float64)[: minibatches * uses] * ANSWERS
            return kept, metrics, float(state.controllers.kl_coef)

        run.settings = settings  # type: ignore[attr-defined]
        yield run


def record_moves_a_step_by_its_bound() -> None:
    """The record that leaves takes its score along: what stands in its place scores 0."""
    with iteration() as run:
        moved = []
        for scores in ([1e6, 1, 2, 3], [-1e6, 1, 1, 1], [3, -2, 5, 1]):
            whole = run(scores)[0]
            for i in range(ANSWERS):
                others = np.arange(ANSWERS) != i
                moved.append(np.linalg.norm(whole - run(np.where(others, scores, 0.0), others)[0]) / PPO_CLIP)
    assert max(moved) < 1 + 1e-5, f"a record moves a step by {max(moved):.2f} C"
    assert max(moved) > 0.99, "no record comes near the bound: this shows nothing"


def uses_read_one_minibatch() -> None:
    with iteration(minibatches=2, uses=2) as run:
        steps, _, _ = run([1e3, -1, 0.5, 2, 3, -4, 1, 0], [True, True, False, True, False, True, True, False])
    assert np.array_equal(steps[0::2], steps[1::2]), "a minibatch's second use reads other records"
    assert not np.array_equal(steps[0], steps[2]), "two minibatches are one"


def coefficient_follows_what_was_released() -> None:
    with iteration(noisy=True, kl_controller="adaptive", kl_target=0.5, kl_horizon=100) as run:
        settings, moves = run.settings, []
        for number in range(2):
            _, metrics, moved = run([1, 2, 3, 4], None, number)
            released = adaptive_kl_step(settings.kl_coef, metrics["objective/kl"], 0.5, 100, ANSWERS)
            assert abs(moved - float(released)) < 1e-7, "the coefficient follows another KL than the one released"
            moves.append(float(metrics["objective/kl"]))
    assert moves[0] != moves[1], "the KL that is released has no noise"


def scores_do_not_stop_a_stage() -> None:
    with iteration() as run:
        steps, _, _ = run([np.nan, 1e30, -1e30, 0.0])
    assert np.isfinite(steps).all(), "a score that is not finite is in the gradient"


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(said: str, change: Any) -> Any:
    """The check that a private experiment is accepted, and refused once it is changed."""

    def check() -> None:
        provenance.check_privacy(ppo_experiment())
        config = ppo_experiment()
        change(config)
        try:
            provenance.check_privacy(config)
        except UserError as error:
            assert said in str(error), str(error)
            return
        raise AssertionError(f"a private stage takes {said}")

    return check


def private_stage(kind: str, **fields: Any) -> Any:
    """A change that adds a private stage of a kind."""

    def change(config: Any) -> None:
        config.stages.other = configured(kind, init="sft", data="other.jsonl")
        config.stages.other.update(**fields)
        config.stages.other.privacy.update(epsilon=1.0, delta=1e-5)

    return change


def fields(**values: Any) -> Any:
    """A change of fields of the private ppo stage."""

    def change(config: Any) -> None:
        for name, value in values.items():
            group = config.stages.ppo
            *path, last = name.split("__")
            for part in path:
                group = group[part]
            group[last] = value

    return change
