"""Roles without arrays: every weight is its shape, dtype and place on a mesh, for programs that are only compiled."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax.config import is_folder, scoring_model
from rlhf_jax.distributed.sharding import shapes_at, tree_shardings
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.leaves import base_leaves, shapes
from rlhf_jax.models.pretrained import is_reward_model
from rlhf_jax.models.roles import RoleSpec, Weights, split, weight_axes
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.plan import shape_of
from rlhf_jax.stages.scorer import start_scorer
from rlhf_jax.training.artifacts import Role, base_folder, checkpoint_config, continue_role


class NoTokenizer:
    """What stands for a tokenizer where nothing is read: ids that any vocabulary has."""

    stop_ids = (0,)
    fim_middle_id = None
    identity = "none"


def placed(spec: RoleSpec, like: Weights, mesh: Mesh) -> Weights:
    """A role's weights as shapes with their shardings."""
    return shapes_at(like, tree_shardings(like, weight_axes(spec, like), mesh))


def made_of(function: Callable[[Role], Role], role: Role, mesh: Mesh) -> Role:
    """What `function` makes of a role, traced: parts that it hands on are the same objects, so bases stay shared."""
    out: list[Role] = []
    kept: dict[str, str] = {}

    def trace(weights: Weights) -> Weights:
        made = function(dataclasses.replace(role, weights=weights))
        out.append(made)
        kept.update(
            (name, old) for name, part in made.weights.items() for old, given in weights.items() if part is given
        )
        return made.weights

    like = jax.eval_shape(trace, role.weights)
    weights = {**placed(out[0].spec, like, mesh), **{name: role.weights[old] for name, old in kept.items()}}
    return dataclasses.replace(out[0], weights=weights)


class Abstract:
    """The finished models of an experiment's stages and folders, as `Context.load` would give them.

    Roles that stand on one base hold the same objects, as loaded ones do.
    """

    def __init__(self, contexts: dict[str, Context], mesh: Mesh):
        self._contexts, self._mesh = contexts, mesh
        self._found: dict[str, Role] = {}

    def load(self, reference: str) -> Role:
        """The role of a stage or checkpoint folder; of a laplace stage its subject's."""
        stages = next(iter(self._contexts.values())).experiment.stages
        reference = scoring_model(stages, reference)
        if reference not in self._found:
            make = self._folder if is_folder(stages, reference) else self._stage
            self._found[reference] = make(reference)
        return self._found[reference]

    def start(self, name: str) -> Role:
        """The role that a stage trains, before its first step."""
        context = self._contexts[name]
        config = context.config
        if config.init == "scratch":
            shape = shape_of(context, name)
            assert shape is not None, f"the vocabulary of {name} is not known"
            like: Weights = {"base": shapes(base_leaves(shape), shape.param_dtype)}
            return Role(RoleSpec(shape), placed(RoleSpec(shape), like, self._mesh), NoTokenizer())  # type: ignore[arg-type]
        if config.kind in ("reward", "cost"):
            marked = config.get("schema") == "completion"
            return made_of(partial(start_scorer, context, marked=marked), self.load(config.init), self._mesh)
        keyed = partial(continue_role, lora=context.lora(), compute=config.compute, key=context.key("adapters"))
        return made_of(keyed, self.load(config.init), self._mesh)

    def _stage(self, name: str) -> Role:
        """What a stage leaves: the parts that it trains are its own."""
        role = self.start(name)
        trained, frozen = split(role.spec, role.weights)
        own = shapes_at(trained, jax.tree.map(lambda leaf: leaf.sharding, trained))
        return dataclasses.replace(role, weights={**frozen, **own})

    def _folder(self, reference: str) -> Role:
        folder = base_folder(Path(reference).expanduser())
        contexts = self._contexts.values()
        dtypes = [c.config.get("compute", {}).get("param_dtype") for c in contexts if c.config.get("init") == reference]
        shape = checkpoint_config(folder)
        shape = dataclasses.replace(shape, param_dtype=next(filter(None, dtypes), "float32"))
        like: Weights = {"base": shapes(base_leaves(shape), shape.param_dtype)}
        if is_reward_model(folder):
            like["head"] = jax.eval_shape(partial(init_head, shape.width, 1.0), key=jax.random.key(0))
        spec = RoleSpec(shape)
        return Role(spec, placed(spec, like, self._mesh), NoTokenizer(), base_checkpoint=str(folder))  # type: ignore[arg-type]
