"""Decode Mixture-of-Experts language models in batches on a JAX device mesh."""

from moe_jax.async_llm import AsyncLLM
from moe_jax.errors import MoEJaxError
from moe_jax.llm import LLM
from moe_jax.requests import RequestOutput, SamplingParams, StreamEvent

__all__ = ["LLM", "AsyncLLM", "MoEJaxError", "RequestOutput", "SamplingParams", "StreamEvent"]
