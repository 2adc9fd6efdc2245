"""Reading compiled programs: a module by hand, and one that JAX compiles for CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.distributed import make_mesh
from rlhf_jax.distributed.program import collectives, computations, memory_of, times
from rlhf_jax.distributed.topology import topology_devices
from rlhf_jax.errors import UserError

BY_HAND = """HloModule jit_step

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %permuted = f32[8]{0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  %reduced = f32[8]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%sum
}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%y), kind=kCustom, calls=%fused
  %loop = (s32[], f32[8]) while(%t), condition=%inner_condition, body=%inner_body
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[4,16]) -> bf16[16,16] {
  %gathered = bf16[16,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4], metadata={op_name="jit(step)/a"}
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scattered = f32[4]{0} reduce-scatter(%v), replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, to_apply=%sum
}
"""


def test_loops_in_loops_multiply():
    found = computations(BY_HAND)
    count = times(found)
    assert (count[""], count["body"], count["fused"], count["inner_body"]) == (1, 3, 3, 15)


RING = """HloModule jit_step

%windowed_body (p: (bf16[8,4], u32[], u32[])) -> (bf16[8,4], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %at = u32[] get-tuple-element(%p), index=1
  %next = u32[] add(%at, %two)
  %sent = bf16[8,4]{1,0} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (bf16[8,4], u32[], /*index=2*/u32[]) tuple(%sent, %next, %z)
}

%windowed_condition (p: (bf16[8,4], u32[], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

%blocks_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %at = s32[] get-tuple-element(%p), index=0
  %ring = (bf16[8,4], u32[], u32[]) while(%t), condition=%windowed_condition, body=%windowed_body
  %done = u32[] get-tuple-element(%ring), index=1
  %next = s32[] add(%at, %done)
  ROOT %out = (s32[], f32[8]) tuple(%next, %y)
}

%blocks_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(20)
  %at = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

%started (p: bf16[2,8]) -> bf16[8,8] {
  %g = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="1"}
}

%beside_a_product (p: bf16[2,8]) -> bf16[8,8] {
  %g = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="1"}
}

ENTRY %main (p: bf16[4,16]) -> bf16[16,16] {
  %a = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%started
  %b = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%beside_a_product
  %loop = (s32[], f32[8]) while(%t), condition=%blocks_condition, body=%blocks_body
}
"""


def test_a_loop_that_counts_by_more_than_one_and_by_a_loop_inside():
    count = times(computations(RING))
    assert (count["blocks_body"], count["windowed_body"]) == (3, 12)  # 20 by 8s; 8 by 2s in each


def test_an_exchange_beside_several_computations_counts_once():
    gathered = [exchange for exchange in collectives(RING, devices=4) if exchange.kind == "all-gather"]
    assert [exchange.sent for exchange in gathered] == [2 * 64 * 3 / 4]


def test_what_a_program_by_hand_sends():
    found = {exchange.kind: exchange for exchange in collectives(BY_HAND, devices=8)}
    gathered, reduced = found["all-gather"], found["all-reduce"]
    assert (gathered.shape, gathered.times, gathered.sent) == ("bf16[16,16]", 1, 2 * 256 * 3 / 4)
    assert gathered.where == "jit(step)/a"
    assert (reduced.times, reduced.sent) == (3, 3 * 4 * 8 * 2 * 1 / 2)  # two devices: each sends half, twice
    assert (found["collective-permute"].times, found["collective-permute"].sent) == (15, 15 * 32)
    assert found["reduce-scatter"].sent == 4 * 4 * 4 * 3 / 4  # of 16 numbers each of four devices sends three parts


def test_a_programs_memory_and_network_are_what_its_shapes_say():
    """A scan over layers of weights that are split over four devices and gathered where they are used."""
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    layers, width = 6, 64

    def layer(x, mine):
        return jnp.tanh(x @ jax.lax.all_gather(mine, "fsdp", axis=1, tiled=True)), None

    columns = PartitionSpec(None, None, "fsdp")
    forward = jax.jit(
        jax.shard_map(
            lambda weights, x: jax.lax.scan(layer, x, weights)[0],
            mesh=mesh,
            in_specs=(columns, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=NamedSharding(mesh, columns))
    x = jax.ShapeDtypeStruct((8, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compiled = forward.lower(weights, x).compile()
    memory = memory_of(compiled)
    assert memory.arguments == 4 * (layers * width * width // 4 + 8 * width)
    assert memory.outputs == 4 * 8 * width and memory.total >= memory.arguments + memory.outputs
    (found,) = collectives(compiled.as_text(), 4)
    assert (found.kind, found.times) == ("all-gather", layers)
    assert found.sent == layers * width * width * 4 * 3 / 4


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:4x4", "v5e:4x4;", "h100:2x2"])
def test_a_slice_that_cannot_be_is_refused_before_libtpu_is_asked(name):
    with pytest.raises(UserError, match="give GENERATION:AxB"):
        topology_devices(name)
