"""What a stage is given to run: its config, its folder, its keys, and the models of the stages before it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.training.artifacts import Role, load_role
from rlhf_jax.training.randomness import stage_key


@dataclasses.dataclass
class Context:
    """One stage's surroundings."""

    name: str
    experiment: ConfigDict
    workdir: Path
    identity: str  # hash of the stage's semantic fields and of its upstream stages
    bases: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ConfigDict:
        return self.experiment.stages[self.name]

    @property
    def seed(self) -> int:
        return self.experiment.seed

    @property
    def folder(self) -> Path:
        return self.workdir / self.name

    def key(self, purpose: str) -> jax.Array:
        """The key of one purpose of this stage."""
        return stage_key(self.seed, self.name, purpose)

    def path(self, reference: str) -> Path:
        """A file of another stage ("prepare/sft.jsonl") inside the work directory, or the user's own path."""
        inside = reference.split("/")[0] in self.experiment.stages
        return self.workdir / reference if inside else Path(reference).expanduser()

    def own_files(self) -> list[tuple[str, Path]]:
        """(field, path) of the data files that no stage makes: these can be checked before anything runs."""
        fields = [("data", self.config.get("data"))]
        if "evaluation" in self.config:
            fields.append(("evaluation.data", self.config.evaluation.data))
        stages = self.experiment.stages
        return [(field, self.path(v)) for field, v in fields if v and v.split("/")[0] not in stages]

    def mesh(self) -> Mesh:
        """The stage's mesh."""
        return make_mesh(self.config.mesh.data, self.config.mesh.fsdp, self.config.mesh.tensor)

    def check_rows(self, field: str, rows: int) -> None:
        """Raises a UserError unless `rows` divide over the mesh's batch axes."""
        mesh = self.mesh()
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % shards:
            raise UserError(
                f"stages.{self.name}: {field} gives {rows} rows, which do not divide over {shards} devices (data "
                f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): make the rows a multiple of {shards}"
            )

    def lora(self) -> LoraConfig | None:
        """The stage's adapters, or None when every weight trains."""
        fields = self.config.lora
        return LoraConfig(fields.rank, fields.alpha, tuple(fields.targets), fields.rslora) if fields.rank else None

    def load(self, stage: str, mesh: Mesh) -> Role:
        """Another stage's finished model."""
        return load_role(self.workdir, stage, mesh, self.bases)

    def progress(self, message: str) -> None:
        """Prints a line, from process 0."""
        if is_main_process():
            print(f"  {message}", flush=True)

    def once(self, folder: Path, make: Any) -> None:
        """Runs `make()` in process 0 unless `folder` exists; the others wait."""
        if is_main_process() and not folder.exists():
            make()
        barrier(f"made {folder}")
