"""A SentencePiece tokenizer for source code: exact round trips, special tokens that no text can spell."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from rlhf_jax.errors import UserError

FIM_PIECES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
SPACE_MARKER = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care


class Tokenizer:
    """The SentencePiece model at `path`.

    Attributes: `path`; `pad_id`, `bos_id`, `eos_id`, `unk_id`; `fim_prefix_id`, `fim_suffix_id`, `fim_middle_id` (None
    where the model has no such control piece); `vocab_size`; `identity`, the SHA-256 of the model file in hexadecimal.

    Round trips are exact for models of `train_tokenizer`. A foreign model keeps its own normalization.

    Raises:
        UserError: the file is missing or no SentencePiece model; or pad, bos and eos are not three different ids.
    """

    def __init__(self, path: str | Path):
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the tokenizer ({error.strerror}): give a SentencePiece .model"
            ) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a SentencePiece model: give a .model file that SentencePiece wrote"
            ) from error
        self.path = Path(path).absolute()
        self.identity = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._model.vocab_size()
        self.pad_id, self.bos_id = self._model.pad_id(), self._model.bos_id()
        self.eos_id, self.unk_id = self._model.eos_id(), self._model.unk_id()
        self.fim_prefix_id, self.fim_suffix_id, self.fim_middle_id = (self._control_id(piece) for piece in FIM_PIECES)
        special = (self.pad_id, self.bos_id, self.eos_id)
        if min(special) < 0 or len(set(special)) < 3:
            raise UserError(
                f"{path}: pad, bos and eos must be three different ids, got pad={self.pad_id} bos={self.bos_id} "
                f"eos={self.eos_id}: train the model again with pad_id=0, bos_id=1, eos_id=2, unk_id=3"
            )
        marker = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARKER.encode()]
        self._marker_ids = marker if all(self._model.is_byte(i) for i in marker) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos. The spelling of a special token is ordinary text."""
        if self._marker_ids is None or SPACE_MARKER not in text:
            return self._model.encode(text)
        first, *rest = text.split(SPACE_MARKER)
        ids = self._model.encode(first)
        for part in rest:
            ids += self._marker_ids + self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, leaving out pad, bos and eos."""
        special = (self.pad_id, self.bos_id, self.eos_id)
        return self._model.decode([int(i) for i in ids if int(i) not in special])

    def _control_id(self, piece: str) -> int | None:
        index = self._model.piece_to_id(piece)
        return index if self._model.is_control(index) else None


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains byte-pair encoding on `texts` and writes the model to `path`; the same texts give the same bytes.

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
    Path(path).write_bytes(model.getvalue())
