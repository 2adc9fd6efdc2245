"""Models that stages take up and leave: a stage's result, a Hugging Face checkpoint folder, a PEFT adapter folder.

`<stage>/model/` holds the weights, `<stage>/model.json` the decoder's shape, the adapters' settings, who owns the base
(a stage, or a checkpoint folder), fingerprints, and the tokenizer. A role with adapters stores no base: roles share one
where it is the same. A quantized base is made again from its owner's, which gives the same codes; only where nothing
owns what it was made from (merged adapters) it is stored itself.
"""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlhf_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from rlhf_jax.distributed.sharding import shapes_at, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import HOW, TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.leaves import base_leaves, shapes
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.peft import is_peft, load_peft, load_peft_head, peft_base
from rlhf_jax.models.pretrained import (
    answer_mark,
    checkpoint_identity,
    is_reward_model,
    load_pretrained,
    load_reward_model,
    read_config,
)
from rlhf_jax.models.quantized import cast_base, quantize_base, quantized_shapes
from rlhf_jax.models.roles import RoleSpec, Weights, member, member_parts, merged_base, weight_axes
from rlhf_jax.training.checkpoints import load_tree, save_tree, write_json
from rlhf_jax.training.state import fingerprint

Bases = dict[tuple[str, Mesh], Any]  # (fingerprint, mesh) -> base: roles of one base get the same arrays


@dataclasses.dataclass
class Role:
    """A loaded role: its weights on the mesh, and where its base came from.

    `base_stage` and `base_checkpoint` say who holds the base on disk, a stage or a Hugging Face folder; both are empty
    while nothing does. Of a quantized base they say who holds what it was made from. `bases` are those loaded with it.
    """

    spec: RoleSpec
    weights: Weights
    tokenizer: Tokenizer
    base_stage: str = ""
    base_checkpoint: str = ""
    bases: Bases = dataclasses.field(default_factory=dict, repr=False)


def save_role(workdir: Path, stage: str, role: Role) -> dict[str, str]:
    """Writes `role` as the result of `stage`; its base only if nothing else owns it. Returns its fingerprints."""
    owns = not role.base_checkpoint and role.base_stage in ("", stage)
    parts = {name: part for name, part in role.weights.items() if name != "base" or owns}
    prints = {name: fingerprint(part) for name, part in role.weights.items()}
    save_tree(workdir / stage / "model", jax.tree.map(lambda leaf: leaf.astype(_stored(leaf.dtype)), parts))
    lora, path = role.spec.lora, role.tokenizer.path
    inside = path.is_relative_to(workdir)  # then the work directory can be moved
    info = {
        "model": role.spec.config.to_dict(),
        "lora": dataclasses.asdict(lora) if lora else None,
        "answer_mark": role.spec.answer_mark,
        "base_kind": role.spec.base,
        "members": role.spec.members,
        "parts": sorted(parts),
        "base_stage": stage if owns else role.base_stage,
        "base_checkpoint": role.base_checkpoint,
        "fingerprints": prints,
        "tokenizer": {"path": str(path.relative_to(workdir) if inside else path), "identity": role.tokenizer.identity},
    }
    write_json(workdir / stage / "model.json", info)
    return prints


def _stored(dtype: Any) -> Any:
    """What an array is written in: Orbax's format has no 4-bit unsigned integers."""
    return jnp.uint8 if dtype == jnp.uint4 else dtype


def _like(spec: RoleSpec, parts: list[str], mesh: Mesh) -> Weights:
    """What `parts` of a role's weights look like on the mesh."""
    config, key = spec.config, jax.random.key(0)
    like: Weights = {"head": jax.eval_shape(partial(init_head, config.width, 1.0), key=key)}
    if "base" in parts:
        whole = shapes(base_leaves(config), config.param_dtype)
        like["base"] = quantized_shapes(config, spec.base) if spec.base else whole
    if spec.lora is not None:
        like["adapters"] = jax.eval_shape(partial(init_adapters, config, spec.lora), key=key)
    if spec.members > 1:
        own, shared = member_parts(like)
        wide = jax.tree.map(lambda s: jax.ShapeDtypeStruct((spec.members, *s.shape), s.dtype), own)
        like = {**shared, **wide}
    like = {name: like[name] for name in parts}
    at = tree_shardings(like, weight_axes(spec, like), mesh)
    return shapes_at(like, at)


def read_info(workdir: Path, stage: str) -> dict[str, Any]:
    """A stage's model.json."""
    path = workdir / stage / "model.json"
    if not path.exists():
        raise UserError(f"{path} is missing: delete the folder of stage {stage} and run again to make it anew")
    return json.loads(path.read_text())


