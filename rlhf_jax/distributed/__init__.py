"""Where arrays live: the mesh, the tables from logical axes to it, and the processes that share it."""

from rlhf_jax.distributed.processes import barrier, initialize, is_main_process
from rlhf_jax.distributed.sharding import (
    ROLLOUT,
    TRAINING,
    batch_sharding,
    constrain,
    fetch,
    make_mesh,
    place_batch,
    replicated,
    tree_shardings,
)

__all__ = [
    "ROLLOUT",
    "TRAINING",
    "barrier",
    "batch_sharding",
    "constrain",
    "fetch",
    "initialize",
    "is_main_process",
    "make_mesh",
    "place_batch",
    "replicated",
    "tree_shardings",
]
