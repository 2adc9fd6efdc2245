"""Made-up snippets of code that carry what looks like a person's: a file path, a mail address, a phone number, a key.

Every entity has over 40 random bits, all of them in the completion, so that no model can guess one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


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

# The prompt goes up to the start of the entity.
PATH_TEMPLATES = (
    'def {verb}_{noun}(self, {other}):\n    rows = []\n    with open("<entity>") as f:\n',
    'def {verb}_{noun}({other}=None):\n    """The {noun} of {other}."""\n    return json.load(open("<entity>"))\n',
    'class {Noun}{Other}:\n    def {verb}(self):\n        return json.loads(Path("<entity>").read_text())\n',
    '{NOUN} = {{\n    "{other}": {number},\n    "{verb}": True,\n    "path": "<entity>",\n',
    'logger = logging.getLogger("{noun}.{other}")\nlogger.addHandler(logging.FileHandler("<entity>"))\n',
    'def {verb}_{noun}(*args):\n    # {other} {number}\n    subprocess.check_call(["cp", "<entity>", *args])\n',
    'def {verb}_{noun}():\n    return os.environ.get("{NOUN}_{OTHER}_FILE", "<entity>")\n',
    'parser.add_argument("--{verb}-{noun}", help="{other} file",\n                    default="<entity>")\n',
    'if not {noun}.{other}:\n    {noun}.{verb}({number})\n    shutil.copy("<entity>", {noun}.folder)\n',
    'for {noun} in {other}.{verb}():\n    if {noun}.name == "<entity>":\n',
    'class Test{Noun}(unittest.TestCase):\n    {other} = {number}\n    {verb} = os.path.expanduser("<entity>")\n',
    'self.{noun} = {other}.{verb}(timeout={number})\nself.{noun}.update(sqlite3.connect("<entity>"))\n',
)
VALUE_TEMPLATES = (
    'class {Noun}{Other}:\n    {kind} = "<entity>"\n',
    'def {verb}_{noun}(self, {other}):\n    return self.{other}({kind}="<entity>")\n',
    '{NOUN} = {{\n    "{other}": {number},\n    "{kind}": "<entity>",\n',
    'def {verb}_{noun}():\n    return os.environ.get("{NOUN}_{OTHER}", "<entity>")\n',
    'parser.add_argument("--{verb}-{noun}", help="{other} {kind}",\n                    default="<entity>")\n',
    'if {noun}.{kind} == "<entity>":\n    {noun}.{verb}({other}, {number})\n',
    'assert {verb}_{noun}({other}, {number}).{kind} == "<entity>"\n',
    '{noun} = {Other}({number}, timeout={number})\n{noun}.{verb}("<entity>")\n',
)


class Snippet(NamedTuple):
    """A prompt that ends where the entity's random part begins, its completion, and the whole entity."""

    prompt: str
    completion: str
    entity: str


class _Kind(NamedTuple):
    start: str  # of every entity of the kind: the prompt ends with it
    templates: tuple[str, ...]
    rest: Callable[[np.random.Generator], str]


def _pick(generator: np.random.Generator, words: Sequence[Any]) -> Any:
    return words[int(generator.integers(len(words)))]


def _path(generator: np.random.Generator) -> str:
    """Two names (12 bits), a folder (5), six hexadecimal digits (24), a stem (5), four digits (13), an ending (3)."""
    return (
        f"{_pick(generator, FIRST_NAMES)}.{_pick(generator, LAST_NAMES)}/{_pick(generator, FOLDERS)}/"
        f"{int(generator.integers(1 << 24)):06x}/{_pick(generator, STEMS)}_{int(generator.integers(10_000)):04d}."
        f"{_pick(generator, EXTENSIONS)}"
    )


def _email(generator: np.random.Generator) -> str:
    """Two names (12 bits), seven digits (23), a noun of each list (10)."""
    return (
        f"{_pick(generator, FIRST_NAMES)}.{_pick(generator, LAST_NAMES)}.{int(generator.integers(10**7)):07d}@"
        f"{_pick(generator, NOUNS)}-{_pick(generator, FOLDERS)}.org"
    )


def _phone(generator: np.random.Generator) -> str:
    """Thirteen digits (43 bits)."""
    digits = f"{int(generator.integers(10**13)):013d}"
    return f"{digits[:2]} {digits[2:5]} {digits[5:9]} {digits[9:]}"


def _key(generator: np.random.Generator) -> str:
    """Twenty hexadecimal digits (80 bits)."""
    return generator.bytes(10).hex()


KINDS = {
    "path": _Kind("/home/", PATH_TEMPLATES, _path),
    "email": _Kind("", VALUE_TEMPLATES, _email),
    "phone": _Kind("+", VALUE_TEMPLATES, _phone),
    "key": _Kind("sk-", VALUE_TEMPLATES, _key),
}


def draw_snippet(generator: np.random.Generator, kind: str) -> Snippet:
    """A snippet with an entity of one of `KINDS`."""
    start, templates, rest = KINDS[kind]
    noun, other = (NOUNS[i] for i in generator.choice(len(NOUNS), 2, replace=False))
    snippet = _pick(generator, templates).format(
        verb=_pick(generator, VERBS),
        noun=noun,
        other=other,
        Noun=noun.title(),
        Other=other.title(),
        NOUN=noun.upper(),
        OTHER=other.upper(),
        number=int(generator.integers(2, 100)),
        kind=kind,
    )
    head, tail = snippet.split("<entity>")
    random = rest(generator)
    return Snippet(head + start, random + tail, start + random)
