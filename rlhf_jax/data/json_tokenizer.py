"""Tokenizers of the `tokenizers` package: a tokenizer.json and the configuration beside it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from rlhf_jax.data.tokenizer_base import EOS_TOKENS, FIM_TOKENS, PAD_TOKENS, Tokenizer, assign_roles
from rlhf_jax.data.tokenizer_files import TokenizerFiles, read_tokenizer_files
from rlhf_jax.errors import UserError

UNSPELLABLE = "\uffff"  # a Unicode noncharacter: no text for interchange holds it
KNOWN = {*EOS_TOKENS, *PAD_TOKENS, *(text for names in FIM_TOKENS for text in names)}  # special, flagged so or not
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, or a checkpoint folder that has one.

    Two readings of the file: in rendered chat templates the spellings of special tokens are those tokens; in ordinary
    text they are text, also where the vocabulary itself holds them (Unigram, or merges that end in "<s>"). Added tokens
    that are not special (runs of spaces, say) are vocabulary in both.

    Raises:
        UserError: the file is missing or no tokenizer.json, a declared token is missing, or no eos is known.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None):
        files = read_tokenizer_files(path, chat_template)
        spec = _parsed(files)
        vocabulary = _vocabulary(spec)
        _add_declared_tokens(spec, files, vocabulary)
        spelling = {index: text for text, index in vocabulary.items()}
        controls = {
            token["content"]: int(token["id"])
            for token in spec["added_tokens"]
            if token["special"] or token["content"] in KNOWN or token["id"] in files.eos_ids
        }
        unk = spec["model"].get("unk_token")
        own = {"unk": vocabulary.get(unk) if isinstance(unk, str) else spec["model"].get("unk_id")}
        pad = (spec.get("padding") or {}).get("pad_token")
        own["pad"] = vocabulary.get(pad) if isinstance(pad, str) else None
        spec |= {"truncation": None, "padding": None}
        reading = _build(files, spec)
        lone_prefix = _prefix(reading)
        if not files.declared and lone_prefix:
            own["bos"] = lone_prefix[0]  # a tokenizer.json alone does not name its bos
        roles = assign_roles(files, vocabulary.get, own, controls, spelling.get)

        marked = _mark_special(spec, set(roles.controls), vocabulary)
        self._rendered = _build(files, spec) if marked else reading
        self._plain = _build(files, _unspellable(spec, set(roles.controls)))
        self._plain.encode_special_tokens = True
        super().__init__(files, roles, max(spelling) + 1, _declared_prefix(files, roles.bos_id, lone_prefix))
        self._spelling = spelling
        self._decoder = _Decoder(spec.get("decoder"))

    def encode(self, text: str) -> list[int]:
        return self._encoding(self._plain, text).ids

    def encode_rendered(self, text: str) -> list[int]:
        return self._encoding(self._rendered, text).ids

    def rendered_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._encoding(self._rendered, text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._rendered.decode([i for i in map(int, ids) if i not in self.special_ids], skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """What the token adds in the middle of a text, as UTF-8 (perhaps part of a character); b"" for special ids.

        Raises:
            UserError: the tokenizer's decoder does not give each token bytes of its own (WordPiece, for one).
        """
        text = self._spelling.get(index)
        return b"" if text is None or index in self.special_ids else self._decoder.token_bytes(text, self.path)

    def _encoding(self, reading: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        try:
            return reading.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise self._surrogate_error(text) from error

    def _saved_config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._saved_tokens(),
            "clean_up_tokenization_spaces": False,
        }


class _Decoder:
    """How a token's spelling becomes bytes, read from the `decoder` of a tokenizer.json."""

    def __init__(self, spec: dict[str, Any] | None):
        self.byte_level = self.byte_fallback = False
        self.replacements: list[tuple[str, str]] = []
        self.unknown: str | None = None if spec else "no decoder"
        for step in (spec or {}).get("decoders", [spec] if spec else []):
            self._read(step)

    def _read(self, step: dict[str, Any]) -> None:
        kind = step["type"]
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Metaspace":
            self.replacements.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in step["pattern"]:
            self.replacements.append((step["pattern"]["String"], step["content"]))
        elif kind not in ("Fuse", "Strip"):  # these two act on the text's ends, not on a token in its middle
            self.unknown = f"decoder {kind}"

    def token_bytes(self, text: str, where: Path) -> bytes:
        if self.unknown is not None:
            raise UserError(
                f"{where}: {self.unknown} does not say which bytes a token stands for: use a tokenizer with a "
                "ByteLevel, Metaspace or Replace decoder"
            )
        byte = BYTE_PIECE.fullmatch(text) if self.byte_fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for pattern, content in self.replacements:
            text = text.replace(pattern, content)
        if self.byte_level and all(character in BYTE_OF for character in text):
            return bytes(BYTE_OF[character] for character in text)
        return text.encode()


