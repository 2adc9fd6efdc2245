"""Who is gone, who is behind, and who may take its time."""

import json
import time

import pytest

from rlhf_jax.distributed import heartbeat
from rlhf_jax.distributed.heartbeat import Heartbeat, Patience, Sign, Verdict, overdue

PATIENCE = Patience(silent=30, hang=600)
# A thread that would have ended the process raises SystemExit instead.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def signs(*rows):
    """{process: (sign, when it beat last, when it moved last)} of rows (place, marks, beaten, moved, fields)."""
    return {
        i: (Sign(i, f"host-{i}", marks=marks, place=place, **fields), beaten, moved)
        for i, (place, marks, beaten, moved, fields) in enumerate(rows)
    }


def test_all_is_well_while_everybody_beats_and_somebody_moves():
    assert overdue(signs(("a", 5, 1000, 990, {}), ("b", 4, 971, 500, {})), 1000, PATIENCE) is None


def test_a_silent_process_is_named_with_its_place():
    verdict = overdue(signs(("a", 5, 1000, 990, {}), ("ppo, iteration 7", 4, 969, 969, {})), 1000, PATIENCE)
    assert verdict is not None and verdict.status == heartbeat.LOST
    assert "process 1 (host-1) is gone" in verdict.message and '"ppo, iteration 7"' in verdict.message


def test_a_process_that_left_is_not_missed():
    assert overdue(signs(("a", 5, 1000, 990, {}), ("end", 9, 100, 100, {"done": True})), 1000, PATIENCE) is None
    assert overdue(signs(("end", 9, 1, 1, {"done": True})), 1000, PATIENCE) is None


def test_the_one_behind_is_named_where_nobody_moves():
    rows = ("barrier: pairs", 8, 1000, 390, {}), ("reads data", 7, 1000, 300, {}), ("barrier: pairs", 8, 1000, 399, {})
    verdict = overdue(signs(*rows), 1000, PATIENCE)
    assert verdict is not None and 'the others wait for process 1 (host-1) at "reads data"' in verdict.message
    assert overdue(signs(*rows), 999, PATIENCE) is None


def test_work_that_one_does_alone_may_take_as_long_as_it_does():
    rows = ("barrier: end prepare", 8, 1000, 1, {}), ("stage prepare", 7, 1000, 1, {"alone": True})
    assert overdue(signs(*rows), 1000, PATIENCE) is None


def test_equal_places_are_called_so():
    verdict = overdue(signs(("step 3", 8, 1000, 1, {}), ("step 3", 8, 1000, 1, {})), 1000, PATIENCE)
    assert verdict is not None and 'all 2 processes stand at "step 3"' in verdict.message


class Store:
    """The coordinator's key-value store, as JAX's client shows it."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(f"{folder}/")]


@pytest.fixture
def exits(monkeypatch):
    """Exit statuses of threads that would have ended the process."""
    found = []

    def leave(status):
        found.append(status)
        raise SystemExit

    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "FAREWELL", 2.0)
    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    return found


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_a_failure_of_one_ends_the_others_with_its_message(exits, capsys):
    store = Store()
    beats = [Heartbeat(store, i, 3, PATIENCE) for i in range(3)]
    beats[2].fail(Verdict("process 2 (c): no such file", 2))
    wait_for(lambda: exits == [2, 2])
    assert capsys.readouterr().err == "error: process 2 (c): no such file\n" * 2
    assert len(store.key_value_dir_get("rlhf_jax/read")) == 3  # who failed waits for no other's word


def test_process_0_stays_until_all_have_read_why_it_ends(exits):
    store = Store()
    first = Heartbeat(store, 0, 2, PATIENCE)
    second = Heartbeat(store, 1, 2, PATIENCE)
    first.fail(Verdict("process 0 (a): disk full", 2))
    assert "rlhf_jax/read/1" in store.values
    wait_for(lambda: exits == [2])
    assert second.verdict() == Verdict("process 0 (a): disk full", 2)


def test_process_0_does_not_wait_for_one_that_fails_too(exits):
    store = Store()
    first, second = Heartbeat(store, 0, 2, PATIENCE), Heartbeat(store, 1, 2, PATIENCE)
    second.fail(Verdict("the config names no file", 2))
    began = time.monotonic()
    first.fail(Verdict("the config names no file", 2))
    assert time.monotonic() - began < heartbeat.FAREWELL / 2  # it did not stay for its whole time


def test_the_first_verdict_stands(exits):
    store = Store()
    beats = [Heartbeat(store, i, 2, PATIENCE) for i in (0, 1)]
    beats[0].close()
    beats[1].close()
    beats[1].fail(Verdict("first", 2))
    beats[0].fail(Verdict("second", 1))
    assert json.loads(store.values["rlhf_jax/verdict/first"]) == ["first", 2]


def test_a_silent_process_is_found_by_process_0_and_ends_all(exits, capsys):
    store = Store()
    patience = Patience(silent=0.3, hang=600)
    Heartbeat(store, 0, 2, patience)
    lost = Heartbeat(store, 1, 2, patience)
    lost.mark("sft, iteration 3")
    wait_for(lambda: '"sft, iteration 3"' in store.values.get("rlhf_jax/sign/1", ""))
    lost._closed.set()  # silent from here on
    wait_for(lambda: exits == [1])
    assert "process 1 (" in (said := capsys.readouterr().err) and "is gone" in said and '"sft, iteration 3"' in said
