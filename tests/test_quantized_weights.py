"""Quantized weights: logits on every placement, sizes, numbers, errors."""

from __future__ import annotations

import re
import shutil
from array import array
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_checkpoint import assert_equal, decoder, load, tensors
from test_goldens import GOLDENS
from test_quantization import CASE, CONFIG, QUANTIZED, checkpoints, write

from bench.published import config as published
from moe_jax import LLM
from moe_jax.analysis.roofline import held_bytes
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.config import (
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    Quantization,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
    WeightDtype,
)
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.kernels.quantized import QuantizedWeight, quantize
from moe_jax.models import BatchShape, PageRange, Segment, Segments, ShardedDecoder, pack
from moe_jax.programs import Programs
from moe_jax.sharding import Role, Route, ScatterCombine, as_placement
from moe_jax.training.trainer import Trainer

INT8 = Quantization(WeightDtype.INT8)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
MATRICES = re.compile(r"model\.layers\..*(proj\w*|experts\.\d+\.w\d)\.weight")
DTYPES = {"int8": (127, np.int8), "float8_e4m3fn": (448, ml_dtypes.float8_e4m3fn)}
"""Largest number and NumPy dtype of each format."""


def rounded(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Quantize and dequantize a weight `[outputs, inputs]` with one scale per output."""
    largest, stored_dtype = DTYPES[dtype]
    dequantized = np.empty(weight.shape, np.float32)
    for output, row in enumerate(weight.astype(np.float32)):
        scale = np.abs(row).max() / np.float32(largest)
        units = np.round(row / scale) if dtype == "int8" else row / scale
        dequantized[output] = units.astype(stored_dtype).astype(np.float32) * scale
    return dequantized


@cache
def rounded_checkpoint(case: str, dtype: str) -> Path:
    """Copy a golden checkpoint, with its matrices rounded."""
    path = Path(shutil.copytree(GOLDENS / case, Path(mkdtemp()) / case))
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    names = [name for name in tensors if MATRICES.fullmatch(name)]
    save_file(tensors | {name: rounded(tensors[name], dtype) for name in names}, file)
    return path


def logits(path: Path, mesh: str, weight_dtype: str = "exact") -> np.ndarray:
    """Logits after each token of the prompts, which run on the first token shard."""
    checkpoint, placement = Checkpoint(path), as_placement(mesh)
    quantization = checkpoint.quantization(weight_dtype)
    sharded = ShardedDecoder(checkpoint.config, placement, "float32", quantization=quantization)
    shards, pages = placement.size(Role.TOKENS), dict.fromkeys(sharded.windows, 2)
    segments = Segments.of(
        [Segment(0, prompt, [PageRange(0, array("i", [page]))] * len(pages)) for page, prompt in enumerate(PROMPTS)],
        tables=len(pages),
    )
    shape = BatchShape((QueryLayout(2, 8),), 16, tuple((window, 1) for window in pages))
    batch, first_rows = pack([[segments]] + [[Segments(len(pages))]] * (shards - 1), shape, placement)
    route = Route.whole(ScatterCombine(placement))
    run = jax.jit(lambda parameters, caches, batch: sharded.all_logits(parameters, caches, batch, route)[0])
    rows = np.asarray(run(checkpoint.load(sharded), sharded.empty_caches(pages, 8, 2), batch))
    return np.concatenate(
        [rows[first : first + len(prompt)] for first, prompt in zip(first_rows, PROMPTS, strict=True)]
    )


@cache
def expected_logits(case: str, dtype: str) -> np.ndarray:
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
def test_quantized_weights_give_the_logits_of_rounded_weights(case: str, mesh: str, dtype: str) -> None:
    expected = expected_logits(case, dtype)
    assert np.abs(logits(GOLDENS / case, mesh, dtype) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_quantized_blocks_of_files_are_loaded_bit_for_bit_on_every_placement(tmp_path: Path) -> None:
    stored, numbers = checkpoints()
    quantized = write(tmp_path / "quantized", stored, quantization_config=CONFIG)
    dequantized = write(tmp_path / "dequantized", numbers)
    checkpoint = Checkpoint(quantized)
    quantization = checkpoint.quantization("float8_e4m3fn")
    assert quantization == Quantization(WeightDtype.FLOAT8, block=12)
    exact = load(dequantized)
    for mesh in ("data=1", "expert=2,tensor=4; tokens=; heads=expert,tensor"):
        sharded = ShardedDecoder(checkpoint.config, as_placement(mesh), "float32", quantization=quantization)
        assert_equal(checkpoint.load(sharded), exact)
    expected = logits(dequantized, "data=1")
    assert np.abs(logits(quantized, SPLIT, "float8_e4m3fn") - expected).max() <= 1e-5 * np.abs(expected).max()


def test_exact_weights_are_quantized_with_one_scale_per_output_in_every_block(tmp_path: Path) -> None:
    path = write(tmp_path / "exact", tensors(GOLDENS / CASE), quantization_config=CONFIG)
    checkpoint = Checkpoint(path)
    one, blocks = Quantization(WeightDtype.FLOAT8), Quantization(WeightDtype.FLOAT8, block=12)
    sharded = ShardedDecoder(checkpoint.config, as_placement(SPLIT), "float32", quantization=one)
    assert_equal(checkpoint.load(sharded), checkpoint.load(replace(sharded, quantization=blocks)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_nearest_and_the_largest_is_exact(dtype: str) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 64, 5)).astype(np.float32)
    weights[1, :, 2], weights[0, 7, 0] = 0, 50
    quantization = Quantization(WeightDtype(dtype))
    numbers, scales = quantize(weights, (1,), quantization)
    assert scales.shape == (3, 1, 5)
    weight = QuantizedWeight(jnp.asarray(numbers), jnp.asarray(scales), WeightDtype(dtype), "float32")
    dequantized = np.asarray(weight[...])
    step = scales / 2 if dtype == "int8" else np.maximum(np.abs(weights) / 16, scales * 2**-10)
    assert (np.abs(dequantized - weights) <= step * 1.0001).all()
    assert (dequantized[1, :, 2] == 0).all()
    largest = np.abs(weights) == np.abs(weights).max(1, keepdims=True)
    np.testing.assert_allclose(dequantized[largest], weights[largest], rtol=1e-6)


def test_quantized_matrices_take_one_byte_per_number() -> None:
    placement = as_placement("expert=4,tensor=2")
    exact = ShardedDecoder(published("Qwen3-30B-A3B"), placement, "bfloat16")
    for quantization in (Quantization(WeightDtype.INT8), Quantization(WeightDtype.FLOAT8, block=128)):
        quantized = replace(exact, quantization=quantization)
        pairs = list(zip(values(exact), values(quantized), strict=True))
        matrices = [(before, after) for before, after in pairs if isinstance(after, QuantizedWeight)]
        assert held_bytes(matrices[0][0]) == 2 * held_bytes(matrices[0][1].numbers)
        mean_ratio = sum(held_bytes(after) / held_bytes(before) for before, after in matrices) / len(matrices)
        assert 0.5 < mean_ratio < 0.52
        assert 0.5 < held_bytes(quantized.parameters) / held_bytes(exact.parameters) < 0.6
        assert sum(held_bytes(before) for before, _ in matrices) > 0.8 * held_bytes(exact.parameters)


def values(decoder: ShardedDecoder) -> list[Any]:
    return [param.get_value() for _, param in nnx.to_flat_state(decoder.parameters)]


@pytest.mark.parametrize("case", ["jamba_e8_top2", "qwen3_next_e8_top2", "deepseek_v3_e8_top2_groups_yarn"])
def test_matrices_are_quantized_except_small_ones_of_recurrences(case: str) -> None:
    sharded = ShardedDecoder(Checkpoint(GOLDENS / case).config, as_placement("data=1"), "float32", quantization=INT8)
    is_quantized = {
        path[4:]: isinstance(param.get_value(), QuantizedWeight)
        for path, param in nnx.to_flat_state(sharded.parameters)
    }
    exact = {name for name, quantized in is_quantized.items() if not quantized and name}
    recurrent = ("convolution", "decay", "strength", "select", "step", "log_rates", "skip")
    small = ("norm", "router", "bias", *recurrent)
    for name in exact:
        assert any(str(part).endswith(small) or name == ("ffn", "shared", "gate") for part in name), name
    assert {name[:2] for name, quantized in is_quantized.items() if quantized} >= {("ffn", "experts")}
    never = {"router", "decay", "strength", "select", "step"}
    assert not any(quantized for name, quantized in is_quantized.items() if set(name) & never)


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("quantization", [INT8, Quantization(WeightDtype.FLOAT8, block=64)], ids=str)
def test_programs_do_not_copy_quantized_weights(quantization: Quantization) -> None:
    attention = AttentionConfig(heads=8, kv_heads=2, head_dim=32, rope=RopeConfig(1e4))
    experts = MoEConfig(8, 2, 256, router=RouterConfig(norm=1), shared=SharedExpertConfig(256, gated=False))
    model = ModelConfig(128, 256, (LayerConfig(attention, experts),) * 24, 1e-6, 64)
    placement = as_placement("expert=2")
    sharded = ShardedDecoder(model, placement, "bfloat16", quantization=quantization)
    memory = Programs(sharded).decode_step(8, 64, Route.whole(ScatterCombine(placement))).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.3 * held_bytes(sharded.parameters)


def test_gradients_of_quantized_weights_are_refused() -> None:
    value = QuantizedWeight(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 3)), WeightDtype.INT8, "float32")
    x = jnp.ones((4, 2))
    assert jax.grad(lambda x: value.einsum("nd,df->nf", x).sum())(x).shape == x.shape
    for read in (lambda value: value[...].sum(), lambda value: value.einsum("nd,df->nf", x).sum()):
        with pytest.raises(ConfigError, match="no gradient: train with exact weights"):
            jax.grad(lambda scales, read=read: read(replace(value, scales=scales)))(value.scales)
    placement = as_placement("data=1")
    sharded = ShardedDecoder(Checkpoint(ADDER).config, placement, "float32", quantization=INT8)
    with pytest.raises(ConfigError, match="no gradient: train with exact weights"):
        Trainer(sharded, optax.sgd(1.0), lambda _: None, Route.whole(ScatterCombine(placement)))  # type: ignore[arg-type,return-value]


def test_quantized_weights_are_neither_saved_nor_read_from_orbax(tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / CASE)
    exact = decoder(checkpoint, "data=1")
    quantized = replace(exact, quantization=INT8)
    loaded = checkpoint.load(quantized)
    with pytest.raises(CheckpointError, match="cannot be saved: load the checkpoint"):
        checkpoint.save_orbax(tmp_path / "out", loaded)
    with pytest.raises(CheckpointError, match="cannot be saved: load the checkpoint"):
        checkpoint.save_hugging_face(tmp_path / "out", quantized, loaded)
    checkpoint.save_orbax(tmp_path / "out", checkpoint.load(exact))
    with pytest.raises(CheckpointError, match="cannot be read in eight bits"):
        Checkpoint(tmp_path / "out").load(quantized)


def test_nan_and_infinite_weights_are_errors_that_name_the_tensor(tmp_path: Path) -> None:
    stored, _ = checkpoints()
    for value, quantized in ((np.nan, True), (np.inf, False)):
        broken = stored if quantized else tensors(GOLDENS / CASE)
        broken = {name: tensor.copy() for name, tensor in broken.items()}
        broken[QUANTIZED][3, 1] = value
        path = write(tmp_path / str(value), broken, **({"quantization_config": CONFIG} if quantized else {}))
        with pytest.raises(CheckpointError, match=f"NaN or infinite in {QUANTIZED}"):
            logits(path, "data=1", "float8_e4m3fn")


def test_invalid_quantizations_are_errors() -> None:
    with pytest.raises(ConfigError, match="weight_dtype must be one of exact, float8_e4m3fn, int8, got 'int4'"):
        LLM(weight_dtype="int4")
    with pytest.raises(ConfigError, match="say None"):
        Quantization(WeightDtype.EXACT)
    with pytest.raises(ConfigError, match="block must be positive"):
        Quantization(WeightDtype.INT8, block=0)


def test_random_weights_are_quantized_too() -> None:
    sharded = ShardedDecoder(Checkpoint(ADDER).config, as_placement("data=1"), "float32", quantization=INT8)
    for path, param in nnx.to_flat_state(sharded.init(0)):
        if isinstance(value := param.get_value(), QuantizedWeight):
            scaled_dims = tuple(dim for dim, size in enumerate(value.scales.shape) if size == 1)
            assert (np.abs(value.numbers).max(axis=scaled_dims) == 127).all(), path
