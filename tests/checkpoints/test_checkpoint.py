"""Loading and saving of Hugging Face and orbax checkpoints, intact and damaged."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_goldens import GOLDENS, MAIN_CASES
from typer.testing import CliRunner

from moe_jax.checkpoints import Checkpoint, loading
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.checkpoints.export import export
from moe_jax.checkpoints.regions import regions
from moe_jax.cli.app import app
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.sharding import as_placement

ONE, SHARDED = "qwen3_moe_gqa4_e8_top2", "mixtral_gqa8_e16_top4_sharded"
MULTIMODAL = "llama4_gqa4_e4_top2_bias"
Tensors = dict[str, np.ndarray]


def decoder(checkpoint: Checkpoint, mesh: str, dtype: str = "float32") -> ShardedDecoder:
    return ShardedDecoder(checkpoint.config, as_placement(mesh), dtype)


def load(path: Path, mesh: str = "expert=2", dtype: str = "float32") -> Parameters:
    checkpoint = Checkpoint(path)
    return checkpoint.load(decoder(checkpoint, mesh, dtype))


def tensors(path: Path) -> Tensors:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(one: Parameters, other: Parameters) -> None:
    for (path, a), (_, b) in zip(nnx.to_flat_state(one), nnx.to_flat_state(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=str(path))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / ONE, tmp_path / ONE))


@pytest.mark.parametrize("case", MAIN_CASES)
def test_conversion_to_orbax_and_back_keeps_the_tensors(case: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / case)
    target = decoder(checkpoint, "expert=2,tensor=2")
    checkpoint.save_orbax(tmp_path / "orbax", checkpoint.load(target))
    between = Checkpoint(tmp_path / "orbax")
    between.save_hugging_face(tmp_path / "out", target, between.load(target))
    expected, got = tensors(GOLDENS / case), tensors(tmp_path / "out")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert Checkpoint(tmp_path / "out").config == checkpoint.config


MIXED = ["deepseek_v3_e8_top2_groups_yarn", ONE, "jamba_e8_top2"]


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("wide", ["router", "all norms and routers"])
def test_conversion_keeps_the_dtype_of_each_tensor(case: str, wide: str, tmp_path: Path) -> None:
    """Float32 tensors of a bfloat16 model keep their values; orbax keeps those that the decoder holds in float32."""
    path = Path(shutil.copytree(GOLDENS / case, tmp_path / case))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    parts = ("gate", "router") if wide == "router" else ("gate", "router", "norm")
    kept = [name for name in tensors(path) if name.split(".")[-2] in parts or "correction_bias" in name]
    mixed = {name: value if name in kept else value.astype(ml_dtypes.bfloat16) for name, value in tensors(path).items()}
    assert len(kept) > 1
    for file in path.glob("*.safetensors"):
        save_file({name: mixed[name] for name in load_file(file)}, file)

    def convert(source: Path, to: str) -> Path:
        run = CliRunner().invoke(
            app, ["-q", "convert", str(source), str(tmp_path / to), "--to", to, "--mesh", "expert=2"]
        )
        assert run.exit_code == 0, run.output
        return tmp_path / to

    direct = tensors(convert(path, "huggingface"))
    for name, value in mixed.items():
        assert direct[name].dtype == value.dtype
        np.testing.assert_array_equal(direct[name], value, err_msg=name)
    orbax = convert(path, "orbax")
    shutil.rmtree(tmp_path / "huggingface")
    by_way_of_orbax = tensors(convert(orbax, "huggingface"))
    for name, value in mixed.items():
        assert by_way_of_orbax[name].dtype == value.dtype
        if wide == "router":
            np.testing.assert_array_equal(by_way_of_orbax[name], value, err_msg=name)


@pytest.mark.parametrize("case", [ONE, "qwen3_5_moe_text_e4_top3"])
def test_large_parameters_load_region_by_region(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = "data=2,expert=2,tensor=2"
    together = load(GOLDENS / case, mesh)
    monkeypatch.setattr(loading, "SMALL", 0)
    assert_equal(load(GOLDENS / case, mesh), together)


def test_the_language_model_of_a_multimodal_checkpoint_loads(tmp_path: Path) -> None:
    case = Path(shutil.copytree(GOLDENS / MULTIMODAL, tmp_path / MULTIMODAL))
    rewrite(case, lambda stored: stored.update({"vision_model.class_embedding": np.zeros(8, np.float32)}))
    assert_equal(load(case), load(GOLDENS / MULTIMODAL))
    raw = json.loads((case / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = [3, 4]
    (case / "config.json").write_text(json.dumps(raw))
    assert Checkpoint(case).eos_token_ids == {3, 4}


def test_large_exports_are_split_and_indexed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / ONE)
    target = decoder(checkpoint, "expert=8")
    parameters = checkpoint.load(target)
    shutil.copy(GOLDENS / ONE / "config.json", tmp_path)
    parts = regions(target, checkpoint.family.sources)
    export(tmp_path, parts, parameters, lambda _: np.dtype(np.float32), largest_file=40_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not list(tmp_path.glob("part-*"))
    assert_equal(load(tmp_path), load(GOLDENS / ONE))


def test_orbax_restores_onto_another_mesh(tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / ONE)
    checkpoint.save_orbax(tmp_path / "out", load(GOLDENS / ONE, "expert=8"))
    restored = Checkpoint(tmp_path / "out")
    target = decoder(restored, "data=2,expert=2,tensor=2")
    parameters = restored.load(target)
    assert_equal(parameters, load(GOLDENS / ONE, "data=1"))
    for got, expected in zip(jax.tree.leaves(parameters), jax.tree.leaves(target.parameters), strict=True):
        assert got.sharding == expected.sharding


@pytest.mark.parametrize("case", ["qwen3_next_e8_top2", "step3p5_gqa8_e4_top3"])
def test_orbax_restores_unstacked_layers_as_safetensors_do(case: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(GOLDENS / case)
    stacked = decoder(checkpoint, "data=2,expert=2,tensor=2")
    checkpoint.save_orbax(tmp_path / "out", checkpoint.load(stacked))
    apart = replace(stacked, scan_layers=False)
    restored = Checkpoint(tmp_path / "out").load(apart)
    assert_equal(restored, checkpoint.load(apart))
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(apart.parameters), strict=True):
        assert (got.shape, got.sharding) == (expected.shape, expected.sharding)


def test_weights_have_the_requested_dtype_but_the_router_float32() -> None:
    flat = {str(path): leaf for path, leaf in nnx.to_flat_state(load(GOLDENS / ONE, dtype="bfloat16"))}
    dtypes = {name: leaf.get_value().dtype for name, leaf in flat.items()}
    assert {str(dtype) for name, dtype in dtypes.items() if "router" not in name} == {"bfloat16"}
    assert {str(dtype) for name, dtype in dtypes.items() if "router" in name} == {"float32"}


def rewrite(path: Path, change: Callable[[Tensors], None]) -> None:
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.experts.3.gate_proj.weight"


def damage(stored: Tensors) -> None:
    del stored[NORM]
    stored["model.extra"] = np.zeros(3, np.float32)
    stored[GATE] = stored[GATE].T.copy()
    stored["model.layers.0.mlp.gate.weight"] = np.zeros((8, 32), np.int8)


def test_all_mismatches_are_named_at_once(copy: Path) -> None:
    rewrite(copy, damage)
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    for words in (
        f"{NORM} is missing",
        "model.extra is not used",
        f"{GATE} has shape [32, 16], config.json implies [16, 32]",
        "model.layers.0.mlp.gate.weight has dtype I8",
    ):
        assert words in str(caught.value)


def test_long_lists_of_mismatches_are_shortened(copy: Path) -> None:
    rewrite(copy, dict.clear)
    with pytest.raises(CheckpointError, match=r"is missing\n.*\n  and \d+ more$"):
        load(copy)


@pytest.mark.parametrize(("bad", "small"), [(np.nan, loading.SMALL), (np.inf, 0)])
def test_nan_and_infinite_weights_are_refused_by_name(
    copy: Path, bad: float, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "SMALL", small)
    rewrite(copy, lambda stored: stored[GATE].__setitem__((2, 3), bad))
    with pytest.raises(CheckpointError, match=f"NaN or infinite in {GATE}: "):
        load(copy)


def test_truncated_weights(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    for length in (len(whole) - 100, 100, 3, 0):
        (copy / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged .*copy it again"):
            load(copy)


def test_missing_files(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        Checkpoint(tmp_path / "nowhere")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        Checkpoint(copy)


def test_damaged_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Checkpoint(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        Checkpoint(copy)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        CheckpointError, match=r"'llama' is not known: the families are .*mixtral, .*qwen2_moe, .*qwen3_moe"
    ):
        Checkpoint(copy)


def test_damaged_index(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDENS / SHARDED, tmp_path / SHARDED))
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    whole["weight_map"]["model.more"] = next(iter(whole["weight_map"].values()))
    index.write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match=r"disagree on where these tensors are: model.more"):
        load(path)
    for malformed in ("{}", '{"weight_map": 5}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'):
        index.write_text(malformed)
        with pytest.raises(CheckpointError, match="is no index of safetensors files"):
            load(path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDENS / SHARDED, tmp_path / SHARDED))
    last = sorted(path.glob("*.safetensors"))[-1]
    save_file(load_file(last) | {"model.norm.weight": np.zeros(32, np.float32)}, last)
    one = sorted(path.glob("*.safetensors"))[0]
    save_file(load_file(one) | {"model.norm.weight": np.zeros(32, np.float32)}, one)
    with pytest.raises(CheckpointError, match=r"disagree on where these tensors are: model.norm.weight"):
        load(path)


def test_weights_too_large_for_the_dtype(copy: Path) -> None:
    rewrite(copy, lambda stored: stored[GATE].__setitem__((2, 3), 1e6))
    with pytest.raises(CheckpointError, match=rf"{GATE} are too large for the dtype: choose a wider one"):
        load(copy, dtype="float16")


@pytest.mark.parametrize("ids", [1.5, ["a"], {}])
def test_malformed_eos_token_ids(copy: Path, ids: object) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match="eos_token_id must be a token id or a list of them"):
        Checkpoint(copy)


def test_eos_token_id_of_generation_config_takes_precedence_unless_null(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"eos_token_id": 3}))
    for ids, expected in ((None, {3}), (5, {5}), ([5, 6], {5, 6})):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert Checkpoint(copy).eos_token_ids == expected


def test_conversion_keeps_the_chat_template_and_leaves_neighbours_alone(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out.unfinished").mkdir()
    checkpoint = Checkpoint(copy)
    checkpoint.save_orbax(tmp_path / "out", load(copy))
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert (tmp_path / "out.unfinished").exists()


KILLED = """
import os, sys
from moe_jax.checkpoints import export, orbax_store
def write_a_part(path, *_, **__):
    path.mkdir(exist_ok=True)
    (path / "part").write_text("x")
    os.kill(os.getpid(), 9)
