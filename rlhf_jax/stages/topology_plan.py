"""What `--topology` says: each stage's programs compiled for a slice, against what its chips have and can do."""

import dataclasses
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.distributed.chips import GIB, Chip, chip_of
from rlhf_jax.distributed.program import Collective, Memory, collectives, memory_of
from rlhf_jax.errors import UserError
from rlhf_jax.stages.abstract import Abstract
from rlhf_jax.stages.ahead import Program, Programs, bytes_on_device, programs_of
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.footprint import roofline

SHOWN = 3  # collectives of a program, those that send most


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the compiler says of a program.

    Attributes:
      memory: of one device; None where it refused the program for want of it.
      refused: bytes that it said it would need, where it refused.
      exchanges: collectives, those that send most first.
      seconds: that compiling took.
    """

    memory: Memory | None
    refused: float
    exchanges: list[Collective]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program against a chip.

    Attributes:
      memory: bytes that one device needs for the call, all that the stage keeps counted.
      temporary: of them those of the call alone.
      fits: whether they are there.
      seconds: {what bounds it: the least time that takes}: "compute", "memory", "network".
      devices: of the slice.
    """

    program: Program
    facts: Facts
    memory: float
    temporary: float
    fits: bool
    seconds: dict[str, float]
    chip: Chip
    devices: int

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda what: self.seconds[what])

    @property
    def time(self) -> float:
        """Seconds of a call, if what bounds it hides all else."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Useful FLOPs over what the chips could do in `time`."""
        return self.program.useful / (self.time * self.devices * self.chip.flops)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage on a slice.

    Attributes:
      sizes: {what it keeps: bytes on one device}; what several parts hold counts for the first.
      compiled: its programs; none where already what it keeps is too much, and fewer where the first that did not fit
        was enough to know.
    """

    programs: Programs
    sizes: dict[str, int]
    compiled: list[Compiled]
    chip: Chip

    @property
    def resident(self) -> int:
        return sum(self.sizes.values())

    @property
    def fits(self) -> bool:
        return len(self.compiled) == len(self.programs.programs) and all(one.fits for one in self.compiled)

    @property
    def worst(self) -> Compiled:
        return max(self.compiled, key=lambda one: one.memory)

    @property
    def time(self) -> float:
        """Seconds of one iteration, each program bound by what bounds it most."""
        return sum(one.time * one.program.calls for one in self.compiled)


def _needed(message: str) -> float:
    """Bytes that a program would have needed, from the compiler's refusal."""
    match = re.search(r"Used ([\d.]+)([GMK]) of", message) or re.search(r"\(([\d.]+)([GMK])\) exceeds", message)
    return float(match.group(1)) * {"G": GIB, "M": 2**20, "K": 2**10}[match.group(2)] if match else float("inf")


def _compile(lowered: Any, devices: int) -> Facts:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Facts(None, _needed(str(error)), [], time.monotonic() - began)
        exchanges = collectives(program_text(compiled, Path(folder)), devices)
    return Facts(memory_of(compiled), 0.0, exchanges, time.monotonic() - began)


