"""`metrics.jsonl`, TensorBoard events and the progress line of a stage."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rlhf_jax.distributed.processes import is_main_process


def cut_back(path: Path, step: int) -> None:
    """Drops rows after `step`, and a torn last line: what is left is what a run stopped at `step` had written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class MetricsLog:
    """Appends one JSON object a logged step, `step` first, and mirrors it to TensorBoard; process 0 alone writes."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = True):
        self._file = self._events = None
        if not is_main_process():
            return
        path = folder / "metrics.jsonl"
        cut_back(path, step)
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter  # slow to import

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Writes one row; arrays are fetched from the device here. Returns the row."""
        row: dict[str, float] = {"step": step}
        for name, value in metrics.items():
            number = np.asarray(value).item()
            row[name] = number if isinstance(number, int) or math.isfinite(number) else float("nan")
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, as `write` has said: rows are flushed as they come
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()


class Progress:
    """A stage's progress bar with ETA and the figures that matter; time of earlier runs counts in."""

    def __init__(self, name: str, total: int, done: int, seconds_before: float):
        self._before, self._start = seconds_before, time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            disable=not is_main_process(),
            file=sys.stdout,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    @property
    def seconds(self) -> float:
        """Seconds spent on the stage, over all its runs."""
        return self._before + time.monotonic() - self._start

    def update(self, figures: dict[str, float] | None = None) -> None:
        if figures:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
