"""What a stage is given to run: its config, its folder, its keys, and the models of the stages before it."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlhf_jax.config import SCORERS, all_sources, is_folder, references
from rlhf_jax.data.sources import RecordStream, stream_records
from rlhf_jax.data.tokenizer import check_vocabulary
from rlhf_jax.distributed.processes import alone, barrier, is_main_process
from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.peft import is_peft, load_peft
from rlhf_jax.models.pretrained import check_weights
from rlhf_jax.training.artifacts import (
    Role,
    base_folder,
    checkpoint_config,
    checkpoint_tokenizer,
    is_reward_checkpoint,
    load_checkpoint,
    load_role,
)
from rlhf_jax.training.randomness import stage_key

SCORING = {field.split(".")[0] for field in (*SCORERS, "proxies")}
MODEL_FIELDS = ("init", "policy", "reference", "subject")  # beside what scores, what may name a checkpoint folder
CHECKED_RECORDS, CHECKED_BYTES = 1000, 1 << 28  # before anything runs: files up to so many bytes are read whole


@dataclasses.dataclass
class Context:
    """One stage's surroundings."""

    name: str
    experiment: ConfigDict
    workdir: Path
    identity: str  # hash of the stage's semantic fields and of its upstream stages
    bases: dict[Any, Any] = dataclasses.field(default_factory=dict)
    audited: Any = None  # an `audit.Recording`, where a private stage runs to be audited
    on_claim: Callable[[], Any] = lambda: None  # called once a private run's claim is written, before its first draw
    devices: Any = None  # of a topology that programs are only compiled for; None: those that are here

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
        return self.resolve(reference) or Path(reference).expanduser()

    def resolve(self, name: str) -> Path | None:
        """The path of a stage's file, or of a file or folder that is there; None for what may be a hub name."""
        if name.split("/")[0] in self.experiment.stages:
            return self.workdir / name
        path = Path(name).expanduser()
        return path if path.exists() else None

    def stream(self, data: str, schema: str, limit: int | None = None) -> RecordStream:
        """The records of a data string, as they are read."""
        return stream_records(data, schema, self.config.get("on_error", "raise"), resolve=self.resolve, limit=limit)

    def records(self, data: str, schema: str, limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """The records of a data string, and how many malformed ones were skipped."""
        stream = self.stream(data, schema, limit)
        return list(stream), stream.skipped

    def spread_records(self, data: str, schema: str, limit: int | None) -> tuple[list[dict[str, Any]], int]:
        """At most `limit` records, spread evenly over the data (which may be sorted, by label or by source), and how
        many malformed ones it holds. Reads all of it."""
        found, skipped = self.records(data, schema)
        count = len(found) if limit is None else min(limit, len(found))
        return [found[i * len(found) // count] for i in range(count)], skipped

    def data_names(self, field: str) -> list[str]:
        """The names in a data string: `field` is "data" or "evaluation.data"."""
        return [value for name, value in references(self.config) if name == field]

    def check_data(self, schema: str) -> None:
        """Reads each data set that no stage makes, the first records of a large or remote one; raises what is wrong."""
        evaluation = self.config.get("evaluation")
        for field, data in (("data", self.config.data), ("evaluation.data", evaluation and evaluation.data)):
            names = self.data_names(field)
            if not data or any(name.split("/")[0] in self.experiment.stages for name in names):
                continue
            paths = [self.resolve(name) for name in names]
            sizes = [path.stat().st_size for path in paths if path is not None and path.is_file()]
            whole = len(sizes) == len(paths) and sum(sizes) <= CHECKED_BYTES
            for _ in self.stream(data, schema, None if whole else CHECKED_RECORDS):
                pass

    def mesh(self) -> Mesh:
        """The stage's mesh."""
        return make_mesh(self.config.mesh.data, self.config.mesh.fsdp, self.config.mesh.tensor, self.devices)

    def check_rows(self, field: str, rows: int) -> None:
        """Raises a UserError unless `rows` divide over the mesh's batch axes."""
        mesh = self.mesh()
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % shards:
            raise UserError(
                f"stages.{self.name}: {field} gives {rows} rows, which do not divide over {shards} devices (data "
                f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): make the rows a multiple of {shards}, "
                "or give mesh.tensor some of the devices"
            )

    def lora(self) -> LoraConfig | None:
        """The stage's adapters, or None when every weight trains."""
        return LoraConfig.of(self.config.lora)

    def load(self, reference: str, mesh: Mesh) -> Role:
        """Another stage's finished model, or a checkpoint folder's."""
        if is_folder(self.experiment.stages, reference):
            dtype = self.config.get("compute", {}).get("param_dtype") or "float32"
            return load_checkpoint(Path(reference).expanduser(), mesh, self.bases, dtype)
        return load_role(self.workdir, reference, mesh, self.bases)

    def folders(self) -> Iterator[tuple[str, Path]]:
        """(field, folder) of the checkpoint folders that the stage starts from."""
        fields = [(field, self.config.get(field)) for field in MODEL_FIELDS]
        fields += [("subjects", name) for name in self.config.get("subjects", ())]
        for field, value in [*fields, *all_sources(self.config)]:
            if value and value != "scratch" and is_folder(self.experiment.stages, value):
                yield field, Path(value).expanduser()

    def check_folders(self) -> None:
        """Raises a UserError unless every checkpoint folder can be read: config, headers, tokenizer, vocabulary."""
        for field, folder in self.folders():
            check_weights(base_folder(folder))
            config, tokenizer = checkpoint_config(folder), checkpoint_tokenizer(folder)
            if is_peft(folder):
                load_peft(folder, config)  # fits its base
            check_vocabulary(tokenizer, config.vocab_size, str(folder))
            if field.split(".")[0] in SCORING and not is_reward_checkpoint(folder):
                raise UserError(
                    f"stages.{self.name}.{field}: {folder} is a language model: give a sequence-classification "
                    "checkpoint with one label, or a reward stage"
                )

    def progress(self, message: str) -> None:
        """Prints a line, from process 0."""
        if is_main_process():
            print(f"  {message}", flush=True)

    def once(self, folder: Path, make: Any) -> None:
        """Runs `make()` in process 0 unless `folder` exists; the others wait."""
        if is_main_process() and not folder.exists():
            with alone(f"makes {folder}"):
                make()
        barrier(f"made {folder}")
