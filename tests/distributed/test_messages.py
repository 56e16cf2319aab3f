"""Messages between processes carry numbers, text and arrays, and run no code."""

from __future__ import annotations

import ast
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe_jax
from moe_jax.engine.distributed import ExplainRequest, decode, encode
from moe_jax.engine.distributed.messages import ARRAY, Greeting, Shutdown, Welcome
from moe_jax.errors import ProcessGroupError
from moe_jax.kernels.forward_batch import ForwardBatch, PageTable, QueryLayout
from moe_jax.programs import StepFlags, StepInput
from moe_jax.sharding import Rows

PACKAGE = Path(moe_jax.__file__).parent


def step_input() -> StepInput:
    ints: Any = np.arange(6, dtype=np.int32)
    table = PageTable(ints.reshape(2, 3), ints[:2], None)
    batch = ForwardBatch(ints, ints, ints, ints, ints, (table,), Rows(ints, 8), (QueryLayout(2, 1), QueryLayout(1, 4)))
    return StepInput(batch, ints, ints > 2, None, limits=ints, flags=StepFlags(top_logprobs=20), max_steps=8)


@pytest.mark.parametrize(
    "message",
    [
        None,
        {"the dtype": "float32"},
        ExplainRequest(7),
        Shutdown("words"),
        Greeting(3, "x"),
        Welcome(),
        step_input(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_were_sent(message: Any) -> None:
    got = decode(encode(message))
    assert type(got) is type(message)
    assert jax.tree.structure(got) == jax.tree.structure(message)
    for mine, sent in zip(jax.tree.leaves(got), jax.tree.leaves(message), strict=True):
        np.testing.assert_array_equal(mine, sent)
        assert not isinstance(sent, np.ndarray) or mine.dtype == sent.dtype


def extension(dtype: str, shape: tuple[int, ...], numbers: bytes, code: int = ARRAY) -> bytes:
    header = msgspec.msgpack.encode((dtype, shape))
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, bytes([len(header)]) + header + numbers))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        pickle.dumps(ExplainRequest(1)),
        encode(step_input())[:-5],
        encode(step_input()) + b"\0",
        b"\x91" * 10**5,
        extension("<i4", (3,), bytes(8)),
        extension("<i4", (-1, -3), bytes(12)),
        extension("<i4", (2**40, 2**40), b""),
        extension("|O", (1,), bytes(8)),
        extension("<i4,<i4", (1,), bytes(8)),
        extension("<i4", (1,), bytes(4), code=7),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(ARRAY, b"")),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(ARRAY, b"\xff\x93")),
        msgspec.msgpack.encode({"": "Popen", "args": ["true"]}),
        msgspec.msgpack.encode({"": "Shutdown"}),
        msgspec.msgpack.encode({"": "Shutdown", "reason": "x", "other": 2}),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_damaged_messages_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(ProcessGroupError, match="a message of another process is damaged"):
        decode(data)


@given(st.binary(max_size=200) | st.builds(bytes.__add__, st.just(encode(step_input())[:60]), st.binary(max_size=90)))
def test_any_bytes_give_a_message_or_an_error(data: bytes) -> None:
    with suppress(ProcessGroupError):
        decode(data)


def test_no_module_uses_a_format_that_can_run_code() -> None:
    formats = {"pickle", "marshal", "dill", "cloudpickle", "shelve", "joblib"}
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                assert not formats & {alias.name.split(".")[0] for alias in node.names}, module
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in formats, module
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "np.load", "yaml.load", "connection.recv", "connection.send"), (
                    module
                )
                assert not any(keyword.arg == "allow_pickle" for keyword in node.keywords), module
