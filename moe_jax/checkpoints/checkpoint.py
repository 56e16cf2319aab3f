"""A checkpoint directory, in Hugging Face or orbax format.

config.json              as Hugging Face writes it
tokenizer.json           of the `tokenizers` library; optional
hf_quant_config.json     optional; quantization of NVIDIA's Model Optimizer, if config.json has none
generation_config.json   optional; its `eos_token_id` takes precedence over that of config.json
model.safetensors        weights in Hugging Face format; or several files with model.safetensors.index.json
parameters/              weights in orbax format, instead of safetensors
tensor_dtypes.json       beside parameters/: the dtype of each tensor before it was converted
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from moe_jax.checkpoints import export, loading
from moe_jax.checkpoints.directories import new_directory
from moe_jax.checkpoints.families import ALIASES, FAMILIES, Family
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.checkpoints.formats import FIELD, DequantizedTensors, EightBits, read_schemes
from moe_jax.checkpoints.formats.modelopt import config_in
from moe_jax.checkpoints.regions import regions
from moe_jax.checkpoints.tensor_files import INDEX, SINGLE, TensorFiles
from moe_jax.config import Quantization, WeightDtype, as_weight_dtype
from moe_jax.errors import CheckpointError
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.sharding import Placement

CONFIG, TOKENIZER, GENERATION, ORBAX = "config.json", "tokenizer.json", "generation_config.json", "parameters"
MODELOPT, DTYPES = "hf_quant_config.json", "tensor_dtypes.json"
FLOATS = {"F32": jnp.dtype("float32"), "F16": jnp.dtype("float16"), "BF16": jnp.dtype("bfloat16")}
"""Dtypes of tensors by their names in safetensors files."""
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
"""Suffixes of the files that a converted checkpoint keeps: configs, tokenizers, chat templates, licences."""


class Checkpoint:
    """A model on disk: its config, tokenizer and end-of-sequence tokens. `load` reads the weights.

    Raises:
      CheckpointError: the directory or its config.json is missing, a JSON file is damaged, or the model type is
        unknown.
      ConfigError: the config has an unsupported field or value.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is no directory: give one that holds config.json and the weights")
        raw = _read_json(self.path / CONFIG)
        if raw is None:
            raise CheckpointError(f"{self.path / CONFIG} is missing: give a directory in Hugging Face layout")
        if not raw.get(FIELD) and (quantization := _read_json(self.path / MODELOPT)):
            raw = {**raw, FIELD: config_in(quantization)}
        self._raw, self._merged = raw, _merged(raw)
        self.family = family_of(raw)
        self._schemes, self.config = Fields(raw).read(lambda fields: (read_schemes(fields), self.family.read(fields)))
        self.eos_token_ids = self._eos_token_ids()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in tokenizer.json, without truncation and padding; `None` if there is no such file.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self.path / TOKENIZER
        if not path.exists():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"{path} is damaged ({error}): copy it again, or remove it") from error
        tokenizer.no_truncation()  # settings of whoever saved the file, which transformers resets too
        tokenizer.no_padding()
        return tokenizer

    def _eos_token_ids(self) -> frozenset[int]:
        """Read the tokens that end a sequence."""
        ids = (_read_json(self.path / GENERATION) or {}).get("eos_token_id")
        ids = self._merged.get("eos_token_id") if ids in (None, []) else ids
        listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int for token in listed):
            raise CheckpointError(f"{self.path}: eos_token_id must be a token id or a list of them, got {ids!r}")
        return frozenset(listed)

    @property
    def dtype(self) -> str:
        """The dtype of the saved weights, from config.json."""
        return str(self._merged.get("dtype") or "bfloat16")

    def quantization(self, weight_dtype: str) -> Quantization | None:
        """Return the quantization for a weight dtype; `None` for `"exact"`.

        Weights that the files have in the same dtype keep the block scales of the files.

        Raises:
          ConfigError: the dtype is unknown.
        """
        dtype = as_weight_dtype(weight_dtype)
        if dtype is WeightDtype.EXACT:
            return None
        blocks = {each.square_block for each in self._schemes if isinstance(each, EightBits)}
        is_one = dtype is WeightDtype.FLOAT8 and len(blocks) == 1
        return Quantization(dtype, blocks.pop() if is_one else None)

    def load(self, decoder: ShardedDecoder) -> Parameters:
        """Load the weights onto the decoder's mesh, in its dtype and quantization.

        Raises:
          CheckpointError: weights are missing, damaged, not finite, or do not match config.json; or the decoder is
            quantized and the weights are in orbax format.
        """
        if (self.path / ORBAX).is_dir():
            if decoder.quantization is not None:
                raise CheckpointError(
                    f"{self.path} holds weights in orbax format, which cannot be read in eight bits: give the "
                    "checkpoint from which it was converted, or run moe-jax convert --to huggingface"
                )
            from moe_jax.checkpoints import orbax_store  # importing orbax takes half a second

            stacked = replace(decoder, scan_layers=True)
            parameters = orbax_store.restore(self.path / ORBAX, stacked.parameters)
            loading.check_finite(parameters)
            return decoder.unstacked(parameters)
        with TensorFiles(self.path) as files:
            sources = self.family.sources_in(files.shapes())
            needed = list(regions(decoder, sources))
            tensors = DequantizedTensors(files, self._schemes) if self._schemes else files
            loading.check(needed, tensors, self._is_ignored)
            return loading.load(decoder.parameters, needed, tensors, decoder.quantization)

    def _is_ignored(self, tensor: str) -> bool:
        """Return True for a tensor that files may hold though the model does not read it.

        Examples are a tied head and multi-token-prediction layers, which follow the last layer.
        """
        if self.config.tied_embeddings and tensor in self.family.sources["head.table"].names:
            return True
        if tensor.startswith(self.family.ignored_prefixes):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", tensor)
        has_mtp = any(self._merged.get(name) for name in ("num_mtp_layers", "num_nextn_predict_layers"))
        return bool(has_mtp and layer and int(layer[1]) >= len(self.config.layers))

    def save_orbax(self, path: str | Path, parameters: Parameters) -> None:
        """Write this model with the given weights to a new directory, in orbax format.

        Raises:
          CheckpointError: the weights are quantized, or `path` exists.
        """
        from moe_jax.checkpoints import orbax_store

        check_exact(parameters)
        with self._new_directory(path) as new:
            orbax_store.save(new / ORBAX, parameters)
            names = {dtype: name for name, dtype in FLOATS.items()}
            dtypes = {name: names[dtype] for name, dtype in self.tensor_dtypes.items()}
            (new / DTYPES).write_text(json.dumps(dtypes))

    def save_hugging_face(self, path: str | Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
        """Write this model with the given weights to a new directory, in Hugging Face format.

        Raises:
          CheckpointError: the weights are quantized, or `path` exists.
        """
        check_exact(parameters)
        with self._new_directory(path) as new:
            self.write_tensors(new, decoder, parameters)

    def write_tensors(self, directory: Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
        """Write the weights as safetensors files. A tensor has the dtype that it came with, or that of config.json."""
        default, dtypes = jnp.dtype(self.dtype), self.tensor_dtypes
        parts = regions(decoder, self.family.sources)
        export.export(directory, parts, parameters, lambda name: dtypes.get(name, default))

    @cached_property
    def tensor_dtypes(self) -> Mapping[str, np.dtype]:
        """Dtypes of the tensors in Hugging Face format, by name; empty if they are quantized or not known."""
        if self._schemes or not any((self.path / name).exists() for name in (ORBAX, INDEX, SINGLE)):
            return {}
        if (self.path / ORBAX).is_dir():
            known = _read_json(self.path / DTYPES) or {}
        else:
            with TensorFiles(self.path) as files:
                known = {name: dtype for name, (_, dtype) in files.shapes().items()}
        return {name: FLOATS[dtype] for name, dtype in known.items() if dtype in FLOATS}

    def exact_dtype(self, placement: Placement) -> str:
        """Return the dtype in which a decoder holds each tensor of the files without rounding."""
        decoder = ShardedDecoder(self.config, placement, self.dtype)
        held = dict(nnx.to_flat_state(decoder.parameters))
        for region in regions(decoder, self.family.sources):
            size = held[region.path].get_value().dtype.itemsize
            if any(self.tensor_dtypes.get(entry.name, FLOATS["F16"]).itemsize > size for entry in region.entries):
                return "float32"
        return self.dtype

    @contextmanager
    def _new_directory(self, path: str | Path) -> Iterator[Path]:
        with new_directory(path) as new:
            for file in self.path.iterdir():
                if file.suffix in KEPT_SUFFIXES and file.name not in (INDEX, MODELOPT, DTYPES):
                    shutil.copy(file, new / file.name)
            if self._schemes:  # exported weights are dequantized
                (new / CONFIG).write_text(json.dumps(_without_quantization(self._raw), indent=2))
            yield new


def _without_quantization(raw_config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in raw_config.items() if name != FIELD}
    return kept | {TEXT: _without_quantization(inner)} if isinstance(inner := kept.get(TEXT), dict) else kept


def _merged(raw_config: dict[str, Any]) -> dict[str, Any]:
    """Merge the outer fields and those of `text_config`, which take precedence.

    `torch_dtype` is the older name of `dtype`.
    """
    inner = raw_config.get(TEXT)
    merged: dict[str, Any] = {}
    for part in (raw_config, inner if isinstance(inner, dict) else {}):
        present = {name: value for name, value in part.items() if value is not None}
        merged |= {"dtype": present["torch_dtype"], **present} if "torch_dtype" in present else present
    return merged


def family_of(raw_config: dict[str, Any]) -> Family:
    """Return the family of a config.

    Raises:
      CheckpointError: the model type is unknown.
    """
    kind = raw_config.get("model_type")
    if family := FAMILIES.get(ALIASES.get(str(kind), str(kind))):
        return family
    known = ", ".join(sorted({*FAMILIES, *ALIASES}))
    raise CheckpointError(f"model_type {kind!r} is not known: the families are {known}")


def check_exact(parameters: Parameters) -> None:
    """Raise `CheckpointError` if weights are quantized."""
    if any(isinstance(param.get_value(), QuantizedWeight) for _, param in nnx.to_flat_state(parameters)):
        raise CheckpointError("weights in eight bits cannot be saved: load the checkpoint with weight_dtype=exact")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
