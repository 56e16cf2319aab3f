"""Requests of a model with recurrent layers have separate states, however their prompts are cut into chunks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax import LLM, SamplingParams
from moe_jax.analysis.roofline import held_bytes, roofline
from moe_jax.checkpoints import Checkpoint
from moe_jax.engine import Options, plan_cache
from moe_jax.errors import RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE
from moe_jax.sharding import Placement, as_hardware

GOLDEN = Path(__file__).parents[1] / "goldens" / "qwen3_next_e8_top2"
POSITIONS, PAGES = 128, 9
"""Maximum positions of a sequence; pages of a token shard, one more than the longest sequence needs."""

TOKENS = np.random.default_rng(0).integers(0, 48, 100).tolist()
PROMPTS = [TOKENS[:length] for length in (61, 100, 62, 1, 15)] + [[7], [*TOKENS[:60], 1, 2], TOKENS[3:90]]
PARAMS = [SamplingParams(temperature=0, max_tokens=tokens) for tokens in (24, 3, 20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, with sequences long enough for several segments."""
    path = tmp_path_factory.mktemp("recurrent") / "model"
    shutil.copytree(GOLDEN, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": POSITIONS}))
    return path


def test_a_batch_has_the_tokens_of_each_request_alone(checkpoint: Path) -> None:
    """Prompts take several segments and several steps while other requests decode. Slots are reused, requests are
    preempted and recomputed, and requests end within a dispatch."""
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
    assert stats.prefix_hits == 0, "pages hold no recurrent states"


def test_a_model_can_have_only_recurrent_layers(tmp_path: Path) -> None:
    """Its cache pages are empty, but still count positions."""
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


def decoder_and_state_bytes(checkpoint: Path) -> tuple[ShardedDecoder, int]:
    """Return a decoder, and the bytes of the states of one sequence on each device."""
    decoder = ShardedDecoder(Checkpoint(checkpoint).config, Placement.parse("data=2,tensor=2"), "bfloat16")
    layers, heads, key_heads, keys, values, seen = 3, 4, 2, 6, 4, 3  # of each device
    state, recent = heads * keys * values * 4, seen * (2 * key_heads * keys + heads * values) * 2
    return decoder, layers * (state + recent)


def test_recurrent_states_are_counted_in_the_memory_plan(checkpoint: Path) -> None:
    decoder, states = decoder_and_state_bytes(checkpoint)
    sizes = [held_bytes(decoder.abstract_caches({None: 0}, PAGE, slots)) for slots in (0, 1, 5)]
    assert sizes == [slots * states for slots in (0, 1, 5)]
    pages = held_bytes(decoder.abstract_caches({None: 5 * POSITIONS // PAGE}, PAGE, 0))
    estimate = roofline(decoder, as_hardware("h100"), rows=8, slots=5, positions=POSITIONS, collective_seconds=0)
    assert estimate.cache_bytes == pages + sizes[-1]


def test_pages_fill_the_memory_left_by_weights_and_states(checkpoint: Path) -> None:
    decoder, states = decoder_and_state_bytes(checkpoint)
    options = Options(max_length=POSITIONS, max_batch_size=10, cache_memory=0.5)
    plan = plan_cache(options, decoder, 80e9)
    assert plan.sizes.slots == 5
    assert plan.pages == {None: 5 * POSITIONS // PAGE}
    page = 2 * PAGE * 2 * 8 * 2  # keys and values, positions, heads of each device, their width, bytes

    def pages(room: float) -> int:
        """Return the pages of each token shard if `room` bytes are left for caches after the weights."""
        return plan_cache(options, decoder, held_bytes(decoder.parameters) + room / 0.5).pages[None]

    for wanted in (8, 9, 20):
        assert pages(5 * states + (wanted + 0.5) * page) == wanted
    for room, fitting in ((5 * states + 7.5 * page, 7), (5 * states, 0), (4 * states, 0)):
        with pytest.raises(RequestError, match=rf"there is room for {fitting} pages .* a sequence of 128 .* needs 8"):
            pages(room)
