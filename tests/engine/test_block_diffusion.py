"""Block-diffusion requests in a batch get the tokens that plain NumPy decodes for each request alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import plain
import plain_blocks
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models

from moe_jax import LLM, SamplingParams
from moe_jax.errors import RequestError
from moe_jax.programs import StepFlags

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = GOLDENS / "llada2_moe_gqa4_e8_top2_groups"
BLOCK, POSITIONS, MASK = 32, 128, 31
"""Block size (two pages), maximum positions, and mask token."""
SAMPLED: dict[str, Any] = {"temperature": 0, "logit_bias": {0: 0.0}}
"""Greedy decoding with a bias of zero, so that only the programs of sampling are compiled."""

TOKENS = np.random.default_rng(0).integers(0, 31, 100).tolist()
PROMPTS = [TOKENS[:length] for length in (1, 5, 31, 32, 33, 70, 64, 90)]
SCHEDULES = [(1.0, 32), (0.3, 32), (0.3, 5), (1.0, 1)]
"""Confidence thresholds and denoising steps."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with blocks of 32, and a tokenizer that writes each token as one letter."""
    path = tmp_path_factory.mktemp("blocks") / "model"
    shutil.copytree(GOLDEN, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"block_size": BLOCK, "max_position_embeddings": POSITIONS}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({letter(token): token for token in range(MASK + 1)}, unk_token=letter(0)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def letter(token: int) -> str:
    return chr(ord("A") + token)


@pytest.fixture(scope="module")
def crowded(checkpoint: Path) -> LLM:
    """An engine of two token shards, each with two slots and too few pages for two of the longest sequences."""
    return LLM(
        checkpoint, mesh="data=2,tensor=2", dtype="float32", max_batch_size=4, prefill_tokens=32, decode_steps=3,
        cache_pages=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Callable[..., plain_blocks.Decoded]:
    """Decode one request in plain NumPy."""
    config, weights = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    logits = partial(plain.logits, config, weights)

    @cache
    def decoded(
        prompt: tuple[int, ...], wanted: int, schedule: tuple[float, int], ends: tuple[int, ...] = ()
    ) -> plain_blocks.Decoded:
        threshold, steps = schedule
        return plain_blocks.decode(
            logits, prompt, wanted, block=BLOCK, mask=MASK, threshold=threshold, steps=steps, ends=ends
        )

    return decoded


def test_a_batch_has_the_tokens_of_each_request_alone(crowded: LLM, alone: Callable[..., plain_blocks.Decoded]) -> None:
    """Prompts are shorter and longer than a block, fill blocks or not, and are prefilled in chunks. Outputs end within
    a block. Blocks take from one to 32 steps. Prefixes are shared, pages are short, and nothing is compiled after
    warm-up."""
    with crowded.engine_loop.paused() as engine:
        engine.warm_up([StepFlags(sampling=True)], progress=False)
    compiled = crowded._programs.compilations
    requests = [
        (prompt, 1 + 11 * number % min(60, POSITIONS - len(prompt)), SCHEDULES[number % len(SCHEDULES)])
        for number, prompt in enumerate(PROMPTS * 3)
    ]
    params = [
        SamplingParams(max_tokens=wanted, confidence_threshold=threshold, denoising_steps=steps, **SAMPLED)
        for _, wanted, (threshold, steps) in requests
    ]
    outputs, step_counts = crowded.generate([prompt for prompt, *_ in requests], params), set[int]()
    for (prompt, wanted, schedule), output in zip(requests, outputs, strict=True):
        expected = alone(tuple(prompt), wanted, schedule)
        assert output.token_ids == expected.tokens
        assert output.finish_reason == "length"
        np.testing.assert_allclose(output.logprobs, _logprobs(expected), rtol=0, atol=1e-4)
        step_counts |= set(expected.steps) if schedule == SCHEDULES[1] else set()
    assert {1, 3, 5} <= step_counts, "blocks take different numbers of steps"
    assert crowded._programs.compilations == compiled
    stats = crowded.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0


def _logprobs(decoded: plain_blocks.Decoded) -> list[float]:
    rows = zip(decoded.logits, decoded.tokens, strict=True)
    return [row[token] - np.log(np.exp(row).sum()) for row, token in rows]


def test_a_request_can_end_within_a_block(crowded: LLM, alone: Callable[..., plain_blocks.Decoded]) -> None:
    """A stop token, a stop string or the last position ends it; later tokens of the block are dropped."""
    prompt = PROMPTS[1]
    whole = alone(tuple(prompt), 40, (0.95, BLOCK)).tokens
    new = next(place for place in range(3, 40) if whole[place] not in whole[:place])
    (output,) = crowded.generate([prompt], SamplingParams(max_tokens=40, stop_token_ids=[whole[new]], **SAMPLED))
    assert (output.token_ids, output.finish_reason) == (whole[: new + 1], "stop")
    assert output.token_ids == alone(tuple(prompt), 40, (0.95, BLOCK), (whole[new],)).tokens

    text = "".join(map(letter, whole))
    stop = text[new : new + 2]
    events = list(crowded.stream([prompt], SamplingParams(max_tokens=40, stop=stop, **SAMPLED)))
    assert "".join(event.text or "" for event in events) == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop"

    (output,) = crowded.generate([TOKENS[:90]], SamplingParams(max_tokens=100, ignore_eos=True, **SAMPLED))
    assert (len(output.token_ids), output.finish_reason) == (POSITIONS - 90, "length")
    full = [(TOKENS * 2)[:POSITIONS]]
    assert [sample.token_ids for sample in crowded.generate(full, SamplingParams(**SAMPLED))] == [[]]


def test_each_event_has_the_tokens_of_one_block(crowded: LLM) -> None:
    events = list(crowded.stream([PROMPTS[2]], SamplingParams(max_tokens=40, denoising_steps=4, **SAMPLED)))
    assert [len(event.token_ids) for event in events if event.token_ids] == [1, 32, 7]
    (whole,) = crowded.generate([PROMPTS[2]], SamplingParams(max_tokens=40, denoising_steps=4, **SAMPLED))
    assert [token for event in events for token in event.token_ids] == whole.token_ids


def test_samples_depend_only_on_the_seed(crowded: LLM) -> None:
    """Neighbours, token shard and preemption have no effect."""
    params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=40, top_k=9) for seed in (1, 2)] * 4
    together = [output.token_ids for output in crowded.generate([PROMPTS[5]] * 8, params)]
    apart = [crowded.generate([PROMPTS[5]], one)[0].token_ids for one in params[:2]]
    assert together == apart * 4
    assert apart[0] != apart[1]
    assert all(MASK not in tokens for tokens in apart)
    (hot,) = crowded.generate([PROMPTS[5]], SamplingParams(temperature=1e3, seed=1, max_tokens=40))
    assert len(set(hot.token_ids)) > 15, "each position has its own random number"


