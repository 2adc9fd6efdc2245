"""What every tokenizer offers, whichever files it is read from, and how its special ids are decided."""

import dataclasses
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.tokenizer_files import TokenizerFiles, json_bytes
from rlhf_jax.errors import UserError

# Fill-in-the-middle controls (prefix, suffix, middle) as the known families spell them; the first are our own models'.
FIM_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
EOS_TOKENS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")  # where none is declared
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|fim_pad|>", "<|endoftext|>")
RESERVED_TOKEN = re.compile(r"<\|?(reserved_special_token_|reserved_|unused|extra_|extra_id_|SPECIAL_)\d+\|?>")
ROLES = ("bos", "eos", "unk", "pad")


@dataclasses.dataclass(frozen=True)
class Roles:
    """The ids with a role; `controls` maps the spelling of every special token to its id."""

    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int
    pad_note: str
    stop_ids: tuple[int, ...]
    fim: tuple[int | None, int | None, int | None]
    controls: dict[str, int]


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        path: the file or folder it was loaded from, absolute.
        identity: SHA-256 in hexadecimal: of a lone SentencePiece model its file's; else of the vocabulary file, the
            special tokens, the prefix and the chat template. Pad and `stop_ids` are not in it: they change no id.
        vocab_size: the highest id plus one, added tokens included: the rows an embedding needs at least.
        pad_id: a filler, never equal to eos or bos; `pad_note` says how it was chosen. Masks come from lengths.
        bos_id, unk_id: None where the tokenizer has none. bos may equal eos (GPT-2).
        eos_id: what ends a document; `stop_ids`: eos, then the further ids that end an answer (Llama 3's <|eot_id|>).
        prefix: the ids every document starts with: (bos,) mostly, () for Qwen2.
        start_id: what an empty prompt starts with: the prefix's first id, else bos, else eos.
        special_ids: ids that stand for no text.
        special_tokens: bos_token, eos_token, ... to their spelling, as chat templates read them.
        fim_prefix_id, fim_suffix_id, fim_middle_id: None where the vocabulary has no such control tokens.
        chat_template: Jinja source, None where there is none.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        roles: Roles,
        vocab_size: int,
        prefix: tuple[int, ...],
        lone: Mapping[str, Any] | None = None,
    ):
        """`lone`: the settings that the vocabulary file has by itself; what differs from them enters `identity`."""
        self._files, self._controls = files, roles.controls
        self.path, self.vocab_size, self.chat_template = files.path, vocab_size, files.chat_template
        self.bos_id, self.eos_id, self.unk_id = roles.bos_id, roles.eos_id, roles.unk_id
        self.pad_id, self.pad_note, self.stop_ids = roles.pad_id, roles.pad_note, roles.stop_ids
        self.fim_prefix_id, self.fim_suffix_id, self.fim_middle_id = roles.fim
        self.prefix = prefix
        start = (*prefix, self.bos_id, self.eos_id)
        self.start_id: int = next(i for i in start if i is not None)
        self.special_ids = frozenset(roles.controls.values())
        spelling = {index: text for text, index in roles.controls.items()}
        named = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id}
        self.special_tokens = {f"{role}_token": spelling[i] for role, i in named.items() if i in spelling}
        self.special_tokens = {f"{role}_token": text for role, text in files.declared.items()} | self.special_tokens
        settings = {
            "bos": self.bos_id,
            "eos": self.eos_id,
            "prefix": list(prefix),
            "special": {text: i for text, i in roles.controls.items() if i != roles.pad_id},
            "chat_template": files.chat_template,
        }
        digest = hashlib.sha256(files.contents[files.name])
        if settings != lone:
            digest.update(json.dumps(settings, sort_keys=True).encode())
        self.identity = digest.hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without prefix or eos. The spelling of a special token is ordinary text."""

    @abstractmethod
    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template: the spellings of special tokens are those tokens."""

    @abstractmethod
    def rendered_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode_rendered`, and for each the (begin, end) characters of `text` it stands for."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, leaving out special ids and ids beyond the vocabulary."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes:
        """What the token adds in the middle of a text, as UTF-8 (perhaps part of a character); b"" for special ids."""

    def encode_prompt(self, text: str) -> list[int]:
        """The prefix and the ids of `text`: at least one id, `start_id` where there is nothing else."""
        return [*self.prefix, *self.encode(text)] or [self.start_id]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files to `folder`, from which this library and transformers load it.

        A generation_config.json is added where there are several `stop_ids` and the folder has none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_config.json": json_bytes(self._saved_config())}
        for name, content in (config | self._files.contents).items():
            (folder / name).write_bytes(content)
        generation = folder / "generation_config.json"
        if len(self.stop_ids) > 1 and not generation.exists():
            generation.write_bytes(json_bytes({"eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}))

    @abstractmethod
    def _saved_config(self) -> dict[str, Any]:
        """tokenizer_config.json for a tokenizer that came without one."""

    def _saved_tokens(self) -> dict[str, str]:
        """The special tokens by role for `_saved_config`; pad only where it is a token made for nothing else."""
        spelling = {index: text for text, index in self._controls.items()}
        pad = {"pad_token": spelling[self.pad_id]} if self.pad_id in spelling and self.pad_id != self.unk_id else {}
        return self.special_tokens | pad

    def _surrogate_error(self, text: str) -> UserError:
        at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), 0)
        return UserError(f"a text is not Unicode (lone surrogate at character {at}): mend or leave out the record")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises UserError where the tokenizer has ids that a model of `vocab_size` embedding rows lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids but the model's embedding has "
            f"{vocab_size} rows: give the model's own tokenizer, or one of at most {vocab_size} ids"
        )


# ---------------------------------------------------- roles ----------------------------------------------------------


def assign_roles(
    files: TokenizerFiles,
    token_id: Callable[[str], int | None],
    own: Mapping[str, int | None],
    controls: dict[str, int],
    spelling: Callable[[int], str | None],
) -> Roles:
    """Decides which id plays which part.

    Args:
        token_id: the id of a spelling, None where the vocabulary lacks it.
        own: role to id as the vocabulary file itself declares them; the configuration's declarations come first.
        controls: the special tokens that the vocabulary file itself declares.
        spelling: the text of an id, None where the vocabulary has no such id.

    Raises:
        UserError: a declared token is not in the vocabulary, or nothing says how a document ends.
    """
    where = files.path
    ids = dict(own)
    for role in ROLES:
        if role in files.declared:
            ids[role] = token_id(files.declared[role])
            if ids[role] is None:
                raise UserError(
                    f"{where}: {role}_token {files.declared[role]!r} is not in the vocabulary: correct "
                    "tokenizer_config.json or add the token"
                )
    eos, bos, unk = ids.get("eos"), ids.get("bos"), ids.get("unk")
    controls = dict(controls)
    for text in (*files.special, *files.declared.values()):
        index = token_id(text)
        if index is not None:
            controls[text] = index
    fim: tuple[int | None, int | None, int | None] = (None, None, None)
    for names in FIM_TOKENS:
        if all(name in controls for name in names):
            fim = (controls[names[0]], controls[names[1]], controls[names[2]])
            break
    further = [i for i in files.eos_ids if spelling(i) in controls]
    if len(further) < len(files.eos_ids) and files.eos_source == "generation_config.json":
        wrong = next(i for i in files.eos_ids if i not in further)
        raise UserError(
            f"{where}: generation_config.json: eos_token_id {wrong} ({spelling(wrong)!r}) is no special token of this "
            "tokenizer: correct it"
        )
    if eos is None:
        eos = next((i for i in (*further, *map(controls.get, EOS_TOKENS)) if i is not None), None)
    if eos is None:
        raise UserError(f'{where}: nothing says which token ends a text: set "eos_token" in tokenizer_config.json')
    for index in (eos, bos):
        spelled = None if index is None else spelling(index)
        if index is not None and spelled is not None:
            controls[spelled] = index
    stop_ids = tuple(dict.fromkeys([eos, *further]))
    pad, note = choose_pad(ids.get("pad"), controls, unk, eos=eos, bos=bos, stop_ids=stop_ids)
    if note in ("declared", "unk"):
        controls[spelling(pad) or ""] = pad
    return Roles(bos, eos, unk, pad, note, stop_ids, fim, controls)


def choose_pad(
    declared: int | None,
    controls: Mapping[str, int],
    unk: int | None,
    *,
    eos: int,
    bos: int | None,
    stop_ids: Sequence[int],
) -> tuple[int, str]:
    """A pad id that is neither eos nor bos, and how it was found.

    In order: the declared one; a special token made for padding or kept in reserve; unk; the lowest id that is no
    special token. The last is a mere filler: masks come from lengths, so it stays ordinary text wherever it is counted.
    """
    if declared is not None and declared not in (eos, bos):
        return declared, "declared"
    taken = {eos, bos, *stop_ids}
    reserved = sorted((index, text) for text, index in controls.items() if RESERVED_TOKEN.fullmatch(text))
    known = [(controls[text], text) for text in PAD_TOKENS if text in controls]
    for index, text in (*known, *reserved):
        if index not in taken:
            return index, f"reserved token {text}"
    if unk is not None and unk not in taken:
        return unk, "unk"
    filler = next(i for i in range(len(controls) + len(taken) + 1) if i not in taken and i not in controls.values())
    return filler, f"ordinary token {filler}, a filler only"
