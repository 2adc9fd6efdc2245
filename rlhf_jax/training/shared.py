"""Jitted training steps whose frozen weights hold one base for several roles: the program is given it once."""

from collections.abc import Callable
from typing import Any

import jax

Tree = Any


@jax.tree_util.register_pytree_node_class
class Once:
    """A tree as a pytree that has an array once, in however many places the tree holds it."""

    def __init__(self, tree: Tree):
        leaves, self._structure = jax.tree.flatten(tree)
        self._arrays = list({id(leaf): leaf for leaf in leaves}.values())
        numbers = {id(leaf): i for i, leaf in enumerate(self._arrays)}
        self._places = tuple(numbers[id(leaf)] for leaf in leaves)

    @property
    def tree(self) -> Tree:
        return jax.tree.unflatten(self._structure, [self._arrays[place] for place in self._places])

    def tree_flatten(self) -> tuple[list[Any], Any]:
        return self._arrays, (self._structure, self._places)

    @classmethod
    def tree_unflatten(cls, where: Any, arrays: Any) -> "Once":
        made = object.__new__(cls)
        made._arrays, (made._structure, made._places) = list(arrays), where
        return made


class JittedStep:
    """`jax.jit` of `step(state, frozen, ...)`: the state is donated, and an array of `frozen` is one argument.

    Of two arguments that are one array a compiler counts both against a device's memory: six roles on one base of 7B
    weights were refused on four chips of 16 GB, where they take 11.
    """

    def __init__(self, step: Callable[..., Any], out_shardings: Any = None):
        def program(state: Any, frozen: Once, *rest: Any, **named: Any) -> Any:
            return step(state, frozen.tree, *rest, **named)

        program.__name__ = step.__name__
        self._program: Any = jax.jit(program, donate_argnums=0, out_shardings=out_shardings)

    def __call__(self, state: Any, frozen: Tree, *rest: Any, **named: Any) -> Any:
        return self._program(state, Once(frozen), *rest, **named)

    def lower(self, state: Any, frozen: Tree, *rest: Any, **named: Any) -> jax.stages.Lowered:
        """The program lowered for these arguments, or shapes of them, as `jax.jit`'s own `lower`."""
        return self._program.lower(state, Once(frozen), *rest, **named)

    def programs(self) -> int:
        """How many it was compiled to."""
        return self._program._cache_size()
