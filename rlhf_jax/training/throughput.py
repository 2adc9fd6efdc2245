"""Peak FLOP/s and memory bandwidth of a device, for the MFU estimate and the roofline of decoding."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s a chip by its maker's data sheet.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

# Bytes/s of a chip's memory by its maker's data sheet.
BANDWIDTH = {
    "TPU v4": 1228e9,
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5p": 2765e9,
    "TPU v5": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
    "NVIDIA A100": 2039e9,
    "NVIDIA H100": 3350e9,
    "NVIDIA H200": 4800e9,
}


def peak_bandwidth() -> float | None:
    """Bytes/s of all devices' memory together by the data sheet; None for a device it does not list."""
    kind = jax.devices()[0].device_kind
    known = next((value for name, value in sorted(BANDWIDTH.items(), reverse=True) if kind.startswith(name)), None)
    return None if known is None else known * jax.device_count()


def peak_flops() -> float:
    """FLOP/s of all devices together: from the data sheet, or on other devices (CPU) from a measured matrix product."""
    kind = jax.devices()[0].device_kind
    known = next((value for name, value in sorted(PEAK.items(), reverse=True) if kind.startswith(name)), None)
    if known is not None:
        return known * jax.device_count()
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
