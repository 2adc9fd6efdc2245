"""Where arrays live: the mesh, the tables from logical axes to it, and the processes that share it."""

from rlhf_jax.distributed.processes import alone, barrier, fail, initialize, is_main_process, mark, same_everywhere
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
from rlhf_jax.distributed.stopping import stop_requested, stops_after

__all__ = [
    "ROLLOUT",
    "TRAINING",
    "alone",
    "barrier",
    "batch_sharding",
    "constrain",
    "fail",
    "fetch",
    "initialize",
    "is_main_process",
    "make_mesh",
    "mark",
    "place_batch",
    "replicated",
    "same_everywhere",
    "stop_requested",
    "stops_after",
    "tree_shardings",
]
