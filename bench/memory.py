"""Memory of `moe-jax generate` with default settings, in a process of its own, on one device and on a mesh.

    weights, cache   GiB that all devices hold, as `moe-jax plan` reports them
    peak             GiB of the process at its largest
    beyond           peak without weights: cache, temporary arrays, Python and JAX
    plan             GiB of the process as `moe-jax plan` estimates them, over the peak
    compile          seconds of compilation, and programs compiled

The script makes the checkpoint, of 373 million parameters, with random weights.

python -m bench.memory [--quick]; --help lists the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench import script

QUICK = {"layers": 2, "hidden": 64, "width": 128, "vocabulary": 512, "positions": 256}
PROMPT, TOKENS = [100, 7, 30, 2, 55], 16
MESHES = {1: "data=1", 8: "data=2,expert=4"}
EXPERTS, HEAD_DIM, KV_HEADS = 4, 64, 3
GIB = 2**30


def config(options: Namespace) -> dict[str, Any]:
    """Config of a model in Mixtral's layout."""
    return {
        "model_type": "mixtral", "vocab_size": options.vocabulary, "hidden_size": options.hidden,
        "intermediate_size": options.width, "num_hidden_layers": options.layers,
        "num_attention_heads": 3 * KV_HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": options.positions,
        "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip


def shapes(options: Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the tensors."""
    hidden, width, heads, kv = options.hidden, options.width, 3 * KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (options.vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(options.layers):
        start = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}{norm}.weight", (hidden,)
        for name, outputs in (("q", heads), ("k", kv), ("v", kv)):
            yield f"{start}self_attn.{name}_proj.weight", (outputs, hidden)
        yield f"{start}self_attn.o_proj.weight", (hidden, heads)
        yield f"{start}block_sparse_moe.gate.weight", (EXPERTS, hidden)
        for expert in range(EXPERTS):
            for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden))):
                yield f"{start}block_sparse_moe.experts.{expert}.{name}.weight", shape


def make_checkpoint(path: Path, options: Namespace) -> None:
    """Write a checkpoint with random weights."""
    random = np.random.default_rng(0)
    tensors = {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes(options)}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config(options)))


GENERATE = """
import json, resource, sys, time
import jax
jax.config.update("jax_num_cpu_devices", {devices})
from moe_jax import LLM, SamplingParams
llm, params, seconds = LLM({model!r}, mesh={mesh!r}), SamplingParams(temperature=0, max_tokens={tokens}), []
for _ in range(2):
    began, before = time.perf_counter(), llm.stats().compile_seconds
    llm.generate([{prompt}], params)
    seconds.append((time.perf_counter() - began, llm.stats().compile_seconds - before))
stats = llm.stats()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({{"peak": peak, "weights": stats.weight_bytes, "cache": stats.cache_bytes,
    "answers": seconds, "compilations": stats.compilations, "compile_seconds": stats.compile_seconds}}))
"""


def measure(path: Path, devices: int) -> dict[str, Any]:
    """Generate in a process of its own, plan in another, and return the bytes of both on all devices."""
    mesh = MESHES[devices]
    program = GENERATE.format(devices=devices, model=str(path), mesh=mesh, tokens=TOKENS, prompt=PROMPT)
    generated = _json_of([sys.executable, "-c", program])
    command = ["plan", "--model", str(path), "--mesh", mesh, "--rows", "1", "--json"]
    plan = _json_of([sys.executable, "-m", "moe_jax", "--cpu-devices", str(devices), *command])
    return generated | {
        "devices": devices,
        "weights": devices * generated["weights"],
        "cache": devices * generated["cache"],
        "plan": plan["process_bytes"] / generated["peak"],
    }


def _json_of(command: list[str]) -> dict[str, Any]:
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = script.parser("memory", "Memory of moe-jax generate with default settings.", repeats=1)
    sizes = {"layers": 30, "hidden": 576, "width": 1536, "vocabulary": 49152, "positions": 8192}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=script.positive, default=default)
    options, placement = script.begin(parser, QUICK)
    columns = ("devices", "weights", "cache", "peak", "beyond", "plan", "first s", "again s", "compile s", "programs")
    table, results = script.Table(dict.fromkeys(columns, ">9")), []
    with TemporaryDirectory() as directory:
        make_checkpoint(Path(directory), options)
        for devices in MESHES:
            results.append(found := measure(Path(directory), devices))
            sizes_gib = [found["weights"], found["cache"], found["peak"], found["peak"] - found["weights"]]
            (first, _), (again, _) = found["answers"]
            times = (f"{first:.1f}", f"{again:.1f}", f"{found['compile_seconds']:.1f}", found["compilations"])
            table.row(devices, *(f"{size / GIB:.2f}" for size in sizes_gib), f"{found['plan']:.2f}", *times)
    script.finish("memory", options, placement, {"results": results}, lambda axes: draw(axes, results))


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    labels, bottom = [f"{result['devices']} devices" for result in results], np.zeros(len(results))
    for part in ("weights", "cache"):
        height = np.array([result[part] / GIB for result in results])
        axes.bar(labels, height, bottom=bottom, label=part)
        bottom += height
    axes.plot(labels, [result["peak"] / GIB for result in results], "k_", markersize=40, label="peak of the process")
    axes.set_ylabel("GiB")


if __name__ == "__main__":
    script.run(main)
