"""Throughput of moe_jax against transformers on the same checkpoint, prompts and lengths, and against machine limits.

    decode     tokens/s after the first token: time of a whole generation minus that of one token
    prefill    prompt tokens/s of a generation of one token
    memory     share of the measured bandwidth that a decode step uses, if it reads each weight that it needs once
    compute    share of the measured float32 FLOP/s that a prefill uses, counting multiplications with weights

The script makes the checkpoint, with random weights. Run by `python -m bench.decode --against transformers`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench import script
from bench.timing import Program, interleaved
from moe_jax import LLM, SamplingParams
from moe_jax.sharding import Placement

Prompts = list[list[int]]
Generate = Callable[[int], np.ndarray]
"""Function from a number of tokens to generated token ids `[sequences, tokens]`."""


@dataclass(frozen=True)
class Workload:
    """Sizes of the checkpoint, and numbers of prompt tokens and generated tokens of a sequence."""

    vocabulary: int = 8192
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    width: int = 256
    prompt: int = 64
    tokens: int = 65

    @property
    def shared_weights(self) -> int:
        """Number of weights that every row uses."""
        heads = 2 * self.heads + 2 * self.kv_heads
        return self.layers * self.hidden * (heads * self.head_dim + self.experts) + self.hidden * self.vocabulary

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert in all layers."""
        return self.layers * 3 * self.hidden * self.width

    def step_bytes(self, sequences: int) -> float:
        """Expected bytes of the weights that a decode step uses, with random experts."""
        used = self.experts * (1 - (1 - self.top_k / self.experts) ** sequences)
        return 4 * (self.shared_weights + used * self.expert_weights)

    def prompt_flops(self, sequences: int) -> float:
        """FLOPs of prefill; only the last row of a prompt goes through the LM head."""
        head = self.hidden * self.vocabulary
        per_token = self.shared_weights - head + self.top_k * self.expert_weights
        return 2 * sequences * (self.prompt * per_token + head)


COLUMNS = {
    "sequences": ">9",
    "": "<12",
    "decode tokens/s": ">15",
    "memory": ">7",
    "prefill tokens/s": ">16",
    "compute": ">7",
}
QUICK = Workload(256, 64, 2, 4, 2, 16, 8, 2, 32, 8, 5)


def main(options: Namespace, placement: Placement) -> dict[str, Any] | None:
    """Print a table of results and return them. Print why and return `None` if transformers is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"not compared: {error}; run pip install '.[compare]'", file=sys.stderr)
        return None
    workload, random = QUICK if options.quick else Workload(), np.random.default_rng(0)
    limits = measured_limits(options)
    gigabytes, gigaflops = (limits[name] / 1e9 for name in ("bytes_per_second", "flops_per_second"))
    print(f"measured limits of this machine: {gigabytes:.1f} GB/s, {gigaflops:.0f} GFLOP/s in float32")
    table = script.Table(COLUMNS)
    with TemporaryDirectory() as directory:
        theirs = random_model(workload, Path(directory), transformers, torch)
        results = []
        for sequences in options.batches:
            prompts = random.integers(workload.vocabulary, size=(sequences, workload.prompt)).tolist()
            ours = moe_jax_generate(directory, workload, prompts, placement)
            results.append(
                compare(workload, sequences, ours, transformers_generate(theirs, prompts, torch), options, limits)
            )
            show(table, results[-1])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"against": versions, "limits": limits, "results": results}


def random_model(workload: Workload, directory: Path, transformers: Any, torch: Any) -> Any:
    """Make a Qwen3-MoE with random weights, and write it to the directory."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        head_dim=workload.head_dim,
        num_experts=workload.experts,
        num_experts_per_tok=workload.top_k,
        moe_intermediate_size=workload.width,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def moe_jax_generate(directory: str, workload: Workload, prompts: Prompts, placement: Placement) -> Generate:
    """Generate with moe_jax."""
    sequences, length = len(prompts), workload.prompt + workload.tokens
    llm = LLM(
        directory,
        mesh=placement,
        max_length=length,
        max_batch_size=sequences,
        prefill_tokens=sequences * workload.prompt,
        decode_steps=16,
        prefix_cache=False,
    )

    def generate(tokens: int) -> np.ndarray:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return np.array([output.token_ids for output in llm.generate(prompts, params)])

    return generate


