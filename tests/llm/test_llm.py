"""LLM: batches, sampling, limits, and errors for bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Encoding

from moe_jax import LLM, MoEJaxError, SamplingParams
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.engine import OutputQueue
from moe_jax.errors import CheckpointError, ConfigError, PlacementError, RequestError
from moe_jax.llm.prompts import as_prompts
from moe_jax.sharding import Placement, ScatterCombine, make_mesh

GOLDEN = Path(__file__).parents[1] / "goldens" / "qwen3_moe_gqa4_e8_top2"
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def adder() -> LLM:
    return LLM(mesh="expert=4,tensor=2", dtype="float32", max_batch_size=16)


@pytest.fixture(scope="module")
def golden() -> LLM:
    """A model without a tokenizer, with 64 positions and a vocabulary of 97 tokens."""
    return LLM(GOLDEN, mesh="expert=8", dtype="float32", prefill_tokens=16)


def test_the_bundled_model_adds(adder: LLM) -> None:
    prompts = ["1+1=", "12+34=", "999+999=", "1234+5678="]
    outputs = adder.generate(prompts, SamplingParams(temperature=0))
    assert [output.text for output in outputs] == ["2", "46", "1998", "6912"]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.finish_reason == "stop"
        assert len(output.prompt_token_ids) == len(prompt)
        assert len(output.token_ids) == len(output.logprobs) == len(output.text or "") + 1
        assert all(-0.1 < logprob <= 0 for logprob in output.logprobs)


def test_one_text_is_a_batch_of_one(adder: LLM) -> None:
    (output,) = adder.generate("2+2=", SamplingParams(temperature=0))
    assert output.text == "4"


def test_scan_layers_does_not_change_the_tokens(golden: LLM) -> None:
    prompts, params = [[5, 6, 7], list(range(20, 50))], SamplingParams(temperature=0, max_tokens=12)
    apart = LLM(GOLDEN, mesh="expert=2", dtype="float32", scan_layers=False)
    for got, wanted in zip(apart.generate(prompts, params), golden.generate(prompts, params), strict=True):
        assert got.token_ids == wanted.token_ids
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-5)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), min_size=20, max_size=20))
def test_answers_do_not_depend_on_the_neighbours(adder: LLM, sums: list[tuple[int, int]]) -> None:
    """More requests than fit into a batch get the tokens that each gets alone."""
    prompts = [f"{left}+{right}=" for left, right in sums]
    together = adder.generate(prompts, GREEDY)
    alone = [adder.generate(prompt, GREEDY)[0] for prompt in prompts[:3]]
    assert [output.token_ids for output in alone] == [output.token_ids for output in together[:3]]
    backwards = adder.generate(prompts[::-1], GREEDY)[::-1]
    assert [output.text for output in backwards] == [output.text for output in together]


def test_seeds_reproduce_samples(adder: LLM) -> None:
    hot = [SamplingParams(temperature=3.0, max_tokens=6, seed=seed, ignore_eos=True) for seed in range(6)]
    first = [output.token_ids for output in adder.generate(["1+1="] * 6, hot)]
    assert first == [output.token_ids for output in adder.generate(["1+1="] * 6, hot[::-1])][::-1]
    assert len({tuple(tokens) for tokens in first}) > 1
    unseeded = SamplingParams(temperature=3.0, max_tokens=6, ignore_eos=True)
    answers = {tuple(output.token_ids) for output in adder.generate(["1+1="] * 16, unseeded)}
    assert len(answers) > 1


def test_each_prompt_can_have_its_own_parameters(adder: LLM) -> None:
    outputs = adder.generate(
        ["5+5=", "6+6=", "7+7=", "8+8="],
        [
            SamplingParams(temperature=0, max_tokens=0),
            SamplingParams(temperature=0, max_tokens=1),
            SamplingParams(temperature=0, max_tokens=9, stop_token_ids=(4,)),
            SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
        ],
    )
    assert [output.text for output in outputs[:3]] == ["", "1", "1"]
    assert [output.finish_reason for output in outputs] == ["length", "length", "stop", "length"]
    assert len(outputs[3].token_ids) == 4


def test_a_sequence_ends_where_the_cache_ends(golden: LLM) -> None:
    (output,) = golden.generate([[1] * 60], SamplingParams(temperature=0, max_tokens=50))
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 64 - 60 + 1
    assert output.text is None
    longest, shortest = golden.generate([[2] * 64, [3]], SamplingParams(temperature=0, max_tokens=100))
    assert (len(longest.token_ids), len(shortest.token_ids)) == (1, 64)


def test_chunked_prefill_does_not_change_the_result() -> None:
    prompts = [np.random.default_rng(seed).integers(0, 97, 20 + 13 * seed).tolist() for seed in range(4)]
    found = []
    for prefill_tokens in (512, 9):
        llm = LLM(GOLDEN, mesh="expert=2", dtype="float32", max_batch_size=8, prefill_tokens=prefill_tokens)
        found.append((llm.logits(prompts), [output.token_ids for output in llm.generate(prompts, GREEDY)]))
    (whole, tokens), (chunked, chunked_tokens) = found
    for one, other in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert chunked_tokens == tokens


def test_bfloat16_stays_close_to_float32(golden: LLM) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    half = LLM(GOLDEN, mesh="data=2,expert=4", dtype="bfloat16", combine="reduce")
    for one, other in zip(half.logits(prompts), golden.logits(prompts), strict=True):
        assert np.abs(one - other).max() < 0.1 * np.abs(other).max()
    assert half.logits(prompts)[0].dtype == np.float32


def test_explain_counts_collectives_and_bytes(golden: LLM) -> None:
    explanation = golden.explain(batch_size=64)
    assert explanation.decision.name == "ScatterCombine"
    assert explanation.as_dict()["collectives_per_step"]["reduce-scatter"] == 2
    routing = 2 * (4 + 4)
    assert explanation.sent_bytes_per_step == 2 * 7 * 8 * (32 * 4 + 32 * 4 + routing)
    for words in ("data=1,expert=8,tensor=1", "ScatterCombine", "64 rows", "2 reduce-scatter"):
        assert words in str(explanation)


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize(
    ("case", "combine"),
    [
        ("qwen2_moe_gqa2_e8_top4_sparse_step", "scatter"),
        ("qwen2_moe_gqa2_e8_top4_sparse_step", "reduce"),
        ("qwen2_moe_gqa2_e8_top4_sparse_step", "all-to-all"),
        ("mixtral_gqa8_e16_top4_sharded", "all-to-all"),
    ],
)
def test_estimated_bytes_are_the_bytes_of_the_compiled_collectives(case: str, combine: str) -> None:
    """The cases have dense layers, shared experts and routed experts."""
    explained = LLM(GOLDEN.parent / case, mesh="expert=4", dtype="float32", combine=combine).explain(16).as_dict()
    assert explained["collective_bytes_per_step"] == pytest.approx(explained["sent_bytes_per_step"])


@pytest.mark.parametrize(
    "mesh", [None, {"expert": 8}, make_mesh("expert=8"), Placement.parse("expert=8"), "data=1,expert=8,tensor=1"]
)
def test_a_mesh_can_be_given_in_several_forms(mesh: Any) -> None:
    llm = LLM(GOLDEN, mesh=mesh)
    assert llm.explain(8).placement.startswith("data=1,expert=8,tensor=1")


def test_combine_can_be_a_user_class() -> None:
    class Mine(ScatterCombine):
        pass

    llm = LLM(GOLDEN, mesh="expert=2", combine=Mine)
    assert llm.explain(8).decision.name == "Mine"


def test_no_prompts_give_no_outputs(golden: LLM) -> None:
    assert golden.generate([], GREEDY) == []
    assert golden.logits([]) == []


def test_scores_are_the_log_probabilities_of_the_tokens(golden: LLM) -> None:
    """Prompts take one step, or several; one has a prefix in the cache."""
    prompts = [list(range(length)) for length in (1, 2, 33, 64)] + [list(range(40))]
    for prompt, logits, scores in zip(prompts, golden.logits(prompts), golden.score(prompts), strict=True):
        expected = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert scores.dtype == np.float32


@pytest.mark.parametrize("last", [1, 2, 17, 63, 64, 100])
def test_logits_of_the_last_tokens(golden: LLM, last: int) -> None:
    prompts = [list(range(length)) for length in (1, 2, 33, 64)]
    for few, whole in zip(golden.logits(prompts, last=last), golden.logits(prompts), strict=True):
        np.testing.assert_allclose(few, whole[-last:], rtol=0, atol=1e-5)


def test_no_logits_are_refused(golden: LLM) -> None:
    with pytest.raises(RequestError, match="last must be at least 1, got 0"):
        golden.logits([1], last=0)


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([[]], "prompt 0 is empty"),
    ([[1], []], "prompt 1 is empty"),
    ([[1] * 65], "prompt 0 has 65 tokens, a sequence can have 64"),
    ([[1, 97]], "prompt 0 holds token id 97, the ids go from 0 to 96"),
    ([[-1]], "prompt 0 holds token id -1"),
    ("text", "has no tokenizer.json: give prompts as lists of token ids"),
    ([[1.5]], "prompt 0 must be a text, a list of token ids, or a dictionary"),
    ([1, 2.0], "prompt 0 must be a text, a list of token ids, .*, got int: 1"),
    ([[1], [True]], "prompt 1 must be a text, .*, got list"),
    ([[1], None], "prompt 1 must be a text, .*, got NoneType"),
    ([b"text"], "prompt 0 must be a text, .*, got bytes"),
    ([[[1]]], "prompt 0 must be a text"),
    (b"text", "prompts must be a text, .*, got bytes"),
    (7, "prompts must be .*, got int"),
    (None, "prompts must be .*, got NoneType"),
    ({1, 2}, "prompts must be .*, or a list of such prompts, got set"),
    ((token for token in (1, 2)), "prompts must be .*, got generator"),
    (np.int32(7), "prompts must be .*, got int32"),
    (np.array([1.0, 2.0]), "prompt 0 must be .*, got float: 1.0"),
    (np.zeros((1, 1, 1), int), "prompt 0 must be"),
    ({}, "prompt 0 is a dictionary without a prompt"),
    ({"prompt": None}, "prompt 0 is a dictionary without a prompt"),
    ({"text": "1"}, "prompt 0 has the key 'text', which is not supported: give a text"),
    ({"prompt_token_ids": [1], "multi_modal_data": {"image": 1}}, "has the key 'multi_modal_data'"),
    ({"prompt_token_ids": "text"}, "prompt 0 must be"),
    ({"prompt": {"prompt": "1"}}, "prompt 0 must be"),
    ([{"prompt_token_ids": []}], "prompt 0 is empty"),
]


@pytest.mark.parametrize(
    "prompts",
    [
        [1, 2],
        (1, 2),
        [[1, 2]],
        range(1, 3),
        np.array([1, 2]),
        np.array([[1, 2]], np.int16),
        jnp.array([1, 2]),
        [np.array([1, 2])],
        [np.int64(1), jnp.int32(2)],
        {"prompt_token_ids": [1, 2]},
        [{"prompt_token_ids": np.array([1, 2]), "prompt": "text", "multi_modal_data": None}],
        {"prompt": [1, 2]},
    ],
)
def test_prompts_of_all_kinds_are_served(golden: LLM, prompts: Any) -> None:
    assert [group.prompt for group in golden.request_groups(as_prompts(prompts), GREEDY)] == [[1, 2]]


def test_texts_of_all_kinds_are_served(adder: LLM) -> None:
    kinds: list[Any] = ["1+1=", ["1+1="], {"prompt": "1+1="}, ({"prompt": "1+1=", "prompt_token_ids": None},)]
    for prompts in kinds:
        assert [output.text for output in adder.generate(prompts, GREEDY)] == ["2"]


def test_a_text_far_too_long_is_refused_by_its_start(adder: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    tokenizer = adder.tokenizer
    assert tokenizer

    class Counting:
        def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
            read.extend(map(len, texts))
            return tokenizer.encode_batch_fast(texts)

    checkpoint = adder._checkpoint
    monkeypatch.setitem(vars(checkpoint), "tokenizer", Counting())
    with pytest.raises(RequestError, match="prompt 0 has 5,000,000 characters and more than 128 tokens"):
        adder.generate("1" * 5_000_000)
    assert sum(read) == 2**16
    with pytest.raises(RequestError, match="prompt 0 has 65536 tokens, a sequence can have 64"):
        adder.generate("1" * 2**16)


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS)
def test_bad_prompts_are_refused(golden: LLM, prompts: Any, message: str) -> None:
    for serve in (golden.generate, golden.logits):
        with pytest.raises(RequestError, match=message):
            serve(prompts)


def test_an_empty_text_is_refused(adder: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        adder.generate([""])


def test_a_text_without_tokens_is_refused(adder: LLM) -> None:
    with pytest.raises(RequestError, match="prompt 1, 'one plus 1=', has text that the tokenizer has no token for"):
        adder.generate(["1+1=", "one plus 1="])


def test_a_wrong_number_of_parameters_is_refused(golden: LLM) -> None:
    with pytest.raises(RequestError, match=r"one for each of 2 prompts, got \[Sampling"):
        golden.generate([[1], [2]], [GREEDY])
    with pytest.raises(RequestError, match=r"one for each of 1 prompts, got \[None\]"):
        golden.generate([[1]], [None])  # type: ignore[list-item]


def test_explain_needs_a_sequence(golden: LLM) -> None:
    with pytest.raises(RequestError, match="at least one sequence, got 0"):
        golden.explain(0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": "/nowhere"}, CheckpointError, "is no directory"),
        ({"mesh": "expert=3"}, PlacementError, "8 experts do not divide over 3 devices"),
        ({"mesh": "expert=16"}, PlacementError, "needs 16 devices, there are 8"),
        ({"mesh": "gpu=8"}, PlacementError, "cannot read 'gpu=8'"),
        (
            {"combine": "both"},
            PlacementError,
            "combine must be auto, scatter, reduce, ragged, all-to-all or a class derived from Combine, got 'both'",
        ),
        ({"dtype": "float8"}, ConfigError, "dtype must be bfloat16, float16 or float32, got 'float8'"),
        ({"dtype": object()}, ConfigError, "dtype must be bfloat16, float16 or float32, got '<object"),
        ({"mesh": 8}, PlacementError, "cannot make a mesh from 8"),
        ({"mesh": {"expert": 2.0}}, PlacementError, "cannot make a mesh from"),
        ({"dtype": "int32"}, ConfigError, "dtype must be bfloat16, float16 or float32, got 'int32'"),
        ({"max_length": 65}, RequestError, "from 1 to the 64 positions of this model, got 65"),
        ({"max_length": 0}, RequestError, "from 1 to the 64 positions of this model, got 0"),
        ({"max_batch_size": 0}, RequestError, "max_batch_size must be a whole number, at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[MoEJaxError], message: str) -> None:
    arguments: dict[str, Any] = {"checkpoint": GOLDEN, **options}
    with pytest.raises(error, match=message):
        LLM(**arguments)


def test_the_bundled_model_is_small_and_the_default() -> None:
    assert sum(path.stat().st_size for path in ADDER.iterdir()) < 5 * 2**20
    assert LLM(mesh="data=1").config.max_positions == 64
    assert jax.device_count() == 8


def test_an_interrupted_step_does_not_change_later_outputs(golden: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix cache does not hold tokens that were planned and never computed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    prompt, greedy = [list(range(50, 83))], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(golden.engine_loop.engine._executor, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            golden.generate(prompt, greedy)
    assert golden.stats().cache_use == golden.stats().running == golden.stats().waiting == 0
    (first,), hits = golden.generate(prompt, greedy), golden.stats().prefix_hits
    assert hits == 0
    (second,) = golden.generate(prompt, greedy)
    assert golden.stats().prefix_hits == 32
    assert first.token_ids == second.token_ids


def test_warm_up_works_between_requests_and_is_refused_while_they_run(
    adder: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was planned ahead may still be in flight."""
    monkeypatch.setattr(type(adder.engine_loop.engine._sizes), "steps", lambda _: [])
    adder.generate("1+1=", SamplingParams(temperature=0))
    adder.warm_up()
    (group,) = adder.request_groups(["1+1="], SamplingParams(temperature=0))
    with adder.engine_loop.paused() as engine:
        engine.add(generation := group.begin(0, OutputQueue()))
        with pytest.raises(RequestError, match="requests are running"):
            engine.warm_up([], progress=False)
        engine.cancel(generation)


def test_a_stream_without_tokens_has_a_finish_reason(adder: LLM) -> None:
    (event,) = adder.stream("1+1=", SamplingParams(max_tokens=0))
    assert (event.text, event.token_ids, event.finish_reason) == ("", [], "length")
    (event,) = adder.stream("1+1=", SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1))
    assert (event.text, event.token_ids, event.finish_reason) == ("", [], "length")


def test_top_logprobs_are_tokens_of_the_vocabulary(adder: LLM) -> None:
    (output,) = adder.generate("1+1=", SamplingParams(temperature=0, logprobs=20))
    assert output.outputs[0].top_logprobs is not None
    assert all(token >= 0 for column in output.outputs[0].top_logprobs for token in column)
