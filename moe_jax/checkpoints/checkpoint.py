"""A checkpoint directory, whatever its format.

config.json          as Hugging Face writes it
tokenizer.json       of the `tokenizers` library; optional
generation_config.json   optional; its end-of-sequence ids win over config.json's
model.safetensors, or several with model.safetensors.index.json     (Hugging Face)
parameters/          orbax, instead of safetensors
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from moe_jax.checkpoints import export, loading
from moe_jax.checkpoints.families import FAMILIES, Family
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.checkpoints.quantization import FIELD, DequantizedTensors, read_quantization
from moe_jax.checkpoints.tensor_files import INDEX, TensorFiles
from moe_jax.checkpoints.weight_mapping import Region, regions
from moe_jax.config import Quantization, WeightDtype, as_weight_dtype
from moe_jax.errors import CheckpointError
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.models import Parameters, ShardedDecoder

CONFIG, TOKENIZER, GENERATION, ORBAX = "config.json", "tokenizer.json", "generation_config.json", "parameters"
DESCRIPTIONS = (".json", ".jinja", ".txt", ".model", ".md")
"""Files beside the weights that a converted checkpoint keeps: tokenizers, chat templates, licences."""


class Checkpoint:
    """What a directory says of a model; `load` reads its weights.

    Raises:
      CheckpointError: no such directory, no or no readable config.json, a damaged generation_config.json, or a family
        not known here.
      ConfigError: the config asks for something that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is no directory: give one that holds config.json and the weights")
        raw = _read_json(self.path / CONFIG)
        if raw is None:
            raise CheckpointError(f"{self.path / CONFIG} is missing: give a directory in Hugging Face layout")
        self._raw, self._of_text = raw, _of_text(raw)
        self.family = family_of(raw)
        self._scales, self.config = Fields(raw).read(
            lambda fields: (read_quantization(fields), self.family.read(fields))
        )
        self.eos_token_ids = self._eos_token_ids()

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        path = self.path / TOKENIZER
        if not path.exists():
            return None
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"{path} is no readable tokenizer: {error}") from error

    def _eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        ids = (_read_json(self.path / GENERATION) or {}).get("eos_token_id")
        ids = self._of_text.get("eos_token_id") if ids is None else ids
        listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(token) is int for token in listed):
            raise CheckpointError(f"{self.path}: eos_token_id must be a token id or a list of them, got {ids!r}")
        return frozenset(listed)

    @property
    def dtype(self) -> str:
        """The dtype that the weights were saved in, as config.json says."""
        return str(self._of_text.get("dtype") or "bfloat16")

    def quantization(self, weight_dtype: str) -> Quantization | None:
        """How weights are held where a user asks for this dtype: `exact`, or one of eight bits. Those that the files
        have in the same one keep the files' scales.

        Raises:
          ConfigError: no such dtype.
        """
        dtype = as_weight_dtype(weight_dtype)
        if dtype is WeightDtype.EXACT:
            return None
        if self._scales is None or dtype is not WeightDtype.FLOAT8:
            return Quantization(dtype)
        return Quantization(dtype, self._scales.neighbours)

    def load(self, decoder: ShardedDecoder) -> Parameters:
        """The weights, on the decoder's mesh, in its dtype or as its quantization says.

        Raises:
          CheckpointError: weights missing, damaged, not finite, or not those that config.json describes; or in orbax
            format, which is restored as it was saved.
        """
        if (self.path / ORBAX).is_dir():
            if decoder.quantization is not None:
                raise CheckpointError(
                    f"{self.path} holds weights in orbax format, which cannot be read in eight bits: "
                    "give the checkpoint that they were converted from, or moe-jax convert --to huggingface"
                )
            from moe_jax.checkpoints import orbax_store  # here, as orbax takes half a second to import

            stacked = replace(decoder, scan_layers=True)
            parameters = orbax_store.restore(self.path / ORBAX, stacked.parameters)
            loading.check_finite(parameters)
            return decoder.unstacked(parameters)
        with TensorFiles(self.path) as files:
            sources = self.family.sources_in(files.shapes())
            wanted = list(regions(decoder, sources))
            tensors = files if self._scales is None else DequantizedTensors(files, self._scales)
            loading.check(wanted, tensors, self._is_unused)
            return loading.load(decoder.parameters, wanted, tensors, decoder.quantization)

    def _is_unused(self, tensor: str) -> bool:
        """Whether a tensor may be there without being read: a tied head, and layers after the last, which guess further
        tokens."""
        if self.config.tied_embeddings and tensor in self.family.sources["head.table"].names:
            return True
        if tensor.startswith(self.family.unused):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", tensor)
        extra = any(self._of_text.get(name) for name in ("num_mtp_layers", "num_nextn_predict_layers"))
        return bool(extra and layer and int(layer[1]) >= len(self.config.layers))

    def save_orbax(self, path: str | Path, parameters: Parameters) -> None:
        """Write this model with the given weights to a new directory, in orbax format.

        Raises:
          CheckpointError: weights in eight bits.
        """
        from moe_jax.checkpoints import orbax_store

        check_exact(parameters)
        with self._new_directory(path) as new:
            orbax_store.save(new / ORBAX, parameters)

    def save_hugging_face(self, path: str | Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
        """Write this model with the given weights to a new directory, in Hugging Face layout.

        Raises:
          CheckpointError: weights in eight bits.
        """
        check_exact(parameters)
        with self._new_directory(path) as new:
            self.write_tensors(new, decoder, parameters)

    def write_tensors(self, directory: Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
        """Write the weights as safetensors, in the dtype that config.json says."""
        export.export(directory, regions_of(self.family, decoder), parameters, jnp.dtype(self.dtype))

    @contextmanager
    def _new_directory(self, path: str | Path) -> Iterator[Path]:
        with new_directory(path) as new:
            for file in self.path.iterdir():
                if file.suffix in DESCRIPTIONS and file.name != INDEX:
                    shutil.copy(file, new / file.name)
            if self._scales is not None:  # what is written is dequantised
                raw = {name: value for name, value in self._raw.items() if name != FIELD}
                (new / CONFIG).write_text(json.dumps(raw, indent=2))
            yield new


def _of_text(raw_config: dict[str, Any]) -> dict[str, Any]:
    """The fields, those of the part for text before those around it; `torch_dtype` is the older name of `dtype`."""
    inner = raw_config.get(TEXT)
    found: dict[str, Any] = {}
    for part in (raw_config, inner if isinstance(inner, dict) else {}):
        said = {name: value for name, value in part.items() if value is not None}
        found |= {"dtype": said["torch_dtype"], **said} if "torch_dtype" in said else said
    return found


def family_of(raw_config: dict[str, Any]) -> Family:
    """Raises CheckpointError for a family that is not known."""
    kind = raw_config.get("model_type")
    if family := FAMILIES.get(str(kind)):
        return family
    raise CheckpointError(f"model_type {kind!r} is not known: the families are {', '.join(sorted(FAMILIES))}")


def regions_of(family: Family, decoder: ShardedDecoder) -> Iterator[Region]:
    return regions(decoder, family.sources)


def check_exact(parameters: Parameters) -> None:
    """Raise `CheckpointError` for weights in eight bits."""
    if any(isinstance(param.get_value(), QuantizedWeight) for _, param in nnx.to_flat_state(parameters)):
        raise CheckpointError("weights in eight bits are not saved: load them exact to convert them")


def check_new(path: Path) -> None:
    """Raise `CheckpointError` if there is something at `path`; to be called before the work that will be put there."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already: name a new directory, or remove that one")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory to fill, which appears at `path` when the block ends without an error, and not at all otherwise.

    Raises:
      CheckpointError: see `check_new`.
    """
    path = Path(path)
    check_new(path)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