def load_role(workdir: Path, stage: str, mesh: Mesh, bases: Bases) -> Role:
    """Reads a stage's result onto the mesh.

    Args:
      bases: bases already loaded. Added to.

    Raises:
      UserError: files are missing, changed, or of another model.
    """
    info = read_info(workdir, stage)
    lora = LoraConfig(**{**info["lora"], "targets": tuple(info["lora"]["targets"])}) if info["lora"] else None
    config, kind = TransformerConfig.from_dict(info["model"]), info.get("base_kind", "")
    spec = RoleSpec(config, lora, info["answer_mark"], kind, info.get("members", 1))
    like = _like(spec, info["parts"], mesh)
    written = jax.tree.map(lambda s: s.update(dtype=_stored(s.dtype)), like)
    weights = jax.tree.map(lambda leaf, s: leaf.astype(s.dtype), load_tree(workdir / stage / "model", written), like)
    owner = info["base_checkpoint"]
    if "base" not in weights:
        wanted = (info["fingerprints"]["base"], mesh)
        if wanted not in bases:
            bases[wanted] = _owned_base(workdir, spec, info["base_stage"], owner, mesh, bases)
        weights = {**weights, "base": bases[wanted]}
    prints = {name: fingerprint(part) for name, part in weights.items()}
    for name, seen in prints.items():
        if seen != info["fingerprints"][name]:
            where = owner if owner and name == "base" else workdir / stage / "model"
            raise UserError(
                f"{where}: the {name} weights are not those {stage}/model.json names ({seen} against "
                f"{info['fingerprints'][name]}): put them back, or delete the stage's folder and run again"
            )
    weights["base"] = bases.setdefault((prints["base"], mesh), weights["base"])
    tokenizer = load_tokenizer(workdir / info["tokenizer"]["path"])
    if tokenizer.identity != info["tokenizer"]["identity"]:
        raise UserError(f"{tokenizer.path} is not the tokenizer stage {stage} was trained with: put that one back")
    return Role(spec, weights, tokenizer, info["base_stage"], owner, bases)


def _owned_base(workdir: Path, spec: RoleSpec, stage: str, checkpoint: str, mesh: Mesh, bases: Bases) -> Any:
    """The base of a role that stores none: its owner's, quantized where the role's is and the owner's is not."""
    if checkpoint:
        base, kind = _checkpoint_base(Path(checkpoint), mesh, spec.config.param_dtype), ""
    else:  # what is only quantized here does not stay in memory
        owner = load_role(workdir, stage, mesh, dict(bases) if spec.base else bases)
        base, kind = owner.weights["base"], owner.spec.base
    return base if kind == spec.base else quantize_base(spec.config, base, spec.base)


def _checkpoint_base(folder: Path, mesh: Mesh, param_dtype: str) -> Any:
    load = load_reward_model if is_reward_model(folder) else load_pretrained
    return load(folder, mesh, param_dtype)[1]


def load_checkpoint(folder: Path, mesh: Mesh, bases: Bases, param_dtype: str = "float32") -> Role:
    """Reads a Hugging Face folder (a language model, a reward model, or PEFT adapters with their base) onto the mesh.

    Args:
      bases: bases already loaded. Added to.
      param_dtype: what the base's parameters are kept in.

    Raises:
      UserError: the folder is no checkpoint this library reads, or its tokenizer has ids beyond the embedding.
    """
    owner = base_folder(folder)
    weights: Weights = {}
    if is_reward_model(owner):
        config, base, weights["head"] = load_reward_model(owner, mesh, param_dtype)
    else:
        config, base = load_pretrained(owner, mesh, param_dtype)
    spec = RoleSpec(config, None, answer_mark(owner))
    weights["base"] = bases.setdefault((fingerprint(base), mesh), base)
    if is_peft(folder):
        lora, adapters = load_peft(folder, config)
        spec = dataclasses.replace(spec, lora=lora)
        weights["adapters"] = adapters
        head, mark = load_peft_head(folder, config)
        if head is not None:
            weights["head"], spec = head, dataclasses.replace(spec, answer_mark=mark)
        own: Weights = {name: weights[name] for name in ("adapters", "head") if name in weights}
        weights |= jax.device_put(own, tree_shardings(own, weight_axes(spec, own), mesh))
    tokenizer = checkpoint_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, str(folder))
    return Role(spec, weights, tokenizer, base_checkpoint=str(owner.absolute()), bases=bases)


def base_folder(folder: Path) -> Path:
    """The folder that holds the base: of PEFT adapters the one they name, else the folder itself.

    Raises:
      UserError: adapters whose base is no folder on this machine.
    """
    if not is_peft(folder):
        return folder
    named = Path(peft_base(folder)).expanduser()
    for place in (named, folder / named):
        if str(named) != "." and place.is_dir():
            return place
    raise UserError(
        f'{folder}: the adapter\'s base "{named}" is no folder here: set base_model_name_or_path in its '
        "adapter_config.json to the base's checkpoint folder"
    )


