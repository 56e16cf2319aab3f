"""Check that transformers loads checkpoints written by `moe-jax convert` and computes the same logits.

    moe-jax convert tests/goldens/CASE orbax/CASE --to orbax
    moe-jax convert orbax/CASE exported/CASE --to huggingface
    python tests/goldens/check_exports.py exported         # needs the packages of make_goldens.py

Prints for each case the largest error of a prompt's logits, relative to the largest logit of the reference.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from make_goldens import CASES, TEXT_ALONE, auto_class

HERE = Path(__file__).parent
TOLERANCE = 1e-5


def error(case: str, folder: Path) -> float:
    model = auto_class(CASES[case]).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    reference = np.load(HERE / case / "reference.npz")
    largest = 0.0
    for prompt, expected in zip(reference["prompts"], reference["prompt_logits"], strict=True):
        length = int((prompt >= 0).sum())
        with torch.no_grad():
            got = model(torch.tensor(prompt[None, :length], dtype=torch.long), use_cache=False).logits[0].numpy()
        largest = max(largest, float(np.abs(got - expected[:length]).max() / np.abs(expected).max()))
    return largest


def main(exported: Path) -> None:
    known = [folder for folder in sorted(exported.iterdir()) if folder.name in CASES.keys() - TEXT_ALONE]
    found = {folder.name: error(folder.name, folder) for folder in known}
    for case, difference in found.items():
        print(f"{case:45} {difference:.1e}")
    wrong = [case for case, difference in found.items() if not difference <= TOLERANCE]
    sys.exit(f"differ: {', '.join(wrong)}" if wrong or not found else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
