"""Every test shares one compilation cache; JAX's dtype warnings are errors (pyproject.toml).

Programs are compiled without LLVM's optimizations and, where jaxlib has that flag, without XLA's MLIR emitters of fused
loops, whose work its older emitter does in less time; here, and in the commands that tests run. Most of the tests' time
is compiling, and each about halves it. XLA's passes over programs are those of every user. Python looks for cycles more
seldom than by itself, which took 5 of 93 seconds of two files.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # 0.12 ends a process that gives it this flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
gc.set_threshold(50_000, 10, 10)
