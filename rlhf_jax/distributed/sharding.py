"""The mesh as data: axes `data`, `fsdp`, `tensor`, and two tables from logical axes to them.

One CPU is the mesh (1, 1, 1). Training shards parameters over `fsdp` and gathers them where they are used; a rollout
reads every weight for every token, so its table leaves them whole along `fsdp` and shards them over `tensor` alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError

Table = Mapping[str | None, Any]

TRAINING: Table = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "rank": None,
    None: None,
}
ROLLOUT: Table = {**TRAINING, "embed": None}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices; `data` = -1 takes what the other two leave.

    On TPU the axes follow the network: `fsdp` and `tensor` stay inside a slice, `data` goes over the slices first.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if data == -1:
        shape[0] = len(devices) // (fsdp * tensor)
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"mesh (data {data}, fsdp {fsdp}, tensor {tensor}) does not fill {len(devices)} devices: "
            f"their product must be {len(devices)}"
        )
    return Mesh(_placed(devices, shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def _placed(devices: Any, shape: list[int]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours in it near each other."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *inner = shape
    if data % slices:
        raise UserError(
            f"mesh axis data {data} does not divide over {slices} slices, and fsdp and tensor stay inside of one: make "
            f"data a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any, table: Table) -> PartitionSpec:
    """Maps logical axes to mesh axes; a dimension that its mesh axes do not divide stays whole."""
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        target = table[axis]
        names = (target,) if isinstance(target, str) else target or ()
        entries.append(target if size % int(np.prod([mesh.shape[n] for n in names])) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for `x` to be sharded along the logical `axes`; without a mesh (`jax.set_mesh`) it returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh, TRAINING))


def tree_shardings(shapes: Any, axes: Any, mesh: Any, table: Table = TRAINING) -> Any:
    """Shardings for a tree.

    Args:
      shapes: a tree of arrays or `ShapeDtypeStruct`.
      axes: the same tree with a tuple of logical axis names in place of each leaf.
      table: `TRAINING` or `ROLLOUT`.
    """
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, _spec(names, leaf.shape, mesh, table)), shapes, axes)


def shapes_at(like: Any, shardings: Any) -> Any:
    """A tree's shapes and dtypes with their places, for what is loaded or only compiled."""
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), like, shardings)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(rows: int, load: Callable[[np.ndarray], dict[str, np.ndarray]], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds a global batch of which this process loads only the rows its own devices hold.

    Args:
      rows: rows of the global batch.
      load: row numbers (n,) -> {field: (n, ...)}; called once, with the rows of this process's devices.

    Raises:
      UserError: the rows do not divide over the mesh.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise UserError(
            f"a batch of {rows} rows does not divide over {shards} devices (data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']}): make batch_size a multiple of {shards}"
        )
    sharding = batch_sharding(mesh)
    held = sharding.addressable_devices_indices_map((rows,)).values()
    mine = np.unique(np.concatenate([np.arange(rows)[index[0]] for index in held if index is not None]))
    local = load(mine)

    def whole(field: np.ndarray) -> jax.Array:
        shape = (rows, *field.shape[1:])

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = int(np.searchsorted(mine, start))
            return field[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, shard)

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer a training loop makes
        return {name: whole(field) for name, field in local.items()}


def fetch(tree: Any) -> Any:
    """Whole host copies (numpy) of arrays that may be sharded over processes."""
    if jax.process_count() > 1:
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        tree = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)
