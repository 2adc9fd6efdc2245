"""Hugging Face checkpoint folders in and out: config.json beside safetensors, streamed tensor by tensor.

Loading reads slices of the stored tensors straight into the shards of the leaves: a layer at a time is written into its
preallocated, sharded stack, so beside the device arrays the host holds one tensor of one layer. Saving is the same the
other way, one file of at most `shard_bytes` at a time. What each family calls its tensors is in `families.py`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.distributed.sharding import fetch, replicated, tree_shardings
from rlhf_jax.errors import UserError
from rlhf_jax.models import families
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.families import LINEAR, PLAIN, SCORE, Family, Layout, Piece, Spans, Stored
from rlhf_jax.models.family_json import from_json, to_json
from rlhf_jax.models.leaves import axes, base_leaves, shapes

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
OURS = "rlhf_jax"  # the key of config.json, and of a file's metadata, for what the format has no place for
SAMPLES, SAMPLE = 16, 4096  # blocks of a weight file that its identity reads, and their bytes
SETTINGS = ("do_sample", "temperature", "top_k", "top_p")


class SavedTokenizer(Protocol):
    """What of a tokenizer a checkpoint folder keeps."""

    pad_id: int
    bos_id: int | None
    eos_id: int

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    def save(self, folder: Path) -> None: ...


# Reading


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` looks like a checkpoint: it has a config.json."""
    return (Path(folder) / CONFIG).is_file()


def is_reward_model(folder: str | Path) -> bool:
    """Whether the checkpoint's architecture is a sequence classifier, which `load_reward_model` loads."""
    return any(name.endswith("ForSequenceClassification") for name in _json(folder).get("architectures") or ())


def read_config(folder: str | Path) -> TransformerConfig:
    """The decoder's shape, without reading a weight; a reward model's has no output kernel.

    Raises:
      UserError: config.json is missing, torn, or of a family or variant the decoder does not compute.
    """
    config = from_json(_json(folder), str(Path(folder) / CONFIG))
    # The hidden states are all that a scalar head reads: a tied config has no leaf for the output kernel.
    return dataclasses.replace(config, tie_embeddings=True) if is_reward_model(folder) else config


def answer_mark(folder: str | Path) -> int | None:
    """The token a reward model of this library reads between prompt and answer; None: nothing."""
    return _json(folder).get(OURS, {}).get("answer_mark")


def generation_settings(folder: str | Path) -> dict[str, Any]:
    """How the checkpoint asks to be sampled.

    Returns:
      "stop_ids", a tuple of ints (of config.json where generation_config.json has none), and of do_sample, temperature,
      top_k and top_p those that generation_config.json states.
    """
    path = Path(folder) / GENERATION
    given = read_json(path) if path.is_file() else {}
    ends = given.get("eos_token_id")
    if ends is None:
        ends = _json(folder).get("eos_token_id")
    stop_ids = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    return {"stop_ids": stop_ids, **{name: given[name] for name in SETTINGS if given.get(name) is not None}}


