"""Source files: found, split by file into named sets, freed of duplicates across sets, cut into completion tasks.

A file is a pair (relative path, text). Every random draw is a pure function of the seed, a purpose and an id.
"""

import hashlib
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

MAX_FILE_BYTES = 200_000
# Third-party code, tests, and tables that are data more than code.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")

SHINGLE_TOKENS = 5
PERMUTATIONS, BANDS = 64, 16  # at Jaccard 0.7 a pair shares a band with probability 1 - (1 - 0.7^4)^16 = 0.988

MIN_PROMPT_TOKENS, MIN_COMPLETION_TOKENS = 16, 4
MAX_COMPLETION_LINES = 3

File = tuple[str, str]


def keyed_generator(seed: int, *names: str) -> np.random.Generator:
    """Random draws that depend on the seed and the names alone: Philox under the first 128 bits of their SHA-256."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


# ------------------------------------------------------- files --------------------------------------------------------


def python_stdlib_files() -> list[File]:
    """The running interpreter's standard library in Python, sorted by path.

    Left out: tests, installed packages, tables of data (encodings, pydoc_data), idlelib, lib2to3, and what
    `folder_files` leaves out.
    """
    return _files_under(Path(sysconfig.get_path("stdlib")), ".py", EXCLUDED_FOLDERS, EXCLUDED_PREFIXES)


def folder_files(folder: str | Path, suffix: str = ".py") -> list[File]:
    """All files of a folder with a suffix, sorted by path; unreadable, blank, non-UTF-8 and > 200 kB ones are left out.

    Raises:
        UserError: no such folder, or no file remains.
    """
    if not Path(folder).is_dir():
        raise UserError(f'{folder}: no such folder: give a folder of {suffix} files or "python_stdlib"')
    files = _files_under(Path(folder), suffix, set(), ())
    if not files:
        raise UserError(f"{folder}: no {suffix} file of UTF-8 text up to {MAX_FILE_BYTES} bytes: give another folder")
    return files


def _files_under(root: Path, suffix: str, excluded: set[str], excluded_prefixes: tuple[str, ...]) -> list[File]:
    excluded = excluded | {"__pycache__"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in excluded and not s.startswith(excluded_prefixes)]
        for name in names:
            if not name.endswith(suffix) or name.startswith(excluded_prefixes):
                continue
            path = Path(folder, name)
            try:
                content = path.read_bytes()
                text = content.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip() and len(content) <= MAX_FILE_BYTES:
                files.append((path.relative_to(root).as_posix(), text))
    return sorted(files)


def split_files(files: Sequence[File], fractions: Mapping[str, float], seed: int) -> dict[str, list[File]]:
    """Puts each file in one set, by the SHA-256 of "seed:path": no file is in two, and no other file matters.

    Returns:
        The sets named by `fractions`, each in the order of its files' hashes.

    Raises:
        UserError: a share is not positive, or the shares do not sum to 1.
    """
    total = sum(fractions.values())
    if min(fractions.values()) <= 0 or abs(total - 1) > 1e-6:
        raise UserError(f"fractions {dict(fractions)} sum to {total:.4g}: give positive shares that sum to 1")
    names, upper = list(fractions), np.cumsum(list(fractions.values()))
    sets: dict[str, list[File]] = {name: [] for name in names}
    hashed = sorted((hashlib.sha256(f"{seed}:{path}".encode()).digest(), path, text) for path, text in files)
    for digest, path, text in hashed:
        # The last eight bytes choose the set, so the order by the first ones stays random inside each set.
        position = int.from_bytes(digest[-8:], "big") / 2**64
        sets[names[min(int(np.searchsorted(upper, position, side="right")), len(names) - 1)]].append((path, text))
    return sets


# ----------------------------------------------------- duplicates -----------------------------------------------------


def remove_duplicates(
    sets: Mapping[Any, Sequence[tuple[Any, str]]], threshold: float
) -> tuple[dict[Any, list[tuple[Any, str]]], dict[str, int]]:
    """Removes each (item, text) that duplicates one kept in an earlier set. Sets come in order of priority.

    Exact: the same text up to white space. Near: Jaccard similarity of the sets of 5-token shingles (tokens are words
    and punctuation marks) of at least `threshold`; candidates share a band of a 64-permutation MinHash (Broder 1997)
    and are then compared exactly. Duplicates inside one set stay.

    Returns:
        The sets that remain, and the number removed: {"exact": n, "near": n}.
    """
    token_hashes: dict[str, int] = {}
    exact_kept: set[bytes] = set()
    band_members: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    shingles_kept: list[np.ndarray] = []
    counts = {"exact": 0, "near": 0}
    remaining: dict[Any, list[tuple[Any, str]]] = {}
    for name, members in sets.items():
        kept = []
        for item, text in members:
            digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
            if digest in exact_kept:
                counts["exact"] += 1
                continue
            shingles = _shingles(text, token_hashes)
            bands = _bands(shingles)
            candidates = {other for band in bands for other in band_members.get(band, ())}
            if any(_jaccard(shingles, shingles_kept[other]) >= threshold for other in candidates):
                counts["near"] += 1
                continue
            kept.append((item, text, digest, shingles, bands))
        for _, _, digest, shingles, bands in kept:
            exact_kept.add(digest)
            for band in bands:
                band_members[band].append(len(shingles_kept))
            shingles_kept.append(shingles)
        remaining[name] = [(item, text) for item, text, *_ in kept]
    return remaining, counts


def _shingles(text: str, token_hashes: dict[str, int]) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the runs of five tokens; a shorter text is one run. `token_hashes`: a cache."""
    tokens = re.findall(r"\w+|[^\w\s]", text)
    for token in set(tokens) - token_hashes.keys():
        token_hashes[token] = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    values = np.fromiter((token_hashes[token] for token in tokens), np.uint64, len(tokens))
    width = max(1, min(SHINGLE_TOKENS, len(values)))
    hashes = np.zeros(len(values) - width + 1, np.uint64)
    for offset in range(width):
        hashes = _mix(hashes + values[offset : len(values) - width + 1 + offset])
    return np.unique(hashes)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64, on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_FACTORS = _mix(np.arange(PERMUTATIONS, dtype=np.uint64)) | np.uint64(
    1
)  # odd, so each product permutes 64-bit integers
_ADDENDS = _mix(np.arange(PERMUTATIONS, 2 * PERMUTATIONS, dtype=np.uint64))


