"""What trainable stages share: the number of steps, and a role's state and step by any gradient."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import stage
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.models import LoraConfig, TransformerConfig
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.stages.train import prepare, steps_of
from rlhf_jax.training.artifacts import Role

CONFIG = TransformerConfig(vocab_size=13, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32)


@pytest.mark.parametrize(
    "epochs, records, size, steps", [(1.0, 8, 4, 2), (1.0, 9, 4, 3), (0.5, 9, 4, 2), (0.1, 3, 4, 1)]
)
def test_steps_are_those_of_all_epochs_and_one_at_least(epochs, records, size, steps):
    assert steps_of(SimpleNamespace(epochs=epochs, batch_size=size), records) == steps


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_a_role_is_moved_by_whatever_gradient_it_is_given(lora):
    config = stage("sft", init="sft", data="x.jsonl")
    config.optimizer.update(name="adamw", learning_rate=0.5, b1=0.0, b2=0.0, weight_decay=0.0, warmup=0.0)
    spec, key = RoleSpec(CONFIG, lora), jax.random.key(0)
    weights = {"base": jax.jit(lambda key: init_base(CONFIG, key=key))(key)}
    if lora:
        weights["adapters"] = init_adapters(CONFIG, lora, key=key)
    trains = "adapters" if lora else "base"

    def gradient(trainable, frozen, batch):
        """The sign of it is all that adamw reads here: it moves every parameter by the learning rate."""
        return jax.tree.map(lambda x: jnp.full_like(x, batch), trainable), {"loss/train": frozen["seen"]}

    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        role = Role(spec, weights, SimpleNamespace())
        state, frozen, step = prepare(SimpleNamespace(config=config), role, gradient, 10, mesh)
        assert set(state.params) == {trains} and set(frozen) == set(weights) - {trains}
        assert all(part is weights[name] for name, part in frozen.items())
        state, metrics = step(state, {"seen": jnp.float32(7.0)}, jnp.float32(1e3))
    assert int(state.step) == 1 and float(metrics["loss/train"]) == 7.0
    for before, after in zip(jax.tree.leaves(weights[trains]), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(after, before - 0.5, rtol=1e-4, atol=1e-4)  # `before` was not donated
