"""What processes tell each other while they run: that they live, how far they are, why one ends.

A thread of each process writes a line about itself to the coordinator's key-value store every few seconds. Process 0
reads all of them: a process that falls silent, or a run in which nobody moves any more, gets a verdict that names the
process and where it was. A process that fails writes its own. Every other one reads the verdict, says it and ends.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

BEAT = 2.0  # seconds between two signs of life
FAREWELL = 15.0  # seconds that process 0, at which all meet, stays for the others to read a verdict
LOST = 1  # exit status where another process is gone or hangs: run the same command again
PREFIX = "rlhf_jax"


@dataclasses.dataclass
class Sign:
    """What a process says of itself."""

    process: int
    host: str
    beats: int = 0
    marks: int = 0  # how often it moved on: all processes run one program, so equal marks are equal places
    place: str = "start"
    alone: bool = False  # at work that no other process takes part in: however long that lasts
    done: bool = False


@dataclasses.dataclass
class Verdict:
    """Why the run ends, as every process says it, and the exit status."""

    message: str
    status: int


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long is too long, in seconds."""

    silent: float = 30.0  # without a sign of life: a process counts as gone
    hang: float = 1800.0  # in which no process moves on, work that one does alone not counted


def overdue(seen: dict[int, tuple[Sign, float, float]], now: float, patience: Patience) -> Verdict | None:
    """What is wrong with a set of processes.

    Args:
      seen: process -> its newest sign, when its beats last changed, when its marks last changed, in seconds.
    """
    seen = {process: entry for process, entry in sorted(seen.items()) if not entry[0].done}
    if not seen:
        return None
    for process, (sign, beaten, _) in seen.items():
        if now - beaten > patience.silent:
            return Verdict(
                f"process {process} ({sign.host}) is gone: nothing was heard of it for {now - beaten:.0f} s, it was at "
                f'"{sign.place}"; its own log says why. Run the same command again to go on',
                LOST,
            )
    moved = max(moved for _, _, moved in seen.values())
    if now - moved <= patience.hang or any(sign.alone for sign, _, _ in seen.values()):
        return None
    least = min(sign.marks for sign, _, _ in seen.values())
    behind = {process: sign for process, (sign, _, _) in seen.items() if sign.marks == least}
    if len(behind) == len(seen):
        where = f'all {len(seen)} processes stand at "{next(iter(behind.values())).place}"'
    else:
        names = [f'process {process} ({sign.host}) at "{sign.place}"' for process, sign in behind.items()]
        where = f"the others wait for {', '.join(names[:4])}"
    return Verdict(f"no process has moved for {now - moved:.0f} s: {where}. Run the same command again to go on", LOST)


class Heartbeat:
    """The thread of one process that speaks and listens."""

    def __init__(self, client: Any, index: int, count: int, patience: Patience):
        """`client` is that of the coordinator's key-value store."""
        self._client, self._index, self._count, self._patience = client, index, count, patience
        self._sign = Sign(index, socket.gethostname())
        self._seen: dict[int, tuple[Sign, float, float]] = {}
        self._answered = time.monotonic()
        self._verdict: Verdict | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, place: str) -> None:
        """Notes that this process has come to `place`."""
        self._sign.place, self._sign.marks = place, self._sign.marks + 1

    @contextlib.contextmanager
    def alone(self, place: str) -> Iterator[None]:
        """Around work of this process for which the others wait: it may take as long as it does."""
        self.mark(place)
        self._sign.alone = True
        try:
            yield
        finally:
            self._sign.alone = False

    def verdict(self) -> Verdict | None:
        """What another process ended with, once that is known; None if nothing becomes known in due time."""
        end = time.monotonic() + self._patience.silent + 3 * BEAT
        while self._verdict is None and time.monotonic() < end:
            time.sleep(BEAT / 4)
        if self._verdict is not None:
            self._closed.set()  # who asked says it
            self._note_read()
        return self._verdict

    def fail(self, verdict: Verdict) -> None:
        """Tells the others why this process ends; process 0 waits until they have read it."""
        self._closed.set()  # its own thread is not to end it
        with contextlib.suppress(Exception):
            self._announce(verdict)
        if self._index:  # which fails too, and reads no other's
            self._note_read()
        end = time.monotonic() + (FAREWELL if self._index == 0 else 0)
        while time.monotonic() < end and self._count > 1 + len(self._read("read")):
            time.sleep(BEAT / 4)
        time.sleep(BEAT / 4 if self._index == 0 else 0)  # the last one is on its way out

    def close(self) -> None:
        """Ends the thread: the run is done."""
        self._closed.set()
        self._thread.join()
        self._sign.done = True
        with contextlib.suppress(Exception):
            self._speak()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                self._speak()
                self._listen()
                self._answered = time.monotonic()
            except Exception:  # the store does not answer
                if time.monotonic() - self._answered > self._patience.silent:
                    self._end(Verdict("process 0, at which all meet, is gone: its own log says why", LOST))

    def _speak(self) -> None:
        self._sign.beats += 1
        said = json.dumps(dataclasses.asdict(self._sign))
        self._client.key_value_set(f"{PREFIX}/sign/{self._index}", said, allow_overwrite=True)

    def _listen(self) -> None:
        found = self._read("verdict")
        if not found and self._index == 0:
            wrong = self._judge()
            if wrong is not None:
                self._announce(wrong)
                found = self._read("verdict")
        if found:
            self._end(Verdict(*json.loads(found[0])))

    def _announce(self, verdict: Verdict) -> None:
        self._client.key_value_set(f"{PREFIX}/verdict/first", json.dumps([verdict.message, verdict.status]))

    def _judge(self) -> Verdict | None:
        """What process 0 makes of everyone's signs."""
        now = time.monotonic()
        for said in self._read("sign"):
            sign = Sign(**json.loads(said))
            old, beaten, moved = self._seen.get(sign.process, (sign, now, now))
            self._seen[sign.process] = (
                sign,
                beaten if sign.beats == old.beats else now,
                moved if sign.marks == old.marks else now,
            )
        return overdue(self._seen, now, self._patience)

    def _read(self, kind: str) -> list[str]:
        """Values of the store's keys of one kind; a missing one is no error."""
        return [value for _, value in self._client.key_value_dir_get(f"{PREFIX}/{kind}")]

    def _end(self, verdict: Verdict) -> None:
        """Ends this process, unless its main thread is about to."""
        self._verdict = verdict
        if self._closed.wait(BEAT):  # the main thread has failed by the same, and says it
            return
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            print(f"error: {verdict.message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        self._note_read()
        os._exit(verdict.status)

    def _note_read(self) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{PREFIX}/read/{self._index}", "")
