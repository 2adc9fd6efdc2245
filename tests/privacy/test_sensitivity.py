"""How far one unit moves a whole private step, its rollout included, and that it moves nobody else's part of it."""

from functools import cache, partial
from types import SimpleNamespace

import clipping_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.config import experiment
from rlhf_jax.config import stage as configured
from rlhf_jax.data.table import pad_prompts
from rlhf_jax.data.units import group_units
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages import ppo, preference, private_ppo, reward, reward_labels
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.ppo_roles import Roles
from rlhf_jax.stages.private import Private, Shape
from rlhf_jax.stages.prompts import Prompts
from rlhf_jax.training import experience
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.experience import init_controllers
from rlhf_jax.training.ppo import make_update
from rlhf_jax.training.state import TrainState

SHAPE = TransformerConfig(
    vocab_size=13, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32, tie_embeddings=False
)
SPEC = RoleSpec(SHAPE)
UNITS, WIDTH, COUNT = 8, 5, 6
CLIP = 0.125
EVERYBODY = np.ones(UNITS, bool)
LOW, HIGH = 0.99, 1 + 1e-6


def recording():
    """An optimizer that moves nothing and keeps the last gradient as it came."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def base(seed):
    params = jax.jit(partial(init_base, SHAPE))(key=jax.random.key(seed))
    return {**params, "embedding": 30 * params["embedding"]}


class Step:
    """One iteration of private policy optimization on a tiny model: one minibatch, one noisy step without its noise.

    The stage's own functions, on prompts and rewards that change from call to call. A unit that is not there has left
    its place to padding, as `Private.draw` leaves it.
    """

    def __init__(self, folder, contribution=1, clip_norm=CLIP, backend="vmap", **changes):
        config = experiment()
        fields = {"whiten_advantages": False, "minibatches": 1, "epochs": 1, "max_new_tokens": COUNT, **changes}
        config.stages.ppo = configured("ppo", init="sft", reward="reward", data="prompts.jsonl", **fields)
        config.stages.ppo.batch_size = UNITS * config.stages.ppo.samples
        config.stages.ppo.privacy.update(epsilon=float("inf"), delta=0.01, clip_norm=clip_norm, physical_batch=UNITS)
        config.stages.ppo.privacy.update(contribution=contribution, backend=backend)
        context = Context("ppo", config, folder, "identity")
        context.folder.mkdir()
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.private = Private(
            context,
            group_units([str(i) for i in range(UNITS)], contribution),
            "digest",
            Shape(1, UNITS, 1, answers=config.stages.ppo.samples),
        )
        units = self.private.units.rows
        self.private.draw = lambda minibatch: (np.where(self.there[:, None], units, -1).reshape(-1), self.there)
        self.prompts = object.__new__(Prompts)
        self.prompts.ids = np.arange(100, 100 + UNITS, dtype=np.int32)
        self.prompts.records = [{"prompt": i} for i in range(UNITS)]
        self.prompts.longest, self.prompts.widths, self.prompts.skipped = WIDTH, [WIDTH], 0
        self.drawn = private_ppo.Drawn(context, self.private, self.mesh)
        self.settings = ppo.ppo_config(config.stages.ppo)
        tokenizer = SimpleNamespace(stop_ids=(8, 12))
        policy = Role(SPEC, {"base": base(0)}, tokenizer)
        critic = {"base": base(1), "head": init_head(SHAPE.width, 0.3, key=jax.random.key(2))}
        judge = SimpleNamespace(roles={}, begin=self.judged, finish=lambda pending: (pending[0], {}))
        value = Role(SPEC, critic, tokenizer) if self.settings.has_critic else None
        self.roles = Roles(self.settings, policy, value, {"base": base(3)}, judge)
        sample = ppo._sampler(context, self.roles, self.mesh)
        roll_out = ppo._rollouts(context, self.roles, self.prompts, sample, self.drawn.rows, self.mesh)
        parts = (context, self.roles, roll_out, self.private, self.drawn, recording(), None, WIDTH + COUNT)
        self.advance = private_ppo.make_private_iteration(*parts)

    def judged(self, rollout, records):
        """Scores by a table of token and unit."""
        self.rollout = rollout
        inside = np.arange(COUNT) < np.asarray(rollout.lengths)[:, None]
        units = np.array([record["prompt"] for record in records])
        each = np.where(inside, self.rewards[units[:, None], rollout.tokens], 0)
        return jnp.asarray(each.sum(1), jnp.float32)

    def __call__(self, ids, rewards, there=EVERYBODY, counted=None):
        """The clipped sum as one vector in float64.

        Args:
          there: units that were drawn; counted: of those, the ones that are marked present (all).
        """
        self.prompts.rows, self.rewards, self.there = pad_prompts(ids, WIDTH), rewards, there
        counted = there if counted is None else counted
        self.drawn.present = lambda iteration: jnp.asarray(counted)
        params = jax.tree.map(jnp.copy, self.roles.trainable)  # donated
        state = TrainState(jnp.int32(0), params, recording().init(params), init_controllers(self.settings))
        with jax.set_mesh(self.mesh):
            state, metrics = self.advance(state, 0)
        assert not {name for name in metrics if not name.startswith("optimizer/")} - {"objective/kl_coef"}
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state))]
        return UNITS * np.concatenate(leaves).astype(np.float64)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The function (fields of the stage) -> its `Step`, made once."""
    return cache(lambda **changes: Step(tmp_path_factory.mktemp("work"), **changes))