def _bands(shingles: np.ndarray) -> list[tuple[int, bytes]]:
    if not len(shingles):
        return []
    signature = np.array([(shingles * a + b).min() for a, b in zip(_FACTORS, _ADDENDS, strict=True)])  # (PERMUTATIONS,)
    return [(band, rows.tobytes()) for band, rows in enumerate(signature.reshape(BANDS, -1))]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


# -------------------------------------------------- completion tasks --------------------------------------------------


def completion_tasks(
    files: Sequence[File],
    tokenizer: Tokenizer,
    *,
    seed: int,
    count: int,
    prompt_tokens: int,
    completion_tokens: int,
    min_completion_tokens: int = MIN_COMPLETION_TOKENS,
    shared_prompts: bool = False,
) -> list[dict[str, str]]:
    """At most `count` tasks {id, prompt, completion}: one of each file, then a second of each, and so on.

    A task is cut at a line boundary. The completion is the next one to three lines without a blank one, whole, of
    `min_completion_tokens` to `completion_tokens` - 1 tokens (eos comes later). The prompt is as many whole lines
    before it as fit, 16 to `prompt_tokens` - 1 tokens (bos comes later). Both hold code, not comments or docstrings
    alone. No two tasks share a line; with `shared_prompts` no two completions do, which cuts more of them. The
    id is "path:line" of the completion, lines counted from 1.
    """
    limits = (prompt_tokens - 1, min_completion_tokens, completion_tokens - 1)
    waiting = [_tasks_of_file(path, text, tokenizer, seed, limits, shared_prompts) for path, text in files]
    tasks: list[dict[str, str]] = []
    while waiting and len(tasks) < count:
        drawn = [(source, next(source, None)) for source in waiting[: count - len(tasks)]]
        waiting = [source for source, task in drawn if task is not None] + waiting[len(drawn) :]
        tasks += [task for _, task in drawn if task is not None]
    return tasks


def _tasks_of_file(
    path: str, text: str, tokenizer: Tokenizer, seed: int, limits: tuple[int, int, int], shared_prompts: bool
) -> Iterator[dict[str, str]]:
    max_prompt, min_completion, max_completion = limits
    lines = re.findall(r"[^\n]*\n", text)  # an unfinished last line is left out
    is_code = _code_lines(lines)
    taken = np.zeros(len(lines), bool)
    line_tokens = [len(tokenizer.encode(line)) for line in lines]
    generator = keyed_generator(seed, "cut", path)
    for cut in generator.permutation(len(lines)):
        stop = cut
        for _ in range(int(generator.integers(1, MAX_COMPLETION_LINES + 1))):
            stop += int(stop < len(lines) and bool(lines[stop].strip()))
        start, length = cut, 0
        while start > 0 and (shared_prompts or not taken[start - 1]) and length + line_tokens[start - 1] <= max_prompt:
            start -= 1
            length += line_tokens[start]
        if not any(is_code[start:cut]) or not any(is_code[cut:stop]) or taken[cut:stop].any():
            continue
        prompt, completion = "".join(lines[start:cut]), "".join(lines[cut:stop])
        prompt_length, completion_length = len(tokenizer.encode(prompt)), len(tokenizer.encode(completion))
        if not MIN_PROMPT_TOKENS <= prompt_length <= max_prompt:
            continue
        if not min_completion <= completion_length <= max_completion:
            continue
        taken[cut if shared_prompts else start : stop] = True
        yield {"id": f"{path}:{cut + 1}", "prompt": prompt, "completion": completion}


def _code_lines(lines: Sequence[str]) -> list[bool]:
    """Whether each line is code: not blank, not a comment, not inside a triple-quoted string (judged by its quotes)."""
    inside = False
    code = []
    for line in lines:
        quotes = line.count('"""') + line.count("'''")
        code.append(bool(line.strip()) and not line.lstrip().startswith(("#", '"""', "'''")) and not inside)
        inside ^= bool(quotes % 2)
    return code
