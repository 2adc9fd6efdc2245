"""What stages that train a scalar head share: the role they start from, batches of answers, the loop, the baseline."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_private
from rlhf_jax.data.order import in_batches, without_padding
from rlhf_jax.distributed.sharding import fetch, place_batch
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import member, member_parts, training_passes
from rlhf_jax.objectives.records import Objective
from rlhf_jax.rollout.scoring import member_scores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import Private, units_of
from rlhf_jax.stages.train import ordered, prepare, steps_of, train
from rlhf_jax.training.artifacts import Role, continue_role
from rlhf_jax.training.gradient import mean_metrics, plain_gradient

Rows = dict[str, np.ndarray]
PlaceRows = Callable[[Rows, np.ndarray, np.ndarray, Mesh], dict[str, jax.Array]]  # (rows, numbers, epochs, mesh)


def start_scorer(context: Context, start: Role, *, marked: bool) -> Role:
    """The role a stage trains: `start` with the stage's adapters, and its head or (from a language model) a fresh one.

    Args:
      marked: the role reads an answer after its prompt, and is shown where it begins if the config says so.
    """
    config = context.config
    role = _ensemble(context, start) if config.members > 1 else _one(context, start)
    if not marked:
        role.spec = dataclasses.replace(role.spec, answer_mark=None)
    elif config.answer_mark and role.tokenizer.fim_middle_id is not None:
        role.spec = dataclasses.replace(role.spec, answer_mark=role.tokenizer.fim_middle_id)
    return role


def _one(context: Context, start: Role, number: int = 0) -> Role:
    """The role of a stage without members, or the member of that number: fresh parts have keys of their own."""

    def key(purpose: str) -> jax.Array:
        return jax.random.fold_in(context.key(purpose), number) if number else context.key(purpose)

    role = continue_role(start, context.lora(), context.config.compute, key=key("adapters"))
    width = role.spec.config.width
    fresh = init_head(width, (width + 1) ** -0.5, key=key("head"))
    _, first = member(start.spec, start.weights, 0)
    role.weights["head"] = first.get("head", fresh)  # an imported model with a head goes on with its own
    return role


def _ensemble(context: Context, start: Role) -> Role:
    """The stage's members on one base, adapters and heads with a leading axis."""
    members = context.config.members
    roles = [_one(context, start, number) for number in range(members)]
    first = roles[0]
    own, shared = zip(*(member_parts(role.weights) for role in roles), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return dataclasses.replace(
        first, spec=dataclasses.replace(first.spec, members=members), weights={**shared[0], **stacked}
    )


def place_answers(
    columns: Sequence[str], data: Rows, rows: np.ndarray, epochs: np.ndarray, mesh: Mesh
) -> dict[str, jax.Array]:
    """A batch of these columns, the same in every epoch; a row number of -1 is a padding row of weight 0.

    `rows` are (B,), or (B, members) of an ensemble, whose columns are then (B, members, ...).
    """

    def load(mine: np.ndarray) -> dict[str, np.ndarray]:
        wanted = rows[mine]
        batch = {name: data[name][wanted] for name in columns}
        return without_padding({**batch, "weight": np.ones(wanted.shape, np.float32)}, wanted, lengths=1)

    return place_batch(len(rows), load, mesh)


@dataclasses.dataclass(frozen=True)
class Trained:
    """How a training went: the loop's summary, its steps, and the private side, where there is one."""

    summary: dict[str, Any]
    steps: int
    private: Private | None


def train_scorer(
    context: Context,
    role: Role,
    objective: Objective,
    training: Rows,
    held_out: Rows | None,
    place: PlaceRows,
    mesh: Mesh,
    *,
    noun: str,
    measured: tuple[str, ...] = ("loss", "accuracy"),
) -> Trained:
    """Trains `role`, whose weights become the result's.

    Args:
      training, held_out: rows with "tokens" (n, ..., T) and "lengths" (n, ...); of a private stage with "owners".
      place: puts rows on the mesh, as the objective reads them.
      noun: what the rows are, as it stands in the line that says how many there are.
      measured: metrics of the objective, without their "/train", that are measured on the held-out rows too.
    """
    config, count = context.config, len(training["lengths"])
    private = Private.of_records(context, *units_of(context, training)) if is_private(config) else None
    steps = private.iterations if private else steps_of(config, count)
    context.progress(f"{count} {noun}, {steps} steps")
    positions = math.prod(training["tokens"].shape[1:])
    plain = plain_gradient(objective, config.accumulation)
    gradient = private.gradient(objective, role, positions) if private else plain
    state, frozen, step = prepare(context, role, gradient, steps, mesh)
    members = role.spec.members
    tokens = config.batch_size * positions * members

    def placed(rows: np.ndarray, epochs: np.ndarray) -> dict[str, jax.Array]:
        return place(training, rows, epochs, mesh)

    batch = private.batches(placed, mesh) if private else ordered(context, count, placed, members)

    def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
        return step(state, frozen, batch(iteration))

    size = config.batch_size
    over = jax.vmap(objective, in_axes=(0, None, None)) if members > 1 else objective
    evaluate = _evaluation(over, frozen, held_out, place, size, mesh, measured) if held_out else None
    params, summary = train(
        context,
        state,
        advance,
        evaluate,
        iterations=steps,
        shown=("loss/train", "accuracy/train", "loss/eval", "accuracy/eval"),
        tokens_each=tokens,
        flops_each=training_passes(role.spec)
        * tokens
        * role.spec.config.forward_flops(training["tokens"].shape[-1], logits=False),
        account=private.account if private else None,
    )
    role.weights = {**frozen, **params}
    return Trained(summary, steps, private)


def _evaluation(
    objective: Objective, frozen: Any, held_out: Rows, place: PlaceRows, size: int, mesh: Mesh, measured: Sequence[str]
) -> Callable[[Any, int], dict[str, float]]:
    """The function (params, iteration) -> {"loss/eval", ...} over the held-out rows; of a count of 0 there is none.

    Of an ensemble they are the members' means.
    """
    first = np.zeros(size, int)  # epoch
    batches = [place(held_out, rows, first, mesh) for rows in in_batches(len(held_out["lengths"]), size)]

    @jax.jit
    def totals(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
        return jax.tree.map(jnp.sum, objective(params, frozen, batch).metrics)

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        sums = jax.tree.map(lambda *x: sum(x), *(totals(params, frozen, batch) for batch in batches))
        means = mean_metrics(sums)
        names = [name for name in measured if float(sums[f"{name}/train"][1])]
        return {f"{name}/eval": float(means[f"{name}/train"]) for name in names}

    return evaluate


def score_rows(role: Role, data: Rows, size: int, mesh: Mesh) -> np.ndarray:
    """The head's score of every answer of rows "tokens" (n, A, T), "lengths" (n, A), in batches of `size`: (n, A).

    Of an ensemble it is the members' mean.
    """
    place = partial(place_answers, ("tokens", "lengths"), data)

    @jax.jit
    def score(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        rows, answers, width = batch["tokens"].shape
        tokens, lengths = batch["tokens"].reshape(rows * answers, width), batch["lengths"].reshape(-1)
        return member_scores(role.spec, weights, tokens, lengths).mean(0).reshape(rows, answers)

    count = len(data["lengths"])
    parts = [score(role.weights, place(rows, np.zeros(size, int), mesh)) for rows in in_batches(count, size)]
    return np.concatenate([fetch(part) for part in parts])[:count]


def rows_hash(rows: Rows) -> str:
    """16 hexadecimal digits that identify rows: every column's name, type, shape and values."""
    digest = hashlib.sha256()
    for name in sorted(rows):
        column = np.ascontiguousarray(rows[name])
        digest.update(f"{name} {column.dtype.str} {column.shape};".encode() + column.tobytes())
    return digest.hexdigest()[:16]


def baseline_accuracy(train: Rows, held_out: Rows) -> float:
    """Held-out pair accuracy of a logistic regression that sees only each answer's length and whether it ended.

    Features (differences of a pair's first and second answer): length, its square, ended. No intercept, ridge 1e-3, 25
    Newton steps; a tie counts one half.
    """

    def features(pairs: Rows) -> np.ndarray:
        length = pairs["answer_lengths"] / 32.0
        x = np.stack([length, length**2, pairs["ended"].astype(float)], -1)  # (n, 2, 3)
        return x[:, 0] - x[:, 1]

    x = features(train)
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(w))
        w += np.linalg.solve(hessian, x.T @ (1 - p) - 1e-3 * w)
    margin = features(held_out) @ w
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))
