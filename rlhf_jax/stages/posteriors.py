"""Posteriors that laplace stages leave: arrays in `<stage>/posterior/`, whose they are in `<stage>/posterior.json`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError
from rlhf_jax.training.artifacts import Role
from rlhf_jax.training.checkpoints import load_tree, save_tree, write_json
from rlhf_jax.training.state import fingerprint
from rlhf_jax.uncertainty.posterior import Diagonal, Dual, Kronecker, Posterior

KINDS: dict[str, Any] = {"kronecker": Kronecker, "diagonal": Diagonal}


def save_posterior(folder: Path, posterior: Posterior, info: dict[str, Any]) -> None:
    """Writes a posterior; of an ensemble with a leading axis of members.

    Args:
      info: "subject", "fingerprints" of the role it is of, "structure", and what else a reader should know.
    """
    arrays = _arrays(posterior)
    save_tree(folder / "posterior", arrays)
    shapes = jax.tree.map(lambda x: {"shape": list(x.shape)}, arrays)
    write_json(folder / "posterior.json", {**info, "scope": posterior.scope, "shapes": shapes})


def _arrays(posterior: Posterior) -> dict[str, Any]:
    """The posterior as dicts of arrays."""
    if isinstance(posterior.factors, Dual):
        factors: Any = posterior.factors._asdict()
    else:
        factors = {name: factor._asdict() for name, factor in posterior.factors.items()}
    rest = {name: getattr(posterior, name) for name in ("precision", "scale", "temperature", "variance_scale")}
    return {"factors": factors, **rest}


def load_posterior(workdir: Path, stage: str, role: Role) -> Posterior:
    """Reads a laplace stage's posterior onto the mesh of the role it is of.

    Raises:
      UserError: files are missing, or it is of other weights: another base, other adapters, another head.
    """
    path = workdir / stage / "posterior.json"
    if not path.exists():
        raise UserError(f"{path} is missing: delete the folder of stage {stage} and run again to make it anew")
    info = json.loads(path.read_text())
    for part, seen in fingerprints(role).items():
        if seen != info["fingerprints"].get(part):
            raise UserError(
                f"{path}: the posterior is of another model, whose {part} is another ({info['fingerprints'].get(part)} "
                f"against {seen}): delete the folder of stage {stage} and run again"
            )
    sharding = jax.tree.leaves(role.weights)[0].sharding
    here = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding

    def like(leaf: dict[str, list[int]]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.float32, sharding=here)

    shapes = jax.tree.map(like, info["shapes"], is_leaf=lambda leaf: isinstance(leaf, dict) and set(leaf) == {"shape"})
    arrays = load_tree(workdir / stage / "posterior", shapes)
    factors = arrays.pop("factors")
    if info["structure"] == "dual":
        factors = Dual(**factors)
    else:
        factors = {name: KINDS[info["structure"]](**factor) for name, factor in factors.items()}
    return Posterior(factors, **arrays, scope=info["scope"])


def fingerprints(role: Role) -> dict[str, str]:
    """What identifies each part of a role's weights."""
    return {name: fingerprint(part) for name, part in role.weights.items()}
