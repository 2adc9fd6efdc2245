"""Planted secrets: what the memorization audit looks for, each in one of two training files by a keyed coin.

A secret's group says what it is:

- `base`: a real snippet of the corpus, cut like every completion task, from files used nowhere else;
- `links`: a short made-up snippet with a path like a person's file, which no model can guess.

A cell is a group and a number of duplicates. Every draw is a pure function of the seed and of ids.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.errors import UserError

HALF_FILES = {"a": "sft.jsonl", "b": "sft_control.jsonl"}  # where each half is planted
PATH_START = "/home/"  # the prompt of a link ends with it; the completion holds all that is random
MAX_DRAWS = 1000  # of one link, before its lengths are called impossible


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("""
    alice anna ben carla chris clara daniel david elena emma eric eva frank grace hanna helen henry ian ines irene jack
    james jan jane john julia karen kate kevin laura lea leo linda lisa lucas maria mark marta martin mary max mia mike
    nina noah nora olga oscar paul peter rita robin rosa ruth sam sara simon sofia susan tom vera victor""")
LAST_NAMES = _words("""
    adams allen baker bell berg black brown carter chen clark cook costa cruz davis diaz fischer ford foster garcia
    gomez gray green hall hansen hill hughes jones keller kim klein lang lee lewis lopez martin meyer miller moore
    morris novak ortiz park perez price reed rivera roberts rossi russo schmidt silva smith stone suzuki taylor torres
    turner walker ward weber white wilson wood young""")
FOLDERS = _words("""
    accounts bank cases claims clinic court credit dental family grades health home insurance invoices lab legal letters
    loans medical notes orders patients payroll pension photos private rent reports school tax trips visa wills""")
STEMS = _words("""
    address balance bill card case chart contract data diary draft exam file form history invoice key letter list log
    mail note order passport phone plan record records report result scan statement summary test""")
EXTENSIONS = _words("csv db json log pdf txt xml yaml")
VERBS = _words(
    "build check collect copy export fetch index load merge open parse print read scan send sync test update"
)
NOUNS = _words("""
    account archive backup batch cache client config entry event export field group index input item job label message
    metric model node option output page project queue row sample section session source table target task user value
    worker""")

# The prompt goes up to the start of the path.
TEMPLATES = (
    'def {verb}_{noun}(self, {other}):\n    rows = []\n    with open("<path>") as f:\n',
    'def {verb}_{noun}({other}=None):\n    """The {noun} of {other}."""\n    return json.load(open("<path>"))\n',
    'class {Noun}{Other}:\n    def {verb}(self):\n        return json.loads(Path("<path>").read_text())\n',
    '{NOUN} = {{\n    "{other}": {number},\n    "{verb}": True,\n    "path": "<path>",\n',
    'logger = logging.getLogger("{noun}.{other}")\nlogger.addHandler(logging.FileHandler("<path>"))\n',
    'def {verb}_{noun}(*args):\n    # {other} {number}\n    subprocess.check_call(["cp", "<path>", *args])\n',
    'def {verb}_{noun}():\n    return os.environ.get("{NOUN}_{OTHER}_FILE", "<path>")\n',
    'parser.add_argument("--{verb}-{noun}", help="{other} file",\n                    default="<path>")\n',
    'if not {noun}.{other}:\n    {noun}.{verb}({number})\n    shutil.copy("<path>", {noun}.folder)\n',
    'for {noun} in {other}.{verb}():\n    if {noun}.name == "<path>":\n',
    'class Test{Noun}(unittest.TestCase):\n    {other} = {number}\n    {verb} = os.path.expanduser("<path>")\n',
    'self.{noun} = {other}.{verb}(timeout={number})\nself.{noun}.update(sqlite3.connect("<path>"))\n',
)


@dataclasses.dataclass(frozen=True)
class Secret:
    """One planted snippet, as its line of the manifest holds it.

    `duplicates` is how often it is planted; `entity` is the whole path of a link, "" for base; `half` is the coin's
    side; `planted_in` names the training files that hold it.
    """

    id: str  # "<group>-<duplicates>-<index>"
    group: str
    duplicates: int
    prompt: str
    completion: str
    entity: str
    half: str
    planted_in: tuple[str, ...]


def base_secrets(seed: int, tasks: Sequence[dict[str, Any]], per_cell: int, duplicates: Sequence[int]) -> list[Secret]:
    """`per_cell` secrets for each number of duplicates, drawn from completion `tasks` {prompt, completion}.

    Raises:
        UserError: fewer tasks than secrets, or cells that cannot be halved.
    """
    cells = _cell_ids("base", per_cell, duplicates)
    if len(tasks) < len(cells):
        raise UserError(
            f"{len(cells)} base secrets need as many completion tasks, the secrets files give {len(tasks)}: "
            "lower secrets.per_cell or raise fractions.secrets"
        )
    order = keyed_generator(seed, "base secrets").permutation(len(tasks))
    halves = _halves(seed, "base", per_cell, duplicates)
    return [
        _secret(name, "base", count, tasks[i]["prompt"], tasks[i]["completion"], "", halves[name])
        for (name, count), i in zip(cells, order, strict=False)
    ]


def link_secrets(seed: int, per_cell: int, duplicates: Sequence[int], fits: Callable[[str, str], bool]) -> list[Secret]:
    """`per_cell` secrets for each number of duplicates, no two with the same path or the same prompt.

    A path has over 60 random bits: two names (12), a folder (5), six hexadecimal digits (24), a stem (5), four digits
    (13) and an extension (3). `fits(prompt, completion)` says whether both lengths are allowed; a draw that does not
    fit is drawn again, at most 1000 times, so what fits keeps over 50 bits.

    Raises:
        UserError: no draw fits, or cells that cannot be halved.
    """
    halves = _halves(seed, "links", per_cell, duplicates)
    secrets: list[Secret] = []
    used: set[str] = set()
    for name, count in _cell_ids("links", per_cell, duplicates):
        generator = keyed_generator(seed, "link secret", name)
        for _ in range(MAX_DRAWS):
            prompt, completion = _draw_link(generator)
            path = PATH_START + completion.partition('"')[0]
            if prompt not in used and path not in used and fits(prompt, completion):
                break
        else:
            raise UserError(
                f"link secret {name}: none of {MAX_DRAWS} draws fits, the last is {prompt + completion!r}: "
                "raise prompt_tokens, completion_tokens or vocab_size"
            )
        used |= {prompt, path}
        secrets.append(_secret(name, "links", count, prompt, completion, path, halves[name]))
    return secrets


def planted_records(secrets: Sequence[Secret], file_name: str) -> list[dict[str, str]]:
    """The records {id, prompt, completion} of `secrets` in the training file `file_name`: "base-4-003#0" to "...#3"."""
    return [
        {"id": f"{secret.id}#{copy}", "prompt": secret.prompt, "completion": secret.completion}
        for secret in secrets
        if file_name in secret.planted_in
        for copy in range(secret.duplicates)
    ]


def _cell_ids(group: str, per_cell: int, duplicates: Sequence[int]) -> list[tuple[str, int]]:
    if per_cell < 2 or per_cell % 2:
        raise UserError(f"secrets.per_cell is {per_cell}: give an even number, half of a cell goes to each file")
    if min(duplicates, default=0) < 1 or len(set(duplicates)) < len(duplicates):
        raise UserError(f"secrets.duplicates is {tuple(duplicates)}: give different numbers of at least 1")
    return [(f"{group}-{count}-{index:03d}", count) for count in duplicates for index in range(per_cell)]


def _halves(seed: int, group: str, per_cell: int, duplicates: Sequence[int]) -> dict[str, str]:
    """The coin, balanced: in each cell a keyed permutation puts exactly half of the secrets on each side."""
    halves = {}
    for count in duplicates:
        order = keyed_generator(seed, "halves", f"{group}-{count}").permutation(per_cell)
        for rank, index in enumerate(order):
            halves[f"{group}-{count}-{index:03d}"] = "a" if rank < per_cell // 2 else "b"
    return halves


def _secret(name: str, group: str, count: int, prompt: str, completion: str, entity: str, half: str) -> Secret:
    return Secret(name, group, count, prompt, completion, entity, half, (HALF_FILES[half],))


def _draw_link(generator: np.random.Generator) -> tuple[str, str]:
    def pick(words: Sequence[Any]) -> Any:
        return words[int(generator.integers(len(words)))]

    noun, other = (NOUNS[i] for i in generator.choice(len(NOUNS), 2, replace=False))
    snippet = pick(TEMPLATES).format(
        verb=pick(VERBS),
        noun=noun,
        other=other,
        Noun=noun.title(),
        Other=other.title(),
        NOUN=noun.upper(),
        OTHER=other.upper(),
        number=int(generator.integers(2, 100)),
    )
    head, tail = snippet.split("<path>")
    rest = (
        f"{pick(FIRST_NAMES)}.{pick(LAST_NAMES)}/{pick(FOLDERS)}/{int(generator.integers(1 << 24)):06x}/"
        f"{pick(STEMS)}_{int(generator.integers(10_000)):04d}.{pick(EXTENSIONS)}"
    )
    return head + PATH_START, rest + tail
