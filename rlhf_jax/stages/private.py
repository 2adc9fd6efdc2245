"""A private stage's side of training: its units, Poisson batches, noise keys, and what it spends."""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_private
from rlhf_jax.data.poisson import PoissonBatches, recommended_batch
from rlhf_jax.data.units import Units, group_units, unit_of
from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import place_batch
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.roles import split
from rlhf_jax.objectives.records import Objective
from rlhf_jax.privacy.clipping import Bounds, choose_backend
from rlhf_jax.privacy.gradient import Canaries, PrivateBatch, PrivateStep, private_gradient
from rlhf_jax.privacy.noise import load_or_make_root, root_key, step_key
from rlhf_jax.privacy.plan import make_plan, plan_of
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.train import Place, steps_of
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.checkpoints import write_json
from rlhf_jax.training.gradient import GradientFunction
from rlhf_jax.training.randomness import step_keys

ROOT_FILE = "privacy.key"  # in the work directory, mode 0600
CLAIM_FILE = "private.json"  # in the stage's folder: the run's nonce, its data's digest, and what it claims


def owner_of(context: Context, record: dict[str, Any], number: int, data: str) -> str:
    """The privacy unit of record `number` (from 0) of a private stage's data."""
    field = context.config.privacy.unit
    return unit_of(record, number, field, f'stages.{context.name}.privacy.unit "{field}", {data}')


def owners_of(context: Context, records: Sequence[dict[str, Any]], data: str) -> dict[str, np.ndarray]:
    """{"owners": (n,) str} of a private stage's records, to be kept beside the rows made of them; else nothing."""
    if not is_private(context.config):
        return {}
    return {"owners": np.asarray([owner_of(context, record, i, data) for i, record in enumerate(records)])}


def units_of(context: Context, rows: Mapping[str, np.ndarray]) -> tuple[Units, str]:
    """The units of rows that have `owners`, and the rows' digest."""
    units = group_units(rows["owners"].tolist(), context.config.privacy.contribution)
    return units, digest(*(rows[name] for name in sorted(rows)))


def digest(*arrays: np.ndarray) -> str:
    """What tells one training set from another."""
    out = hashlib.sha256()
    for array in arrays:
        out.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return out.hexdigest()


@dataclasses.dataclass(frozen=True)
class Shape:
    """How many of what a private stage takes.

    Attributes:
      iterations: of the loop, as the config asks for; each draws `minibatches`, of which each gets `uses` noisy steps.
      units: expected in a minibatch; accumulation: in so many microbatches.
      answers: rows of the objective for each row of data (completions of a prompt).
    """

    iterations: int
    units: int
    accumulation: int
    minibatches: int = 1
    uses: int = 1
    answers: int = 1