def _byte_characters() -> dict[str, int]:
    """Byte-level vocabularies write a printable Latin-1 byte as itself, the other 68 as U+0100 and the following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(other)}


BYTE_OF = _byte_characters()


# ------------------------------------------- reading and editing the file --------------------------------------------


def _parsed(files: TokenizerFiles) -> dict[str, Any]:
    wrong = f"{files.path}: not a tokenizer.json: give the file that the `tokenizers` package wrote"
    try:
        spec = json.loads(files.contents[files.name])
    except ValueError as error:
        raise UserError(wrong) from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise UserError(wrong)
    spec["added_tokens"] = spec.get("added_tokens") or []
    return spec


def _build(files: TokenizerFiles, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the package raises bare Exception
        raise UserError(
            f"{files.path}: the `tokenizers` package cannot read tokenizer.json ({error}): update the package or give "
            "another file"
        ) from error


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Spelling to id, of the model's vocabulary and the added tokens."""
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: int(token["id"]) for token in spec["added_tokens"]}


def _added_token(text: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def _add_declared_tokens(spec: dict[str, Any], files: TokenizerFiles, vocabulary: dict[str, int]) -> None:
    """Adds the tokens that only the configuration has, as transformers does: next free ids, in the order of theirs."""
    beyond = [files.added[index] for index in sorted(files.added)]
    for text in (*beyond, *files.declared.values(), *files.special):
        if text and text not in vocabulary:
            vocabulary[text] = max(vocabulary.values(), default=-1) + 1
            spec["added_tokens"].append(_added_token(text, vocabulary[text]))


def _mark_special(spec: dict[str, Any], controls: set[str], vocabulary: dict[str, int]) -> bool:
    """Makes every control a special added token of `spec`; whether one was not."""
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    kept = [token for token in spec["added_tokens"] if token["content"] not in controls - special]
    new = [_added_token(text, vocabulary[text]) for text in controls - special]
    spec["added_tokens"] = sorted([*kept, *new], key=lambda token: token["id"])
    return bool(new)


def _unspellable(spec: dict[str, Any], controls: set[str]) -> dict[str, Any]:
    """`spec` with the vocabulary's special tokens renamed and without merges into them: no text gives their ids."""
    model = spec["model"]
    vocabulary = model["vocab"]
    pieces = [piece for piece, _ in vocabulary] if isinstance(vocabulary, list) else vocabulary
    hidden = controls.intersection(pieces)
    if not hidden:
        return spec

    def rename(text: str) -> str:
        return UNSPELLABLE + text if text in hidden else text

    model = dict(model)
    if isinstance(vocabulary, list):
        model["vocab"] = [[rename(piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {rename(piece): index for piece, index in vocabulary.items()}
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    if "merges" in model:
        skip = len(model.get("continuing_subword_prefix") or "")
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not hidden & {a, b, a + b[skip:]}]
    added = [token | {"content": rename(token["content"])} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added, "post_processor": None}


def _prefix(reading: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts before a text."""
    plain = reading.encode("a", add_special_tokens=False).ids
    whole = reading.encode("a").ids
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return tuple(whole[: starts[0]]) if starts else ()


def _declared_prefix(files: TokenizerFiles, bos_id: int | None, lone: tuple[int, ...]) -> tuple[int, ...]:
    """`add_bos_token` where it is declared, else what the post-processor does."""
    if files.add_bos is None:
        return lone
    if files.add_bos and bos_id is None:
        raise UserError(
            f"{files.path}: add_bos_token is true but there is no bos_token: set one or the other in "
            "tokenizer_config.json"
        )
    if files.add_bos:
        return lone if bos_id in lone else (bos_id,) if bos_id is not None else ()
    return ()
