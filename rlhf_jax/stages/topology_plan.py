"""What `--topology` says: each stage's programs compiled for a slice, against what its chips have and can do."""

import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

from rlhf_jax.distributed.chips import GIB, Chip, chip_of
from rlhf_jax.distributed.program import Collective, collectives, memory_of
from rlhf_jax.errors import UserError
from rlhf_jax.stages.abstract import Abstract
from rlhf_jax.stages.ahead import Program, Programs, bytes_on_device, programs_of
from rlhf_jax.stages.context import Context

SHOWN = 3  # collectives of a program, those that send most


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of compiling a program.

    Attributes:
      memory: bytes that one device needs for the call, all that the stage keeps counted.
      temporary: of them those of the call alone.
      exchanges: collectives, those that send most first; () where it did not fit.
      fits: whether the compiler found room.
      seconds: {what bounds it: the least time that takes}: "compute", "memory", "network".
      mfu: useful FLOPs over what the chips could do in the longest of these; 0 for programs that are not bound so.
    """

    program: Program
    memory: float
    temporary: float
    exchanges: list[Collective]
    fits: bool
    seconds: dict[str, float]
    compile_seconds: float

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda what: self.seconds[what])

    @property
    def time(self) -> float:
        """Seconds of a call, if what bounds it hides all else."""
        return max(self.seconds.values())

    def mfu(self, chip: Chip, devices: int) -> float:
        return self.program.useful / (self.time * devices * chip.flops)


def roofline(program: Program, chip: Chip, devices: int, sent: float) -> dict[str, float]:
    """The least seconds of a call by what bounds it; `sent` bytes leave each device along one axis of the torus."""
    return {
        "compute": program.flops / (devices * chip.flops),
        "memory": program.read / chip.bandwidth,
        "network": sent / chip.link if chip.link else 0.0,
    }


def _used(message: str) -> float:
    """Bytes that a program would have needed, from the compiler's refusal."""
    match = re.search(r"Used ([\d.]+)([GMK]) of", message)
    return float(match.group(1)) * {"G": GIB, "M": 2**20, "K": 2**10}[match.group(2)] if match else float("inf")


def compile_program(program: Program, kept: Any, chip: Chip, devices: int) -> Compiled:
    """Compiles for the mesh that it was lowered for."""
    began = time.monotonic()
    resident = bytes_on_device(kept)
    given = bytes_on_device((kept, program.arguments)) - resident  # of the call alone
    try:
        compiled = program.lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _used(str(error))
        seconds = roofline(program, chip, devices, 0.0)
        return Compiled(program, max(used, resident + given), used, [], False, seconds, time.monotonic() - began)
    memory = memory_of(compiled)
    exchanges = collectives(compiled.as_text(), devices)
    total = resident + given + memory.outputs + memory.temporary
    seconds = roofline(program, chip, devices, sum(exchange.sent for exchange in exchanges))
    fits = total <= chip.memory
    return Compiled(program, total, memory.temporary, exchanges, fits, seconds, time.monotonic() - began)


def plan_stage(context: Context, abstract: Abstract) -> tuple[Programs, list[Compiled]] | None:
    """The compiled programs of a stage; None of a kind without any."""
    mesh = context.mesh()
    programs = programs_of(context, abstract, mesh)
    if programs is None:
        return None
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if chip is None:
        raise UserError(f"{mesh.devices.flat[0].device_kind}: no data sheet of this chip is known")
    return programs, [compile_program(p, programs.kept, chip, mesh.size) for p in programs.programs]


def describe(context: Context, abstract: Abstract) -> Iterator[str]:
    """The lines of one stage."""
    planned = plan_stage(context, abstract)
    if planned is None:
        yield "no program of its own on the devices, or one that is not planned"
        return
    programs, compiled = planned
    mesh = context.mesh()
    chip = chip_of(mesh.devices.flat[0].device_kind)
    assert chip is not None
    sizes: dict[str, int] = {}
    seen: list[Any] = []
    for what, tree in programs.kept.items():  # what several hold counts for the first
        before = bytes_on_device(seen)
        seen.append(tree)
        sizes[what] = bytes_on_device(seen) - before
    held = ", ".join(f"{what} {size / GIB:.2f}" for what, size in sizes.items())
    yield f"kept on each chip: {sum(sizes.values()) / GIB:.2f} GiB ({held})"
    for one in compiled:
        yield from _lines(one, chip, mesh.size)
    worst = max(compiled, key=lambda one: one.memory)
    if not all(one.fits for one in compiled):
        yield f"DOES NOT FIT: {advice(context, programs, worst, sizes, chip)}"


def _lines(one: Compiled, chip: Chip, devices: int) -> Iterator[str]:
    program = one.program
    parts = f"temporary {one.temporary / GIB:.2f}"
    if program.cache:
        parts += f", of it keys and values {program.cache / GIB:.2f}"
    share = one.memory / chip.memory
    room = f"{one.memory / GIB:.2f} of {chip.memory / GIB:.2f} GiB ({share:.0%}; {parts})"
    times = ", ".join(f"{what} {seconds:.3g} s" for what, seconds in one.seconds.items() if seconds)
    yield (
        f"{program.name}: {room}; at least {one.time:.3g} s, bound by {one.bound} ({times}), MFU at most "
        f"{one.mfu(chip, devices):.0%}; {program.flops / 1e12:.3g} TFLOP; compiled in {one.compile_seconds:.0f} s"
    )
    for exchange in one.exchanges[:SHOWN]:
        if exchange.sent > 2**20:
            yield (
                f"    {exchange.kind} {exchange.shape} {exchange.times:.0f} times: {exchange.sent / GIB:.3g} GiB sent "
                f"by each chip ({exchange.where[-60:]})"
            )


def advice(context: Context, programs: Programs, worst: Compiled, sizes: dict[str, int], chip: Chip) -> str:
    """Which field to change for a program that does not fit."""
    config, where = context.config, f"stages.{context.name}"
    resident, over = sum(sizes.values()), worst.memory - chip.memory
    needed = f"{worst.program.name} needs {worst.memory / GIB:.2f} GiB and a chip has {chip.memory / GIB:.2f}: "
    largest = max(sizes, key=lambda what: sizes[what])
    if resident > 0.8 * chip.memory:
        knobs = [f"{where}.mesh.fsdp={2 * context.mesh().shape['fsdp']} on twice the chips"]
        if "lora" in config and not config.lora.rank:
            knobs.insert(0, f"{where}.lora.rank=16")
        elif "compute" in config and not config.compute.base:
            knobs.insert(0, f'{where}.compute.base="int8"')
        if largest == "optimizer":
            knobs.insert(0, f'{where}.optimizer.moment_dtype="bfloat16"')
        return f"{needed}what is kept ({largest} most of all) leaves too little; try {', or '.join(knobs)}"
    if worst.program.cache:
        rows = max(1, config.batch_size // (2 * config.get("rollout_parts", 1)))
        held = worst.program.cache / GIB
        return f"{needed}try {where}.decode_rows={rows}, or a larger {where}.mesh.tensor (the cache is {held:.2f})"
    if "accumulation" in config and over > 0:
        knobs = [f"{where}.accumulation={2 * config.accumulation}"]
        if config.compute.remat != "full":
            knobs.insert(0, f'{where}.compute.remat="full"')
        return f"{needed}try {', or '.join(knobs)}"
    return f"{needed}try a smaller {where}.batch_size"
