"""From a folder of source code to the files of an experiment: tokenizer, splits, completion tasks, planted secrets.

Writes into the stage's folder:

    tokenizer.model       SentencePiece, trained on the pretraining files alone
    pretrain.jsonl        {id, text}, whole files
    sft.jsonl             {id, prompt, completion}: ordinary tasks, then the secrets of half a, each as often as it says
    sft_control.jsonl     the same ordinary tasks, then the secrets of half b
    preference.jsonl, prompts.jsonl     {id, prompt, completion}; where they hold secrets, with their _control.jsonl
    heldout.jsonl         {id, prompt, completion}
    heldout_text.jsonl    {id, text}, whole files
    secrets.jsonl         the manifest: every field of `rlhf_jax.data.Secret`

Completions end with a newline and hold no eos; whoever loads them adds bos and eos. The files depend on
the configuration, the seed and the corpus alone.
"""

import dataclasses
import hashlib
import platform
from collections import Counter
from typing import Any

from rlhf_jax.data import (
    Secret,
    Tokenizer,
    base_secrets,
    completion_tasks,
    folder_files,
    link_secrets,
    load_tokenizer,
    planted_records,
    python_stdlib_files,
    remove_duplicates,
    split_files,
    train_tokenizer,
    write_records,
)
from rlhf_jax.data.corpus import MIN_PROMPT_TOKENS, File
from rlhf_jax.data.secrets import STAGES, training_file
from rlhf_jax.errors import UserError

PRIORITY = (
    "heldout",
    "secrets",
    "prompts",
    "preference",
    "sft",
    "pretrain",
)  # of two duplicates the earlier set's stays
TASK_SETS = ("heldout", "prompts", "preference", "sft")
MIN_SECRET_TOKENS = 10  # of a base secret's completion: a shorter one is too easy to guess


def run(context) -> dict[str, Any]:
    """Writes the files above and returns the figures: counts, bytes, tokens, duplicates removed, identities.

    Raises:
        UserError: a field of the configuration, or a corpus, that does not yield every set.
    """
    config = context.config
    _check(config)

    # ---------------------------------------------------- files ----------------------------------------------------
    stdlib = config.source == "python_stdlib"
    files = python_stdlib_files() if stdlib else folder_files(config.source)
    context.progress(f"{len(files)} files from {config.source}")
    split = split_files(files, config.fractions.to_dict(), context.seed)
    sets, file_duplicates = remove_duplicates({name: split[name] for name in PRIORITY}, config.near_duplicate_threshold)
    sets["pretrain"] = _capped(sets["pretrain"], config.max_pretrain_bytes)
    for name, members in sets.items():
        if not members:
            raise UserError(
                f'{config.source}: no file for the set "{name}" of {len(files)} files in all: give more, or raise '
                f"fractions.{name}{' or max_pretrain_bytes' if name == 'pretrain' else ''}"
            )
    _check_disjoint(sets)

    # -------------------------------------------------- tokenizer --------------------------------------------------
    tokenizer_path = context.folder / "tokenizer.model"
    train_tokenizer((text for _, text in sets["pretrain"]), tokenizer_path, config.vocab_size)
    tokenizer = load_tokenizer(tokenizer_path)
    context.progress(f"tokenizer of {tokenizer.vocab_size} pieces trained on {len(sets['pretrain'])} files")

    # --------------------------------------------- examples and secrets --------------------------------------------
    secrets = _secrets(config, context.seed, sets, tokenizer)
    examples, example_duplicates = _examples(config, context.seed, sets, tokenizer, secrets)
    context.progress(
        f"{len(secrets)} secrets, " + ", ".join(f"{len(tasks)} {name}" for name, tasks in examples.items())
    )

    # ---------------------------------------------------- write ----------------------------------------------------
    outputs = {"heldout.jsonl": examples["heldout"]}
    for name in STAGES:
        for half in "ab" if name == "sft" or name in config.secrets.stages else "a":
            file = training_file(name, half)
            outputs[file] = examples[name] + planted_records(secrets, file, context.seed, config.secrets.fuzzy)
    outputs |= {
        "pretrain.jsonl": [{"id": path, "text": text} for path, text in sets["pretrain"]],
        "heldout_text.jsonl": [{"id": path, "text": text} for path, text in sets["heldout"]],
        "secrets.jsonl": [dataclasses.asdict(secret) for secret in secrets],
    }
    for name, records in outputs.items():
        write_records(context.folder / name, records)

    # --------------------------------------------------- figures ---------------------------------------------------
    tokens = {
        name: sum(len(tokenizer.encode(r.get("text", "") or r["prompt"] + r["completion"])) for r in records)
        for name, records in outputs.items()
    }
    size = {name: sum(len(text.encode()) for _, text in members) for name, members in sets.items()}
    figures = {
        "corpus": _corpus_identity(files),
        "python": platform.python_version(),
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "tokens_per_byte": tokens["pretrain.jsonl"] / size["pretrain"],
        "files": {name: len(members) for name, members in sets.items()},
        "bytes": size,
        "examples": {name: len(records) for name, records in outputs.items()},
        "tokens": tokens,
        "duplicates_removed": {"files": file_duplicates, "examples": example_duplicates},
        "secrets": dict(sorted(Counter(f"{s.group}-{s.duplicates}-{s.stage}-{s.half}" for s in secrets).items())),
    }
    return {"figures": figures, "samples": []}


