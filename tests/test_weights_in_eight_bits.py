"""Models with weights in eight bits are those whose weights were rounded beforehand, on every placement."""

from __future__ import annotations

import re
import shutil
from array import array
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_goldens import GOLDENS

from moe_jax.checkpoints import Checkpoint
from moe_jax.layers import Grid
from moe_jax.models import Lines, PageRange, Segment, Shape, ShardedDecoder, pack
from moe_jax.sharding import Role, Route, ScatterCombine, as_placement

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
MATRICES = re.compile(r"model\.layers\..*(proj\w*|experts\.\d+\.w\d)\.weight")
DTYPES = {"int8": (127, np.int8), "float8_e4m3fn": (448, ml_dtypes.float8_e4m3fn)}


def rounded(weight: np.ndarray, dtype: str) -> np.ndarray:
    """`[outputs, inputs]`, each output rounded to numbers of its own scale."""
    largest, eight = DTYPES[dtype]
    meant = np.empty(weight.shape, np.float32)
    for output, row in enumerate(weight.astype(np.float32)):
        scale = np.abs(row).max() / np.float32(largest)
        units = row / scale
        meant[output] = (np.round(units) if dtype == "int8" else units).astype(eight).astype(np.float32) * scale
    return meant


@cache
def rounded_checkpoint(case: str, dtype: str) -> Path:
    path = Path(shutil.copytree(GOLDENS / case, Path(mkdtemp()) / case))
    (file,) = path.glob("*.safetensors")
    held = load_file(file)
    names = [name for name in held if MATRICES.fullmatch(name)]
    save_file(held | {name: rounded(held[name], dtype) for name in names}, file)
    return path


def logits(path: Path, mesh: str, weight_dtype: str = "exact") -> np.ndarray:
    """After each token of the prompts, which the first token shard has."""
    checkpoint, placement = Checkpoint(path), as_placement(mesh)
    there = ShardedDecoder(checkpoint.config, placement, "float32", checkpoint.quantization(weight_dtype))
    shards, pages = placement.size(Role.TOKENS), dict.fromkeys(there.windows, 2)
    lines = Lines.of(
        [Segment(0, prompt, [PageRange(0, array("i", [page]))] * len(pages)) for page, prompt in enumerate(PROMPTS)],
        tables=len(pages),
    )
    shape = Shape((Grid(2, 8),), 16, tuple((window, 1) for window in pages))
    batch, first_rows = pack([[lines]] + [[Lines(len(pages))]] * (shards - 1), shape, placement)
    route = Route.whole(ScatterCombine(placement))
    run = jax.jit(lambda parameters, caches, batch: there.all_logits(parameters, caches, batch, route)[0])
    found = np.asarray(run(checkpoint.load(there), there.empty_caches(pages, 8, 2), batch))
    return np.concatenate(
        [found[first : first + len(prompt)] for first, prompt in zip(first_rows, PROMPTS, strict=True)]
    )


@cache
def expected(case: str, dtype: str) -> np.ndarray:
    return logits(rounded_checkpoint(case, dtype), "data=1")


SPLIT = "data=2,expert=2,tensor=2"
WIDE = "expert=2,tensor=4; tokens=; heads=expert,tensor; experts=; ffn=expert,tensor"


@pytest.mark.parametrize(
    ("case", "mesh", "dtype"),
    [
        ("qwen3_moe_gqa4_e8_top2", SPLIT, "int8"),
        ("deepseek_v3_e8_top2_groups_yarn", SPLIT, "int8"),
        ("deepseek_v3_e8_top2_groups_yarn", "expert=2,tensor=2; tokens=; heads=expert,tensor", "int8"),
        ("qwen2_moe_gqa2_e8_top4_sparse_step", SPLIT, "float8_e4m3fn"),
        ("qwen2_moe_gqa2_e8_top4_sparse_step", WIDE, "float8_e4m3fn"),
    ],
)
def test_logits_are_those_of_weights_rounded_beforehand(case: str, mesh: str, dtype: str) -> None:
    wanted = expected(case, dtype)
    got = logits(GOLDENS / case, mesh, dtype)
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
