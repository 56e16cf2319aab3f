"""Compile time of a decode step against depth: Qwen3-30B-A3B's layers, 4 or 48 of them, on eight devices; no weights.

python -m bench.compile_time [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax

from bench.timing import machine
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import Placement, Route, ScatterCombine

LAYER = LayerConfig(
    AttentionConfig(heads=32, kv_heads=4, head_dim=128, rope_theta=1e6, qk_norm=True),
    MoEConfig(experts=128, top_k=8, width=768, renormalise=True),
)
SHALLOW, DEEP = 4, 48
SLOTS, POSITIONS = 64, 2048


def seconds(layers: int) -> float:
    placement = Placement.parse("expert=8")
    config = ModelConfig(151936, 2048, (LAYER,) * layers, 1e-6, 40960)
    began = time.perf_counter()
    Programs(ShardedDecoder(config, placement, "bfloat16")).decode_step(
        SLOTS, POSITIONS, SLOTS, Route.whole(ScatterCombine(placement))
    )
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    jax.config.update("jax_num_cpu_devices", 8)

    seconds(SHALLOW)  # imports and caches that any first program pays for
    pairs = [(seconds(SHALLOW), seconds(DEEP)) for _ in range(repeats)]
    shallow, deep = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{SHALLOW} layers {shallow:.2f} s, {DEEP} layers {deep:.2f} s: ratio {deep / shallow:.2f}")
    print(
        json.dumps(
            {"bench": "compile_time", **machine(), "shallow_s": shallow, "deep_s": deep, "ratio": deep / shallow}
        )
    )


if __name__ == "__main__":
    main()
