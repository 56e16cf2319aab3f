"""Validation and storage of sampling parameters."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine.outputs import CompletionOutput, RequestOutput
from moe_jax.errors import RequestError

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be 1 or more, got 0"),
        ({"denoising_steps": 0}, "denoising_steps must be 1 or more, got 0"),
        ({"confidence_threshold": 1.1}, "confidence_threshold must be from 0 to 1, got 1.1"),
        ({"confidence_threshold": NAN}, "confidence_threshold must be from 0 to 1, got nan"),
        ({"n": 2, "temperature": 0}, "n must be 1 with temperature=0"),
        ({"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        ({"max_tokens": 4.0}, "max_tokens must be a whole number, got 4.0"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"max_tokens": np.True_}, "max_tokens must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be 0 or more"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens, 4, got 5"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": NAN}, "temperature must be 0"),
        ({"temperature": INFINITY}, "temperature must be 0"),
        ({"temperature": 1e39}, "temperature must be 0"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": False}, "temperature must be a number, got False"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"top_k": -1}, "top_k must be positive"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty must be from 0.01 to 100"),
        ({"repetition_penalty": INFINITY}, "repetition_penalty must be from 0.01 to 100"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2, got 2.1"),
        ({"frequency_penalty": None}, "frequency_penalty must be a number, got None"),
        ({"seed": -(2**63) - 1}, "seed must be an integer of 64 bits"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be from 0 to 20, got -1"),
        ({"priority": 0.5}, "priority must be a whole number, got 0.5"),
        ({"stop": ""}, "stop must be a string or a list of strings, none of them empty, got ''"),
        ({"stop": ("a", "")}, "none of them empty"),
        ({"stop": 3}, "stop must be a string or a list of strings"),
        ({"stop": b"end"}, "stop must be a string or a list of strings"),
        ({"stop_token_ids": ("2",)}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": (True,)}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": 2}, "stop_token_ids must be token ids, got 2"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping"),
        ({"logit_bias": {"five": 1}}, "logit_bias's keys must be token ids"),
        ({"logit_bias": {"-5": 1}}, "logit_bias's keys must be token ids"),
        ({"logit_bias": {"5": 1, 5: 2}}, "logit_bias names a token twice"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\] must be from -100 to 100, got 101"),
        ({"logit_bias": {5: NAN}}, r"logit_bias\[5\] must be from -100 to 100, got nan"),
        ({"logit_bias": {5: "much"}}, r"logit_bias\[5\] must be a number, got 'much'"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias can have at most 300 tokens, got 301"),
    ],
)
def test_invalid_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_values_are_stored_in_plain_types() -> None:
    bias = {np.int32(3): 1}
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        max_tokens=np.int32(4),  # type: ignore[arg-type]
        temperature=1,
        top_p=np.float32(0.5),  # type: ignore[arg-type]
        stop="end",
        stop_token_ids=[np.int64(7), 8],  # type: ignore[list-item]
        logit_bias=bias,  # type: ignore[arg-type]
        seed=np.uint32(2**32 - 1),  # type: ignore[arg-type]
    )
    bias[np.int32(4)] = 2
    assert params == SamplingParams(
        n=2, max_tokens=4, top_p=0.5, stop=("end",), stop_token_ids=(7, 8), logit_bias={3: 1.0}, seed=2**32 - 1
    )
    for name in ("n", "max_tokens", "seed"):
        assert type(getattr(params, name)) is int
    assert type(params.temperature) is type(params.top_p) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None) == SamplingParams()


def test_values_of_other_clients_are_taken() -> None:
    """JSON has strings for keys; OpenAI's clients send seeds of 64 bits."""
    assert SamplingParams(logit_bias={"5": 1}).logit_bias == {5: 1.0}  # type: ignore[dict-item]
    for seed in (-1, -(2**63), 2**64 - 1):
        assert SamplingParams(seed=seed).seed == seed


def test_parameters_are_not_given_by_position() -> None:
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(2)  # type: ignore[misc]


def test_parameters_can_be_hashed_pickled_and_replaced() -> None:
    params = SamplingParams(logit_bias={3: 1.0}, stop=["a"])
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1.0}, stop=["a"]))
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, max_tokens=3).logit_bias == {3: 1.0}
    assert SamplingParams(**dataclasses.asdict(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_parameters_are_checked_against_the_model() -> None:
    SamplingParams(logit_bias={96: 1}, stop_token_ids=[96]).check(97, range(17))
    SamplingParams(min_tokens=1).check(97, range(16))
    with pytest.raises(RequestError, match="logit_bias has token id 97, but ids go from 0 to 96"):
        SamplingParams(logit_bias={1: 1, 97: 1}).check(97, [])
    with pytest.raises(RequestError, match="stop_token_ids has token id 98"):
        SamplingParams(stop_token_ids=[98]).check(97, [98])
    with pytest.raises(RequestError, match="min_tokens allows at most 16 stop tokens, got 17"):
        SamplingParams(min_tokens=1).check(97, range(17))


def test_request_output_has_the_fields_of_its_first_sample() -> None:
    first = CompletionOutput([1, 2], [-0.5, -1.0], [{1: -0.5}, {3: -0.2}], "error", "ab", "broken")
    output = RequestOutput([5], [first, CompletionOutput([3], [-2.0], None, "stop", "c")])
    names = ("token_ids", "logprobs", "top_logprobs", "finish_reason", "text", "error")
    assert [getattr(output, name) for name in names] == [getattr(first, name) for name in names]
