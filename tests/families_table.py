"""The table of `docs/families.md`, from the code and its tests.

python -m tests.families_table      # writes it
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "families.md"
HEAD = """# Model families

Each is one page of data in `moe_jax/checkpoints/families/`, compared with Hugging Face transformers on tiny random
checkpoints (`tests/goldens/`): the logits of prompts and of every decoded token within 2e-5 of the largest, and the
same greedy tokens. Those that transformers does not have (bailing_moe, bailing_moe_linear, bailing_moe_v2, llada2_moe,
sarvam_mla, sarvam_moe and sdar_moe) are compared with plain NumPy instead; llada2_moe and sdar_moe decode blocks. Of
models that take pictures too (llama4, qwen3_5_moe, step3p7) the part for text is read, and written. The table is
written by `python -m tests.families_table`, from the cases that the tests run; a test holds that it is up to date.

"""
COLUMNS = (
    "`model_type`",
    "cases",
    "logits",
    "decoding",
    "written back, learns",
    "placements",
    "combines",
    "what is particular",
)


def table() -> str:
    """As Markdown."""
    sys.path.insert(0, str(HERE))
    from test_goldens import CASES, MAIN_CASES, model_type

    from moe_jax.checkpoints import families

    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    kinds = {case: model_type(case) for case, *_ in CASES}
    for family in families.FAMILIES:
        runs = [(case, mesh, combine) for case, mesh, combine, _ in CASES if kinds[case] == family]
        cases, meshes, combines = (sorted(set(column)) for column in zip(*runs, strict=True))
        doc = sys.modules[f"{families.__name__}.{family}"].__doc__ or ""
        compared, written_back = (_yes(runs), _yes(set(cases) & set(MAIN_CASES)))
        here = str(len(cases)), compared, compared, written_back, str(len(meshes)), ", ".join(combines)
        rows.append((f"`{family}`", *here, " ".join(doc.split())))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(tested: Collection[object]) -> str:
    return "yes" if tested else "no"


def main() -> None:
    PAGE.write_text(HEAD + table())


if __name__ == "__main__":
    main()
