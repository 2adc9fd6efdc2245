"""The loop every trainable stage runs: advance, log, evaluate, save; and stop on a signal without losing work."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.distributed import disk_full, mark, stops_after
from rlhf_jax.errors import UserError
from rlhf_jax.training.checkpoints import Checkpoints
from rlhf_jax.training.metrics import MetricsLog, Progress

Tree = Any
IN_FLIGHT = 2  # iterations that the device may be behind the host: it never waits, and a signal never waits long


class Stopped(Exception):
    """A signal came and the state is saved: exit with status 75, to be run again."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often things happen, in iterations of the loop; one iteration is `steps_each` optimizer steps."""

    iterations: int
    log_every: int
    evaluate_every: int
    save_every: int
    steps_each: int = 1


def _check_anchors(name: str, saved: dict[str, str], anchors: dict[str, str]) -> None:
    for role, fingerprint in anchors.items():
        if saved.get(role, fingerprint) != fingerprint:
            raise UserError(
                f"{name}: the {role} is not the one this stage was trained beside (fingerprint {saved[role]}, now "
                f"{fingerprint}): put the model it came from back, or use a new --workdir"
            )


def run_loop(
    *,
    name: str,
    folder: Path,
    identity: str,
    schedule: Schedule,
    state: Any,
    advance: Callable[[Any, int], tuple[Any, dict[str, jax.Array]]],
    evaluate: Callable[[Any, int], dict[str, Any]] | None,
    metric: str,
    higher_is_better: bool,
    shown: tuple[str, ...],
    learning_rate: Callable[[int], Any],
    tokens_each: int,
    flops_each: float,
    peak_flops: float,
    keep: int = 2,
    keep_every: int = 0,
    tensorboard: bool = True,
    watch: Callable[[int, dict[str, jax.Array]], str] | None = None,
    anchors: dict[str, str] | None = None,
) -> tuple[Tree, dict[str, Any]]:
    """Runs a stage from its newest checkpoint, or from `state`, to its end.

    Args:
      name: shown in front of the progress bar.
      folder: the stage's folder: `checkpoints/`, `metrics.jsonl`, `tensorboard/`.
      identity: the stage's identity; a checkpoint of another one is refused.
      state: the fresh state; donated. Its `params` are what evaluation chooses among.
      advance: (state, iteration) -> (state, metrics on the device). Never called twice with one state.
      evaluate: (params, iteration) -> metrics, at iteration 0, every `evaluate_every` and at the end.
      metric, higher_is_better: which evaluation is best; "" makes the last parameters the result.
      shown: metrics of the progress bar.
      keep, keep_every: the newest checkpoints that stay, and every so-manieth iteration's; 0: none.
      learning_rate: optimizer steps done -> learning rate of the next.
      tokens_each, flops_each, peak_flops: tokens and FLOPs of an iteration, the machine's FLOP/s: throughput, MFU.
      watch: (iteration, metrics) -> why training ends here, or ""; called after every iteration, may raise a UserError.
      anchors: fingerprints of frozen models by name, kept in every checkpoint: a resume beside others is refused.

    Returns:
      The best (or last) parameters, and {"first": evaluation at iteration 0, "result": evaluation of what is returned,
      "result_step": its optimizer step, "iterations": those that were run, "ended_early": why, or "", "controllers":
      the state's last ones, "seconds"}.

    Raises:
      Stopped: a signal came; everything is saved.
      UserError: the loss is not finite, or what `advance` and `watch` raise: where the state before it is still whole,
        it is saved. Or a disk is full, also that of a save in the background.
    """
    checkpoints = Checkpoints(folder / "checkpoints", keep, identity, keep_every)
    done, state, memory = checkpoints.restore(state)
    _check_anchors(name, memory.get("anchors", {}), anchors or {})
    ended_early: str = memory.get("ended_early", "")
    total = done if ended_early else schedule.iterations
    log = MetricsLog(folder, done * schedule.steps_each if done else -1, tensorboard)
    progress = Progress(name, schedule.iterations, done, memory.get("seconds", 0.0))
    evaluations: dict[str, Any] = memory.get("evaluations", {})
    lap, lap_start = time.monotonic(), done
    in_flight: deque[Any] = deque()  # metrics of iterations that the device may still be at

    def note_evaluation(iteration: int, params: Tree) -> dict[str, Any]:
        row = {k: np.asarray(v).item() for k, v in evaluate(params, iteration).items()}  # type: ignore[misc]
        if metric:
            best = evaluations.get("best", {}).get(metric)
            if best is None or (row[metric] > best if higher_is_better else row[metric] < best):
                checkpoints.save_best(iteration, params)
                evaluations.update(best=row, best_iteration=iteration)
        evaluations.setdefault("first", row)
        evaluations["last"] = row
        return row

    def save(iteration: int) -> None:
        notes = {"evaluations": evaluations, "anchors": anchors or {}, "ended_early": ended_early}
        checkpoints.save(iteration, state, {"seconds": progress.seconds, **notes})

    def advance_or_save(iteration: int) -> tuple[Any, dict[str, jax.Array]]:
        try:
            with jax.transfer_guard("disallow"):
                return advance(state, iteration - 1)
        except UserError as error:
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            if not whole or iteration == done + 1 or jax.process_count() > 1:
                raise
            save(iteration - 1)
            checkpoints.wait()
            raise UserError(f"{error} ({iteration - 1} iterations are saved)") from error

    try:
        if done == 0 and evaluate is not None:
            log.write(0, note_evaluation(0, state.params))
        for iteration in range(done + 1, total + 1):
            state, metrics = advance_or_save(iteration)
            mark(f"{name}, iteration {iteration}")
            in_flight.append(metrics)
            if len(in_flight) > IN_FLIGHT:  # further ahead, a signal would wait long for all that is asked for
                jax.block_until_ready(in_flight.popleft())
            ended_early = watch(iteration, metrics) if watch is not None else ""
            last = iteration == total or bool(ended_early)
            row: dict[str, Any] = {}
            if last or iteration % schedule.log_every == 0 or iteration == 1:
                row = {k: np.asarray(v).item() for k, v in metrics.items()}
                bad = [k for k, v in row.items() if not np.isfinite(v)]
                if bad:
                    raise UserError(
                        f"{name}: {bad[0]} is not finite at step {iteration * schedule.steps_each}: lower "
                        "optimizer.learning_rate, or look at the data of the last batches"
                    )
                seconds = (time.monotonic() - lap) / (iteration - lap_start)
                lap, lap_start = time.monotonic(), iteration
                row["optimizer/learning_rate"] = float(learning_rate(iteration * schedule.steps_each - 1))
                row["perf/tokens_per_second"] = tokens_each / seconds
                row["perf/mfu"] = flops_each / seconds / peak_flops
            if evaluate is not None and (last or iteration % schedule.evaluate_every == 0):
                row |= note_evaluation(iteration, state.params)
                lap, lap_start = time.monotonic(), iteration
            if row:
                log.write(iteration * schedule.steps_each, row)
            progress.update({k: row[k] for k in shown if k in row})
            asked = stops_after(name, iteration, IN_FLIGHT)
            if last or asked or iteration % schedule.save_every == 0:
                save(iteration)
            if asked and not last:
                checkpoints.wait()
                raise Stopped(f"{name}: stopped after {iteration} of {schedule.iterations} iterations, saved")
            if last:
                total = iteration
                break
        params = state.params
        best_iteration = evaluations.get("best_iteration", total)
        if best_iteration != total:
            checkpoints.wait()
            params = checkpoints.restore_best(best_iteration, params)
        evaluations["result"] = evaluations.get("best", evaluations.get("last"))
        evaluations["result_step"] = best_iteration * schedule.steps_each
        ran = {"iterations": total, "ended_early": ended_early, "controllers": state.controllers}
        return params, {**evaluations, **ran, "seconds": progress.seconds}
    except OSError as error:
        if not disk_full(error):
            raise
        raise UserError(f"no space is left to write to {folder}: {checkpoints.standing()}") from error
    finally:
        checkpoints.close()
        log.close()
        progress.close()
