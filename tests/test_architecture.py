"""The shape of the code, held by reading it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.checkpoints.families import FAMILIES

PACKAGE = Path(__file__).parents[1] / "moe_jax"
ARROW = [
    "errors",
    "config",
    "scheduler",
    "sharding",
    "kernels",
    "layers",
    "models",
    "checkpoints",
    "programs",
    "analysis",
    "engine",
    "llm",
    "training",
    "cli",
    "__main__",
]
"""Rooms from left to right: a module imports only from its own room and those to its left."""

FAMILY_NAMES = ("qwen", *(name for name in FAMILIES if not name.startswith("qwen")))
MODULES = sorted(PACKAGE.rglob("*.py"))
COLLECTIVES = {
    "psum", "psum_scatter", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ragged_all_to_all", "ppermute",
    "pshuffle", "pcast", "pvary", "axis_index", "axis_size",
}  # fmt: skip


def module_name(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [
                f"{node.module}.{alias.name}" if node.module == "moe_jax" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("moe_jax.")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != PACKAGE / "__init__.py"], ids=module_name)
def test_imports_follow_the_arrow(module: Path) -> None:
    here = room(module)
    for there in imported_rooms(module) - {here}:
        assert ARROW.index(there) < ARROW.index(here), f"{here} must not import from {there}"


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_collectives_are_called_in_one_file_only(module: Path) -> None:
    if module == PACKAGE / "sharding" / "collectives.py":
        return
    used = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("lax", "jax.lax"):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            used |= {alias.name for alias in node.names}
    assert not used & COLLECTIVES


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_axis_names_and_family_names_stay_in_their_rooms(module: Path) -> None:
    strings = {
        node.value
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
    }
    if room(module) != "sharding":
        assert not strings & {"data", "expert", "tensor"}
    if room(module) not in ("checkpoints", "training"):
        assert not [text for text in strings if text.startswith(FAMILY_NAMES)]


@pytest.mark.parametrize("name", ["config", "scheduler", "errors"])
def test_is_importable_without_jax(name: str) -> None:
    # The package's own __init__ offers LLM, so the module is loaded by its path.
    code = (
        "import sys, types; sys.modules['jax'] = None; package = types.ModuleType('moe_jax'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['moe_jax'] = package; import moe_jax.{name}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
