"""Messages between processes, as bytes that carry numbers, text and arrays and can run no code.

A message is MessagePack. An object of a known class is a map from its fields, with its class under the empty name; an
array is an extension that holds its dtype, its shape and its numbers. Sizes are checked before anything is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import msgspec
import numpy as np

import moe_jax
from moe_jax.config import BlockDiffusion
from moe_jax.errors import ProcessGroupError
from moe_jax.kernels.forward_batch import ForwardBatch, PageTable, QueryLayout
from moe_jax.programs import DenoisingSchedule, DiffusionStepInput, StepFlags, StepInput
from moe_jax.programs.sampling import SamplingMetadata
from moe_jax.sharding import Rows

MAX_BYTES = 2**28
"""Bytes of the largest message."""
ARRAY = 1
"""Code of the MessagePack extension for an array."""
DTYPES = frozenset(np.dtype(name).str for name in ("bool", "int32", "uint32", "float32"))


@dataclasses.dataclass(frozen=True)
class ExplainRequest:
    """Message to the workers: compile the step of `LLM.explain`, since compilers of several processes may cooperate."""

    batch_size: int


@dataclasses.dataclass(frozen=True)
class Shutdown:
    """Reason for which one process ends early, and with it all others."""

    reason: str

    @classmethod
    def death(cls, process: int) -> Shutdown:
        """Make the shutdown that follows the death of a process."""
        return cls(f"process {process} has died, so all processes end: start them again; written results are kept")


@dataclasses.dataclass(frozen=True)
class Invitation:
    """Address and key by which the workers reach the driver. JAX's coordination service carries it."""

    host: str
    port: int
    key: bytes


@dataclasses.dataclass(frozen=True)
class Greeting:
    """First message of a worker."""

    process: int
    versions: str

    @classmethod
    def of(cls, process: int) -> Greeting:
        """Make the greeting of this process."""
        return cls(process, f"moe_jax {moe_jax.__version__} with JAX {jax.__version__}")


@dataclasses.dataclass(frozen=True)
class Welcome:
    """Answer of the driver to a greeting."""


CLASSES: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        BlockDiffusion, DenoisingSchedule, DiffusionStepInput, ExplainRequest, ForwardBatch, Greeting, Invitation,
        PageTable, QueryLayout, Rows, SamplingMetadata, Shutdown, StepFlags, StepInput, Welcome,
    )
}  # fmt: skip
"""Classes that a message may hold, by name."""


def encode(message: Any) -> bytes:
    """Return a message as bytes."""
    return msgspec.msgpack.encode(_pack(message))


def decode(data: bytes) -> Any:
    """Return the message that the bytes hold. Tuples that are not objects of a known class become lists.

    Raises:
      ProcessGroupError: the bytes hold no message.
    """
    try:
        return _unpack(msgspec.msgpack.decode(data))
    except (ValueError, TypeError, RecursionError) as error:  # errors of msgspec are ValueErrors
        raise ProcessGroupError(
            f"a message of another process is damaged ({error}): start all processes with the same versions"
        ) from error


def _pack(value: Any) -> Any:
    name = type(value).__name__
    if CLASSES.get(name) is type(value):
        return {"": name} | {field: _pack(getattr(value, field)) for field in _fields(type(value))}
    if isinstance(value, np.ndarray):
        assert value.dtype.str in DTYPES, value.dtype
        header = msgspec.msgpack.encode((value.dtype.str, value.shape))
        return msgspec.msgpack.Ext(ARRAY, len(header).to_bytes(1, "big") + header + value.tobytes())
    if isinstance(value, Mapping):
        return {key: _pack(each) for key, each in value.items()}
    return [_pack(each) for each in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any) -> Any:
    match value:
        case msgspec.msgpack.Ext():
            return _array(value)
        case {"": str(name), **fields}:
            kind = CLASSES.get(name)
            if kind is None or fields.keys() != set(_fields(kind)):
                raise ValueError(f"{name} with the fields {sorted(fields)}")
            return kind(**{field: _as_tuple(_unpack(each)) for field, each in fields.items()})
        case dict():
            return {key: _unpack(each) for key, each in value.items()}
        case list():
            return [_unpack(each) for each in value]
        case _:
            return value


def _as_tuple(value: Any) -> Any:
    """Return a list as a tuple: the fields of objects hold tuples alone."""
    return tuple(value) if isinstance(value, list) else value


def _array(extension: msgspec.msgpack.Ext) -> np.ndarray:
    data = memoryview(extension.data)
    if extension.code != ARRAY or not data:
        raise ValueError(f"extension {extension.code}")
    start = 1 + data[0]
    dtype, shape = msgspec.msgpack.decode(data[1:start], type=tuple[str, tuple[int, ...]])
    if dtype not in DTYPES or any(size < 0 for size in shape):
        raise ValueError(f"array of {dtype}{list(shape)}")
    return np.frombuffer(data[start:], dtype).reshape(shape).copy()  # refuses a shape of another size


def _fields(kind: type[Any]) -> tuple[str, ...]:
    return getattr(kind, "_fields", None) or tuple(field.name for field in dataclasses.fields(kind))
