"""Models with weights in eight bits are those whose weights were rounded beforehand, on every placement."""

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
from test_quantization import CASE, CONFIG, SOME, both, write

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
    there = ShardedDecoder(checkpoint.config, placement, "float32", quantization=checkpoint.quantization(weight_dtype))
    shards, pages = placement.size(Role.TOKENS), dict.fromkeys(there.windows, 2)
    segments = Segments.of(
        [Segment(0, prompt, [PageRange(0, array("i", [page]))] * len(pages)) for page, prompt in enumerate(PROMPTS)],
        tables=len(pages),
    )
    shape = BatchShape((QueryLayout(2, 8),), 16, tuple((window, 1) for window in pages))
    batch, first_rows = pack([[segments]] + [[Segments(len(pages))]] * (shards - 1), shape, placement)
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
    assert np.abs(logits(GOLDENS / case, mesh, dtype) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_blocks_that_files_hold_are_kept_to_the_bit_however_they_are_split(tmp_path: Path) -> None:
    held, numbers = both()
    eight, meant = write(tmp_path / "eight", held, quantization_config=CONFIG), write(tmp_path / "meant", numbers)
    checkpoint = Checkpoint(eight)
    quantization = checkpoint.quantization("float8_e4m3fn")
    assert quantization == Quantization(WeightDtype.FLOAT8, block=12)
    exact = load(meant)
    for mesh in ("data=1", "expert=2,tensor=4; tokens=; heads=expert,tensor"):
        there = ShardedDecoder(checkpoint.config, as_placement(mesh), "float32", quantization=quantization)
        assert_equal(checkpoint.load(there), exact)
    wanted = logits(meant, "data=1")
    assert np.abs(logits(eight, SPLIT, "float8_e4m3fn") - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_blocks_of_weights_that_files_hold_exact_have_the_scale_of_their_output(tmp_path: Path) -> None:
    path = write(tmp_path / "exact", tensors(GOLDENS / CASE), quantization_config=CONFIG)
    checkpoint = Checkpoint(path)
    one, blocks = Quantization(WeightDtype.FLOAT8), Quantization(WeightDtype.FLOAT8, block=12)
    there = ShardedDecoder(checkpoint.config, as_placement(SPLIT), "float32", quantization=one)
    assert_equal(checkpoint.load(there), checkpoint.load(replace(there, quantization=blocks)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_the_nearest_and_the_largest_is_hit(dtype: str) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 64, 5)).astype(np.float32)
    weights[1, :, 2], weights[0, 7, 0] = 0, 50
    quantization = Quantization(WeightDtype(dtype))
    numbers, scales = quantize(weights, (1,), quantization)
    assert scales.shape == (3, 1, 5)
    meant = np.asarray(QuantizedWeight(jnp.asarray(numbers), jnp.asarray(scales), WeightDtype(dtype), "float32")[...])
    step = scales / 2 if dtype == "int8" else np.maximum(np.abs(weights) / 16, scales * 2**-10)
    assert (np.abs(meant - weights) <= step * 1.0001).all()
    assert (meant[1, :, 2] == 0).all()
    largest = np.abs(weights) == np.abs(weights).max(1, keepdims=True)
    np.testing.assert_allclose(meant[largest], weights[largest], rtol=1e-6)


def test_a_device_holds_a_byte_for_each_number_of_a_matrix() -> None:
    placement = as_placement("expert=4,tensor=2")
    exact = ShardedDecoder(published("Qwen3-30B-A3B"), placement, "bfloat16")
    for quantization in (Quantization(WeightDtype.INT8), Quantization(WeightDtype.FLOAT8, block=128)):
        eight = replace(exact, quantization=quantization)
        pairs = list(zip(values(exact), values(eight), strict=True))
        matrices = [(whole, value) for whole, value in pairs if isinstance(value, QuantizedWeight)]
        assert held_bytes(matrices[0][0]) == 2 * held_bytes(matrices[0][1].numbers)
        halves = sum(held_bytes(value) / held_bytes(whole) for whole, value in matrices) / len(matrices)
        assert 0.5 < halves < 0.52
        assert 0.5 < held_bytes(eight.parameters) / held_bytes(exact.parameters) < 0.6
        assert sum(held_bytes(whole) for whole, _ in matrices) > 0.8 * held_bytes(exact.parameters)


def values(decoder: ShardedDecoder) -> list[Any]:
    return [param.get_value() for _, param in nnx.to_flat_state(decoder.parameters)]


@pytest.mark.parametrize("case", ["jamba_e8_top2", "qwen3_next_e8_top2", "deepseek_v3_e8_top2_groups_yarn"])
def test_all_but_matrices_and_small_parameters_of_recurrences_are_in_eight_bits(case: str) -> None:
    there = ShardedDecoder(Checkpoint(GOLDENS / case).config, as_placement("data=1"), "float32", quantization=INT8)
    found = {
        path[4:]: isinstance(param.get_value(), QuantizedWeight) for path, param in nnx.to_flat_state(there.parameters)
    }
    exact = {name for name, in_eight_bits in found.items() if not in_eight_bits and name}
    recurrent = ("convolution", "decay", "strength", "select", "step", "log_rates", "skip")
    small = ("norm", "router", "bias", *recurrent)
    for name in exact:
        assert any(str(part).endswith(small) or name == ("ffn", "shared", "gate") for part in name), name
    assert {name[:2] for name in found if found[name]} >= {("ffn", "experts")}
    assert not any(found[name] for name in found if set(name) & {"router", "decay", "strength", "select", "step"})


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("quantization", [INT8, Quantization(WeightDtype.FLOAT8, block=64)], ids=str)
def test_a_program_holds_no_copy_of_the_weights(quantization: Quantization) -> None:
    attention = AttentionConfig(heads=8, kv_heads=2, head_dim=32, rope=RopeConfig(1e4))
    experts = MoEConfig(8, 2, 256, router=RouterConfig(norm=1), shared=SharedExpertConfig(256, gated=False))
    model = ModelConfig(128, 256, (LayerConfig(attention, experts),) * 24, 1e-6, 64)
    placement = as_placement("expert=2")
    there = ShardedDecoder(model, placement, "bfloat16", quantization=quantization)
    memory = Programs(there).decode_step(8, 64, Route.whole(ScatterCombine(placement))).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.3 * held_bytes(there.parameters)


def test_there_is_no_gradient(tmp_path: Path) -> None:
    value = QuantizedWeight(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 3)), WeightDtype.INT8, "float32")
    x = jnp.ones((4, 2))
    assert jax.grad(lambda x: value.product("nd,df->nf", x).sum())(x).shape == x.shape
    for read in (lambda value: value[...].sum(), lambda value: value.product("nd,df->nf", x).sum()):
        with pytest.raises(ConfigError, match="no gradient: train with exact weights"):
            jax.grad(lambda scales, read=read: read(replace(value, scales=scales)))(value.scales)
    placement = as_placement("data=1")
    there = ShardedDecoder(Checkpoint(ADDER).config, placement, "float32", quantization=INT8)
    with pytest.raises(ConfigError, match="no gradient: train with exact weights"):
        Trainer(there, optax.sgd(1.0), lambda _: None, Route.whole(ScatterCombine(placement)))  # type: ignore[arg-type,return-value]


