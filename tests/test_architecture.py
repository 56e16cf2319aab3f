"""Shape of the code: rooms and imports, sizes, names and docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

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
"""Rooms in order of import. A module imports only from its own room and from rooms listed before it."""
FAMILY_NAMES = ("qwen", *(name for name in FAMILIES if not name.startswith("qwen")))
MODULES = sorted(PACKAGE.rglob("*.py"))
COLLECTIVES = {
    "psum", "psum_scatter", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ragged_all_to_all", "ppermute",
    "pshuffle", "pcast", "pvary", "axis_index", "axis_size",
}  # fmt: skip
MAX_ROOMS = 14
MAX_FILE_LINES, MAX_MEDIAN_FILE_LINES, MAX_FUNCTION_LINES = 300, 90, 40
MAX_PARAMETERS = 12
"""Parameters of a function, `self` and `cls` aside."""
MANY_PARAMETERS = {"LLM.__init__"}
"""Public constructors that may have more parameters."""
SHARED_CLASS_NAMES = {"PageTable"}
"""Class names that are used twice: the same idea on the host and on the devices."""
CLAUSE_WORDS = {
    "What", "Whether", "Whatever", "Whoever", "Where", "Of", "As", "Such", "Those", "That", "Who", "How",
}  # fmt: skip
"""Words that begin a clause. A first docstring line is a noun phrase or an imperative instead."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text())


def module_name(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


def room(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(module: Path) -> set[str]:
    names = []
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [
                f"{node.module}.{alias.name}" if node.module == "moe_jax" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("moe_jax.")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != PACKAGE / "__init__.py"], ids=module_name)
def test_imports_follow_the_arrow(module: Path) -> None:
    own = room(module)
    for imported in imported_rooms(module) - {own}:
        assert ARROW.index(imported) < ARROW.index(own), f"{own} must not import from {imported}"


def test_rooms_are_few() -> None:
    rooms = {room(module) for module in MODULES} - {"__init__", "__main__"}
    assert rooms == set(ARROW) - {"__main__"}
    assert len(rooms) <= MAX_ROOMS


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_collectives_are_called_in_one_file_only(module: Path) -> None:
    if module == PACKAGE / "sharding" / "collectives.py":
        return
    used = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("lax", "jax.lax"):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.lax":
            used |= {alias.name for alias in node.names}
    assert not used & COLLECTIVES


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_axis_names_and_family_names_stay_in_their_rooms(module: Path) -> None:
    strings = {
        node.value
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value
    }
    if room(module) != "sharding" and module.parent.name != "formats":  # formats have scales of a "tensor"
        assert not strings & {"data", "expert", "tensor"}
    if room(module) not in ("checkpoints", "training"):
        assert not [text for text in strings if text.startswith(FAMILY_NAMES)]


@pytest.mark.parametrize("name", ["config", "scheduler", "errors"])
def test_is_importable_without_jax(name: str) -> None:
    # The package's __init__ imports jax, so the module is loaded by its path.
    code = (
        "import sys, types; sys.modules['jax'] = None; package = types.ModuleType('moe_jax'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['moe_jax'] = package; import moe_jax.{name}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_are_short() -> None:
    lines = {module_name(module): len(module.read_text().splitlines()) for module in MODULES}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}
    assert median(lines.values()) <= MAX_MEDIAN_FILE_LINES


def functions(node: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[str, Function]]:
    """Yield all functions below a node, with their qualified names."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, Function | ast.ClassDef)
        inner = (*scope, child.name) if named else scope
        if isinstance(child, Function):
            yield ".".join(inner), child
        yield from functions(child, inner)


def parameter_count(function: Function) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    variadic = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(names) + variadic - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_functions_are_short_and_have_few_parameters(module: Path) -> None:
    lines, parameters = {}, {}
    for name, function in functions(parse(module)):
        assert function.end_lineno is not None
        lines[name] = function.end_lineno - function.lineno + 1
        parameters[name] = parameter_count(function)
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}
    many = {name: count for name, count in parameters.items() if count > MAX_PARAMETERS}
    assert {name: count for name, count in many.items() if name not in MANY_PARAMETERS} == {}


def test_classes_do_not_share_names() -> None:
    modules = defaultdict(list)
    for module in MODULES:
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(module_name(module))
    shared = {name: where for name, where in modules.items() if len(where) > 1}
    assert {name: where for name, where in shared.items() if name not in SHARED_CLASS_NAMES} == {}


def docs(module: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text of each docstring and of each string after an assignment."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node) or ""
        if isinstance(node, ast.Module | ast.ClassDef | Function | ast.If):
            for assignment, doc in pairwise(node.body):
                match assignment, doc:
                    case (ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str(text)))):
                        yield doc.lineno, text


def first_word(text: str) -> str:
    return text.split()[0].strip(".,:;") if text.split() else ""


@pytest.mark.parametrize("module", MODULES, ids=module_name)
def test_docs_begin_with_a_noun_phrase_or_an_imperative(module: Path) -> None:
    clauses = [
        f"line {line}: {text.splitlines()[0]}" for line, text in docs(module) if first_word(text) in CLAUSE_WORDS
    ]
    assert not clauses
