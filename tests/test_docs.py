"""Names, links and placements in the documentation."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from moe_jax.sharding import Placement

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

REFERENCE = re.compile(r"([\w/.]+\.py):([A-Za-z_]\w*(?:\.\w+)*)")
"""A name in a file, as in `moe_jax/engine/engine.py:Engine.step`."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEMENT = re.compile(r"^\| `([^`]+)` \| [^|]+ \| (\w+) over ([^|]*?) \|$", re.MULTILINE)
"""A row of the table of placements: the placement, `scatter` or `sum`, and the axes."""

REFERENCES = sorted({(page, *found) for page, text in TEXTS.items() for found in REFERENCE.findall(text)})
LINKS = sorted({(page, link) for page, text in TEXTS.items() for link in LINK.findall(text) if "://" not in link})
PLACEMENTS = sorted({row for text in TEXTS.values() for row in PLACEMENT.findall(text)})
AXES = {"all three": ("data", "expert", "tensor"), "expert and tensor": ("expert", "tensor"), "": ()}


@cache
def names_in(file: Path) -> frozenset[str]:
    """Return the classes, functions and variables of a file, members after their class and a dot."""
    return frozenset(_names(ast.parse(file.read_text()), ""))


def _names(parent: ast.AST, prefix: str) -> set[str]:
    names: set[str] = set()
    for node in ast.iter_child_nodes(parent):
        match node:
            case ast.ClassDef(name=name):
                names |= {prefix + name} | _names(node, f"{prefix}{name}.")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(prefix + name)
            case ast.Assign(targets=targets):
                names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize(("page", "file", "name"), REFERENCES)
def test_names_exist(page: str, file: str, name: str) -> None:
    assert (ROOT / file).is_file(), f"{page} names {file}, which does not exist"
    assert name in names_in(ROOT / file), f"{page} names {name} in {file}, which has no such name"


def test_the_life_of_a_request_has_names() -> None:
    named = {name for page, _, name in REFERENCES if page == "docs/request_lifecycle.md"}
    assert {"LLM.generate", "Engine.step", "RequestGroup.output"} <= named


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_to_files(page: str, link: str) -> None:
    file, _, heading = link.partition("#")
    target = (ROOT / page).parent / file if file else ROOT / page
    assert target.exists(), f"{page} links to {link}, which does not exist"
    assert not heading or heading in headings_in(target), f"{page} links to {link}, which has no such heading"


def headings_in(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_table_of_placements_is_found() -> None:
    assert len(PLACEMENTS) == 6


@pytest.mark.parametrize(("text", "first", "axes"), PLACEMENTS)
def test_placements_combine_as_their_table_says(text: str, first: str, axes: str) -> None:
    placement = Placement.parse(text)
    scattered, summed = (AXES.get(part, (part,)) for part in axes.partition(", then sum over ")[::2])
    if first == "sum":
        scattered, summed = (), scattered
    assert (placement.scatter_axes, placement.sum_axes) == (scattered, summed)
