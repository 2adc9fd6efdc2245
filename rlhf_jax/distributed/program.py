"""Reading a compiled program: what it keeps in memory, and what it sends over the network, loops counted."""

import dataclasses
import math
import re
from typing import Any

SIZES: dict[str, float] = {"s4": 0.5, "u4": 0.5, "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1}
SIZES |= {"s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# Bytes that leave a device, over those of the operation's largest array, among n devices on a ring.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in a program.

    Attributes:
      kind: a key of `SENT`.
      shape: dtype and dimensions of its largest array, as "bf16[4096,1024]".
      times: how often a call of the program does it, loops counted.
      sent: bytes that leave one device in all of them.
      where: the JAX operation it came from.
    """

    kind: str
    shape: str
    times: float
    sent: float
    where: str


def computations(text: str) -> dict[str, list[str]]:
    """{name: its instruction lines} of an HLO module; the entry is also ""."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head.group(2)
            found[name] = []
            if head.group(1):
                found[""] = found[name]
        elif name and line.startswith(" "):
            found[name].append(line)
    return found


def _trips(lines: list[str], line: str) -> float:
    """How often a while runs: what XLA knows, or the one constant that its condition (`lines`) compares with."""
    known = re.search(r'known_trip_count[^0-9]*"?(\d+)', line)
    if known:
        return int(known.group(1))
    bounds = [int(n) for text in lines for n in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", text)]
    return max(bounds) if bounds else 1


def times(found: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs in a call of the program; the dearer branch of a conditional stands for all."""
    count: dict[str, float] = {}

    def visit(name: str, often: float) -> None:
        count[name] = count.get(name, 0.0) + often
        for line in found[name]:
            body = re.search(r"body=%?([\w.\-]+)", line)
            if body:
                condition = re.search(r"condition=%?([\w.\-]+)", line)
                visit(body.group(1), often * _trips(found[condition.group(1)] if condition else [], line))
                continue
            for called in re.findall(r"(?:calls|to_apply|\w+_computation)=%?([\w.\-]+)", line):
                if called in found:
                    visit(called, often)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for branch in branches.split(","):
                    visit(branch.strip().lstrip("%"), often)

    visit("", 1.0)
    return count


def _largest(arrays: list[tuple[str, str]]) -> tuple[str, float]:
    """(the array as text, its bytes) of (dtype, dimensions) pairs."""
    sizes = [
        (f"{dtype}[{dims}]", SIZES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims in arrays
    ]
    return max(sizes, key=lambda entry: entry[1], default=("", 0.0))


def _group(line: str, devices: int) -> int:
    """Devices that exchange with each other."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed.group(1).split(","))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if tiled:
        return int(tiled.group(2))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    return devices


def collectives(text: str, devices: int) -> list[Collective]:
    """The exchanges between devices in an optimized HLO module, those that send most first."""
    found = computations(text)
    out = []
    for name, often in times(found).items():
        for line in found[name]:
            match = re.search(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(", line)
            if not match:
                continue
            shape, size = _largest(re.findall(r"([a-z]\w*)\[([\d,]*)\]", match.group(1)))
            group = _group(line, devices)
            if match.group(2) == "reduce-scatter":
                size *= group  # what is written is a share of what was reduced
            where = re.search(r'op_name="([^"]*)"', line)
            sent = often * size * SENT[match.group(2)](group)
            out.append(Collective(match.group(2), shape, often, sent, where.group(1) if where else ""))
    return sorted(out, key=lambda exchange: -exchange.sent)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: what is there before the call, donated parts too.
      outputs: what it makes beside what it writes in place of donated arguments.
      temporary: the most it has besides at any time.
    """

    arguments: int
    outputs: int
    temporary: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary


def memory_of(compiled: Any) -> Memory:
    """The memory of a `jax.stages.Compiled`."""
    stats = compiled.memory_analysis()
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, made, stats.temp_size_in_bytes)
