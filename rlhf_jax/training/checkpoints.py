"""Checkpoints of a running stage, and the finished models that stages hand to each other (Orbax, never pickle)."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.errors import UserError

Tree = Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part; process 0 alone writes."""
    if is_main_process():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)


class Checkpoints:
    """The checkpoints of one stage: the newest few, and beside them the best by a named metric.

    A checkpoint holds the state and `memory`, a small JSON dict of what the host must not forget: the best evaluation
    so far and the seconds spent. A save that was cut is never picked up: Orbax renames a complete folder into place.
    """

    def __init__(self, folder: Path, keep: int, identity: str):
        self.identity = identity
        self._latest = self._manager(folder / "latest", keep)
        self._best = self._manager(folder / "best", 2)  # the newest `latest` may name the one before

    @staticmethod
    def _manager(folder: Path, keep: int) -> ocp.CheckpointManager:
        # The two managers' barriers between processes need names of their own.
        barriers = ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=f"{folder.parent.parent.name}_{folder.name}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, multiprocessing_options=barriers
        )
        return ocp.CheckpointManager(folder.absolute(), options=options)

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
        """Saves in the background after `index` steps."""
        self._best.wait_until_finished()  # what `memory` names as best must be there first
        self._save(self._latest, index, state, memory)

    def save_best(self, index: int, params: Tree) -> None:
        """Keeps the parameters of the best evaluation so far, in place of the one before."""
        self._save(self._best, index, params, {})

    def _save(self, manager: ocp.CheckpointManager, index: int, tree: Tree, memory: dict[str, Any]) -> None:
        if index in manager.all_steps():  # of a run that was cut after this save: the same bits
            return
        memory = {**memory, "identity": self.identity}
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), memory=ocp.args.JsonSave(memory))
        manager.save(index, args=args, force=True)

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._latest.close()
        self._best.close()


def save_tree(folder: Path, tree: Tree) -> None:
    """Writes a pytree of arrays to `folder`, replacing an older one."""
    if folder.exists() and is_main_process():
        shutil.rmtree(folder)
    barrier(f"clear {folder}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def load_tree(folder: Path, like: Tree) -> Tree:
    """Reads what `save_tree` wrote, as and where `like` (`ShapeDtypeStruct` with shardings) says.

    Raises:
      UserError: the folder is missing or holds a tree of another shape.
    """
    if not folder.exists():
        raise UserError(f"{folder} is missing: delete its stage's folder and run again to make it anew")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except ValueError as error:
        raise UserError(f"{folder} holds another model than its model.json says: {str(error)[:160]}") from error
