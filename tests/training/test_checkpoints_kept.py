"""Checkpoints: which stay, what comes before one counts, what a save costs the loop, what a failed one says."""

import contextlib
import os
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlhf_jax.distributed import storage
from rlhf_jax.errors import UserError
from rlhf_jax.training.checkpoints import Checkpoints, load_tree, newest, save_tree
from rlhf_jax.training.loop import Schedule, run_loop
from rlhf_jax.training.state import TrainState

STATE = {"w": jnp.arange(8.0)}


def folders(path):
    return sorted(int(item.name) for item in path.iterdir() if item.name.isdigit())


@pytest.fixture
def opened():
    """Opens checkpoints, and closes them in the end whatever became of them."""
    made = []

    def open_(folder, keep=2, keep_every=0):
        made.append(Checkpoints(folder, keep, "identity", keep_every))
        return made[-1]

    yield open_
    for checkpoints in made:
        with contextlib.suppress(UserError, ValueError):
            checkpoints.close()


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(1, 0, [12]), (2, 0, [11, 12]), (2, 5, [5, 10, 11, 12]), (1, 4, [4, 8, 12])]
)
def test_the_newest_stay_and_every_so_manieth(tmp_path, opened, keep, keep_every, left):
    checkpoints = opened(tmp_path, keep, keep_every)
    for index in range(1, 13):
        checkpoints.save(index, STATE, {})
        if index in (2, 3):
            checkpoints.save_best(index, STATE)
    checkpoints.wait()
    assert folders(tmp_path / "latest") == left and folders(tmp_path / "best") == [2, 3]
    again = Checkpoints(tmp_path, keep, "identity", keep_every)
    assert again.restore(STATE)[0] == 12
    again.save(13, STATE, {})
    again.close()
    expected = sorted({*range(14 - keep, 14), *(i for i in left if keep_every and i % keep_every == 0)})
    assert folders(tmp_path / "latest") == expected


class Slow:
    """A disk on which the arrays of some checkpoints take as long as the test says."""

    def __init__(self, monkeypatch, place):
        self.place, self.go, self.begun = place, threading.Event(), threading.Event()
        handler = ocp.handlers.StandardCheckpointHandler
        original = handler.async_save
        slow = self

        async def async_save(self, directory, *args, **kwargs):
            futures = await original(self, directory, *args, **kwargs)
            return [*futures, slow] if slow.place in str(directory) else futures

        monkeypatch.setattr(handler, "async_save", async_save)

    def result(self, timeout=None):
        self.begun.set()
        assert self.go.wait(60)


def test_steps_go_on_while_a_save_is_unfinished(tmp_path, monkeypatch, opened):
    slow = Slow(monkeypatch, "latest")
    checkpoints = opened(tmp_path)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = step(jnp.zeros(1000))
    checkpoints.save(1, {"w": state}, {})
    for _ in range(50):
        state = step(state)  # donates what is being saved
    assert float(state[0]) == 51 and newest(tmp_path / "latest") is None
    slow.go.set()
    checkpoints.wait()
    assert float(checkpoints.restore({"w": state})[1]["w"][0]) == 1


def test_a_save_right_behind_a_save_of_the_best_holds_nobody_and_counts_only_after_it(tmp_path, monkeypatch, opened):
    slow = Slow(monkeypatch, "best")
    checkpoints = opened(tmp_path)
    checkpoints.save_best(3, STATE)
    checkpoints.save(3, STATE, {"evaluations": {"best_iteration": 3}})  # would wait for ever, did it wait
    assert slow.begun.wait(60)
    time.sleep(0.5)  # all of the checkpoint is long written
    assert newest(tmp_path / "latest") is None and newest(tmp_path / "best") is None
    slow.go.set()
    checkpoints.wait()
    assert newest(tmp_path / "latest") == newest(tmp_path / "best") == 3


def test_in_a_bucket_the_metrics_are_there_before_the_checkpoint_counts(tmp_path, monkeypatch, opened):
    seen = []
    monkeypatch.setattr(storage, "push", lambda: seen.append(newest(tmp_path / "latest")))
    checkpoints = opened(tmp_path)
    for index in (1, 2):
        checkpoints.save(index, STATE, {})
    checkpoints.wait()
    assert seen == [None, 1]


