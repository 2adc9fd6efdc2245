"""The noise of differential privacy, from a secret root that no config, seed or report holds.

The root is two words of 32 bits from the operating system, in a file that its owner alone can read. Keys are always
threefry2x32, of both words: JAX's integer seeds have 32 bits that can be tried one by one, and the other generators
do not draw the same under every transformation.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError

Array = jax.Array
Tree = Any
Root = tuple[int, int]  # words of 32 bits

IMPLEMENTATION = "threefry2x32"


def new_root() -> Root:
    """A fresh root from the operating system's entropy."""
    first, second = np.frombuffer(os.urandom(8), np.uint32)
    return int(first), int(second)


def load_or_make_root(path: str | os.PathLike[str]) -> Root:
    """The root in a file of mode 0600; where there is none, a new one is written first.

    Raises:
      UserError: others may read or write the file, or it holds no root.
    """
    path = Path(path)
    if not path.exists():
        _write_root(path, new_root())
    with path.open(encoding="ascii", errors="replace") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & 0o077:
            raise UserError(
                f"{path}: others than its owner may use the secret root of privacy noise (mode {mode & 0o777:o}): "
                f"chmod 600 it if nobody read it yet, else delete it and start the private stages again"
            )
        text = file.read(64).split()
    try:
        first, second = (int.from_bytes(bytes.fromhex(word), "big") for word in text)
        if [len(word) for word in text] != [8, 8]:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{path}: not a secret root of privacy noise (two words of 8 hexadecimal digits): "
            "restore it from a copy, or delete it and start the private stages again"
        ) from None
    return first, second


def _write_root(path: Path, root: Root) -> None:
    """Writes a whole file or none, and leaves one that is there already as it is."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{root[0]:08x} {root[1]:08x}\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first
    finally:
        os.unlink(draft)


def root_key(root: Root) -> Array:
    """The key made of both words of a root, whatever JAX's default generator is."""
    return jax.random.wrap_key_data(jnp.asarray(root, jnp.uint32), impl=IMPLEMENTATION)


def step_key(key: Array, run_nonce: str, stage: str, purpose: str, step: int | Array) -> Array:
    """The key of one purpose at one step of one stage of one run.

    Args:
      key: of the root.
      run_nonce: a run's own text: a run that starts again from nothing must not meet the same noise on other weights.
      purpose: what is drawn, such as "gradient".
      step: counted by optimizer steps; may be traced.
    """
    return jax.random.fold_in(_fold_text(key, json.dumps([run_nonce, stage, purpose])), step)


def _fold_text(key: Array, text: str) -> Array:
    """Folds 64 bits of a text's hash into a key, as many as a key has: in 32 two texts could meet by chance."""
    for word in np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], ">u4").astype(np.uint32):
        key = jax.random.fold_in(key, word)
    return key


def add_noise(tree: Tree, key: Array, stddev: float | Array) -> Tree:
    """The tree plus independent N(0, stddev^2) in every entry.

    Every leaf has a key by its path, so no other leaf changes its noise. Noise is drawn at a leaf's global shape: under
    `jit` it is the same on every mesh.

    Args:
      tree: float32 leaves.
      key: a threefry2x32 key (`step_key`).

    Raises:
      ValueError: a leaf that is not float32 (jax.random.normal has 128 values in bfloat16, none beyond 2.9), or a key
        of another generator.
    """
    if (implementation := str(jax.random.key_impl(key))) != IMPLEMENTATION:
        raise ValueError(f"privacy noise is drawn with {IMPLEMENTATION} keys, not {implementation}")

    def noisy(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path)
        if leaf.dtype != jnp.float32:
            raise ValueError(f"privacy noise is added in float32, and {name or 'the leaf'} is {leaf.dtype}")
        return leaf + stddev * jax.random.normal(_fold_text(key, name), leaf.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(noisy, tree)


def privatized(summed: Tree, key: Array, *, noise_multiplier: float, clip_norm: float, expected_batch: float) -> Tree:
    """(sum of clipped gradients + noise_multiplier * clip_norm * N(0, I)) / expected_batch (Abadi et al., 2016).

    Args:
      summed: float32 tree, of no more than `clip_norm` for each unit (`clipping.clipped_sum`), over the whole batch.
      key: of this step (`step_key`).
      noise_multiplier: sigma; 0 adds no noise.
      expected_batch: sampling rate times records: public, unlike how many were drawn.

    Raises:
      UserError: noise without a finite clip norm, which would hide nothing.
    """
    if not (noise_multiplier >= 0 and expected_batch > 0):
        raise UserError(
            f"noise_multiplier is {noise_multiplier:g} and the expected batch is {expected_batch:g}: "
            "give 0 or more and a size above 0"
        )
    if noise_multiplier > 0:
        if not 0 < clip_norm < float("inf"):
            raise UserError(
                f"clip_norm is {clip_norm:g} with noise_multiplier {noise_multiplier:g}: give a finite norm"
            )
        summed = add_noise(summed, key, noise_multiplier * clip_norm)
    return jax.tree.map(lambda x: x / expected_batch, summed)
