"""Decode Mixture-of-Experts language models in batches on a JAX device mesh.

A name of this package imports JAX when it is first used, so that `moe-jax --help` answers at once.
"""
# ruff: noqa: I001  (in groups, by subject)

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Engines
    from moe_jax.llm.llm import LLM  # a checkpoint on a mesh: prompts in, texts out
    from moe_jax.llm.async_llm import AsyncLLM  # an LLM for programs with asyncio: streams for any number of users

    # Requests and results
    from moe_jax.config.sampling_params import SamplingParams  # how to choose the tokens of a request, and when to stop
    from moe_jax.engine.outputs import RequestOutput  # a finished request: texts, token ids, log-probabilities
    from moe_jax.engine.outputs import StreamEvent  # a piece of a running request: new text and tokens

    # Several processes
    from moe_jax.engine import distributed  # distributed.join: processes that hold one mesh

    # Errors
    from moe_jax.errors import MoEJaxError  # base class of all errors that a user can cause

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return _version()
        if name in _MODULES:
            return getattr(import_module(_MODULES[name]), name)
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["LLM", "AsyncLLM", "MoEJaxError", "RequestOutput", "SamplingParams", "StreamEvent", "distributed"]

_MODULES = {
    "LLM": "moe_jax.llm.llm",
    "AsyncLLM": "moe_jax.llm.async_llm",
    "MoEJaxError": "moe_jax.errors",
    "RequestOutput": "moe_jax.engine.outputs",
    "SamplingParams": "moe_jax.config.sampling_params",
    "StreamEvent": "moe_jax.engine.outputs",
    "distributed": "moe_jax.engine",
}


def _version() -> str:
    try:
        return version(__name__)
    except PackageNotFoundError:  # a source directory on the path, not installed
        return "0+source"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
