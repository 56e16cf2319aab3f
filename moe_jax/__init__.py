"""Decode Mixture-of-Experts language models in batches on a JAX device mesh."""

from moe_jax.errors import MoEJaxError
from moe_jax.llm import LLM
from moe_jax.requests import RequestOutput, SamplingParams

__all__ = ["LLM", "MoEJaxError", "RequestOutput", "SamplingParams"]
