"""Checkpoints of a running stage, and the finished models that stages hand to each other (Orbax, never pickle)."""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from rlhf_jax.distributed import storage
from rlhf_jax.distributed.processes import barrier, disk_full, is_main_process
from rlhf_jax.errors import UserError

Tree = Any
PATIENCE = 3600  # seconds in which processes wait for each other's part of a save; one that is gone ends the run anyway
STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how TensorStore begins what a disk or a bucket told it
REMOTE = ("gcsfs", "google", "aiohttp")  # whose exceptions speak of a bucket


# Orbax logs, with a traceback, what it raises besides: a user gets one line.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part; process 0 alone writes."""
    if is_main_process():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)


def _meet(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier of background threads, which a process whose save has failed passes by: others never come."""
    failed = sys.exception()
    if failed is not None:
        raise failed
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
    """The checkpoints of one stage: the newest few, every so-manieth, and beside them the best by a named metric.

    A checkpoint holds the state and `memory`, a small JSON dict of what the host must not forget: the best evaluation
    so far and the seconds spent. A save that was cut is never picked up: Orbax renames a complete folder into place, or
    in a bucket, which knows no renaming, writes a file into it that says so.

    Saves go on in the background. What one of them meets, a full disk say, is a UserError of the next call.
    """

    def __init__(self, folder: Path, keep: int, identity: str, keep_every: int = 0):
        """`keep` newest ones are kept, and for ever those of indices that `keep_every` divides, unless it is 0."""
        self.identity = identity
        self._best = self._manager(folder / "best", 2)  # the newest `latest` may name the one before
        self._latest = self._manager(folder / "latest", keep, keep_every, self._before_complete)

    @staticmethod
    def _manager(folder: Path, keep: int, keep_every: int = 0, before: Any = None) -> ocp.CheckpointManager:
        # The two managers' barriers between processes need names of their own.
        barriers = ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=f"{folder.parent.parent.name}_{folder.name}"
        )
        background = ocp.options.AsyncOptions(
            timeout_secs=PATIENCE, barrier_sync_fn=_meet, post_finalization_callback=before
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            create=True,
            enable_async_checkpointing=True,
            async_options=background,
            multiprocessing_options=barriers,
        )
        return ocp.CheckpointManager(storage.remote(folder), options=options)

    def _before_complete(self) -> None:
        """What has to be there before a checkpoint counts: the best it names, and in a bucket the metrics so far.

        Process 0 runs it in the background, when all has been written but what makes the checkpoint complete.
        """
        self._best.wait_until_finished()
        storage.push()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Around what may raise an error of a save in the background."""
        try:
            yield
        except Exception as error:
            remote = type(error).__module__.split(".")[0] in REMOTE
            if isinstance(error, UserError) or not (isinstance(error, OSError) or remote or STATUS.match(str(error))):
                raise
            raise UserError(
                f"{self._latest.directory} cannot be written ({_cause(error)}): {self.standing()}"
            ) from error

    def standing(self) -> str:
        """What is left after a failed save, and what to do about it."""
        try:
            whole = newest(self._latest.directory)
            stands = f"the checkpoint after {whole} iterations stands" if whole else "there is no whole checkpoint yet"
        except Exception:  # the bucket is out of reach
            stands = "the newest whole checkpoint stands"
        return f"{stands}; make room or mend what is wrong, and run the same command again to go on from there"

    def _restore(self, manager: ocp.CheckpointManager, index: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), memory=ocp.args.JsonRestore())
        try:
            restored = manager.restore(index, args=args)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{manager.directory} holds a checkpoint of another model ({str(error)[:120]}): use a new --workdir"
            ) from error
        if restored["memory"]["identity"] != self.identity:
            raise UserError(f"{manager.directory} holds a checkpoint of another stage: use a new --workdir")
        return restored["state"], restored["memory"]

    def restore(self, like: Tree) -> tuple[int, Tree, dict[str, Any]]:
        """(steps done, state, memory) of the newest complete checkpoint, or (0, like, {}) without one."""
        index = self._latest.latest_step()
        if index is None:
            return 0, like, {}
        state, memory = self._restore(self._latest, index, like)
        return index, state, memory

    def restore_best(self, index: int, like: Tree) -> Tree:
        """The parameters saved by `save_best` at `index`."""
        return self._restore(self._best, index, like)[0]

    def save(self, index: int, state: Tree, memory: dict[str, Any]) -> None:
        """Saves in the background after `index` iterations; returns when `state` may be donated.

        Raises:
          UserError: the save before this one failed.
        """
        self._save(self._latest, index, state, memory)

    def save_best(self, index: int, params: Tree) -> None:
        """Keeps the parameters of the best evaluation so far, in place of the one before."""
        self._save(self._best, index, params, {})

    def _save(self, manager: ocp.CheckpointManager, index: int, tree: Tree, memory: dict[str, Any]) -> None:
        if index in manager.all_steps():  # of a run that was cut after this save: the same bits
            return
        memory = {**memory, "identity": self.identity}
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), memory=ocp.args.JsonSave(memory))
        with self._saving():
            manager.save(index, args=args, force=True)

    def wait(self) -> None:
        """Returns when all saves are on disk.

        Raises:
          UserError: one of them failed.
        """
        with self._saving():
            self._latest.wait_until_finished()
            self._best.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._latest.close()
        self._best.close()


def newest(folder: epath.Path) -> int | None:
    """The index of the newest whole checkpoint of a manager's folder, as it is on disk; None if there is none."""
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def _cause(error: Exception) -> str:
    """The end of what was said: "No space left on device" stands behind paths and codes."""
    if disk_full(error):
        return "no space is left"
    return str(error).splitlines()[0][:300]


def save_tree(folder: Path, tree: Tree) -> None:
    """Writes a pytree of arrays to `folder`, replacing an older one.

    Raises:
      UserError: it cannot be written, for want of room or permission.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(storage.remote(folder), tree, force=True)
            checkpointer.wait_until_finished()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not STATUS.match(str(error)):
                raise
            raise UserError(
                f"{storage.remote(folder)} cannot be written ({_cause(error)}): make room or mend what is wrong, and "
                "run the same command again to go on"
            ) from error


def clear(folder: Path) -> None:
    """Removes what Orbax has written to `folder`, if it has. All processes call it."""
    place = storage.remote(folder)
    if is_main_process() and place.exists():
        place.rmtree()
    barrier(f"clear {folder}")


def load_tree(folder: Path, like: Tree) -> Tree:
    """Reads what `save_tree` wrote, as and where `like` (`ShapeDtypeStruct` with shardings) says.

    Raises:
      UserError: the folder is missing or holds a tree of another shape.
    """
    place = storage.remote(folder)
    if not place.exists():
        raise UserError(f"{place} is missing: delete its stage's folder and run again to make it anew")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(place, like)
    except ValueError as error:
        raise UserError(f"{place} holds another model than its model.json says: {str(error)[:160]}") from error