def checkpoint_identity(folder: str | Path) -> str:
    """A cheap hash of a checkpoint: its config, and each weight file's size, header and evenly spaced blocks."""
    digest = hashlib.sha256((Path(folder) / CONFIG).read_bytes())
    for path in _weight_files(Path(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def load_pretrained(
    folder: str | Path, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Loads a causal language model.

    Args:
      folder: config.json and safetensors, as transformers writes them.
      mesh: where the parameters go, sharded by the training table; None: this process's first device.
      dtype: "float32" | "bfloat16": the config's dtype and param_dtype.

    Returns:
      (config, params), params the tree of `base_leaves(config)`.

    Raises:
      UserError: no checkpoint, not one the decoder computes, pickled, damaged, or with tensors missing, of a wrong
        shape, or more than the decoder has.
    """
    folder = Path(folder)
    if is_reward_model(folder):
        raise UserError(f"{folder} holds a reward model, no language model: load it with load_reward_model")
    config = dataclasses.replace(read_config(folder), dtype=dtype, param_dtype=dtype)
    with _opened(folder, families.family_of(config)) as stored:
        return config, _load(config, stored, mesh, folder, {})


def load_reward_model(
    folder: str | Path, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[TransformerConfig, dict[str, Any], dict[str, jax.Array]]:
    """Loads a sequence classifier of one label: a decoder and a scalar head.

    Args: as `load_pretrained`.

    Returns:
      (config, params, head): head {"kernel": (width, 1), "bias": (1,)} float32, the bias 0 unless this library wrote
      one. The config is tied: there is no output kernel. `answer_mark(folder)` has the role's mark.

    Raises:
      UserError: as `load_pretrained`; or the folder holds no classifier, or one of several labels.
    """
    folder = Path(folder)
    if not is_reward_model(folder):
        raise UserError(f"{folder} holds no ...ForSequenceClassification: load it with load_pretrained")
    config = dataclasses.replace(read_config(folder), dtype=dtype, param_dtype=dtype)
    at: Any = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else replicated(mesh)
    with _opened(folder, families.family_of(config)) as stored:
        if SCORE in stored and shape_of(stored[SCORE])[0] != 1:
            raise UserError(
                f"{folder} scores {shape_of(stored[SCORE])[0]} labels: a reward model has one (num_labels 1)"
            )
        params = _load(config, stored, mesh, folder, {SCORE: (1, config.width)})
        kernel = np.array(stored[SCORE][:], np.float32).T
    bias = np.full((1,), _json(folder).get(OURS, {}).get("head_bias", 0.0), np.float32)
    return config, params, {"kernel": _put(kernel, at), "bias": _put(bias, at)}


def _put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    return _place(PLAIN, value, value.shape, value.dtype, sharding)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
      UserError: it can't be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): copy the checkpoint again") from error


def _json(folder: str | Path) -> dict[str, Any]:
    if not is_checkpoint(folder):
        raise UserError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    return read_json(Path(folder) / CONFIG)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            listed = (
                f"names {len(missing)} files that are not there ({', '.join(missing[:3])})" if names else "is empty"
            )
            raise UserError(f"{folder / INDEX} {listed}: copy the whole checkpoint")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds pickled weights ({pickles[0]}), which may run code and are never loaded: where PyTorch is "
            "installed, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new) writes safetensors"
        )
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}: copy the whole checkpoint")


@contextlib.contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
      UserError: it is cut short or damaged.
    """
    try:
        file: Any = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): copy it again") from error
    with file:
        yield file


@contextlib.contextmanager
def _opened(folder: Path, family: Family) -> Iterator[dict[str, Any]]:
    """All stored tensors by their names in the family's table, unread."""
    with contextlib.ExitStack() as stack:
        out: dict[str, Any] = {}
        for path in _weight_files(folder):
            file = stack.enter_context(opened_file(path))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                canonical = families.canonical_name(family, name)
                if canonical is not None:
                    out[canonical] = file.get_slice(name)
        yield out


def shape_of(stored: Any) -> tuple[int, ...]:
    """Shape of a slice of a safetensors file."""
    return tuple(stored.get_shape())


def _check_tensors(where: str | Path, stored: dict[str, Any], wanted: dict[str, tuple[int, ...]], hint: str) -> None:
    """Compares stored tensors with those wanted.

    Args:
      stored: name -> slice of a safetensors file.
      wanted: name -> shape.
      hint: what to do where they differ.

    Raises:
      UserError: a tensor is missing, unknown, of another shape, or quantized; up to three are named.
    """
    wrong = [n for n, shape in wanted.items() if n in stored and shape_of(stored[n]) != shape]
    kinds = {
        "lacks": [n for n in wanted if n not in stored],
        "has tensors that do not belong to it:": [n for n in stored if n not in wanted],
        "has tensors of another shape:": [f"{n} {shape_of(stored[n])} for {wanted[n]}" for n in wrong],
        "has tensors that are no float32, float16 or bfloat16:": [
            f"{n} {stored[n].get_dtype()}" for n in wanted if n in stored and stored[n].get_dtype() not in DTYPES
        ],
    }
    for what, names in kinds.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{where} {what} {', '.join(names[:3])}{more}: {hint}")


def _check(config: TransformerConfig, stored: dict[str, Any], folder: Path, beside: dict[str, tuple[int, ...]]) -> None:
    """Raises a UserError unless `stored` holds the decoder's tensors and those `beside`, and no others."""
    pieces = families.stored_tensors(config)
    wanted = {name: parts[0].layout.shape(parts[0].shape) for name, parts in pieces.items()}
    head = f"{families.family_of(config).modules['head'].path}.weight"
    if head not in wanted:  # tied, and stored all the same
        stored = {name: tensor for name, tensor in stored.items() if name != head}
    hint = f"its config.json must be that of these weights ({config.family})"
    _check_tensors(folder, stored, {**wanted, **beside}, hint)


def check_weights(folder: str | Path) -> None:
    """Raises a UserError where `load_pretrained` or `load_reward_model` would, reading the files' headers alone."""
    folder, config = Path(folder), read_config(folder)
    with _opened(folder, families.family_of(config)) as stored:
        _check(config, stored, folder, {SCORE: (1, config.width)} if is_reward_model(folder) else {})


def _load(
    config: TransformerConfig,
    stored: dict[str, Any],
    mesh: Mesh | None,
    folder: Path,
    beside: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The parameters; `beside` are tensors that belong to the checkpoint and not to the decoder."""
    _check(config, stored, folder, beside)
    leaves = base_leaves(config)
    tree = shapes(leaves, config.param_dtype)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        at: Any = jax.tree.map(lambda _: device, tree)
    else:
        at = tree_shardings(tree, axes(leaves), mesh)
    where, dtype = families.tensors(config), jnp.dtype(config.param_dtype)

    def outer(name: str) -> jax.Array:
        tensor = where[name]
        return _place(tensor.layout, stored[tensor.name], leaves[name].shape, dtype, at[name])

    def stacked(name: str) -> jax.Array:
        shape, tensor = leaves["layers"][name].shape, where["layers"][name]
        whole = at["layers"][name]
        single = (
            NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:])) if isinstance(whole, NamedSharding) else whole
        )
        stack = _zeros(whole, shape, dtype)()
        for i in range(config.layers):
            layer = _place(tensor.layout, stored[tensor.name.format(i=i)], shape[1:], dtype, single)
            stack = jax.block_until_ready(_write(whole, stack, layer, np.int32(i)))
        return stack

    params: dict[str, Any] = {name: outer(name) for name in leaves if name != "layers"}
    return {**params, "layers": {name: stacked(name) for name in leaves["layers"]}}


def _place(layout: Layout, stored: Stored, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    """A leaf on its devices, each distinct slice read once and let go before the next."""
    holders: dict[Spans, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
        holders.setdefault(spans, []).append(device)
    shards: list[jax.Array] = []
    for spans, devices in holders.items():
        value = layout.read(stored, spans, shape, dtype)
        shards += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.cache
def _zeros(sharding: Sharding, shape: tuple[int, ...], dtype: Any) -> Any:
    """A compiled program that makes zeros; leaves of one shape share it."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _write(sharding: Sharding, stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    written = jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    return jax.lax.with_sharding_constraint(written, sharding)


# Writing


def save_pretrained(
    folder: str | Path,
    config: TransformerConfig,
    params: dict[str, Any],
    tokenizer: SavedTokenizer | None = None,
    adapters: dict[str, Any] | None = None,
    *,
    head: dict[str, Any] | None = None,
    answer_mark: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a checkpoint that transformers loads; every process calls it, the main one writes.

    The folder appears whole: it is written as `folder`.tmp and renamed.

    Args:
      folder: where to; made if it does not exist.
      config, params: the decoder.
      tokenizer: saved beside it, its special ids into config.json and generation_config.json.
      adapters: scaled adapters (`lora.scaled`) to add in, in float32.
      head: {"kernel": (width, 1), "bias": (1,)}: write a sequence classifier of one label, no language model.
      answer_mark: the reward role's mark.
      dtype: "float32" | "bfloat16" | "float16"; None: the config's param_dtype.
      shard_bytes: the most a file holds, unless one tensor is larger.

    Raises:
      UserError: the folder is not empty, or the family's format can't hold this config.
    """
    folder, dtype = Path(folder), dtype or config.param_dtype
    described = _describe(config, tokenizer, head, answer_mark, dtype)
    pieces = families.stored_tensors(config)
    if head is not None:
        pieces.pop(f"{families.family_of(config).modules['head'].path}.weight", None)
        pieces[SCORE] = [Piece("score", None, (config.width, 1), LINEAR)]
        params = {**params, "score": head["kernel"]}
    files = _plan(pieces, dtype, shard_bytes)
    with new_folder(folder) as writing:
        for file, names in files.items():
            whole = {name: _assemble(pieces[name], params, adapters, dtype) for name in names}
            if is_main_process():
                save_tensors(writing / file, whole)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            total = sum(_size(parts, dtype) for parts in pieces.values())
            described[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if is_main_process():
            for name, content in described.items():
                (writing / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(writing)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, on the main process, that becomes `folder` when all is written.

    Raises:
      UserError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: give a new folder to write to")
    writing = folder.with_name(folder.name + ".tmp")
    if is_main_process():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    barrier(f"writing {folder}")
    yield writing
    if is_main_process():
        if folder.exists():
            folder.rmdir()
        os.rename(writing, folder)
    barrier(f"saved {folder}")


def save_tensors(path: Path, tensors: dict[str, np.ndarray], extras: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, as readable as the folder it is in; `extras` go into its metadata."""
    save_file(tensors, path, metadata={"format": "pt", **(extras or {})})
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes it private


def _describe(
    config: TransformerConfig,
    tokenizer: SavedTokenizer | None,
    head: dict[str, Any] | None,
    mark: int | None,
    dtype: str,
) -> dict[str, Any]:
    """The folder's JSON files: name -> content."""
    family = families.family_of(config)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    out = {
        **to_json(config),
        "architectures": [family.causal if head is None else family.classifier],
        **ids,
        "torch_dtype": dtype,
    }
    if head is not None:
        extras = {"head_bias": float(fetch(head["bias"])[0]), "answer_mark": mark}
        out.update(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, **{OURS: extras})
    files = {CONFIG: out}
    if tokenizer is not None and head is None:
        stops = list(tokenizer.stop_ids)
        files[GENERATION] = {**ids, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    return files


def _size(parts: list[Piece], dtype: str) -> int:
    """Bytes of a stored tensor."""
    return math.prod(parts[0].layout.shape(parts[0].shape)) * np.dtype(dtype).itemsize


def _plan(pieces: dict[str, list[Piece]], dtype: str, shard_bytes: int) -> dict[str, list[str]]:
    """File -> names of its tensors: as many in a row as `shard_bytes` hold."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, parts in pieces.items():
        size = _size(parts, dtype)
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


@jax.jit
def _layer(leaf: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def _assemble(parts: list[Piece], params: dict[str, Any], adapters: dict[str, Any] | None, dtype: str) -> np.ndarray:
    """One stored tensor on the host, from the leaves that make it up, adapters added in."""
    whole = np.empty(parts[0].layout.shape(parts[0].shape), dtype)
    for piece in parts:
        if piece.layer is None:
            leaf = fetch(params[piece.leaf])
        else:
            at = np.int32(piece.layer)
            leaf = fetch(_layer(params["layers"][piece.leaf], at))
            if adapters is not None and piece.leaf in adapters:
                a, b = (fetch(_layer(adapters[piece.leaf][side], at)) for side in ("a", "b"))
                leaf = leaf.astype(np.float32) + a.astype(np.float32) @ b.astype(np.float32)
        piece.layout.write(whole, leaf)
    return whole
