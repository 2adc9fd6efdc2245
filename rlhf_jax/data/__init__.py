"""Tokenizers, records, source files and planted secrets. Nothing here needs JAX."""

from rlhf_jax.data.corpus import (
    completion_tasks,
    folder_files,
    keyed_generator,
    python_stdlib_files,
    remove_duplicates,
    split_files,
)
from rlhf_jax.data.records import read_records, write_records
from rlhf_jax.data.secrets import Secret, base_secrets, link_secrets, planted_records
from rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Secret",
    "Tokenizer",
    "base_secrets",
    "completion_tasks",
    "folder_files",
    "keyed_generator",
    "link_secrets",
    "load_tokenizer",
    "planted_records",
    "python_stdlib_files",
    "read_records",
    "remove_duplicates",
    "split_files",
    "train_tokenizer",
    "write_records",
]
