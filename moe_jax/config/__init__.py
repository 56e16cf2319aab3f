"""Model configurations: frozen dataclasses, validated when they are created. This package does not import jax.

A checkpoint family (`moe_jax.checkpoints.families`) turns a Hugging Face `config.json` into a `ModelConfig`. All other
modules read only these dataclasses and know no family by name.
"""

from moe_jax.config.attention import (
    AttentionConfig,
    LatentAttentionConfig,
    OutputGate,
    QKNorm,
    QueryScalingConfig,
    Window,
)
from moe_jax.config.decoding import BlockDiffusion
from moe_jax.config.feed_forward import (
    Activation,
    ClampedSwiGLUConfig,
    DenseConfig,
    GroupLimit,
    GroupScore,
    LimitedSwiGLUConfig,
    MoEConfig,
    RouterConfig,
    Score,
    SharedExpertConfig,
    SparseMixerConfig,
    SwiGLUConfig,
    Weighted,
)
from moe_jax.config.model import VOCAB_MULTIPLE, LayerConfig, ModelConfig, Norm
from moe_jax.config.recurrent import DecayConfig, DeltaConfig, HeadGate, LightningConfig, MambaConfig, RecurrentConfig
from moe_jax.config.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from moe_jax.config.weights import Quantization, WeightDtype, as_weight_dtype

__all__ = [
    "VOCAB_MULTIPLE",
    "Activation",
    "AttentionConfig",
    "BlockDiffusion",
    "ClampedSwiGLUConfig",
    "DecayConfig",
    "DeltaConfig",
    "DenseConfig",
    "GroupLimit",
    "GroupScore",
    "HeadGate",
    "LatentAttentionConfig",
    "LayerConfig",
    "LightningConfig",
    "LimitedSwiGLUConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MambaConfig",
    "MoEConfig",
    "ModelConfig",
    "NTKScaling",
    "Norm",
    "OutputGate",
    "QKNorm",
    "Quantization",
    "QueryScalingConfig",
    "RecurrentConfig",
    "RopeConfig",
    "RopeScaling",
    "RouterConfig",
    "Score",
    "SharedExpertConfig",
    "SparseMixerConfig",
    "SwiGLUConfig",
    "WeightDtype",
    "Weighted",
    "Window",
    "YarnScaling",
    "as_weight_dtype",
]
