"""No request reads what earlier requests left in the cache, and no row that nobody wants is judged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_goldens import GOLDENS

from moe_jax import LLM, SamplingParams
from moe_jax.engine.input_builder import SampledSegment
from moe_jax.engine.output_processor import step_outputs
from moe_jax.programs import SampledTokens
from moe_jax.scheduler import Request

CASES = {
    "grouped-query attention": "granitemoe_gqa2_e8_top3",
    "sliding windows and sinks": "gpt_oss_gqa2_e8_top2_yarn",
    "latent attention": "deepseek_v3_e4_top2_halves",
    "recurrent layers": "qwen3_next_e8_top2",
    "block diffusion": "sdar_moe_gqa2_e8_top3",
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


def poison(llm: LLM) -> None:
    """Replace everything in the caches by NaN, as requests whose values overflowed leave it."""
    executor = llm.engine_loop.engine._executor
    executor._caches = jax.tree.map(lambda part: jnp.full_like(part, jnp.nan), executor._caches)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nan_in_the_cache_changes_no_request(case: str) -> None:
    """The requests end inside a dispatch, at different steps."""
    llm = LLM(GOLDENS / case, mesh="data=2,expert=2", max_batch_size=4, prefix_cache=False)
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (5, 11, 2)]
    clean = llm.generate(PROMPTS, params)
    poison(llm)
    assert llm.generate(PROMPTS, params) == clean


def test_columns_that_a_request_did_not_emit_are_not_judged() -> None:
    logprobs = np.array([[-1, np.nan], [np.nan, -1], [-1, -1]], np.float32)
    tokens, top = np.zeros((3, 2), np.int32), np.zeros((3, 2, 0), np.int32)
    emitted = SampledTokens(tokens, logprobs, top, top.astype(np.float32), counts=np.array([1, 1, 0]))  # type: ignore
    requests = [Request(number, [1], 2) for number in range(3)]
    outputs = step_outputs(emitted, [SampledSegment(request, row) for row, request in enumerate(requests)])
    assert [outputs[request].is_finite for request in requests] == [True, False, True]
