"""Rewards, and other numbers of answers, from a user's Python function, FILE.py:FUNCTION: found, called, checked.

    def score(prompts, completions, records):  # records only where the function takes it
        return [float(record["answer"] in text) for text, record in zip(completions, records)]

It must be a function of its arguments alone: every process calls it on the rows of its own devices, a cut run calls
it again, and only its file's content enters the stage's identity, not what the file imports.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.schemas import Record, Text
from rlhf_jax.errors import UserError

SHOWN = 40  # characters of an answer or value that a message shows


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A loaded function: `source` is FILE.py:FUNCTION and `field` what names it, for messages; `path` its file."""

    field: str
    source: str
    path: Path
    call: Callable[..., Any]
    takes_records: bool

    @property
    def name(self) -> str:
        return self.source.rpartition(":")[2]

    @property
    def label(self) -> str:
        return f'{self.field} "{self.source}"'


def split_source(source: str, field: str = "reward") -> tuple[Path, str]:
    """(file, function's name) of FILE.py:FUNCTION.

    Raises:
      UserError: there is no such file, or no name behind the colon.
    """
    file, _, name = source.rpartition(":")
    path = Path(file).expanduser().absolute()
    if not name.isidentifier():
        raise UserError(f'{field} "{source}": "{name}" is no function\'s name: give FILE.py:FUNCTION')
    if not path.is_file():
        raise UserError(f'{field} "{source}": there is no file {path}: give FILE.py:FUNCTION')
    return path, name


def function_identity(source: str) -> str:
    """What a stage's identity holds of a function: its name and a hash of its file's content."""
    path, name = split_source(source)
    return f"function {name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def load_function(source: str, field: str = "reward") -> RewardFunction:
    """Imports FILE.py and finds FUNCTION in it; `field` is the config's that names it.

    Raises:
      UserError: no such file, the import fails, there is no such function, or it does not take two arguments.
    """
    path, name = split_source(source, field)
    module_name = f"rlhf_jax_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f'{field} "{source}": importing {path} raised {_told(error, path)}: mend it') from error
    call = getattr(module, name, None)
    if not callable(call):
        own = [n for n, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module_name]
        raise UserError(f'{field} "{source}": {path} has no function "{name}", it has: {", ".join(own) or "none"}')
    return RewardFunction(field, source, path, call, _takes_records(f'{field} "{source}"', call))


def _takes_records(label: str, call: Callable[..., Any]) -> bool:
    """Whether a call passes `records`: by name or among **kwargs."""
    try:
        signature = inspect.signature(call)
    except ValueError:  # of a builtin nothing is known
        return False
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    records = "records" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds
    try:
        signature.bind(None, None, **({"records": None} if records else {}))
    except TypeError as error:
        raise UserError(
            f"{label} is called with (prompts, completions), and records where it takes them, but its "
            f"arguments are {signature} ({error}): give the others defaults"
        ) from error
    return records


def score_answers(
    function: RewardFunction, prompts: Sequence[Text], completions: Sequence[str], records: Sequence[Record]
) -> np.ndarray:
    """The function's scores (n,) float32 of n answers.

    Raises:
      UserError: the function raised, or did not return one finite number for each answer.
    """
    if not completions:
        return np.zeros(0, np.float32)
    extra = {"records": [dict(record) for record in records]} if function.takes_records else {}
    try:
        scores = function.call(list(prompts), list(completions), **extra)
    except (Exception, SystemExit) as error:
        raise UserError(f"{function.label} raised {_told(error, function.path)}: mend it") from error
    return _checked(function.label, scores, completions)


def _checked(label: str, scores: Any, completions: Sequence[str]) -> np.ndarray:
    mend = "return one finite number for each answer"
    where, count = f"{label} returned", len(completions)
    if isinstance(scores, str | bytes | Mapping) or not hasattr(scores, "__len__"):
        raise UserError(f"{where} {_shown(scores)}, a {type(scores).__name__}: {mend}")
    shape = getattr(scores, "shape", None)
    if shape is not None and len(shape) != 1:
        raise UserError(f"{where} an array of shape {tuple(shape)} for {count} answers: {mend}")
    if len(scores) != count:
        raise UserError(f"{where} {len(scores)} scores for {count} answers: {mend}")
    values = np.zeros(count, np.float32)
    for i, (score, text) in enumerate(zip(scores, completions, strict=True)):
        answer = f"answer {i + 1} ({_shown(text)})"
        number = np.asarray(score)
        if number.ndim or number.dtype.kind not in "biuf":
            raise UserError(f"{where} {_shown(score)}, a {type(score).__name__}, for {answer}: {mend}")
        with np.errstate(over="ignore"):
            values[i] = number
        if not np.isfinite(values[i]):
            raise UserError(f"{where} {score} for {answer}, which float32 has no finite number for: {mend}")
    return values


def _shown(value: Any) -> str:
    """The beginning of a value, as Python writes it."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:SHOWN]) if isinstance(value, str) else text[:SHOWN]


def _told(error: BaseException, path: Path) -> str:
    """An exception's type, message and place: the deepest line of the user's file, else of what it called."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == path]
    file, line = path, 0
    if isinstance(error, SyntaxError) and error.filename:
        file, line = Path(error.filename), error.lineno or 0
    elif own or frames:
        file, line = Path((own or frames)[-1].filename), (own or frames)[-1].lineno or 0
    return f"{type(error).__name__}: {str(error)[:200]} ({file}:{line})"
