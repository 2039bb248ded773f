"""Which room of the package may know which: see docs/contributing.md."""

import ast
from pathlib import Path

import pytest

import layerskip_jax

PACKAGE = Path(layerskip_jax.__file__).parent
# From the ground up: a room may import itself and those before it.
ORDER = (
    "schema", "interrupts", "hardware", "distributed", "ops", "layer_dropout", "early_exit_loss",
    "model", "config", "settings", "decoding", "self_speculation", "run_folder", "data",
    "generation", "interop", "training", "planning", "language_model", "evaluation", "report",
    "commands", "cli",
)  # fmt: skip
# The package itself: its version, which every room may read, and `load`, imported on first use.
FACE = "layerskip_jax"


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else FACE


def imported(source: str) -> set[str]:
    """Returns the modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == FACE:
            found |= {f"{FACE}.{a.name}" for a in node.names if a.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == FACE}


def forbidden(here: str, source: str) -> list[str]:
    """Returns the imports of a file in room `here` that go up instead of down."""
    return [
        name for name in sorted(imported(source)) if ORDER.index(room(name)) > ORDER.index(here)
    ]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))


def test_every_room_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_those_before_it(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert forbidden(here, path.read_text(encoding="utf-8")) == []


def test_an_import_that_goes_up_is_found():
    source = "def f():\n    from layerskip_jax.training.step import Batch\n"
    assert forbidden("config", source) == ["layerskip_jax.training.step"]
    assert forbidden("planning", source) == []
