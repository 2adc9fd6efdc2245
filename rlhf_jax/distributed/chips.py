"""What accelerators can do by their makers' data sheets: memory, products, bandwidths."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      memory: bytes of HBM that a program can have.
      flops: dense bfloat16 FLOP/s.
      bandwidth: bytes/s of HBM.
      link: bytes/s between neighbours along one axis of the torus, both directions together; 0: no torus.
      hosts: chips of one host.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float = 0.0
    hosts: int = 8


# Google's system pages (cloud.google.com/tpu/docs/system-architecture) and, for links, "How to Scale Your Model"
# (jax-ml.github.io/scaling-book/tpus). Memory is what libtpu's compiler grants a program.
V4 = Chip(30.75 * GIB, 275e12, 1228e9, 9e10, 4)
V5E = Chip(15.75 * GIB, 197e12, 819e9, 9e10, 4)
V5P = Chip(95.74 * GIB, 459e12, 2765e9, 1.8e11, 4)
V6E = Chip(31.25 * GIB, 918e12, 1640e9, 1.8e11, 4)
CHIPS = {  # by how JAX's device_kind begins
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5p": V5P,
    "TPU v5": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "NVIDIA A100": Chip(80e9, 312e12, 2039e9),
    "NVIDIA H100": Chip(80e9, 989e12, 3350e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4800e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device kind, or None for one that no data sheet here lists."""
    return next((chip for name, chip in sorted(CHIPS.items(), reverse=True) if device_kind.startswith(name)), None)
