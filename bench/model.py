"""The model that a script runs: that of a config.json, or of some sizes; its weights are random either way."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bench import script
from moe_jax.checkpoints import Checkpoint
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, QKNorm, RopeConfig, RouterConfig
from moe_jax.models import ShardedDecoder
from moe_jax.models.sharded import DTYPES
from moe_jax.sharding import Placement


def options(parser: ArgumentParser, **sizes: int) -> ArgumentParser:
    """The same parser, with the options that say which model; `sizes` are the defaults: layers, hidden, experts,
    width, that of an expert, and, if not 8, attention heads."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--model", type=Path, metavar="DIR", help="its config.json instead of the sizes below")
    for name, default in ({"heads": 8} | sizes).items():
        parser.add_argument(f"--{name}", type=script.positive, default=default, help="of the synthetic model")
    return parser


def decoder(options: Namespace, placement: Placement) -> ShardedDecoder:
    return ShardedDecoder(_config(options), placement, options.dtype)


def _config(options: Namespace) -> ModelConfig:
    if options.model:
        return Checkpoint(options.model).config
    attention = AttentionConfig(
        heads=options.heads, kv_heads=options.heads, head_dim=32, rope=RopeConfig(1e4), qk_norm=QKNorm.HEAD
    )
    experts = MoEConfig(options.experts, min(4, options.experts), options.width, router=RouterConfig(norm=1))
    layers = (LayerConfig(attention, experts),) * options.layers
    return ModelConfig(1024, options.hidden, layers, 1e-6, 2**20)
