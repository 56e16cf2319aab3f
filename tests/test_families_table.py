"""`docs/families.md` is up to date, and the README has the right number of model types."""

from __future__ import annotations

import re
from pathlib import Path

from families_table import PAGE, page

from moe_jax.checkpoints.families import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "write it again: python -m tests.families_table"


def test_the_page_names_every_model_type_in_alphabetic_order() -> None:
    (names,) = re.findall(r"by the `model_type` of `config\.json`:\n(.*?)\.\n", PAGE.read_text(), re.DOTALL)
    assert re.split(r",\s", names) == sorted(FAMILIES)


def test_the_readme_has_the_number_of_model_types() -> None:
    (count,) = re.findall(r"\[(\d+) model types\]\(docs/families\.md\)", README)
    assert int(count) == len(FAMILIES)