def data(seed):
    """Prompts (UNITS,) and rewards (UNITS, vocabulary): random ones, and from seed 12 on such as an adversary picks."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 13, rng.integers(1, WIDTH + 1)).tolist() for _ in range(UNITS)]
    rewards = rng.normal(size=(UNITS, 13))
    match seed - 12:
        case 0:
            rewards *= 1e6
        case 1:
            rewards[::2] *= 1e-6  # below the clip
        case 2:
            ids, rewards = [[4] * WIDTH] * UNITS, np.where(np.arange(UNITS)[:, None] == 3, -rewards[0], rewards[0])
        case 3:
            ids = [[0] if i % 2 else [12] * WIDTH for i in range(UNITS)]
        case 4:
            rewards[2], rewards[5] = np.nan, np.inf
        case 5:
            rewards[:] = 1e30
        case 6:
            ids, rewards = [[8, 12, 8, 12, 8]] * UNITS, 1e6 * np.abs(rewards)
        case 7:
            rewards[0] = 1e6
    return ids, rewards


def neighbours(step, seeds):
    """|S(D) - S(D less a unit)| / C for every unit of every data set, all of the step done again without it."""
    moved = []
    for seed in seeds:
        ids, rewards = data(seed)
        whole = step(ids, rewards)
        for unit in range(UNITS):
            moved.append(np.linalg.norm(whole - step(ids, rewards, np.arange(UNITS) != unit)) / CLIP)
    return moved


def test_one_unit_moves_a_whole_ppo_step_by_the_clip_norm(steps):
    moved = neighbours(steps(), range(4, 20))
    print(f"gae: {len(moved)} neighbours, largest {max(moved):.9f} C")
    assert len(moved) == 128 and LOW < max(moved) < HIGH


def test_one_unit_with_all_its_answers_moves_a_step_by_the_clip_norm(steps):
    moved = neighbours(steps(backend="", estimator="rloo", samples=2), range(10, 20))
    print(f"rloo: {len(moved)} neighbours, largest {max(moved):.9f} C")
    assert len(moved) == 80 and LOW < max(moved) < HIGH


def test_one_record_leaves_all_others_tokens_and_gradients_as_they_were(steps):
    step = steps()
    for seed in (0, 12, 13):
        ids, rewards = data(seed)
        other_ids, other_rewards = data(seed + 100)
        for changed in (0, 3, UNITS - 1):
            there = {}
            for name, i, r in (("before", ids, rewards), ("after", other_ids, 1e6 * other_rewards)):
                mixed = [i[u] if u == changed else ids[u] for u in range(UNITS)]
                table = np.where(np.arange(UNITS)[:, None] == changed, r, rewards)
                alone = [step(mixed, table, counted=np.arange(UNITS) == u) for u in range(UNITS)]
                there[name] = np.array(step.rollout.tokens), np.stack(alone)
            others = np.arange(UNITS) != changed
            for before, after in zip(there["before"], there["after"], strict=True):
                np.testing.assert_array_equal(before[others], after[others])
                assert not np.array_equal(before[changed], after[changed])


def test_without_noise_and_clip_a_whole_step_is_the_plain_one(steps, monkeypatch):
    """Of answers that count alike, all of them drawn."""
    step, made = steps(clip_norm=float("inf"), loss_weighting="constant"), []

    def kept(*args):
        made.append(experience.make_experience(*args))
        return made[-1]

    monkeypatch.setattr(private_ppo, "make_experience", kept)
    private = step(*data(0)) / UNITS
    params = jax.tree.map(jnp.copy, step.roles.trainable)  # donated
    state = TrainState(jnp.int32(0), params, recording().init(params))
    update = make_update(step.settings, SPEC, SPEC, recording())
    state, _ = update(state, step.roles.frozen, made[0][0], step.settings.kl_coef, jax.random.key(0))
    plain = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state))])
    assert np.abs(private - plain).max() < 1e-6 * np.abs(plain).max()


def test_what_is_a_statistic_of_the_batch_is_seen(steps):
    """The refused whitening, put in all the same: a unit then moves its neighbours' gradients too."""
    assert max(neighbours(steps(whiten_advantages=True), [0, 19])) > 1.1


