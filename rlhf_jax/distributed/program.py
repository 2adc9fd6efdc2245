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


def _named(lines: list[str], name: str) -> str:
    """What the instruction `name` of a computation does, as text; "" where it is not there."""
    return next(
        (line.split(" = ", 1)[1] for line in lines if re.match(rf"\s*(ROOT )?%?{re.escape(name)} = ", line)), ""
    )


def _constant(text: str) -> int | None:
    match = re.search(r"[su]32\[\][^ ]* constant\((\d+)\)", text)
    return int(match.group(1)) if match else None


def _trips(found: dict[str, list[str]], line: str) -> float:
    """How often a while (`line`) runs: what XLA knows, or its bound over what a round of its body adds."""
    known = re.search(r'known_trip_count[^0-9]*"?(\d+)', line)
    condition, body = (re.search(rf"{what}=%?([\w.\-]+)", line) for what in ("condition", "body"))
    if known or not condition or not body:
        return int(known.group(1)) if known else 1
    tests = found[condition.group(1)]
    bounds = [n for n in map(_constant, tests) if n is not None]
    counters = [re.search(r"[su]32\[\].* get-tuple-element\(.*index=(\d+)", text) for text in tests]
    counter = next((int(match.group(1)) for match in counters if match), None)
    return math.ceil(max(bounds) / _added(found, found[body.group(1)], counter)) if bounds else 1


def _added(found: dict[str, list[str]], body: list[str], counter: int | None) -> float:
    """What a round of a loop adds to its counter, itself or by a loop inside of it; 1 where that can not be read."""
    root = next((text for text in body if re.match(r"\s*ROOT .* tuple\(", text)), None)
    if root is None or counter is None:
        return 1

    def grown(name: str) -> float | None:
        """A constant, or how far a loop inside counts."""
        text = _named(body, name)
        handed = re.search(r" get-tuple-element\(.*%([\w.\-]+)\), index=(\d+)", text)
        inner = _named(body, handed.group(1)) if handed else ""
        again = re.search(r" while\(.*body=%?([\w.\-]+)", inner)
        if not handed or not again:
            return _constant(text)
        return _trips(found, inner) * _added(found, found[again.group(1)], int(handed.group(2)))

    result = re.findall(r"%([\w.\-]+)", root.split(" tuple(", 1)[1])[counter]
    added = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)", _named(body, result))
    return next(filter(None, map(grown, added.groups() if added else (result,))), 1)


def times(found: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs in a call of the program; the dearer branch of a conditional stands for all."""
    count: dict[str, float] = {}

    def visit(name: str, often: float) -> None:
        count[name] = count.get(name, 0.0) + often
        for line in found[name]:
            body = re.search(r"body=%?([\w.\-]+)", line)
            if body:
                visit(body.group(1), often * _trips(found, line))
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
    """The exchanges between devices in an optimized HLO module, those that send most first.

    On TPU one exchange goes on beside several computations, each of which names it: a channel counts once.
    """
    found = computations(text)
    out, seen = [], set()
    for name, often in times(found).items():
        for line in found[name]:
            match = re.search(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(", line)
            channel = re.search(r"channel_id=(\d+).*chain_id", line)
            if not match or (channel and channel.group(1) in seen):
                continue
            if channel:
                seen.add(channel.group(1))
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
