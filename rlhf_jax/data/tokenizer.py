"""Tokenizers: SentencePiece models, our own and foreign ones, and `load_tokenizer` for every kind."""

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from rlhf_jax.data.json_tokenizer import JsonTokenizer
from rlhf_jax.data.tokenizer_base import (
    FIM_TOKENS,
    Roles,
    Tokenizer,
    assign_roles,
    check_vocabulary,
)
from rlhf_jax.data.tokenizer_files import TokenizerFiles, read_tokenizer_files, vocabulary_file
from rlhf_jax.errors import UserError

__all__ = [
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
    "train_tokenizer",
]

FIM_PIECES = FIM_TOKENS[0]
SPACE_MARKER = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece .model, a tokenizer.json, or a Hugging Face checkpoint folder.

    A folder's tokenizer.json comes before its tokenizer.model; the configuration files beside them are read.

    Args:
        chat_template: Jinja source that replaces the checkpoint's template.

    Raises:
        UserError: no tokenizer there, or one whose special tokens are missing or contradictory.
    """
    kind = JsonTokenizer if vocabulary_file(path).suffix == ".json" else SentencePieceTokenizer
    return kind(path, chat_template)


class SentencePieceTokenizer(Tokenizer):
    """The SentencePiece model at `path`: a .model file, or a folder with a tokenizer.model.

    Round trips are exact for models of `train_tokenizer`. A foreign model keeps its own normalization, and gets a pad
    id where it declares none.

    Raises:
        UserError: the file is missing or no SentencePiece model; no eos; or pad, bos and eos of a model with the
            controls of `train_tokenizer` are not three different ids.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None):
        files = read_tokenizer_files(path, chat_template)
        self._model = _processor(files)
        model = self._model
        self._own = all(model.is_control(model.piece_to_id(piece)) for piece in FIM_PIECES)
        self._beyond = {text: i for i, text in files.added.items() if i >= model.vocab_size()}
        roles, lone = self._roles(files)
        prefix = () if roles.bos_id is None or files.add_bos is False else (roles.bos_id,)
        super().__init__(files, roles, max([model.vocab_size() - 1, *self._beyond.values()]) + 1, prefix, lone)
        spellings = sorted((text for text, i in roles.controls.items() if i != self.unk_id), key=len, reverse=True)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, spellings))})")
        marker = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARKER.encode()]
        self._marker_ids = marker if self._own and all(model.is_byte(i) for i in marker) else None

    def _roles(self, files: TokenizerFiles) -> tuple[Roles, dict[str, Any]]:
        """The roles, and the settings that the model file would have without the files beside it."""
        model = self._model
        ids = {"pad": model.pad_id(), "bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
        three = (ids["pad"], ids["bos"], ids["eos"])
        if self._own and (min(three) < 0 or len(set(three)) < 3):
            raise UserError(
                f"{files.path}: pad, bos and eos must be three different ids, got pad={ids['pad']} bos={ids['bos']} "
                f"eos={ids['eos']}: train the model again with pad_id=0, bos_id=1, eos_id=2, unk_id=3"
            )
        own = {role: index if index >= 0 else None for role, index in ids.items()}
        controls = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        roles = assign_roles(files, self._token_id, own, controls | self._beyond, self._spelling)
        return roles, {
            "bos": own["bos"],
            "eos": own["eos"],
            "prefix": [] if own["bos"] is None else [own["bos"]],
            "special": {text: i for text, i in controls.items() if i != roles.pad_id},
            "chat_template": None,
        }

    def _token_id(self, text: str) -> int | None:
        index = self._model.piece_to_id(text)
        found = index != self._model.unk_id() or text == self._model.id_to_piece(index)
        return index if found else self._beyond.get(text)

    def _spelling(self, index: int) -> str | None:
        if index < self._model.vocab_size():
            return self._model.id_to_piece(index)
        return next((text for text, i in self._beyond.items() if i == index), None)

    def encode(self, text: str) -> list[int]:
        try:
            if self._marker_ids is None or SPACE_MARKER not in text:
                return self._model.encode(text)
            first, *rest = text.split(SPACE_MARKER)
            ids = self._model.encode(first)
            for part in rest:
                ids += self._marker_ids + self._model.encode(part)
            return ids
        except (RuntimeError, TypeError, UnicodeError) as error:  # which, depends on sentencepiece's version
            raise self._surrogate_error(text) from error

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template: the spellings of special tokens are those tokens.

        What stands between two special tokens is encoded as a text of its own, with the model's dummy space if any.
        """
        ids: list[int] = []
        for part in self._spelled.split(text):
            ids += [self._controls[part]] if part in self._controls else self.encode(part)
        return ids

    def rendered_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for part in self._spelled.split(text):
            if part in self._controls:
                ids.append(self._controls[part])
                spans.append((at, at + len(part)))
            else:
                for index, begin, end in self._spans(part):
                    ids.append(index)
                    spans.append((at + begin, at + end))
            at += len(part)
        return ids, spans

    def _spans(self, text: str) -> Iterable[tuple[int, int, int]]:
        """(id, begin, end) of `encode`, in characters; of a character's byte pieces the last has it, the rest none."""
        ids = self.encode(text)
        sizes = [len(self.token_bytes(index)) for index in ids]
        character = [i for i, c in enumerate(text) for _ in c.encode()] + [len(text)]  # by byte
        spaces = sum(sizes) - len(text.encode())
        if spaces not in (0, 1):
            raise UserError(
                f"{self.path}: the SentencePiece model rewrites text, so a chat template's generation blocks cannot be "
                "found in the tokens: give the checkpoint's tokenizer.json"
            )
        at = -spaces  # the model's dummy space stands before the first byte
        for index, size in zip(ids, sizes, strict=True):
            yield index, character[max(at, 0)], character[at + size]
            at += size

    def decode(self, ids: Sequence[int]) -> str:
        size = self._model.vocab_size()
        return self._model.decode([i for i in map(int, ids) if i not in self.special_ids and i < size])

    def token_bytes(self, index: int) -> bytes:
        model = self._model
        if (
            index in self.special_ids
            or index >= model.vocab_size()
            or model.is_unknown(index)
            or model.is_unused(index)
        ):
            return b""
        piece = model.id_to_piece(index)
        return bytes([int(piece[1:-1], 16)]) if model.is_byte(index) else piece.replace(SPACE_MARKER, " ").encode()

    def _saved_config(self) -> dict[str, Any]:
        first = self._model.encode("a")[:1]
        dummy_space = bool(first) and self._model.id_to_piece(first[0]).startswith(SPACE_MARKER)
        extra = [text for text, i in self._controls.items() if text not in self._saved_tokens().values()]
        return {
            "tokenizer_class": "LlamaTokenizer",
            **self._saved_tokens(),
            "add_bos_token": bool(self.prefix),
            "add_eos_token": False,
            "add_prefix_space": dummy_space,
            "legacy": dummy_space,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": extra,
        }


def _processor(files: TokenizerFiles) -> sentencepiece.SentencePieceProcessor:
    """The model; pieces that the configuration declares special are controls in it, which no text spells."""
    content = files.contents[files.name]
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        declared = {*files.special, *files.declared.values()}
        if declared:
            proto = ModelProto.FromString(content)
            for piece in proto.pieces:
                if piece.piece in declared and piece.type == ModelProto.SentencePiece.USER_DEFINED:
                    piece.type = ModelProto.SentencePiece.CONTROL
            model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as error:
        raise UserError(
            f"{files.path}: not a SentencePiece model: give a .model file that SentencePiece wrote"
        ) from error
    return model


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains byte-pair encoding on `texts` and writes the model to `path`, whole or not at all; the same texts
    give the same bytes.

    Pieces: pad 0, bos 1, eos 2, unk 3, the fill-in-the-middle controls 4 to 6, 256 bytes, then merges. No merge goes on
    past a newline, so cutting a text at the start of a non-blank line never changes its tokens; ``"):\\n"`` and a run
    of spaces are one piece each.

    Raises:
        UserError: `vocab_size` is larger or smaller than the texts allow, or there is no text.
    """
    # SentencePiece drops the newline at the end of a sentence; the space after it, its own word, keeps it.
    lines = (line + " " for text in texts for line in re.findall(r"[^\n]+\n*|\n+", text))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # the size reached is checked below
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,  # bytes
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=list(FIM_PIECES),
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"{path}: cannot train a tokenizer of vocab_size {vocab_size} ({str(error).split('] ')[-1] or 'no text'}): "
            "give more text or another vocab_size"
        ) from error
    reached = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if reached != vocab_size:
        raise UserError(
            f"{path}: vocab_size {vocab_size} is too large, the texts support {reached}: "
            f"set vocab_size to {reached} or less, or give more text"
        )
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
