"""Every test shares one compilation cache; JAX's dtype warnings are errors (pyproject.toml).

Programs are compiled without LLVM's optimizations, here and in the commands that tests run: most of the tests' time is
compiling, and half of that was theirs. XLA's own passes are those of every user.
"""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
