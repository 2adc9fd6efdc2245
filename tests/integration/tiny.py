"""The quickstart job shrunk to one layer and a few steps, and how tests run it: by the real command, in a process.

A config file of a test is three lines that call `tiny_config`; what it changes besides goes on the command line.
"""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("prepare", "pretrain", "sft", "sft_control", "reward", "ppo", "memorization")
TRAINED = ("pretrain", "sft", "sft_control", "reward", "ppo")

# One device, and one thread a program: its bits then depend on nothing but the program.
ALONE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false",
}


def tiny_config(source: str, stages: Iterable[str] = STAGES, lora_rank: int = 0):
    """`configs/quickstart.py` made small: some of its stages, on the files of `source`, with adapters where asked."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    config.logging.update(every=1, tensorboard=False)
    config.stages.prepare.update(
        source=source,
        fractions=dict(pretrain=0.3, sft=0.2, preference=0.15, prompts=0.1, heldout=0.1, secrets=0.15),
        vocab_size=400,
        max_pretrain_bytes=14_000,
        prompt_tokens=64,
        completion_tokens=48,
        examples=dict(sft=48, preference=48, prompts=24, heldout=12),
        secrets=dict(per_cell=2, duplicates=(1, 4)),
    )
    shape = dict(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, ffn=64, context=112)
    for name, stage in config.stages.items():
        if stage.kind == "sft":
            stage.update(model=shape, sequence_length=112, batch_size=8, accumulation=1, epochs=1.0)
        if stage.kind == "reward":
            stage.update(batch_size=8, accumulation=1, epochs=1.0, max_new_tokens=8)
            stage.update(rollout_batch_size=16, calibration_prompts=8)
        if stage.kind == "ppo":
            stage.update(iterations=4, batch_size=8, accumulation=1, epochs=1, minibatches=2, max_new_tokens=16)
        if stage.kind == "memorization":
            stage.update(batch_size=8)
        if "checkpoint" in stage:
            stage.checkpoint.every = 2
            stage.evaluation.update(every=2, records=8, samples=2)
        if "lora" in stage and name != "pretrain":
            stage.lora.rank = lora_rank
    for name in [name for name in config.stages if name not in stages]:
        del config.stages[name]
    return config


def write_config(path: Path, source: Path, extra: str = "", **options) -> Path:
    """A config file that returns `tiny_config(source, **options)` after the statements `extra` on `config`."""
    lines = [
        "import runpy",
        "from rlhf_jax.config import stage",
        f"tiny = runpy.run_path({str(Path(__file__).absolute())!r})",
        "def get_config():",
        f"    config = tiny['tiny_config']({str(source)!r}, **{options!r})",
        *(f"    {line}" for line in extra.splitlines()),
        "    return config",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclasses.dataclass
class Finished:
    """What a command left: its exit status, negative for a signal, and what it printed."""

    status: int
    stdout: str
    stderr: str


class Command:
    """`python -m rlhf_jax.main` in its own process; its output goes to files beside the work directory.

    `merged` writes what goes to stderr to stdout, in the order of writing; `program` replaces the module.
    """

    def __init__(
        self,
        config: Path,
        workdir: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        log: str = "",
        merged: bool = False,
        program: tuple[str, ...] = ("-m", "rlhf_jax.main"),
    ):
        self._logs = [workdir.with_name(f"{workdir.name}{log}.{stream}") for stream in ("stdout", "stderr")]
        given = {k: v for k, v in os.environ.items() if not k.startswith("RLHF_JAX_")}
        command = [sys.executable, *program, f"--config={config}", f"--workdir={workdir}", *flags]
        with self._logs[0].open("w") as out, self._logs[1].open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT if merged else err,
                cwd=workdir.parent,
                env={**given, "PYTHONPATH": str(ROOT), **ALONE, **(environment or {})},
            )

    def wait(self, timeout: float = 300) -> Finished:
        try:
            status = self.process.wait(timeout)
        finally:
            self.process.kill()
        return Finished(status, *(log.read_text() for log in self._logs))

    def signal_when(self, condition: Callable[[], bool], number: int) -> Finished:
        """Sends a signal the moment `condition()` holds; if the command ends before, no signal is sent."""
        while self.process.poll() is None:
            if condition():
                os.kill(self.process.pid, number)
                break
            time.sleep(0.0005)
        return self.wait()


def run_main(config: Path, workdir: Path, *flags: str, environment: dict[str, str] | None = None) -> Finished:
    """Runs the command to its end."""
    return Command(config, workdir, *flags, environment=environment).wait()


def copy_stages(source: Path, workdir: Path, stages: Iterable[str]) -> Path:
    """A new work directory that holds finished stages of another."""
    workdir.mkdir(parents=True)
    for stage in stages:
        shutil.copytree(source / stage, workdir / stage)
    return workdir


def read_rows(path: Path) -> list[dict[str, float]]:
    """The complete rows of a metrics.jsonl, as long as they are."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def metrics(workdir: Path, stage: str) -> list[dict[str, float]]:
    """A stage's logged rows without what a clock measured."""
    rows = read_rows(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def reached(workdir: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the stage has logged `step`."""
    path = workdir / stage / "metrics.jsonl"
    return lambda: any(row["step"] >= step for row in read_rows(path))


def unfinished_saves(workdir: Path, stage: str) -> list[Path]:
    """Folders of checkpoints of the running state that are being written."""
    return list((workdir / stage / "checkpoints" / "latest").glob("*orbax-checkpoint-tmp*"))


def result(workdir: Path, stage: str) -> dict:
    return json.loads((workdir / stage / "result.json").read_text())


def model_info(workdir: Path, stage: str) -> dict:
    return json.loads((workdir / stage / "model.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def status_name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else str(status)
