"""Finished models: what a stage leaves for others, and how a role is taken up again.

`<stage>/model/` holds the weights, `<stage>/model.json` the decoder's shape, the adapters' settings, which stage owns
the base, fingerprints, and the tokenizer. A role with adapters stores no base: roles share one where it is the same.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.roles import RoleSpec, Weights, init_base, merged_base, weight_axes
from rlhf_jax.training.checkpoints import load_tree, save_tree, write_json
from rlhf_jax.training.state import fingerprint


@dataclasses.dataclass
class Role:
    """A loaded role: its weights on the mesh, and where its base came from."""

    spec: RoleSpec
    weights: Weights
    base_stage: str  # the stage whose folder holds the base; "" while it has no folder
    tokenizer: Tokenizer


def save_role(workdir: Path, stage: str, role: Role) -> dict[str, str]:
    """Writes `role` as the result of `stage`; its base only if no other stage owns it. Returns its fingerprints."""
    owns = role.base_stage in ("", stage)
    parts = {name: part for name, part in role.weights.items() if name != "base" or owns}
    prints = {name: fingerprint(part) for name, part in role.weights.items()}
    save_tree(workdir / stage / "model", parts)
    lora, path = role.spec.lora, role.tokenizer.path
    inside = path.is_relative_to(workdir)  # then the work directory can be moved
    info = {
        "model": role.spec.config.to_dict(),
        "lora": dataclasses.asdict(lora) if lora else None,
        "answer_mark": role.spec.answer_mark,
        "parts": sorted(parts),
        "base_stage": stage if owns else role.base_stage,
        "fingerprints": prints,
        "tokenizer": {"path": str(path.relative_to(workdir) if inside else path), "identity": role.tokenizer.identity},
    }
    write_json(workdir / stage / "model.json", info)
    return prints


def _like(spec: RoleSpec, parts: list[str], mesh: Mesh) -> Weights:
    make: dict[str, Any] = {
        "base": partial(init_base, spec.config),
        "head": partial(init_head, spec.config.width, 1.0),
    }
    if spec.lora is not None:
        make["adapters"] = partial(init_adapters, spec.config, spec.lora)
    shapes = {name: jax.eval_shape(lambda key, name=name: make[name](key=key), jax.random.key(0)) for name in parts}
    at = tree_shardings(shapes, weight_axes(spec, shapes), mesh)
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, at)


def read_info(workdir: Path, stage: str) -> dict[str, Any]:
    """A stage's model.json."""
    path = workdir / stage / "model.json"
    if not path.exists():
        raise UserError(f"{path} is missing: delete the folder of stage {stage} and run again to make it anew")
    return json.loads(path.read_text())


def load_role(workdir: Path, stage: str, mesh: Mesh, bases: dict[Any, Any]) -> Role:
    """Reads a stage's result onto the mesh.

    Args:
      bases: (fingerprint, mesh) -> base already loaded; roles of one base get the same arrays. Added to.

    Raises:
      UserError: files are missing, changed, or of another model.
    """
    info = read_info(workdir, stage)
    lora = LoraConfig(**{**info["lora"], "targets": tuple(info["lora"]["targets"])}) if info["lora"] else None
    spec = RoleSpec(TransformerConfig.from_dict(info["model"]), lora, info["answer_mark"])
    weights = load_tree(workdir / stage / "model", _like(spec, info["parts"], mesh))
    if "base" not in weights:
        wanted = (info["fingerprints"]["base"], mesh)
        if wanted not in bases:
            bases[wanted] = load_role(workdir, info["base_stage"], mesh, bases).weights["base"]
        weights = {**weights, "base": bases[wanted]}
    prints = {name: fingerprint(part) for name, part in weights.items()}
    for name, seen in prints.items():
        if seen != info["fingerprints"][name]:
            raise UserError(
                f"{workdir / stage / 'model'}: the {name} weights are not those model.json names ({seen} against "
                f"{info['fingerprints'][name]}): delete the stage's folder and run again"
            )
    weights["base"] = bases.setdefault((prints["base"], mesh), weights["base"])
    tokenizer = Tokenizer(workdir / info["tokenizer"]["path"])
    if tokenizer.identity != info["tokenizer"]["identity"]:
        raise UserError(f"{tokenizer.path} is not the tokenizer stage {stage} was trained with: put that one back")
    return Role(spec, weights, info["base_stage"], tokenizer)


def continue_role(role: Role, lora: LoraConfig | None, *, key: jax.Array) -> Role:
    """What a new stage starts from: `role`'s function, with the new stage's choice of what trains.

    The same adapter settings go on with the adapters on the shared base; fresh adapters share the base of a role
    without any; any other change merges the old adapters, and the role gets its own base. The head is left out.
    """
    spec = RoleSpec(role.spec.config, lora)
    if lora is not None and lora == role.spec.lora:
        return Role(spec, {k: role.weights[k] for k in ("base", "adapters")}, role.base_stage, role.tokenizer)
    merged = role.spec.lora is not None
    weights: Weights = {"base": merged_base(role.spec, role.weights)}
    if lora is not None:
        weights["adapters"] = init_adapters(spec.config, lora, key=key)
    return Role(spec, weights, "" if merged or lora is None else role.base_stage, role.tokenizer)