def test_a_failed_save_of_the_best_never_leaves_a_checkpoint_that_names_it(tmp_path, monkeypatch, opened):
    slow = Slow(monkeypatch, "best")
    slow.result = lambda timeout=None: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    checkpoints = opened(tmp_path)
    checkpoints.save_best(3, STATE)
    checkpoints.save(3, STATE, {})
    with pytest.raises(UserError, match="no space is left.*no whole checkpoint yet"):
        checkpoints.wait()
    assert newest(tmp_path / "latest") is None


def test_an_error_of_the_background_is_said_at_the_next_save_and_at_the_end(tmp_path, monkeypatch, opened):
    slow = Slow(monkeypatch, "latest")
    slow.result = lambda timeout=None: None
    checkpoints = opened(tmp_path)
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    slow.result = lambda timeout=None: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    checkpoints.save(2, STATE, {})
    with pytest.raises(UserError, match="the checkpoint after 1 iterations stands; make room") as told:
        checkpoints.save(3, STATE, {})
    assert "\n" not in str(told.value) and str(tmp_path) in str(told.value)
    at_the_end = opened(tmp_path / "other")
    at_the_end.save(2, STATE, {})
    with pytest.raises(UserError, match="no space is left"):
        at_the_end.close()


def test_what_is_no_matter_of_the_disk_stays_what_it_is(tmp_path, monkeypatch, opened):
    slow = Slow(monkeypatch, "latest")
    slow.result = lambda timeout=None: (_ for _ in ()).throw(ValueError("a defect"))
    checkpoints = opened(tmp_path)
    checkpoints.save(1, STATE, {})
    with pytest.raises(ValueError, match="a defect"):
        checkpoints.wait()


# --- a true full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here: that takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def run(folder, words, iterations=6):
    """A loop over random words that no compression makes smaller."""

    @jax.jit
    def step(state):
        new = jax.random.bits(jax.random.fold_in(jax.random.key(0), state.step), (words,), jnp.uint32)
        return state.replace(step=state.step + 1, params={"x": new}), {"loss/train": jnp.float32(state.step)}

    params, _ = run_loop(
        name="full",
        folder=folder,
        identity="identity",
        schedule=Schedule(iterations, 1, 100, 1),
        state=TrainState(jnp.int32(0), {"x": jnp.zeros(words, jnp.uint32)}, (), None),
        advance=lambda state, iteration: step(state),
        evaluate=None,
        metric="",
        higher_is_better=True,
        shown=(),
        learning_rate=lambda step: 1.0,
        tokens_each=1,
        flops_each=1.0,
        peak_flops=1.0,
        tensorboard=False,
    )
    return np.asarray(params["x"])


def test_a_run_on_a_full_disk_goes_on_where_room_is_made(small_disk, tmp_path):
    words = 400_000  # 1.6 MB: two checkpoints and the third that replaces one of them have room
    ballast = small_disk / "ballast"
    ballast.write_bytes(os.urandom(4_500_000))
    folder = small_disk / "stage"
    folder.mkdir()
    with pytest.raises(UserError, match="no space is left.*the checkpoint after [12] iterations stands") as told:
        run(folder, words)
    whole = newest(folder / "checkpoints" / "latest")
    assert f"after {whole} iterations" in str(told.value)
    ballast.unlink()
    there = run(folder, words)
    (tmp_path / "uncut").mkdir()
    np.testing.assert_array_equal(there, run(tmp_path / "uncut", words))
    rows = [(path / "metrics.jsonl").read_text().count("\n") for path in (folder, tmp_path / "uncut")]
    assert rows == [6, 6]


def test_metrics_that_find_no_room_say_so(small_disk):
    folder = small_disk / "stage"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(os.urandom(4096))
    with pytest.raises(UserError, match=f"no space is left to write to {folder}: there is no whole checkpoint yet"):
        run(folder, 10)


def test_a_finished_model_that_finds_no_room_says_so_and_is_written_later(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(os.urandom(7_000_000))
    tree = {"x": jax.random.bits(jax.random.key(0), (400_000,), jnp.uint32)}
    with pytest.raises(UserError, match="model cannot be written .no space is left"):
        save_tree(small_disk / "model", tree)
    ballast.unlink()
    save_tree(small_disk / "model", tree)
    save_tree(small_disk / "model", {"x": tree["x"] + 1})  # in place of it
    np.testing.assert_array_equal(load_tree(small_disk / "model", tree)["x"], tree["x"] + 1)