def transformers_generate(model: Any, prompts: Prompts, torch: Any) -> Generate:
    """Generate with transformers."""
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)

    def generate(tokens: int) -> np.ndarray:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        return out[:, ids.shape[1] :].numpy()

    return generate


def compare(
    workload: Workload,
    sequences: int,
    ours: Generate,
    theirs: Generate,
    options: Namespace,
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """Time both programs for one batch size."""
    both = {"moe_jax": ours, "transformers": theirs}
    first, second = (generate(workload.tokens) for generate in both.values())
    calls = {
        f"{name}, {tokens} tokens": partial(generate, tokens)
        for tokens in (1, workload.tokens)
        for name, generate in both.items()
    }
    times = interleaved(calls, options.repeats)
    speeds = {}
    for name in both:
        prefill, whole = (times[f"{name}, {tokens} tokens"].median for tokens in (1, workload.tokens))
        step = (whole - prefill) / (workload.tokens - 1)
        speeds[name] = {
            "decode": sequences / step,
            "prefill": sequences * workload.prompt / prefill,
            "memory": workload.step_bytes(sequences) / step / limits["bytes_per_second"],
            "compute": workload.prompt_flops(sequences) / prefill / limits["flops_per_second"],
        }
    return {
        "sequences": sequences,
        "speeds": speeds,
        "times": {name: speeds["moe_jax"][name] / speeds["transformers"][name] for name in ("decode", "prefill")},
        "different_tokens": int(np.sum(first != second)),
        "tokens": int(first.size),
    }


def measured_limits(options: Namespace) -> dict[str, float]:
    """Measure bandwidth (the best of read, copy and triad on large arrays) and FLOP/s (a square matmul)."""
    count, side = (2**16, 64) if options.quick else (2**26, 2048)
    x, square = jnp.ones(count, jnp.float32), jnp.ones((side, side), jnp.float32)
    programs = {
        "read": Program.of(jnp.sum, x),
        "copy": Program.of(lambda x: -x, x),
        "triad": Program.of(lambda x, y: x + 2 * y, x, -x),
        "matmul": Program.of(jnp.matmul, square, square),
    }
    times = {name: time.median for name, time in interleaved(programs, options.repeats).items()}
    moved = {"read": 1, "copy": 2, "triad": 3}
    best = max(arrays * x.nbytes / times[name] for name, arrays in moved.items())
    return {"bytes_per_second": best, "flops_per_second": 2 * side**3 / times["matmul"]}


def show(table: script.Table, result: Mapping[str, Any]) -> None:
    """Print a row for each program, and the comparison."""
    for name, speed in result["speeds"].items():
        figures = f"{speed['decode']:.0f}", f"{speed['memory']:.0%}", f"{speed['prefill']:.0f}"
        table.row(result["sequences"], name, *figures, f"{speed['compute']:.0%}")
    decode, prefill = result["times"]["decode"], result["times"]["prefill"]
    same = result["tokens"] - result["different_tokens"]
    print(f"          moe_jax decodes at {decode:.2f} and prefills at {prefill:.2f} times the speed of transformers")
    print(f"          the same greedy tokens: {same} of {result['tokens']}", flush=True)


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    """Draw decode tokens/s."""
    at, width = np.arange(len(results)), 0.4
    for index, name in enumerate(("moe_jax", "transformers")):
        axes.bar(
            at + (index - 0.5) * width, [result["speeds"][name]["decode"] for result in results], width, label=name
        )
    axes.set_xticks(at, [f"batch {result['sequences']}" for result in results])
    axes.set_ylabel("decode tokens/s")
