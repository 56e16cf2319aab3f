"""Write `rope.json`: the frequencies and amplitudes that Hugging Face transformers computes for each way to stretch the
rotary embedding, with the fields of `config.json` that ask for it.

    pip install torch==2.13.0 transformers==5.23
    python tests/goldens/make_rope.py
"""

import json
from pathlib import Path
from typing import Any

from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEAD_DIM, THETA = 16, 1e4
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 32.0, "original_max_position_embeddings": 4096},
    "yarn, ends not whole": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    "yarn, narrow ramp": {"factor": 4.0, "beta_fast": 2, "beta_slow": 1.9, "original_max_position_embeddings": 64},
    "yarn, magnitudes": {
        "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
    "yarn, amplitude": {"factor": 8.0, "attention_factor": 0.9, "original_max_position_embeddings": 512},
    "longrope, long": {**FACTORS, "original_max_position_embeddings": 4096},
    "longrope, short": {**FACTORS, "original_max_position_embeddings": 131072},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn, no pair turns fast": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, no pair turns fast, ends not whole": {
        "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
    },
    "yarn, no ramp": {"factor": 4.0, "original_max_position_embeddings": 4},
    "yarn, no pair turns once": {"factor": 4.0, "original_max_position_embeddings": 4, "truncate": False},
    "yarn, all pairs turn": {"factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10.0},
}  # fmt: skip


def main() -> None:
    found = []
    for name, fields in CASES.items():
        rope = {"rope_type": name.partition(",")[0], "rope_theta": THETA, **fields}
        config = MixtralConfig(head_dim=HEAD_DIM, max_position_embeddings=131072, rope_parameters=rope)
        longest = config.max_position_embeddings
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=longest)
        found.append({"rope_parameters": rope, "frequencies": frequencies.tolist(), "amplitude": float(amplitude)})
    text = json.dumps({"head_dim": HEAD_DIM, "max_position_embeddings": longest, "cases": found}, indent=1)
    (Path(__file__).parent / "rope.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