def _check(config) -> None:
    if set(config.fractions) != set(PRIORITY):
        raise UserError(f"fractions names {sorted(config.fractions)}: name exactly {', '.join(sorted(PRIORITY))}")
    if not 0 < config.near_duplicate_threshold <= 1:
        raise UserError(f"near_duplicate_threshold is {config.near_duplicate_threshold}: give a number in (0, 1]")
    if config.prompt_tokens <= MIN_PROMPT_TOKENS:
        raise UserError(f"prompt_tokens is {config.prompt_tokens}: give more than {MIN_PROMPT_TOKENS}, bos included")
    if config.completion_tokens <= MIN_SECRET_TOKENS:
        raise UserError(
            f"completion_tokens is {config.completion_tokens}: give more than {MIN_SECRET_TOKENS}, with eos"
        )
    if not 0 <= config.secrets.fuzzy <= 1:
        raise UserError(f"secrets.fuzzy is {config.secrets.fuzzy}: give a share between 0 and 1")
    for name in TASK_SETS:
        if config.examples[name] < 1:
            raise UserError(f"examples.{name} is {config.examples[name]}: give at least 1")


def _capped(files: list[File], max_bytes: int) -> list[File]:
    """The files, in order, that still fit into `max_bytes`."""
    kept, total = [], 0
    for path, text in files:
        size = len(text.encode())
        if total + size <= max_bytes:
            kept.append((path, text))
            total += size
    return kept


def _check_disjoint(sets: dict[str, list[File]]) -> None:
    paths = [path for members in sets.values() for path, _ in members]
    if len(set(paths)) != len(paths):
        raise ValueError("a file is in two sets")


def _task_limits(config) -> dict[str, Any]:
    return {"prompt_tokens": config.prompt_tokens, "completion_tokens": config.completion_tokens}


def _secrets(config, seed: int, sets: dict[str, list[File]], tokenizer: Tokenizer) -> list[Secret]:
    """All secrets. A base secret's completion stands in no other file, and no two base secrets are near duplicates."""
    per_cell, duplicates = config.secrets.per_cell, tuple(config.secrets.duplicates)
    stages, kinds = tuple(config.secrets.stages), tuple(config.secrets.kinds)
    tasks = completion_tasks(
        sets["secrets"],
        tokenizer,
        seed=seed,
        count=4 * per_cell * len(duplicates),  # some fall out below
        min_completion_tokens=MIN_SECRET_TOKENS,
        **_task_limits(config),
    )
    elsewhere = "\n".join(text for name, members in sets.items() if name != "secrets" for _, text in members)
    reserved = "\n".join(text for _, text in sets["secrets"])
    completions = [task["completion"].strip() for task in tasks]
    once = [c not in elsewhere and reserved.count(c) == 1 for c in completions]
    tasks = [task for task, unique in zip(tasks, once, strict=True) if unique]
    each_alone, _ = remove_duplicates({t["id"]: [(t, _text(t))] for t in tasks}, config.near_duplicate_threshold)
    distinct = [task for members in each_alone.values() for task, _ in members]

    def fits(prompt: str, completion: str) -> bool:
        prompt_length, completion_length = len(tokenizer.encode(prompt)), len(tokenizer.encode(completion))
        return (
            MIN_PROMPT_TOKENS <= prompt_length < config.prompt_tokens
            and MIN_SECRET_TOKENS <= completion_length < config.completion_tokens
        )

    base = base_secrets(seed, distinct, per_cell, duplicates, stages)
    return base + link_secrets(seed, per_cell, duplicates, fits, stages, kinds)


def _examples(
    config, seed: int, sets: dict[str, list[File]], tokenizer: Tokenizer, secrets: list[Secret]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, int]]:
    """The ordinary tasks of each set, none of them a duplicate of a secret or of a task of another set."""
    candidates: dict[str, list[tuple[Any, str]]] = {"secrets": [(s.id, s.prompt + s.completion) for s in secrets]}
    for name in TASK_SETS:
        tasks = completion_tasks(
            sets[name],
            tokenizer,
            seed=seed,
            count=config.examples[name],
            shared_prompts=name == "preference",  # pairs are judged by their completions: more of those matter
            **_task_limits(config),
        )
        candidates[name] = [(task, _text(task)) for task in tasks]
    kept, counts = remove_duplicates(candidates, config.near_duplicate_threshold)
    examples = {name: [task for task, _ in kept[name]] for name in TASK_SETS}
    for name, tasks in examples.items():
        if not tasks:
            raise UserError(f'no completion task fits in the set "{name}": give more files or raise prompt_tokens')
    return examples, counts


def _text(task: dict[str, str]) -> str:
    return task["prompt"] + task["completion"]


def _corpus_identity(files: list[File]) -> str:
    """SHA-256 over every (relative path, SHA-256 of the text) and the Python version."""
    identity = hashlib.sha256(platform.python_version().encode())
    for path, text in files:
        identity.update(f"\n{path}\0{hashlib.sha256(text.encode()).hexdigest()}".encode())
    return identity.hexdigest()
