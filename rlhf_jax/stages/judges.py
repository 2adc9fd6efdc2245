"""What scores a rollout: reward models on the device, functions on the host, and the weighted sum of several."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import all_sources, is_folder, is_function, knows_uncertainty, score_sources
from rlhf_jax.data.examples import answer_ids
from rlhf_jax.data.schemas import Record
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import batch_sharding, place_batch, replicated
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.objectives.adjustment import Moments, adjusted
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.functions import RewardFunction, load_function, score_answers
from rlhf_jax.rollout.reencode import ForeignScores, answer_text
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.uncertain import adjustment_of, load_scorer, moments, reference_of
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.ppo import score_moments, score_rewards

COLUMNS = {"mean": "rewards", "variance": "variance", "lowest": "lowest", "highest": "highest"}


@dataclasses.dataclass
class Pending:
    """A rollout whose scores are on their way."""

    rollout: Rollout
    records: Sequence[Record]
    scores: dict[str, Moments]  # of reward models that read the policy's tokens
    called: Future[dict[str, np.ndarray]] | None  # of functions: this process's rows


class Judge:
    """Scores of a rollout by every source of a stage's `reward`, or of another field that scores answers.

    Attributes:
      names: a short name of each source, in the config's order: the stage's, the folder's or the function's.
      roles: name -> reward role, of the sources that are models.
      posteriors: name -> the posterior over a role's weights, of laplace stages.
      foreign: name -> whether that model has a tokenizer other than the policy's.
    """

    def __init__(
        self,
        context: Context,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        parts: int,
        stop_strings: bool,
        field: str = "reward",
    ):
        """Loads every source.

        Args:
          tokenizer: the policy's.
          field: the config field that names the sources; `reward_weights` weigh those of "reward", and
            `reward_adjustment` and `constraint.adjustment` say what their uncertainty costs.
          parts: pieces that a reward model reads a rollout in, one after the other.
          stop_strings: answers may end without a stop token; reward models read one behind them.
        """
        stages, sources = context.experiment.stages, score_sources(context.config, field)
        self.names = source_names(sources)
        self.roles: dict[str, Role] = {}
        self.posteriors: dict[str, Any] = {}
        self.foreign: dict[str, bool] = {}
        self._tokenizer, self._mesh, self._parts, self._stop_strings = tokenizer, mesh, parts, stop_strings
        self._functions: dict[str, RewardFunction] = {}
        self._rescore: dict[str, ForeignScores] = {}
        for name, source in zip(self.names, sources, strict=True):
            if is_function(source):
                self._functions[name] = load_function(source)
                continue
            scorer = load_scorer(context, source, mesh)
            role = self.roles[name] = scorer.role
            if scorer.posterior is not None:
                self.posteriors[name] = scorer.posterior
            self.foreign[name] = role.tokenizer.identity != tokenizer.identity
            if self.foreign[name]:
                if reference_of(context, field) and knows_uncertainty(stages, source):
                    raise UserError(
                        f"stages.{context.name}: {source} has a tokenizer of its own, and its uncertainty against a "
                        "reference answer is not read: leave `against` out"
                    )
                whole = is_folder(stages, source)
                self._rescore[name] = ForeignScores(
                    role.spec, (role.weights, scorer.posterior), role.tokenizer, tokenizer, mesh, whole, _of_rows
                )
        given = context.config.reward_weights if field == "reward" else ()
        weights = np.asarray(given or [1.0] * len(sources), np.float32)
        self._reference = reference_of(context, field)
        kind, ks = adjustment_of(context, field, sources)
        signs = np.where((weights < 0) | (field == "constraint.cost"), -1, 1).astype(np.float32)
        self._numbers = jax.device_put((weights, ks, signs), replicated(mesh))

        def combine(parts: list[list[Moments]], numbers: Any) -> tuple[jax.Array, list[Moments]]:
            """The weighted sum of the sources' adjusted scores, each in one piece a part; names are no part of the
            program."""
            sources = [jax.tree.map(lambda *x: jnp.concatenate(x), *column) for column in zip(*parts, strict=True)]
            scores = [
                weight * adjusted(source, kind, k, sign)
                for source, weight, k, sign in zip(sources, *numbers, strict=True)
            ]
            return jnp.sum(jnp.stack(scores), axis=0), sources

        self._combine = jax.jit(combine, out_shardings=batch_sharding(mesh))
        self._by_rows = jax.jit(lambda fields: fields, out_shardings=batch_sharding(mesh))
        self._worker = ThreadPoolExecutor(1, "reward function")  # one: calls keep their order

    def forward_passes(self) -> int:
        """What its models' scores cost; the variance of a posterior takes a backward pass, as two forward ones."""
        return sum(role.spec.members * (3 if name in self.posteriors else 1) for name, role in self.roles.items())

    def begin(self, rollout: Rollout, records: Sequence[Record]) -> Pending:
        """Starts scoring without waiting for the rollout: models on the device, functions in a thread.

        Args:
          records: the normalized prompt record of each of the rollout's rows.
        """
        references = self._references(rollout, records)
        scores = {name: self._read(name, rollout, references) for name in self.roles if not self.foreign[name]}
        called = None
        if self._functions:  # the thread only copies shards: processes meet in no collective there
            fields = self._by_rows((rollout.tokens, rollout.lengths, rollout.ended))
            called = self._worker.submit(self._call, fields, records)
        return Pending(rollout, records, scores, called)

    def _references(self, rollout: Rollout, records: Sequence[Record]) -> tuple[jax.Array, ...]:
        """Tokens (B, N) and lengths (B,) of the records' reference answers, cut to the rollout's N; () without any.

        One row where all rows are of one record: it is then read once.
        """
        if not self._reference:
            return ()
        width = rollout.tokens.shape[1]
        one = all(record is records[0] for record in records)
        if one:
            records = records[:1]
        answers = [self._reference_ids(record)[:width] for record in records]

        def load(mine: np.ndarray) -> dict[str, np.ndarray]:
            tokens = np.zeros((len(mine), width), np.int32)
            for at, row in enumerate(mine):
                tokens[at, : len(answers[row])] = answers[row]
            return {"tokens": tokens, "lengths": np.asarray([len(answers[row]) for row in mine], np.int32)}

        if one:
            whole = load(np.zeros(1, int))
            return jax.device_put((whole["tokens"], whole["lengths"]), replicated(self._mesh))
        placed = place_batch(len(records), load, self._mesh)
        return placed["tokens"], placed["lengths"]

    def _reference_ids(self, record: Record) -> list[int]:
        if not record.get(self._reference):
            raise UserError(
                f'a prompt has no "{self._reference}", which its answers\' uncertainty is read against: add it to '
                "every record, or leave `against` out"
            )
        return answer_ids(self._tokenizer, record["prompt"], record[self._reference])

    def _read(self, name: str, rollout: Rollout, references: tuple[jax.Array, ...]) -> Moments:
        """What a model that reads the policy's tokens says."""
        role, posterior = self.roles[name], self.posteriors.get(name)
        if posterior is None and role.spec.members == 1:
            return Moments(score_rewards(role.spec, role.weights, rollout, self._parts, self._stop_strings))
        held = role.spec, role.weights, posterior
        return score_moments(
            moments, *held, rollout, self._parts, stop_strings=self._stop_strings, references=references
        )

    def finish(self, pending: Sequence[Pending]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Waits for the scores of rollouts that were begun.

        Returns:
          The weighted sum (B,) float32 of adjusted scores, rows of all rollouts one after the other; and what each
          source says before weight and adjustment, {"rewards/<name>": (B,) float32}, with "variance/<name>" where it
          knows its uncertainty, and "lowest/<name>" and "highest/<name>" of an ensemble. All are on the mesh.

        Raises:
          UserError: a function raised, or returned something else than a finite number for each answer.
        """
        parts = []
        for one in pending:
            texts = [record["prompt"] for record in one.records]
            foreign = {name: rescore(one.rollout, texts) for name, rescore in self._rescore.items()}
            found = {**one.scores, **foreign, **self._placed(one)}
            parts.append([found[name] for name in self.names])
        total, sources = self._combine(parts, self._numbers)
        columns = [
            (f"{COLUMNS[field]}/{name}", column)
            for name, source in zip(self.names, sources, strict=True)
            for field, column in source._asdict().items()
            if column is not None
        ]
        return total, dict(columns)

    def _placed(self, one: Pending) -> dict[str, Moments]:
        if one.called is None:
            return {}
        local = one.called.result()  # this process's rows, as they were read
        placed = place_batch(len(one.records), lambda mine: local, self._mesh)
        return {name: Moments(column) for name, column in placed.items()}

    def _call(self, fields: Any, records: Sequence[Record]) -> dict[str, np.ndarray]:
        """Scores of this process's rows by each function."""
        rows, (tokens, lengths, ended) = _held(fields)
        texts = [
            answer_text(self._tokenizer, answer[:length].tolist(), bool(end))
            for answer, length, end in zip(tokens, lengths, ended, strict=True)
        ]
        chosen = [records[row] for row in rows]
        prompts = [record["prompt"] for record in chosen]
        return {name: score_answers(function, prompts, texts, chosen) for name, function in self._functions.items()}


def _of_rows(spec: RoleSpec, held: tuple[Weights, Any], tokens: jax.Array, lengths: jax.Array) -> Moments:
    """`moments` as `ForeignScores` calls it."""
    return moments(spec, *held, tokens, lengths)


def _held(fields: Sequence[jax.Array]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The row numbers of arrays sharded by rows that this process's devices hold, and those rows on the host."""
    held, rows = [], np.zeros(0, int)
    for x in fields:
        shards = {shard.index[0].indices(len(x))[:2]: shard.data for shard in x.addressable_shards}
        spans = sorted(shards)
        held.append(np.concatenate([jax.device_get(shards[span]) for span in spans]))
        rows = np.concatenate([np.arange(*span) for span in spans])
    return rows, held


def source_names(sources: Sequence[str]) -> list[str]:
    """A short name for each reward source; a second one of the same name gets `_2` behind it."""
    names: list[str] = []
    for source in sources:
        name = source.rpartition(":")[2] if is_function(source) else Path(source).name
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(x for x in itertools.chain([name], numbered) if x not in names))
    return names


def check_sources(context: Context) -> None:
    """Imports every function that scores; `context.check_folders` reads the folders.

    Raises:
      UserError: a file or function is not there, the import fails, or a weight is no finite number.
    """
    for _, source in all_sources(context.config):
        if is_function(source):
            load_function(source)
    for weight in context.config.get("reward_weights", ()):
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"stages.{context.name}.reward_weights has {weight!r}: give one finite number a source")
