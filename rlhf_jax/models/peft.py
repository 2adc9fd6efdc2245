"""LoRA adapters as PEFT keeps them: adapter_config.json beside adapter_model.safetensors.

PEFT adapts modules, we adapt projections. Where a family fuses query, key and value into one module (GPT-2, GPT-NeoX),
an adapter of it is one `a` for all three and a `b` whose outputs are split; three adapters of ours become one of three
times the rank, its `b` block-diagonal, with alpha raised so that every scale stays what it was.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import SCORE, Layout, family_of, module_of
from rlhf_jax.models.leaves import layer_leaves
from rlhf_jax.models.lora import TARGETS, LoraConfig
from rlhf_jax.models.pretrained import OURS, PICKLES, new_folder, opened_file, read_json, save_tensors, shape_of

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change what is computed, beyond a low-rank product beside a projection.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
)
# Initializations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) subtract from its weights.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Module:
    """One adapted module of a layer: its path with `{i}`, and its projections in stored order."""

    path: str
    name: str  # as `target_modules` lists it: the path's last part, or two where one is not enough
    targets: tuple[str, ...]
    layouts: tuple[Layout, ...]
    d_in: int
    d_out: int  # of the whole module

    def key(self, layer: int, side: str) -> str:
        return f"{PREFIX}{self.path.format(i=layer)}.lora_{side}.weight"


def _modules(config: TransformerConfig) -> list[_Module]:
    """The modules of a layer that adapters may sit on; PEFT's B is (d_out, rank) in every family."""
    leaves = layer_leaves(config)
    grouped: dict[str, list[tuple[str, Layout]]] = {}
    for target in TARGETS:
        if target in leaves:
            path, layout = module_of(config, target)
            grouped.setdefault(path, []).append((target, dataclasses.replace(layout, transposed=True)))
    out = []
    last = [path.split(".")[-1] for path in grouped]
    for path, members in grouped.items():
        parts = path.split(".")
        name = parts[-1] if last.count(parts[-1]) == 1 else ".".join(parts[-2:])  # GPT-2 has two c_proj
        targets, layouts = zip(*members, strict=True)
        d_in, d_out = leaves[targets[0]].shape
        out.append(_Module(path, name, targets, layouts, d_in, d_out * len(targets)))
    return out


def is_peft(folder: str | Path) -> bool:
    """Whether `folder` looks like a PEFT adapter: it has an adapter_config.json."""
    return (Path(folder) / SETTINGS).is_file()


def peft_base(folder: str | Path) -> str:
    """The base the adapter says it is for (a folder or a hub name), "" where it says nothing."""
    return read_json(Path(folder) / SETTINGS).get("base_model_name_or_path") or ""


