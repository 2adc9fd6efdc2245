"""A training step whose roles read one base is given that base once."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.training.shared import JittedStep, Once


def advanced(state, frozen, by):
    out = sum(jnp.sum(frozen[role]["base"]["kernel"] * frozen[role]["own"]) for role in sorted(frozen))
    return state + by * out


def roles(kernel, *own):
    return {f"role {i}": {"base": {"kernel": kernel}, "own": each} for i, each in enumerate(own)}


def test_a_tree_comes_back_as_it_was():
    kernel, other = jnp.arange(3.0), jnp.arange(4.0)
    tree = {"a": kernel, "b": [other, kernel], "c": None, "d": (2.5, 2.5)}
    leaves, structure = jax.tree.flatten(Once(tree))
    assert sum(leaf is kernel for leaf in leaves) == 1
    again = jax.tree.unflatten(structure, leaves).tree
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert again["a"] is kernel and again["b"][1] is kernel and again["b"][0] is other and again["d"] == (2.5, 2.5)


def test_equal_arrays_that_are_not_one_stay_two():
    assert len(jax.tree.leaves(Once({"a": jnp.ones(3), "b": jnp.ones(3)}))) == 2


def test_the_program_has_a_shared_array_as_one_argument():
    step, kernel = JittedStep(advanced), jnp.arange(1000.0)
    shared, apart = (roles(*own) for own in ((kernel, 1.0, 2.0), (kernel, 1.0, 2.0)))
    apart["role 1"]["base"]["kernel"] = kernel + 0.0
    arguments = {
        name: step.lower(jnp.float32(0), frozen, 0.5).compile().memory_analysis().argument_size_in_bytes
        for name, frozen in (("shared", shared), ("apart", apart))
    }
    assert arguments["apart"] - arguments["shared"] == kernel.nbytes
    expected = advanced(np.float32(1), jax.tree.map(np.asarray, shared), 0.5)
    np.testing.assert_allclose(step(jnp.float32(1), shared, by=0.5), expected)
    np.testing.assert_allclose(step(jnp.float32(1), apart, 0.5), expected)


def test_shapes_lower_as_their_arrays_do():
    kernel = jnp.arange(1000.0)
    frozen = roles(kernel, jnp.ones(()), jnp.ones(()))
    like = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    lowered = JittedStep(advanced).lower(jnp.float32(0), roles(like, jnp.ones(()), jnp.ones(())), 0.5)
    assert lowered.as_text() == JittedStep(advanced).lower(jnp.float32(0), frozen, 0.5).as_text()


def test_other_values_are_the_same_program_and_the_state_is_donated():
    step, state = JittedStep(advanced), jnp.float32(0)
    for i in range(3):
        kernel, before = jnp.full(10, float(i)), state
        state = step(state, roles(kernel, jnp.float32(1), jnp.float32(i)), 1.0)
        assert before.is_deleted() and not kernel.is_deleted()
    assert float(state) == 20.0 + 60.0 and step.programs() == 1
