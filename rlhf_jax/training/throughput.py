"""Peak FLOP/s and memory bandwidth of a device, for the MFU estimate and the roofline of decoding."""

import time

import jax
import jax.numpy as jnp

from rlhf_jax.distributed.chips import chip_of


def peak_bandwidth() -> float | None:
    """Bytes/s of all devices' memory together by the data sheet; None for a device it does not list."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.bandwidth * jax.device_count()


def peak_flops() -> float:
    """FLOP/s of all devices together: from the data sheet, or on other devices (CPU) from a measured matrix product."""
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None:
        return chip.flops * jax.device_count()
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    # Virtual CPU devices share the cores, so the machine's peak is one device's.
    return 2 * size**3 / best * jax.process_count()
