"""Model of a script: from a config.json or from sizes, with random weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from bench import script
from moe_jax.checkpoints import Checkpoint
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, QKNorm, RopeConfig, RouterConfig
from moe_jax.models import ShardedDecoder
from moe_jax.models.sharded import DTYPES
from moe_jax.sharding import Placement

SIZES = {
    "heads": "attention heads",
    "layers": "layers",
    "hidden": "hidden size",
    "experts": "experts",
    "width": "intermediate size of each expert",
}


def options(parser: ArgumentParser, **sizes: int) -> ArgumentParser:
    """Add the options of the model to the parser and return it.

    Args:
      sizes: Defaults of `layers`, `hidden`, `experts`, `width` (of each expert) and, if not 8, `heads` (of attention).
    """
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="directory of a config.json to use instead of the sizes below"
    )
    for name, default in ({"heads": 8} | sizes).items():
        parser.add_argument(
            f"--{name}", type=script.positive, default=default, help=f"{SIZES[name]} of the synthetic model"
        )
    return parser


def decoder(options: Namespace, placement: Placement) -> ShardedDecoder:
    """Make the decoder that the options describe."""
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
