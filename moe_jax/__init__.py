"""Decode Mixture-of-Experts language models in batches on a JAX device mesh."""
# ruff: noqa: I001  (in groups, by subject)

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

__all__ = ["LLM", "AsyncLLM", "MoEJaxError", "RequestOutput", "SamplingParams", "StreamEvent", "distributed"]
