"""Decode Mixture-of-Experts language models in batches on a JAX device mesh."""

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import distributed
from moe_jax.engine.outputs import RequestOutput, StreamEvent
from moe_jax.errors import MoEJaxError
from moe_jax.llm.async_llm import AsyncLLM
from moe_jax.llm.llm import LLM

__all__ = ["LLM", "AsyncLLM", "MoEJaxError", "RequestOutput", "SamplingParams", "StreamEvent", "distributed"]
