"""Generator of `docs/families.md`, from the family modules and the golden tests.

python -m tests.families_table      # write the page
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

from moe_jax.checkpoints import families

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "families.md"
INTRODUCTION = """# Model families

moe_jax reads {count} model types of Hugging Face checkpoints, by the `model_type` of `config.json`:
{names}.

Each is one page of data in `moe_jax/checkpoints/families/`. The tests compare every model type with Hugging Face
transformers on tiny random checkpoints (`tests/goldens/`): the logits of prompts and of every decoded token agree
within 2e-5 of the largest logit, and the greedy tokens are the same. transformers lacks bailing_moe,
bailing_moe_linear, bailing_moe_v2, llada2_moe, sarvam_mla, sarvam_moe and sdar_moe, so these are compared with a NumPy
reference. llada2_moe and sdar_moe decode by block diffusion. llama4, qwen3_5_moe and step3p7 are multimodal: only their
language model is loaded and exported.

The columns of the table:

- cases: the number of golden checkpoints
- logits, decoding: compared with the reference
- export, gradients: exported tensors are bit-identical to those loaded, and every parameter has a gradient
- placements, combines: the number of placements, and the combine strategies, under which the comparison runs

`python -m tests.families_table` writes this page from the tests' cases; a test checks that the page is up to date.

"""
COLUMNS = (
    "`model_type`",
    "cases",
    "logits",
    "decoding",
    "export, gradients",
    "placements",
    "combines",
    "model",
)


def page() -> str:
    """Return the page as Markdown."""
    names = textwrap.fill(", ".join(sorted(families.FAMILIES)), 120)
    return INTRODUCTION.format(count=len(families.FAMILIES), names=names) + _table()


def _table() -> str:
    sys.path.insert(0, str(HERE))
    from test_goldens import CASES, MAIN_CASES, model_type

    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    model_types = {case: model_type(case) for case, *_ in CASES}
    for family in families.FAMILIES:
        runs = [(case, mesh, combine) for case, mesh, combine, _ in CASES if model_types[case] == family]
        cases, meshes, combines = (sorted(set(column)) for column in zip(*runs, strict=True))
        compared, exported = _yes(runs), _yes(set(cases) & set(MAIN_CASES))
        doc = " ".join((sys.modules[f"{families.__name__}.{family}"].__doc__ or "").split())
        row = f"`{family}`", len(cases), compared, compared, exported, len(meshes), ", ".join(combines), doc
        rows.append(tuple(map(str, row)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(tested: Collection[object]) -> str:
    return "yes" if tested else "no"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
