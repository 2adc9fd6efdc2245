"""Asking to stop: by a signal, by the machine's notice, and after the same iteration everywhere."""

import http.server
import threading
import time

import jax
import pytest

from rlhf_jax.distributed import stopping


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    monkeypatch.setattr(stopping, "_asked", {"why": ""})
    monkeypatch.setattr(stopping, "POLL", 0.05)


@pytest.fixture
def machine(monkeypatch):
    """A metadata server: {path: answer}; a missing path is 404."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = answers.get(self.path.removeprefix("/computeMetadata/v1/"))
            good = found is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "quiet", "bad"),
    [
        ("instance/maintenance-event", "NONE", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("instance/preempted", "FALSE", "TRUE"),
    ],
)
def test_a_notice_of_the_machine_asks_to_stop(machine, path, quiet, bad, capfd):
    machine[path] = quiet
    stopping.watch_machine("")
    time.sleep(0.3)
    assert not stopping.stop_requested()
    machine[path] = bad
    end = time.monotonic() + 5
    while not stopping.stop_requested() and time.monotonic() < end:
        time.sleep(0.01)
    assert stopping.stop_requested()
    assert capfd.readouterr().err == f"{path} is {bad}: saving, to stop\n"


def test_a_machine_without_a_server_is_left_alone(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    before = threading.active_count()
    stopping.watch_machine("")
    assert threading.active_count() == before
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nobody answers
    stopping.watch_machine("")
    time.sleep(0.2)
    assert not stopping.stop_requested()


class Store:
    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.mark.parametrize("asked_at", [[(0, 4)], [(1, 4)], [(2, 9), (0, 8)], [(1, 1), (2, 1)]])
@pytest.mark.parametrize("seed", range(6))
def test_all_stop_after_the_same_iteration_whoever_is_asked_when(asked_at, seed, monkeypatch):
    """Three processes that run as the loop does: each asks for an iteration, then waits for the one `ahead` before it,
    which ends when all have asked for it; then it looks whether to stop. Any order of their moves that this allows."""
    import random

    from jax._src import distributed

    ahead, processes, order = 2, 3, random.Random(seed)
    store = Store()
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(distributed.global_state, "client", store)
    begun, looked, stopped = [0] * processes, [0] * processes, [0] * processes
    asked = [""] * processes
    while not all(stopped):
        free = [p for p in range(processes) if not stopped[p]]
        moves = [(p, "begin") for p in free if begun[p] == looked[p]]
        moves += [(p, "look") for p in free if begun[p] > looked[p] and min(begun) >= begun[p] - ahead]
        process, move = order.choice(moves)
        if move == "begin":
            begun[process] += 1
            continue
        looked[process] += 1
        if (process, looked[process]) in asked_at:
            asked[process] = "SIGTERM"
        stopping._asked["why"] = asked[process]
        if stopping.stops_after("loop", looked[process], ahead):
            stopped[process] = looked[process]
    assert len(set(stopped)) == 1
    assert stopped[0] <= min(at for _, at in asked_at) + 2 * (ahead + 1)