orbax_store.save = export.export = write_a_part
from moe_jax.cli import main
main()
"""


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_a_killed_conversion_leaves_no_checkpoint_and_can_be_repeated(to: str, tmp_path: Path) -> None:
    """On another mesh, too."""
    source, output = ADDER, tmp_path / "output"
    if to == "huggingface":
        bundled = Checkpoint(ADDER)
        bundled.save_orbax(source := tmp_path / "source", bundled.load(decoder(bundled, "data=1", "bfloat16")))
    arguments = ["convert", str(source), str(output), "--to", to, "--mesh"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, "expert=2"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path != source)
    assert left.name.startswith("output.unfinished-")
    assert CliRunner().invoke(app, [*arguments, "expert=4,tensor=2"]).exit_code == 0
    assert set(tmp_path.iterdir()) - {source} == {output}
    assert_equal(load(output, "tensor=2", "bfloat16"), load(ADDER, "tensor=2", "bfloat16"))


def test_damaged_orbax(tmp_path: Path) -> None:
    Checkpoint(GOLDENS / ONE).save_orbax(tmp_path / "out", load(GOLDENS / ONE))
    for path in (tmp_path / "out").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(CheckpointError, match="parameters is damaged, or does not hold what this model needs"):
        load(tmp_path / "out")


def test_a_failed_export_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(GOLDENS / ONE)
    target = decoder(checkpoint, "expert=2")
    parameters = checkpoint.load(target)
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="taken exists already"):
        checkpoint.save_hugging_face(tmp_path / "taken", target, parameters)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("moe_jax.checkpoints.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save_hugging_face(tmp_path / "out", target, parameters)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_half_precision_files_are_read(copy: Path) -> None:
    def halve(stored: Tensors) -> None:
        for name in stored:
            stored[name] = stored[name].astype(ml_dtypes.bfloat16)

    rewrite(copy, halve)
    expected = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32), load(GOLDENS / ONE))
    assert_equal(load(copy), expected)


def test_truncation_and_padding_of_the_tokenizer_file_are_reset(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(ADDER, tmp_path / "adder"))
    tokenizer = Checkpoint(directory).tokenizer
    assert tokenizer is not None
    expected = tokenizer.encode("123+456=").ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(directory / "tokenizer.json"))
    reset = Checkpoint(directory).tokenizer
    assert reset is not None
    assert reset.encode("123+456=").ids == expected


@pytest.mark.parametrize(("generation", "config", "expected"), [([], 3, {3}), (None, [3, 4], {3, 4}), (5, 3, {5})])
def test_an_empty_eos_token_id_is_none(generation: Any, config: Any, expected: set[int], copy: Path) -> None:
    """generation_config.json takes precedence where it names a token."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    assert Checkpoint(copy).eos_token_ids == expected
