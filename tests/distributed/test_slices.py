"""The mesh over TPU slices: fsdp and tensor inside of one, data over all."""

import dataclasses

import pytest

from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice of 4 x 4 chips, as JAX describes it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices):
    places = [(s, x, y) for s in range(slices) for y in range(4) for x in range(4)]
    return [Chip(i, s, (x, y, 0), process_index=i // 4) for i, (s, x, y) in enumerate(places)]


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 8, 1), (2, 16, 1), (8, 2, 2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_fsdp_and_tensor_stay_inside_a_slice(shape, mixed):
    devices = chips(2)
    mesh = make_mesh(*shape, devices=devices[::2] + devices[1::2] if mixed else devices)
    assert mesh.devices.shape == shape and len(set(mesh.devices.flat)) == 32
    for number, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {number // (shape[0] // 2)}


def test_tensor_neighbours_are_neighbours_of_the_network():
    mesh = make_mesh(1, 4, 4, devices=chips(1))
    for row in mesh.devices[0]:
        columns = {device.coords[:2] for device in row}
        assert len({x for x, _ in columns}) == 1 or len({y for _, y in columns}) == 1


def test_data_that_does_not_divide_over_the_slices_is_refused():
    with pytest.raises(UserError, match="data 1 does not divide over 2 slices.*make data a multiple of 2"):
        make_mesh(1, 8, 4, devices=chips(2))