def test_a_cancelled_request_frees_its_pages(crowded: LLM) -> None:
    events = crowded.stream(PROMPTS[:4], SamplingParams(max_tokens=60, **SAMPLED))
    next(events)
    del events
    with crowded.engine_loop.paused() as engine:
        assert engine.stats.cache_use == 0
        while engine.has_work:
            engine.step()


def test_explain_counts_all_rows_of_blocks(crowded: LLM) -> None:
    assert crowded.explain(6).rows == 6 * BLOCK


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SamplingParams(repetition_penalty=1.1), "repetition_penalty is not supported by models that decode blocks"),
        (SamplingParams(presence_penalty=0.1), "any order"),
        (SamplingParams(frequency_penalty=0.1), "any order"),
        (SamplingParams(min_tokens=1), "any order"),
        (SamplingParams(logprobs=1), "only the tokens chosen"),
        (SamplingParams(prompt_logprobs=0), "where it is masked"),
        (SamplingParams(denoising_steps=33), "at most 32"),
    ],
)
def test_parameters_without_meaning_for_blocks_are_refused(crowded: LLM, params: SamplingParams, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        crowded.generate([[1]], params)


@pytest.mark.parametrize("params", [{"denoising_steps": 1}, {"confidence_threshold": 0.5}])
def test_parameters_of_blocks_are_refused_for_other_models(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="for models that decode blocks"):
        SamplingParams(**params).check(10, ())
