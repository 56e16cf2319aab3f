"""Recurrent layers: linear attention and state-space models, with a state of fixed size for each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.config.rope import RopeConfig, check_rotated
from moe_jax.errors import ConfigError

StateShape = tuple[int, ...]
"""Shape of the recurrent state of one sequence, heads or channels first."""


class HeadGate(Enum):
    """Activation of the output gate: it multiplies the normalized output of each head."""

    SILU = auto()
    SIGMOID = auto()


@dataclass(frozen=True)
class DecayConfig:
    """Decay of the state from one position to the next, computed from a projection of the row."""

    each_channel: bool
    """True if each key channel has its own decay; False for one decay for each head."""
    floor: float | None = None
    """`kda_lower_bound`: lower bound on the log decay, by a sigmoid; `None` for no bound, by a softplus."""

    def __post_init__(self) -> None:
        if self.floor is not None and not -1e3 < self.floor < 0:
            raise ConfigError(
                f"DecayConfig.floor must be the logarithm of a decay, between -1000 and 0, got {self.floor}"
            )


@dataclass(frozen=True)
class DeltaConfig:
    """Gated delta rule: linear attention with a matrix state for each head (Yang et al., arXiv:2412.06464).

    The state decays at each position, then the position replaces the value stored under its key. With a decay for each
    channel it is Kimi delta attention (Kimi Linear, arXiv:2510.26692).
    """

    heads: int
    """`linear_num_value_heads`: number of value heads, and of states."""
    key_heads: int
    """`linear_num_key_heads`: number of query and key heads; `heads / key_heads` neighbouring value heads share one."""
    key_head_dim: int
    """`linear_key_head_dim`: width of each query and key head."""
    value_head_dim: int
    """`linear_value_head_dim`: width of each value head."""
    conv_kernel: int
    """`linear_conv_kernel_dim`: kernel size of the short convolutions, in positions."""
    decay: DecayConfig
    """Decay of the state."""
    gate: HeadGate
    """Activation of the output gate."""

    def __post_init__(self) -> None:
        check_positive(self, "heads", "key_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        if self.heads % self.key_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.key_heads} key heads evenly")

    @property
    def state_shape(self) -> StateShape:
        """Shape of the state of a sequence, heads first."""
        return self.heads, self.key_head_dim, self.value_head_dim

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """Shapes of the convolution states of queries, keys and values, heads first."""
        keys = self.key_heads, self.conv_kernel - 1, self.key_head_dim
        return keys, keys, (self.heads, self.conv_kernel - 1, self.value_head_dim)


@dataclass(frozen=True)
class MambaConfig:
    """Mamba: a selective state-space layer with a vector state for each channel (Gu and Dao, arXiv:2312.00752).

    dt, B and C are RMS-normalized, as in Jamba (arXiv:2403.19887).
    """

    channels: int
    """`mamba_expand * hidden_size`: number of channels."""
    d_state: int
    """`mamba_d_state`: width of the state of each channel."""
    dt_rank: int
    """`mamba_dt_rank`: rank of the projection to dt, the step size of each channel."""
    d_conv: int
    """`mamba_d_conv`: kernel size of the short convolution, in positions."""
    convolution_bias: bool = True
    """`mamba_conv_bias`: True if the convolution adds a bias."""
    bias: bool = False
    """`mamba_proj_bias`: True if the input and output projections add a bias."""

    def __post_init__(self) -> None:
        check_positive(self, "channels", "d_state", "dt_rank", "d_conv")

    @property
    def state_shape(self) -> StateShape:
        """Shape of the state of a sequence, channels first."""
        return self.channels, self.d_state

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """Shape of the convolution state, channels first."""
        return ((self.channels, self.d_conv - 1),)


@dataclass(frozen=True)
class LightningConfig:
    """Lightning attention: linear attention with a fixed decay for each head (Lightning Attention-2, arXiv:2401.04658).

    Layer n multiplies the decay rates of its heads by `scale - scale_decrement * n`.
    """

    heads: int
    """`num_attention_heads`: number of heads."""
    head_dim: int
    """`head_dim`: width of each head."""
    rope: RopeConfig | None
    """`rope_parameters`: rotary embedding; `None` for no position embedding."""
    qk_norm: bool
    """`use_qk_norm`: True if each query and key head is RMS-normalized."""
    norm_groups: int
    """`group_norm_size`: number of groups of neighbouring heads whose outputs are normalized together."""
    scale: float
    """Factor on the decay rates in layer 0."""
    scale_decrement: float
    """Decrease of the factor from one layer to the next."""

    def __post_init__(self) -> None:
        check_positive(self, "heads", "head_dim", "norm_groups", "scale")
        if self.heads % self.norm_groups:
            raise ConfigError(f"{self.heads} heads do not make {self.norm_groups} groups of one size")
        if self.rope is not None:
            check_rotated(self.rope, self.head_dim)

    @property
    def state_shape(self) -> StateShape:
        """Shape of the state of a sequence, heads first."""
        return self.heads, self.head_dim, self.head_dim

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """No convolution states: the layer has no convolutions."""
        return ()


RecurrentConfig = DeltaConfig | MambaConfig | LightningConfig
"""Configuration of a recurrent layer."""