def folder_identity(folder: Path) -> str:
    """A cheap hash of what a Hugging Face folder holds: of adapters their files and their base's identity."""
    base = base_folder(folder)
    if base == folder:
        return checkpoint_identity(folder)
    digest = hashlib.sha256(checkpoint_identity(base).encode())
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def is_reward_checkpoint(folder: Path) -> bool:
    """Whether a folder scores text: a sequence-classification checkpoint, or adapters with such a head."""
    if is_reward_model(base_folder(folder)):
        return True
    return is_peft(folder) and load_peft_head(folder, checkpoint_config(folder))[0] is not None


def checkpoint_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; adapters without one take their base's."""
    own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(folder if own else base_folder(folder))


def checkpoint_config(folder: Path) -> TransformerConfig:
    """The decoder's shape of a Hugging Face folder, without reading weights."""
    return read_config(base_folder(folder))


def computed(config: TransformerConfig, compute: Any) -> TransformerConfig:
    """The config with a stage's `compute` fields in place of its own where they are set."""
    return dataclasses.replace(config, **{name: compute[name] for name in HOW if compute[name]})


def continue_role(role: Role, lora: LoraConfig | None, compute: Any = None, *, key: jax.Array) -> Role:
    """What a new stage starts from: `role`'s function, with the new stage's choice of what trains and in what dtype.

    The same adapter settings go on with the adapters on the shared base; fresh adapters share the base of a role
    without any; any other change merges the old adapters, and the role gets its own base, as it does where the
    parameters' dtype changes. The head is left out. Of an ensemble the first member goes on.

    With `compute.base` that base is quantized (which changes the function by its rounding), once for all roles loaded
    together; without it a quantized base stays one as long as there are adapters over it.
    """
    if role.spec.members > 1:
        first_spec, first = member(role.spec, role.weights, 0)
        role = dataclasses.replace(role, spec=first_spec, weights=first)
    old, config = role.spec.config, role.spec.config if compute is None else computed(role.spec.config, compute)
    kind = ("" if compute is None else compute.base) or role.spec.base if lora else ""
    spec, cast = RoleSpec(config, lora, base=kind), config.param_dtype != old.param_dtype
    together = lora is not None and lora == role.spec.lora and role.spec.base in ("", kind)
    weights: Weights = {"base": role.weights["base"] if together else merged_base(role.spec, role.weights)}
    if cast:
        weights["base"] = cast_base(weights["base"], config.param_dtype)
    if kind and not (together and role.spec.base):
        weights["base"] = _quantized(config, weights["base"], kind, role.bases)
    if together:
        weights["adapters"] = role.weights["adapters"]
    elif lora is not None:
        weights["adapters"] = init_adapters(config, lora, key=key)
    shared = lora is not None and not cast and (together or role.spec.lora is None)
    owner = (role.base_stage, role.base_checkpoint) if shared else ("", "")
    return Role(spec, weights, role.tokenizer, *owner, bases=role.bases)


def _quantized(config: TransformerConfig, base: Any, kind: str, bases: Bases) -> Any:
    """The quantized base, one for all roles that ask; `bases` no longer keeps the one it was made from."""
    small, sharding = quantize_base(config, base, kind), base["embedding"].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if not isinstance(mesh, Mesh):
        return small
    bases.pop((fingerprint(base), mesh), None)
    return bases.setdefault((fingerprint(small), mesh), small)


def role_memory(roles: dict[str, Weights]) -> dict[str, dict[str, Any]]:
    """Bytes each role's weights take over all devices, an array that several roles hold counted for the first.

    Returns:
      {role: {part: bytes, ..., "base_of": the role whose base it shares, or itself}}.
    """
    seen: dict[int, str] = {}
    out: dict[str, dict[str, Any]] = {}
    for name, weights in roles.items():
        row: dict[str, Any] = {"base_of": name}
        for part, tree in weights.items():
            row[part] = 0
            for leaf in jax.tree.leaves(tree):
                first = seen.setdefault(id(leaf), name)
                if first == name:
                    row[part] += leaf.nbytes
                elif part == "base":
                    row["base_of"] = first
        out[name] = row
    return out


OWN = ("adapters", "head", "posterior", "optimizer")  # what a role has beside the base


def describe_memory(memory: dict[str, dict[str, Any]]) -> str:
    """One line of `role_memory`, in MiB."""
    roles = []
    for name, row in memory.items():
        parts = [f"{part} {row[part] / 2**20:.1f}" for part in OWN if row.get(part)]
        base = f"base {row.get('base', 0) / 2**20:.1f}" if row["base_of"] == name else f"base of {row['base_of']}"
        roles.append(f"{name}: " + ", ".join([base] * ("base" in row) + parts))
    return "MiB over all devices: " + "; ".join(roles)
