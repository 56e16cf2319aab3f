"""Requests of a model with recurrent layers keep their states to themselves, in whatever pieces they are computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import LLM, SamplingParams
from moe_jax.analysis.roofline import held_bytes, roofline
from moe_jax.checkpoints import Checkpoint
from moe_jax.engine import Options
from moe_jax.errors import RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE
from moe_jax.sharding import Placement, as_hardware

GOLDEN = Path(__file__).parents[1] / "goldens" / "qwen3_next_e8_top2"
POSITIONS, PAGES = 128, 9
"""Of a sequence; and on each token shard, one more than the longest sequence needs."""

BEGINNING = np.random.default_rng(0).integers(0, 48, 100).tolist()
PROMPTS = [BEGINNING[:length] for length in (61, 100, 62, 1, 15)] + [[7], [*BEGINNING[:60], 1, 2], BEGINNING[3:90]]
PARAMS = [SamplingParams(temperature=0, max_tokens=tokens) for tokens in (24, 3, 20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden, for sequences long enough to be several lines."""
    path = tmp_path_factory.mktemp("recurrent") / "model"
    shutil.copytree(GOLDEN, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return path


def test_a_crowd_is_as_each_alone(checkpoint: Path) -> None:
    """Prompts of several lines and several steps, beside others that decode; slots taken over; pages for less than two
    of the longest, so that requests are preempted and computed anew; lines that end within a dispatch."""
    crowded = LLM(
        checkpoint, mesh="data=2,tensor=2", dtype="float32", max_batch_size=4, prefill_tokens=32, decode_steps=4,
        cache_pages=PAGES,
    )  # fmt: skip
    lonely = LLM(checkpoint, mesh="data=1", dtype="float32", max_batch_size=1, prefill_tokens=32, decode_steps=1)
    prompts = PROMPTS * 3
    params = [PARAMS[number % len(PARAMS)] for number in range(len(prompts))]
    outputs = [output.token_ids for output in crowded.generate(prompts, params)]
    assert outputs == [output.token_ids for output in lonely.generate(prompts, params)]
    stats = crowded.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits == 0, "pages hold no states"


def test_a_model_may_have_no_other_layers(tmp_path: Path) -> None:
    """Then positions are counted in pages that hold nothing."""
    other = GOLDEN.parent / "qwen3_5_moe_text_e4_top3"
    config = json.loads((other / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    held = {
        name.replace("layers.1.", "layers.0."): tensor
        for name, tensor in load_file(other / "model.safetensors").items()
        if "layers.0." not in name
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(held, tmp_path / "model.safetensors")
    llm = LLM(tmp_path, mesh="data=2", dtype="float32", max_batch_size=4, prefill_tokens=32, decode_steps=4)
    prompts = [[1, 2, 3], [4] * 40, [5]]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    together = [output.token_ids for output in llm.generate(prompts, greedy)]
    assert together == [llm.generate([prompt], greedy)[0].token_ids for prompt in prompts]
    for prompt, tokens in zip(prompts, together, strict=True):
        (logits,) = llm.logits([prompt + tokens[:-1]])
        assert logits[len(prompt) - 1 :].argmax(axis=-1).tolist() == tokens


def planned(checkpoint: Path) -> tuple[ShardedDecoder, int]:
    """A decoder, and the bytes of the states of a sequence on each device."""
    decoder = ShardedDecoder(Checkpoint(checkpoint).config, Placement.parse("data=2,tensor=2"), "bfloat16")
    layers, heads, key_heads, keys, values, seen = 3, 4, 2, 6, 4, 3  # of each device
    state, recent = heads * keys * values * 4, seen * (2 * key_heads * keys + heads * values) * 2
    return decoder, layers * (state + recent)


def test_a_plan_counts_the_states(checkpoint: Path) -> None:
    decoder, states = planned(checkpoint)
    sizes = [held_bytes(decoder.abstract_caches({None: 0}, PAGE, slots)) for slots in (0, 1, 5)]
    assert sizes == [slots * states for slots in (0, 1, 5)]
    pages = held_bytes(decoder.abstract_caches({None: 5 * POSITIONS // PAGE}, PAGE, 0))
    emitted = roofline(decoder, as_hardware("h100"), rows=8, slots=5, positions=POSITIONS, collective_seconds=0)
    assert emitted.cache_bytes == pages + sizes[-1]


def test_pages_share_the_memory_that_weights_and_states_leave(checkpoint: Path) -> None:
    decoder, states = planned(checkpoint)
    options = Options(max_length=POSITIONS, max_batch_size=10, cache_memory=0.5)
    sizes = options.sizes(decoder)
    assert sizes.slots == 5
    assert options.pages(decoder, decoder.policy(as_hardware("h100"), "auto", "auto", "exact"), sizes) == {
        None: 5 * POSITIONS // PAGE
    }
    page = 2 * PAGE * 2 * 8 * 2  # keys and values, positions, heads of each device, their width, bytes

    def pages(room: float, devices: int = 1) -> int:
        """Those of each token shard where so many bytes beside the weights may hold caches."""
        memory = devices * (held_bytes(decoder.parameters) + room / 0.5)
        hardware = replace(as_hardware("h100"), memory=memory, shared=devices > 1)
        return options.pages(decoder, decoder.policy(hardware, "auto", "auto", "exact"), sizes)[None]

    for wanted in (8, 9, 20):
        assert pages(5 * states + (wanted + 0.5) * page) == wanted
    assert pages(5 * states + 20.5 * page, devices=4) == 20, "a host's memory, which all its devices share"
    for room, fitting in ((5 * states + 7.5 * page, 7), (5 * states, 0), (4 * states, 0)):
        with pytest.raises(RequestError, match=rf"there is room for {fitting} pages .* a sequence of 128 .* needs 8"):
            pages(room)