def load_peft(folder: str | Path, config: TransformerConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """Loads a LoRA adapter for the base `config`.

    Modules of several ranks or scales get the largest rank, the others filled up with zeros, and one alpha, the
    difference put into b; a layer the adapter leaves out gets zeros. The function is the same.

    Returns:
      (lora, adapters): adapters {projection: {"a": (layers, d_in, rank), "b": (layers, rank, d_out)}}, float32 numpy
      arrays on the host, unscaled: `lora.scaled` folds the scale in.

    Raises:
      UserError: no LoRA adapter, a variant the decoder does not compute, or one for another base.
    """
    folder = Path(folder)
    settings = _settings(folder)
    with opened_file(_weights(folder)) as file:
        stored = {_canonical(name, config): file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        stored.pop(PREFIX + SCORE, None)
        modules = [m for m in _modules(config) if any(m.key(i, "A") in stored for i in range(config.layers))]
        _check(folder, config, modules, stored)
        rank = max(shape_of(tensor)[0] for name, tensor in stored.items() if name.endswith("lora_A.weight"))
        rslora = bool(settings.get("use_rslora"))
        scales = {
            (m.path, i): _alpha(settings, m.path.format(i=i)) / _divisor(shape_of(stored[m.key(i, "A")])[0], rslora)
            for m in modules
            for i in range(config.layers)
            if m.key(i, "A") in stored
        }
        alphas = {scale * _divisor(rank, rslora) for scale in scales.values()}
        lora = LoraConfig(rank, float(max(alphas)), tuple(t for m in modules for t in m.targets), rslora)
        leaves = layer_leaves(config)
        adapters: dict[str, Any] = {}
        for module in modules:
            for target, layout in zip(module.targets, module.layouts, strict=True):
                d_in, d_out = leaves[target].shape
                a = np.zeros((config.layers, d_in, rank), np.float32)
                b = np.zeros((config.layers, rank, d_out), np.float32)
                for i in range(config.layers):
                    if module.key(i, "A") not in stored:
                        continue
                    here = stored[module.key(i, "A")][:].astype(np.float32)  # (its rank, d_in)
                    own = len(here)
                    a[i, :, :own] = here.T
                    out = layout.read(stored[module.key(i, "B")], ((0, own), (0, d_out)), (own, d_out), np.float32)
                    b[i, :own] = out if len(alphas) == 1 else out * np.float32(scales[module.path, i] / lora.scale)
                adapters[target] = {"a": a, "b": b}
    return lora, adapters


def load_peft_head(folder: str | Path, config: TransformerConfig) -> tuple[dict[str, Any] | None, int | None]:
    """The scalar head an adapter of a sequence classifier brings along.

    Returns:
      (head, answer_mark): head {"kernel": (width, 1), "bias": (1,)} float32 numpy, None where the adapter has none;
      bias and mark 0 and None unless this library wrote them.

    Raises:
      UserError: the head is not of one label and this width.
    """
    with opened_file(_weights(Path(folder))) as file:
        names = {_canonical(name, config): name for name in file.keys()}  # noqa: SIM118
        if PREFIX + SCORE not in names:
            return None, None
        kernel = file.get_slice(names[PREFIX + SCORE])
        if shape_of(kernel) != (1, config.width):
            raise UserError(f"{folder}: {SCORE} is {shape_of(kernel)}, a reward head here is (1, {config.width})")
        extras = json.loads((file.metadata() or {}).get(OURS, "{}"))
        bias = np.full((1,), extras.get("head_bias", 0.0), np.float32)
        return {"kernel": kernel[:].astype(np.float32).T, "bias": bias}, extras.get("answer_mark")


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds a pickled adapter ({pickles[0]}), which may run code and is never loaded: where PyTorch "
            "is installed, PeftModel.from_pretrained(base, folder).save_pretrained(new) writes safetensors"
        )
    raise UserError(f"{folder} has no {WEIGHTS}: copy the whole adapter")


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json, after all that refuses it."""
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder} has no {SETTINGS}: give the folder of a PEFT adapter")
    settings = read_json(path)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type {kind} is not supported: give a LORA adapter, or merge it into its base")
    for name in UNSUPPORTED:
        if settings.get(name):
            raise UserError(f"{path}: {name} ({settings[name]}) is not supported: merge the adapter into its base")
    if settings.get("bias", "none") != "none":
        raise UserError(
            f'{path}: bias "{settings["bias"]}" is not supported, "none" is: merge the adapter into its base'
        )
    initial = settings.get("init_lora_weights", True)
    if initial not in INITIALIZATIONS:
        raise UserError(
            f'{path}: init_lora_weights "{initial}" changes the base: convert it to plain LoRA with PEFT '
            "(path_initial_model_for_weight_conversion), or merge the adapter into its base"
        )
    return settings


def _canonical(name: str, config: TransformerConfig) -> str:
    """A stored name with both prefixes; adapters of a bare decoder leave the family's out."""
    prefix = family_of(config).prefix
    bare = name.removeprefix(PREFIX).removeprefix(prefix)
    return PREFIX + (bare if bare == SCORE else prefix + bare)


def _check(folder: Path, config: TransformerConfig, modules: list[_Module], stored: dict[str, Any]) -> None:
    wanted: dict[str, tuple[_Module, str]] = {}
    for module in modules:
        for i in range(config.layers):
            pair = [module.key(i, side) in stored for side in ("A", "B")]
            if any(pair):
                wanted.update({module.key(i, side): (module, side) for side in ("A", "B")})
            if any(pair) and not all(pair):
                raise UserError(f"{folder} has one of lora_A and lora_B of {module.path.format(i=i)}: copy it again")
    foreign = [name.removeprefix(PREFIX) for name in stored if name not in wanted]
    if foreign or not wanted:
        known = ", ".join(module.name for module in _modules(config))
        raise UserError(
            f"{folder} adapts {foreign[0] if foreign else 'nothing'}, which adapters of this base do not reach: "
            f"a {config.family} of {config.layers} layers has {known}"
        )
    for name, (module, side) in wanted.items():
        shape = shape_of(stored[name])
        mine, base = (shape[1], module.d_in) if side == "A" else (shape[0], module.d_out)
        if mine != base:
            raise UserError(
                f"{folder} is an adapter for another base: {name.removeprefix(PREFIX)} is {shape}, this base "
                f"{'reads' if side == 'A' else 'writes'} {base} there, not {mine}: give the base of its {SETTINGS}"
            )


def _divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by."""
    return rank**0.5 if rslora else float(rank)


def _alpha(settings: dict[str, Any], path: str) -> float:
    """A module's alpha: of the first pattern that its path ends in, else the adapter's."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return alpha
    return settings["lora_alpha"]


def save_peft(
    folder: str | Path,
    config: TransformerConfig,
    lora: LoraConfig,
    adapters: dict[str, Any],
    base_path: str = "",
    head: dict[str, Any] | None = None,
    answer_mark: int | None = None,
) -> None:
    """Writes an adapter that PEFT loads; every process calls it, the main one writes, and the folder appears whole.

    Args:
      folder: where to; made if it does not exist.
      config: the base's.
      lora, adapters: as `load_peft` gives them: b unscaled.
      base_path: the base's folder or hub name, for `base_model_name_or_path`.
      head: a reward role's {"kernel": (width, 1), "bias": (1,)}: makes it an adapter of a sequence classifier.
      answer_mark: the reward role's mark.

    Raises:
      UserError: the folder is not empty, or the family has no such projection.
    """
    folder = Path(folder)
    adapters = jax.tree.map(np.asarray, fetch(adapters))
    modules = [module for module in _modules(config) if any(target in adapters for target in module.targets)]
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        members = [(t, layout) for t, layout in zip(module.targets, module.layouts, strict=True) if t in adapters]
        shared = len(members) == len(module.targets) and all(
            np.array_equal(adapters[t]["a"], adapters[members[0][0]]["a"]) for t, _ in members
        )
        blocks = 1 if shared else len(members)
        if blocks > 1:
            ranks[module.name] = blocks * lora.rank
        for i in range(config.layers):
            whole = np.zeros((module.d_out, blocks * lora.rank), np.float32)
            for block, (target, layout) in enumerate(members):
                at = 0 if shared else block * lora.rank
                layout.write(whole[:, at : at + lora.rank], adapters[target]["b"][i])
            sides = [adapters[target]["a"][i].T for target, _ in members[:blocks]]
            tensors[module.key(i, "A")] = np.ascontiguousarray(np.concatenate(sides), np.float32)
            tensors[module.key(i, "B")] = whole
    extras = {}
    if head is not None:
        host = fetch(head)
        tensors[PREFIX + SCORE] = np.ascontiguousarray(host["kernel"].T, np.float32)
        extras[OURS] = json.dumps({"head_bias": float(host["bias"][0]), "answer_mark": answer_mark})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base_path or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": [module.name for module in modules],
        "rank_pattern": ranks,
        "alpha_pattern": {
            name: lora.alpha * _divisor(rank, lora.rslora) / _divisor(lora.rank, lora.rslora)
            for name, rank in ranks.items()
        },
        "modules_to_save": None if head is None else ["score"],
        "fan_in_fan_out": config.family == "gpt2",
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with new_folder(folder) as writing:
        if is_main_process():
            save_tensors(writing / WEIGHTS, tensors, extras)
            text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
            (writing / SETTINGS).write_text(text, encoding="utf-8")