# --- the stages that learn from records -------------------------------------------------------------------------------

PROBLEMS = [("sft_full", "vmap", 2), ("reward", "adapters", 2), ("dpo", "adapters", 1)]  # and how many microbatches


def rearranged(batch, rng):
    """Other records: those of the batch in another order, half of them with another one's tokens."""
    order, other = rng.permutation(problems.ROWS), rng.integers(0, problems.ROWS, problems.ROWS)
    out, kept = {field: x[order] for field, x in batch.items()}, rng.random(problems.ROWS) < 0.5
    out["tokens"] = np.where(kept.reshape(-1, *[1] * (out["tokens"].ndim - 1)), out["tokens"], batch["tokens"][other])
    return out


@pytest.mark.parametrize(("name", "backend", "accumulation"), PROBLEMS)
def test_one_record_moves_a_step_by_the_clip_norm(name, backend, accumulation):
    def summed(rows, present):
        total, _ = problems.run(name, rows, present, backend, accumulation=accumulation)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(total)]).astype(np.float64)

    bound, batch, moved = problems.median_norm(name), problems.problem(name)[3], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows, present = rearranged(batch, rng), rng.random(problems.ROWS) < 0.8
        whole = summed(rows, present)
        for unit in np.flatnonzero(present):
            without = summed(rows, present & (np.arange(problems.ROWS) != unit))
            moved.append(np.linalg.norm(whole - without) / bound)
    print(f"{name}: {len(moved)} neighbours, largest {max(moved):.9f} C")
    assert LOW < max(moved) < HIGH


# --- more units than a batch has room for -----------------------------------------------------------------------------


def test_a_cut_batch_is_moved_by_twice_the_clip_norm_at_most(steps):
    """Without a unit that was kept, another one takes its place (`test_poisson`: each as likely as any): -g + h.

    The worst neighbours have opposite gradients, as where rewards have opposite signs.
    """
    step, moved = steps(), []
    for seed in (0, 1, 12, 14, 16, 19):
        ids, rewards = data(seed)
        for unit in range(1, 4):
            others = np.arange(UNITS) != unit
            ids[0], rewards = ids[unit], np.where(np.arange(UNITS)[:, None] == 0, -rewards[unit], rewards)
            kept, taken = step(ids, rewards, np.arange(UNITS) != 0), step(ids, rewards, others)
            moved.append(np.linalg.norm(kept - taken) / CLIP)
    print(f"cut batches: {len(moved)} neighbours, largest {max(moved):.9f} C")
    assert 1.1 < max(moved) < 2 * HIGH


# --- places without a row ---------------------------------------------------------------------------------------------


def test_a_unit_of_fewer_prompts_reads_nobody_else_s(steps):
    """Units may have two prompts and have one: another one's reward is nothing to them."""
    step = steps(contribution=2, missing_end="add")
    ids, rewards = data(0)
    for other in range(1, UNITS):
        changed = np.where(np.arange(UNITS)[:, None] == other, 7.0 * rewards, rewards)
        first = np.arange(UNITS) == 0
        np.testing.assert_array_equal(step(ids, rewards, counted=first), step(ids, changed, counted=first))


@pytest.mark.parametrize("stage", ["reward", "preference", "labels"])
def test_a_place_without_a_row_holds_no_record(stage):
    mesh, rows, epochs = make_mesh(1, 1, 1, devices=jax.devices()[:1]), np.array([-1]), np.zeros(1, int)

    def placed(token):
        pairs, ones = np.full((3, 2, 4), token, np.int32), np.ones((3, 2), np.int32)
        if stage == "labels":
            texts = {
                "tokens": pairs[:, 0],
                "lengths": 4 * ones[:, 0],
                "positive": np.ones(3, bool),
                "ids": np.array(["a"] * 3),
            }
            context = SimpleNamespace(config=SimpleNamespace(sequence_length=4), seed=0, name="reward")
            return reward_labels.place_windows(context, texts, rows, epochs, mesh)
        data = {"tokens": pairs, "lengths": 4 * ones, "answer_lengths": ones}
        return preference._place(data, rows, mesh) if stage == "preference" else reward._place(data, rows, epochs, mesh)

    one, other = (jax.device_get(placed(token)) for token in (3, 5))
    jax.tree.map(np.testing.assert_array_equal, one, other)
