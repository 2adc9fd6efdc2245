"""Where arrays live: the mesh, the tables from logical axes to it, and the processes that share it."""

from rlhf_jax.distributed.processes import (
    alone,
    barrier,
    disk_full,
    fail,
    initialize,
    is_main_process,
    mark,
    one_folder,
    same_everywhere,
)
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
from rlhf_jax.distributed.storage import remote

__all__ = [
    "ROLLOUT",
    "TRAINING",
    "alone",
    "barrier",
    "batch_sharding",
    "constrain",
    "disk_full",
    "fail",
    "fetch",
    "initialize",
    "is_main_process",
    "make_mesh",
    "mark",
    "one_folder",
    "place_batch",
    "remote",
    "replicated",
    "same_everywhere",
    "stop_requested",
    "stops_after",
    "tree_shardings",
]