def program_text(compiled: Any, folder: Path) -> str:
    """The compiled program; from the compiler's own file where it can not be handed over (seen of a v5p's)."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        (path,) = folder.glob("*after_optimizations.txt")
        return path.read_text()


def facts_of(program: Program, devices: int, target: str, notes: Path | None = None) -> Facts:
    """What the compiler says of a program, from `notes` where that folder has it already.

    Args:
      target: names what it is compiled for, as the chips' kind.
    """
    lowered = program.lower()
    if notes is None:
        return _compile(lowered, devices)
    text = f"{jax.__version__} {target} {devices} {lowered.as_text()}"
    note = notes / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if note.exists():
        kept = json.loads(note.read_text())
        memory = Memory(**kept["memory"]) if kept["memory"] else None
        return Facts(memory, kept["refused"], [Collective(**e) for e in kept["exchanges"]], kept["seconds"])
    facts = _compile(lowered, devices)
    notes.mkdir(parents=True, exist_ok=True)
    unfinished = note.with_suffix(".tmp")
    unfinished.write_text(json.dumps(dataclasses.asdict(facts)))
    unfinished.replace(note)
    return facts


def against(program: Program, facts: Facts, kept: Any, chip: Chip, devices: int) -> Compiled:
    """A compiled program against a chip, beside what the stage keeps."""
    resident = bytes_on_device(kept)
    given = bytes_on_device((kept, program.arguments)) - resident  # of the call alone
    if facts.memory is None:
        memory, temporary = max(facts.refused, resident + given), facts.refused
    else:
        temporary = facts.memory.temporary
        memory = resident + given + facts.memory.outputs + temporary
    sent = sum(exchange.sent for exchange in facts.exchanges)
    seconds = roofline(program.flops, program.read, sent, chip, devices)
    fits = facts.memory is not None and memory <= chip.memory
    return Compiled(program, facts, memory, temporary, fits, seconds, chip, devices)


def _sizes(kept: dict[str, Any]) -> dict[str, int]:
    """{what is kept: bytes on one device}; what several hold counts for the first."""
    sizes: dict[str, int] = {}
    seen: list[Any] = []
    for what, tree in kept.items():
        before = bytes_on_device(seen)
        seen.append(tree)
        sizes[what] = bytes_on_device(seen) - before
    return sizes


def plan_stage(
    context: Context, abstract: Abstract, notes: Path | None = None, *, every: bool = True
) -> StagePlan | None:
    """The programs of a stage, compiled for its mesh; None of a kind without any.

    Args:
      every: whether to go on behind a program that does not fit.

    Raises:
      UserError: nothing is known of the mesh's chips.
    """
    mesh = context.mesh()
    kind = mesh.devices.flat[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        raise UserError(f"{kind}: no data sheet of this chip is known")
    programs = programs_of(context, abstract, mesh)
    if programs is None:
        return None
    sizes, compiled = _sizes(programs.kept), []
    if sum(sizes.values()) <= chip.memory:
        target = f"{kind} {[device.coords for device in mesh.devices.flat] if mesh.size > 1 else ''}"
        for program in sorted(programs.programs, key=lambda program: program.cache > 0):  # decoding compiles longest
            facts = facts_of(program, mesh.size, target, notes)
            compiled.append(against(program, facts, programs.kept, chip, mesh.size))
            if not (every or compiled[-1].fits):
                break
    return StagePlan(programs, sizes, compiled, chip)


def describe(context: Context, abstract: Abstract, notes: Path | None = None) -> Iterator[str]:
    """The lines of one stage."""
    plan = plan_stage(context, abstract, notes)
    if plan is None:
        yield "no program of its own on the devices, or one that is not planned"
        return
    held = ", ".join(f"{what} {_size(size)}" for what, size in plan.sizes.items())
    yield f"kept on each chip: {_size(plan.resident)} ({held})"
    for one in plan.compiled:
        yield from _lines(one)
    if not plan.fits:
        yield f"DOES NOT FIT: {advice(context, plan)}"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number > GIB / 20 else f"{number / 2**20:.2f} MiB"


def _lines(one: Compiled) -> Iterator[str]:
    program, chip = one.program, one.chip
    parts = f"temporary {_size(one.temporary)}"
    if program.cache:
        parts += f", of it keys and values {_size(program.cache)}"
    share = one.memory / chip.memory
    room = f"{_size(one.memory)} of {_size(chip.memory)} ({share:.0%}; {parts})"
    times = ", ".join(f"{what} {seconds:.3g} s" for what, seconds in one.seconds.items() if seconds)
    yield (
        f"{program.name}: {room}; at least {one.time:.3g} s, bound by {one.bound} ({times}), MFU at most "
        f"{one.mfu:.0%}; {program.flops / 1e12:.3g} TFLOP; compiled in {one.facts.seconds:.0f} s"
    )
    for exchange in one.facts.exchanges[:SHOWN]:
        if exchange.sent > 2**20:
            yield (
                f"    {exchange.kind} {exchange.shape} {exchange.times:.0f} times: {_size(exchange.sent)} sent "
                f"by each chip ({exchange.where[-60:]})"
            )


def advice(context: Context, plan: StagePlan) -> str:
    """Which field to change for a stage that does not fit."""
    config, where, chip = context.config, f"stages.{context.name}", plan.chip
    most = plan.worst.memory if plan.compiled else plan.resident
    what = plan.worst.program.name if plan.compiled else "what is kept"
    needed = f"{what} needs {most / GIB:.2f} GiB and a chip has {chip.memory / GIB:.2f}: "
    largest = max(plan.sizes, key=lambda part: plan.sizes[part])
    if plan.resident > 0.8 * chip.memory:
        knobs = [f"{where}.mesh.fsdp={2 * context.mesh().shape['fsdp']} on twice the chips"]
        if "lora" in config and not config.lora.rank:
            knobs.insert(0, f"{where}.lora.rank=16")
        elif "compute" in config and not config.compute.base:
            knobs.insert(0, f'{where}.compute.base="int8"')
        if largest == "optimizer":
            knobs.insert(0, f'{where}.optimizer.moment_dtype="bfloat16"')
        return f"{needed}what is kept ({largest} most of all) leaves too little; try {', or '.join(knobs)}"
    program = plan.worst.program
    if program.cache:
        rows = max(1, config.batch_size // (2 * config.get("rollout_parts", 1)))
        knob = f"{where}.mesh.tensor={2 * context.mesh().shape['tensor']}, by which decoding shards the weights"
        held = program.cache / GIB
        return f"{needed}try {knob}, or {where}.decode_rows={rows} (keys and values take {held:.2f})"
    if "accumulation" in config:
        knobs = [f"{where}.accumulation={2 * config.accumulation}"]
        if config.compute.remat != "full":
            knobs.insert(0, f'{where}.compute.remat="full"')
        return f"{needed}try {', or '.join(knobs)}"
    return f"{needed}try a smaller {where}.batch_size"