class Private:
    """Made once a stage, before its first step; every process makes the same.

    Attributes:
      units: of the training data.
      plan: noise, and what it is worth.
      physical_batch: units a minibatch has room for; accumulation: its microbatches.
      iterations: how many the budget allows.
    """

    def __init__(self, context: Context, units: Units, data_digest: str, shape: Shape):
        """`units`: of the rows of data that training may draw; `data_digest` tells them from others (`digest`)."""
        config, where = context.config.privacy, f"stages.{context.name}.privacy"
        self._recording, self._records = context.audited, len(units)
        self.units = units = self._recording.joined(units) if self._recording else units
        self._name, self._shape, self._config = context.name, shape, config
        micro = shape.units // shape.accumulation
        rate = min(1.0, shape.units / len(self.units))
        self.physical_batch = recommended_batch(len(self.units), rate, micro)
        if config.physical_batch:
            self.physical_batch = -(-config.physical_batch // micro) * micro
        self.accumulation = self.physical_batch // micro
        if self._recording:
            self._recording.private = self
        begun = self._begun(context, data_digest)
        if begun:
            self.plan = plan_of(begun["claim"])
        else:
            self.plan = make_plan(
                where,
                units=len(self.units),
                expected_batch=shape.units,
                minibatches=shape.iterations * shape.minibatches,
                uses=shape.uses,
                physical_batch=self.physical_batch,
                target=config.epsilon,
                delta=config.delta,
                noise=config.noise_multiplier,
                adjacency=config.adjacency,
                together=shape.minibatches,
            )
            begun = self._begin(context, data_digest)
        context.on_claim()
        nonce = begun["nonce"]
        self.iterations = self.plan.mechanism.steps // shape.minibatches
        key = root_key(_shared_root(context))
        words = np.asarray(jax.random.key_data(step_key(key, nonce, context.name, "sampling", 0)))
        mechanism = self.plan.mechanism
        self._sampler = PoissonBatches(
            len(self.units), mechanism.sampling_rate, self.physical_batch, words.tolist(), self.accumulation
        )
        noise = step_key(key, nonce, context.name, "gradient", 0)
        self.keys = step_keys(noise, mechanism.steps * shape.uses)  # of every noisy step
        context.progress(self.describe())

    @classmethod
    def of_records(cls, context: Context, units: Units, data_digest: str) -> "Private":
        """Of a stage that makes one step of every batch of `batch_size` records, `epochs` times over all units."""
        config = context.config
        return cls(
            context, units, data_digest, Shape(steps_of(config, len(units)), config.batch_size, config.accumulation)
        )

    def _begun(self, context: Context, data_digest: str) -> dict[str, Any]:
        """What this run wrote when it began, from the stage's folder; nothing if it has not begun."""
        barrier(f"look for the claim of {context.name}")
        path = context.folder / CLAIM_FILE
        if not path.exists():
            return {}
        begun = json.loads(path.read_text())
        if begun["data"]["digest"] != data_digest:
            raise UserError(
                f"{context.name}: the training data is not what this private stage was begun with: put it back, or use "
                "a new --workdir (the same noise on other data would give both away)"
            )
        return begun

    def _begin(self, context: Context, data_digest: str) -> dict[str, Any]:
        """Writes the run's nonce, data and claim before its first draw; every process returns the same."""
        path = context.folder / CLAIM_FILE
        barrier(f"no claim of {context.name} yet")
        data = {"names": context.data_names("data"), "digest": data_digest, "unit": self._config.unit or "record"}
        write_json(path, {"nonce": secrets.token_hex(16), "data": data, "claim": self.plan.figures()})
        barrier(f"claim of {context.name}")
        return json.loads(path.read_text())

    def describe(self) -> str:
        """One line of what is spent on what."""
        m, unit = self.plan.mechanism, self._config.unit or "record"
        worth = (
            "no noise, no claim"
            if not m.noise_multiplier
            else (f"epsilon {self.plan.spent(m.steps):.4g} at delta {self.plan.delta:.3g} ({self.plan.adjacency})")
        )
        return (
            f"private by {unit}: {len(self.units)} units, {self._shape.units} of them expected in each of {m.steps} "
            f"minibatches ({self.physical_batch} at most), noise multiplier {m.noise_multiplier:.4g}: {worth}"
        )

    def step(
        self,
        clip_norm: Bounds,
        trainable: Any,
        config: TransformerConfig,
        positions: int,
        figures: Sequence[tuple[str, float]],
    ) -> PrivateStep:
        """The numbers of a noisy step.

        Args:
          trainable: what trains, and config: of its decoder; they and the positions that the objective reads for a row
            decide on the back end, unless the stage's config does.
          figures: released where the config gives them a share of the budget.
        """
        share, rows = self._config.released_share, self._config.contribution * self._shape.answers
        step = PrivateStep(
            clip_norm=clip_norm,
            noise_multiplier=self.plan.mechanism.noise_multiplier,
            expected_batch=self._shape.units,
            backend=self._config.backend or choose_backend(trainable, config, rows * positions),
            accumulation=self.accumulation,
            units_rows=rows,
            released=tuple(figures) if share else (),
            released_share=share,
        )
        if self._recording:
            self._recording.step = step
        return step

    def gradient(self, objective: Objective, role: Role, positions: int) -> GradientFunction:
        """The private gradient of a stage that trains one role on its records; its batches are `batches`'."""
        trainable, _ = split(role.spec, role.weights)
        figures = [("loss/train", self._config.loss_bound)]
        step = self.step(self._config.clip_norm, trainable, role.spec.config, positions, figures)
        return private_gradient(objective, step, self.canaries)

    @property
    def canaries(self) -> Canaries | None:
        """What is watched where the stage runs to be audited."""
        return self._recording and self._recording.canaries

    def batches(self, place: Place, mesh: Mesh) -> Callable[[int], PrivateBatch]:
        """The function iteration -> its Poisson batch on the mesh, and its noise key; `place` as in `train.ordered`."""

        def batch(iteration: int) -> PrivateBatch:
            rows, present = self.draw(iteration)
            placed = place(rows, np.full(len(rows), iteration))
            if self._recording:
                placed = {"rows": placed, "canary": place_array(self.drawn_canaries(iteration), mesh)}
            return PrivateBatch(placed, place_array(present, mesh), self.keys[iteration])

        return batch

    def draw(self, minibatch: int) -> tuple[np.ndarray, np.ndarray]:
        """A minibatch: row numbers (physical_batch * contribution,), -1 for padding, and present (physical_batch,)."""
        units, present = self._sampler.batch(minibatch)
        return np.where(present[:, None], self.units.rows[units], -1).reshape(-1), present

    def drawn_canaries(self, minibatch: int) -> np.ndarray:
        """The canary (physical_batch * contribution,) int32 that each row of a minibatch is, -1 for a real one."""
        units, present = self._sampler.batch(minibatch)
        numbers = self._recording.numbers(np.where(present, units - self._records, -1))
        return np.repeat(numbers, self._config.contribution)

    def account(self, iteration: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """An iteration's metrics with `privacy/epsilon` after it; what an audit watches is taken out and recorded."""
        if self._recording:
            metrics = self._recording.take(metrics)
        if self.plan.mechanism.noise_multiplier:
            metrics = metrics | {"privacy/epsilon": self.plan.spent((iteration + 1) * self._shape.minibatches)}
        return metrics

    @property
    def rollout_rows(self) -> int:
        """Answers of the union of an iteration's minibatches, one row of each unit counted."""
        return self._shape.minibatches * self.physical_batch * self._shape.answers

    def figures(self) -> dict[str, Any]:
        """What stands in the stage's result."""
        return {"privacy": self.plan.figures()}


def place_array(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """A number for each unit or row, on the mesh as the rows are."""
    return place_batch(len(array), lambda mine: {"array": array[mine]}, mesh)["array"]


def _shared_root(context: Context) -> tuple[int, int]:
    """The work directory's secret root, made by the main process where there is none."""
    path = context.workdir / ROOT_FILE
    if is_main_process():
        load_or_make_root(path)
    barrier("secret root")
    return load_or_make_root(path)
