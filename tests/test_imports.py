"""Imports point one way: what a file may use is what stands below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"
# From the top down; parts of one layer do not import each other.
LAYERS = (
    ("main",),
    ("pipeline",),
    ("stages",),
    ("reporting",),
    ("evaluation",),
    ("uncertainty", "privacy", "training"),
    ("rollout",),
    ("models", "data"),
    ("distributed",),
    ("validation",),
    ("config",),
    ("errors", "xla_flags"),
)
HEIGHT = {part: -number for number, layer in enumerate(LAYERS) for part in layer}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def part_of(path):
    """The layer's name a file belongs to: its top folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Dotted names of all modules a file imports, wherever in it; a relative import is not used in this package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(path):
    """The parts of this package that a file imports."""
    for name in imported(path):
        folders = name.split(".")
        if folders[0] == "rlhf_jax" and len(folders) > 1 and folders[1] != "__version__":
            yield folders[1]


def test_every_part_of_the_package_has_its_place():
    assert {part_of(path) for path in FILES} - {"bench", "objectives"} <= set(HEIGHT)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_what_lies_below_it(path):
    part = part_of(path)
    if part == "bench":
        return
    for other in own_parts(path):
        if part == "objectives":
            assert other == "objectives", f"{path} imports {other}"
        elif other not in (part, "objectives"):
            assert HEIGHT[other] < HEIGHT[part], f"{path} imports {other}"


def top_level_imports(folder):
    return {name.split(".")[0] for path in (PACKAGE / folder).rglob("*.py") for name in imported(path)}


def test_objectives_are_mathematics_on_arrays():
    assert top_level_imports("objectives") - sys.stdlib_module_names == {"jax", "rlhf_jax"}


def test_data_needs_no_jax():
    assert not top_level_imports("data") & {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_the_command_starts_without_what_is_slow_to_import():
    program = "import sys, rlhf_jax.pipeline; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "orbax.checkpoint" in loaded
    assert not {"scipy.stats", "scipy.optimize", "matplotlib", "datasets", "pandas", "tensorboardX"} & set(loaded)


def test_no_pickle_is_ever_loaded():
    for path in FILES:
        names = set(imported(path))
        assert not names & {"pickle", "dill", "cloudpickle", "shelve"}, path
        assert "allow_pickle=True" not in path.read_text(encoding="utf-8"), path
