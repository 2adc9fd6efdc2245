"""Runs an experiment's stages in order: checks first, skips what is finished, resumes what was cut."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlhf_jax import __version__
from rlhf_jax.config import NOT_SEMANTIC, is_folder, is_function, is_private, score_sources, scoring_fields, upstream
from rlhf_jax.distributed import alone, barrier, is_main_process, one_folder, remote, same_everywhere
from rlhf_jax.distributed.topology import topology_devices
from rlhf_jax.errors import UserError
from rlhf_jax.rollout.functions import function_identity
from rlhf_jax.stages import (
    annotate,
    audit,
    best_of_n,
    cost,
    export,
    laplace,
    memorization,
    overoptimization,
    ppo,
    preference,
    prepare,
    reward,
    safety,
    safety_task,
    sft,
    split,
    tokenizer,
    topology_plan,
)
from rlhf_jax.stages import plan as plans
from rlhf_jax.stages.abstract import Abstract
from rlhf_jax.stages.context import MODEL_FIELDS, Context
from rlhf_jax.stages.ledger import Ledger
from rlhf_jax.stages.provenance import check_privacy, describe_claim
from rlhf_jax.training.artifacts import folder_identity
from rlhf_jax.training.checkpoints import write_json
from rlhf_jax.training.loop import Stopped
from rlhf_jax.validation import validate

KINDS: dict[str, Any] = {
    "tokenizer": tokenizer,
    "split": split,
    "safety_task": safety_task,
    "prepare": prepare,
    "sft": sft,
    "reward": reward,
    "cost": cost,
    "laplace": laplace,
    "ppo": ppo,
    "preference": preference,
    "best_of_n": best_of_n,
    "annotate": annotate,
    "overoptimization": overoptimization,
    "safety": safety,
    "memorization": memorization,
    "audit": audit,
    "export": export,
}

# Kinds that use no device: process 0 runs them, the others wait.
HOST_ONLY = ("tokenizer", "split", "safety_task", "prepare")


def checked_order(config: ConfigDict) -> list[str]:
    """The stages in the order they run; refuses what can be refused without data or devices."""
    order = validate(config)
    check_privacy(config)
    return order


def semantic_fields(config: ConfigDict, name: str) -> dict[str, Any]:
    """The fields of a stage that decide what it makes; a folder or file stands for what it holds, wherever it is."""
    fields = config.stages[name].to_dict()

    def content(source: str) -> str:
        if is_function(source):
            return function_identity(source)
        folder = source != "scratch" and is_folder(config.stages, source)
        return f"checkpoint {folder_identity(Path(source).expanduser())}" if folder else source

    fields |= {field: content(fields[field]) for field in MODEL_FIELDS if fields.get(field)}
    if "subjects" in fields:
        fields["subjects"] = list(map(content, fields["subjects"]))
    fields |= {field: content(fields[field]) for field in ("similarity", "refusals") if fields.get(field)}
    for field in scoring_fields(fields):
        *groups, last = field.split(".")
        holder = fields.get(groups[0], {}) if groups else fields
        if holder.get(last):
            holder[last] = ",".join(map(content, score_sources(config.stages[name], field)))
    return {name: value for name, value in fields.items() if name not in NOT_SEMANTIC}


def identities(config: ConfigDict, order: list[str]) -> dict[str, str]:
    """Stage -> hash of its semantic fields, the seed, and its upstream stages' identities."""
    out: dict[str, str] = {}
    for name in order:
        content = {
            "fields": semantic_fields(config, name),
            "seed": config.seed,
            "upstream": {u: out[u] for u in upstream(config.stages, name)},
        }
        out[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return out


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [d for name in names for d in _differences(old.get(name), new.get(name), f"{where}.{name}")]
    if json.dumps(old) == json.dumps(new):
        return []
    return [f"{where[1:]} was {json.dumps(old)} and is now {json.dumps(new)}"]


def _refuse_changes(workdir: Path, config: ConfigDict, names: dict[str, str]) -> None:
    """Raises a UserError if the work directory holds a stage that this config would make differently."""
    for name, identity in names.items():
        path = workdir / name / "stage.json"
        if not path.exists():
            continue
        saved = json.loads(path.read_text())
        if saved["identity"] == identity:
            continue
        changes = _differences(saved["fields"], json.loads(json.dumps(semantic_fields(config, name))))
        if saved["seed"] != config.seed:
            changes.insert(0, f"seed was {saved['seed']} and is now {config.seed}")
        what = "; ".join(changes[:3]) or "a stage it depends on has changed"
        raise UserError(
            f"stage {name} in {workdir} was made by another config ({what}): use a new --workdir, or set the "
            "old value back"
        )


def _write_summary(workdir: Path, config: ConfigDict, order: list[str]) -> None:
    results = {}
    for name in order:
        path = workdir / name / "result.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    summary = {
        "seed": config.seed,
        "jax": jax.__version__,
        "devices": [str(d.device_kind) for d in jax.devices()[:1]] + [jax.device_count()],
        "seconds": {name: result["seconds"] for name, result in results.items()},
        "stages": {name: result["figures"] for name, result in results.items()},
    }
    write_json(workdir / "summary.json", summary)


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _headline(figures: dict[str, Any]) -> str:
    """The scalar figures of a result, for the console."""
    shown = []
    for name, value in figures.items():
        if isinstance(value, bool | str) or not isinstance(value, int | float) or name.endswith(("_low", "_high")):
            continue
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        interval = f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else ""
        shown.append(f"{name} {value:.4g}{interval}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(shown)


def _check(contexts: dict[str, Context], waiting: list[str], ledger: Ledger) -> None:
    """Raises a UserError for what a stage that is still to run can refuse now."""
    for name in waiting:
        kind = KINDS[contexts[name].config.kind]
        if hasattr(kind, "check"):
            kind.check(contexts[name])
    if any(is_private(contexts[name].config) for name in waiting):
        ledger.overlaps()


def plan(config: ConfigDict, workdir: Path) -> str:
    """What a run would do: stages in order, mesh, memory, batch layout, decoded examples. Nothing is written."""
    order = checked_order(config)
    names = identities(config, order)
    _refuse_changes(workdir, config, names)
    contexts = {name: Context(name, config, workdir, names[name]) for name in order}
    _check(contexts, order, Ledger(workdir, config, contexts))
    lines = [f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), work directory {workdir}"]
    for number, name in enumerate(order, 1):
        fields = config.stages[name]
        done = (workdir / name / "result.json").exists()
        begun = remote(workdir / name / "checkpoints").exists()
        lines.append(
            f"[{number}/{len(order)}] {name} ({fields.kind}): "
            + ("finished" if done else "resumes" if begun else "to run")
        )
        if "mesh" in fields:
            mesh = contexts[name].mesh()
            lines.append("      mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
        if "optimizer" in fields:
            lora = f"adapters of rank {fields.lora.rank}" if fields.lora.rank else "every weight trains"
            per = fields.batch_size // (fields.accumulation * fields.get("minibatches", 1))
            lines.append(f"      init {fields.init}, {lora}, batch {fields.batch_size} in microbatches of {per} rows")
            if is_private(fields):
                lines.append(f"      {describe_claim(fields)}")
            described = [*plans.describe(contexts[name]), *plans.previews(contexts[name], KINDS[fields.kind])]
            lines += [f"      {line}" for line in described]
        elif hasattr(KINDS[fields.kind], "describe"):
            lines += [f"      {line}" for line in KINDS[fields.kind].describe(contexts[name])]
    return "\n".join(lines)


def plan_topology(config: ConfigDict, workdir: Path, topology: str) -> Iterator[str]:
    """What each stage's own programs are on a TPU slice that is not here; neither data nor weights are read."""
    order = checked_order(config)
    devices = topology_devices(topology)
    contexts = {name: Context(name, config, workdir, "", devices=devices) for name in order}
    yield f"{topology}: {len(devices)} {devices[0].device_kind} chips"
    abstract: dict[Any, Abstract] = {}  # by mesh
    for number, name in enumerate(order, 1):
        yield f"[{number}/{len(order)}] {name} ({config.stages[name].kind})"
        if config.stages[name].kind in HOST_ONLY:
            continue
        mesh = contexts[name].mesh()
        yield "      mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        if mesh not in abstract:
            abstract[mesh] = Abstract(contexts, mesh)
        notes = workdir / "topology"
        yield from (f"      {line}" for line in topology_plan.describe(contexts[name], abstract[mesh], notes))


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs every stage that is not finished, then writes `summary.json` and `report.html`.

    Raises:
      UserError: something the user can mend, found before the first compilation where possible.
      Stopped: a signal came; the running stage is saved.
    """
    order = checked_order(config)
    names = identities(config, order)
    versions = [__version__, jax.__version__]
    same_everywhere("the config (or a file, flag or version)", json.dumps([config.to_dict(), names, versions]))
    one_folder(workdir)
    _refuse_changes(workdir, config, names)
    contexts = {name: Context(name, config, workdir, names[name]) for name in order}
    ledger = Ledger(workdir, config, contexts)
    waiting = [name for name in order if not (workdir / name / "result.json").exists()]
    same_everywhere("what is finished in --workdir, which all have to see,", json.dumps(waiting))
    _check(contexts, waiting, ledger)
    if is_main_process():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config.to_dict())
    for number, name in enumerate(order, 1):
        title = f"[{number}/{len(order)}] {name} ({config.stages[name].kind})"
        if name not in waiting:
            _say(f"{title}: finished before, skipped")
            continue
        _say(title)
        if is_private(config.stages[name]):
            ledger.overlaps()  # with data that stages before it have made
            contexts[name].on_claim = ledger.write
        try:
            _run_stage(contexts[name])
        finally:
            if is_private(config.stages[name]):
                _account(ledger)
        contexts[name].bases.clear()  # the next stage loads what it names
    _write_summary(workdir, config, order)
    from rlhf_jax.reporting import write_report  # slow to import

    if is_main_process():
        with alone("report"):
            _say(f"report: {remote(write_report(workdir))}")
    barrier("run finished")


def _account(ledger: Ledger) -> None:
    """Brings the ledger up to date with a private stage, be it finished or cut."""
    written = ledger.write()
    if written is not None:
        claim = written["claim"]
        _say(f"  privacy so far: epsilon {claim['epsilon']:.4g} at delta {claim['delta']:.3g} (privacy.json)")


def _run_stage(context: Context) -> None:
    config, start = context.config, time.monotonic()
    stage_file = context.folder / "stage.json"
    if is_main_process():
        context.folder.mkdir(exist_ok=True)
    barrier(f"folder {context.name}")
    before = json.loads(stage_file.read_text())["seconds"] if stage_file.exists() else 0.0

    def note(seconds: float) -> None:
        fields = {
            "identity": context.identity,
            "seed": context.seed,
            "fields": semantic_fields(context.experiment, context.name),
        }
        write_json(stage_file, {**fields, "seconds": seconds})

    barrier(f"begin {context.name}")
    note(before)
    host_only = config.kind in HOST_ONLY
    if host_only and not is_main_process():
        barrier(f"end {context.name}")
        return
    try:
        with alone(f"stage {context.name}") if host_only else nullcontext():
            result = KINDS[config.kind].run(context)
    except Stopped:
        note(before + time.monotonic() - start)
        raise
    seconds = before + time.monotonic() - start
    write_json(
        context.folder / "result.json",
        {"stage": context.name, "kind": config.kind, "identity": context.identity, "seconds": seconds, **result},
    )
    barrier(f"end {context.name}")
    _say(f"  {_headline(result['figures'])}\n  {seconds:.0f} s")