def test_they_are_neither_saved_nor_read_from_orbax(tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / CASE)
    exact = decoder(checkpoint, "data=1")
    eight = replace(exact, quantization=INT8)
    loaded = checkpoint.load(eight)
    with pytest.raises(CheckpointError, match="not saved: load them exact"):
        checkpoint.save_orbax(tmp_path / "out", loaded)
    with pytest.raises(CheckpointError, match="not saved: load them exact"):
        checkpoint.save_hugging_face(tmp_path / "out", eight, loaded)
    checkpoint.save_orbax(tmp_path / "out", checkpoint.load(exact))
    with pytest.raises(CheckpointError, match="cannot be read in eight bits"):
        Checkpoint(tmp_path / "out").load(eight)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    held, _ = both()
    for value, quantized in ((np.nan, True), (np.inf, False)):
        broken = held if quantized else tensors(GOLDENS / CASE)
        broken = {name: tensor.copy() for name, tensor in broken.items()}
        broken[SOME][3, 1] = value
        path = write(tmp_path / str(value), broken, **({"quantization_config": CONFIG} if quantized else {}))
        with pytest.raises(CheckpointError, match=f"NaN or infinite in {SOME}"):
            logits(path, "data=1", "float8_e4m3fn")


def test_other_dtypes_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="weight_dtype must be one of exact, float8_e4m3fn, int8, got 'int4'"):
        LLM(weight_dtype="int4")
    with pytest.raises(ConfigError, match="say None"):
        Quantization(WeightDtype.EXACT)
    with pytest.raises(ConfigError, match="block must be positive"):
        Quantization(WeightDtype.INT8, block=0)


def test_what_is_drawn_is_held_in_eight_bits_too() -> None:
    there = ShardedDecoder(Checkpoint(ADDER).config, as_placement("data=1"), "float32", quantization=INT8)
    for path, param in nnx.to_flat_state(there.init(0)):
        if isinstance(value := param.get_value(), QuantizedWeight):
            over = tuple(dim for dim, size in enumerate(value.scales.shape) if size == 1)
            assert (np.abs(value.numbers).max(axis=over) == 127).all(), path
