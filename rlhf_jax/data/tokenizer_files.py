"""A tokenizer's files and what the configuration beside the vocabulary declares."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files, read once, and what the files beside the vocabulary declare.

    Attributes:
        path: the file or folder given, absolute.
        name: the file that holds the vocabulary, as `save` names it: "tokenizer.json" or "tokenizer.model".
        contents: bytes of each file by name, the vocabulary's among them.
        declared: bos, eos, unk, pad and any other ``*_token`` of the configuration: role to spelling.
        special: spellings declared special besides those; added: id to spelling of tokens beyond the vocabulary.
        add_bos: `add_bos_token`, None where not declared.
        eos_ids: the end-of-sequence ids of generation_config.json, else those of config.json.
        eos_source: the name of that file.
        chat_template: the default template, None where there is none.
    """

    path: Path
    name: str
    contents: dict[str, bytes]
    declared: dict[str, str]
    special: tuple[str, ...]
    added: dict[int, str]
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    eos_source: str
    chat_template: str | None


def vocabulary_file(path: str | Path) -> Path:
    """The file with the vocabulary: `path` itself, or a folder's tokenizer.json, else its tokenizer.model.

    Raises:
        UserError: a folder with neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path}: no tokenizer.json and no tokenizer.model here: give a folder with one of them "
        "(transformers' save_pretrained writes tokenizer.json)"
    )


def read_tokenizer_files(path: str | Path, chat_template: str | None = None) -> TokenizerFiles:
    """Reads the tokenizer at `path` and the configuration beside it. A lone SentencePiece model stands for itself.

    Args:
        chat_template: replaces the template of the files.

    Raises:
        UserError: a file is missing, cannot be read, or is not JSON of the expected form.
    """
    main = vocabulary_file(path)
    name = "tokenizer.json" if main.suffix == ".json" else "tokenizer.model"
    try:
        contents = {name: main.read_bytes()}
        if Path(path).is_dir() or name == "tokenizer.json":
            beside = [main.with_name(other) for other in CONFIG_FILES]
            contents |= {file.name: file.read_bytes() for file in beside if file.is_file()}
            models = [main.with_name(other) for other in ("generation_config.json", "config.json")]
            model_configs = {file.name: file.read_bytes() for file in models if file.is_file()}
        else:
            model_configs = {}
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the tokenizer ({error.strerror}): give a SentencePiece .model, a tokenizer.json, or "
            "a checkpoint folder"
        ) from error
    if chat_template is not None:
        contents["chat_template.jinja"] = chat_template.encode()

    folder = main.parent
    config = _json_object(folder / "tokenizer_config.json", contents.get("tokenizer_config.json"))
    merged = _json_object(folder / "special_tokens_map.json", contents.get("special_tokens_map.json"))
    merged |= {key: value for key, value in config.items() if value is not None}
    declared = {key.removesuffix("_token"): text for key, text in _spellings(merged) if not key.startswith("add_")}
    extra = [merged.get("additional_special_tokens"), merged.get("extra_special_tokens")]
    lists = [list(e.values()) if isinstance(e, dict) else e for e in extra if isinstance(e, list | dict)]
    decoder = merged.get("added_tokens_decoder") or {}
    added = _json_object(folder / "added_tokens.json", contents.get("added_tokens.json"))
    flagged = [t["content"] for t in decoder.values() if isinstance(t, dict) and t.get("special")]
    eos_ids, source = _eos_ids(folder, model_configs)
    return TokenizerFiles(
        path=Path(path).absolute(),
        name=name,
        contents=contents,
        declared=declared,
        special=tuple(s for s in [*map(_spelling, sum(lists, [])), *flagged] if s),
        added={int(i): text for text, i in added.items()} | {int(i): _spelling(t) or "" for i, t in decoder.items()},
        add_bos=merged.get("add_bos_token"),
        eos_ids=eos_ids,
        eos_source=source,
        chat_template=_chat_template(contents, merged.get("chat_template")),
    )


def _json_object(path: Path, content: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(content or b"{}")
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): download the checkpoint's file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object: download the checkpoint's file again")
    return value


def _spelling(token: Any) -> str | None:
    """A token's text: configurations hold it plainly or as {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _spellings(config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        text = _spelling(value)
        if key.endswith("_token") and text is not None:
            yield key, text


def _eos_ids(folder: Path, files: dict[str, bytes]) -> tuple[tuple[int, ...], str]:
    for name, content in files.items():
        config = _json_object(folder / name, content)
        value = config.get("eos_token_id")
        value = config.get("text_config", {}).get("eos_token_id") if value is None else value
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise UserError(f"{folder / name}: eos_token_id is {value!r}: make it an id or a list of ids")
            return tuple(ids), name
    return (), ""


def _chat_template(contents: dict[str, bytes], configured: Any) -> str | None:
    if "chat_template.jinja" in contents:
        return contents["chat_template.jinja"].decode("utf-8")
    if isinstance(configured, list):  # named templates
        configured = {
            t["name"]: t["template"] for t in configured if isinstance(t, dict) and {"name", "template"} <= set(t)
        }
    return configured.get("default") if isinstance(configured, dict) else configured


def json_bytes(value: dict[str, Any]) -> bytes:
    """`value` as indented JSON in UTF-8."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
