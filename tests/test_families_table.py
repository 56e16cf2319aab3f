"""`docs/families.md` says what is tested."""

from __future__ import annotations

import re
from pathlib import Path

from families_table import HEAD, PAGE, table

from moe_jax.checkpoints.families import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_is_what_the_code_says() -> None:
    assert PAGE.read_text() == HEAD + table(), "write it anew: python -m tests.families_table"


def test_the_readme_names_every_family() -> None:
    (sentence,) = re.findall(r"It reads Hugging Face checkpoints of\s(.*?) \(", README, re.DOTALL)
    assert set(re.split(r",\s|\sand\s", sentence)) == set(FAMILIES)
