"""Layers that keep a state of fixed size instead of keys and values of every position, as choices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.config.rope import RopeConfig, check_rotated
from moe_jax.errors import ConfigError

StateShape = tuple[int, ...]


class HeadGate(Enum):
    """What of a projection of the row multiplies each head's normalised output."""

    SILU = auto()
    SIGMOID = auto()


@dataclass(frozen=True)
class DecayConfig:
    """How much of its state a head keeps from one position to the next, as a projection of the row says."""

    each_channel: bool
    """Whether each number of a key decays by itself, not whole heads."""
    floor: float | None = None
    """The logarithm lies between this and 0, by a sigmoid; `None`: anywhere below 0, by a softplus."""

    def __post_init__(self) -> None:
        if self.floor is not None and not -1e3 < self.floor < 0:
            raise ConfigError(f"DecayConfig.floor is the logarithm of a decay, below 0, got {self.floor}")


@dataclass(frozen=True)
class DeltaConfig:
    """Attention by the gated delta rule: a matrix for each head, which decays, and in which each position replaces what
    its key finds (Yang et al., arXiv:2412.06464; with decays for each channel, Kimi Linear, arXiv:2510.26692)."""

    heads: int
    """Of values and states."""
    key_heads: int
    """Of queries and keys; each serves `heads / key_heads` neighbouring ones."""
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    """Positions that the short convolutions see, their own included."""
    decay: DecayConfig
    gate: HeadGate

    def __post_init__(self) -> None:
        check_positive(self, "heads", "key_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        if self.heads % self.key_heads:
            raise ConfigError(f"{self.heads} heads cannot share {self.key_heads} key heads evenly")

    @property
    def state_shape(self) -> StateShape:
        """What is remembered of a sequence, heads first."""
        return self.heads, self.key_head_dim, self.value_head_dim

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """The last inputs of each convolution: of queries, keys and values, heads first."""
        keys = self.key_heads, self.conv_kernel - 1, self.key_head_dim
        return keys, keys, (self.heads, self.conv_kernel - 1, self.value_head_dim)


@dataclass(frozen=True)
class MambaConfig:
    """A selective state space (Gu and Dao, arXiv:2312.00752), what selects being normalised (Jamba, arXiv:2403.19887):
    a vector for each channel, of which each number decays at its own rate."""

    channels: int
    d_state: int
    """Of the state of a channel."""
    dt_rank: int
    """Of the projection to the steps that channels take."""
    d_conv: int
    """Positions that the short convolution sees, their own included."""
    convolution_bias: bool = True
    bias: bool = False
    """Whether the projections of rows to channels and back add biases."""

    def __post_init__(self) -> None:
        check_positive(self, "channels", "d_state", "dt_rank", "d_conv")

    @property
    def state_shape(self) -> StateShape:
        """What is remembered of a sequence, channels first."""
        return self.channels, self.d_state

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """The last inputs of the convolution, channels first."""
        return ((self.channels, self.d_conv - 1),)


@dataclass(frozen=True)
class LightningConfig:
    """Linear attention whose heads decay by themselves, each at a rate of its own (Lightning Attention-2,
    arXiv:2401.04658), the rates falling from layer to layer."""

    heads: int
    head_dim: int
    rope: RopeConfig | None
    qk_norm: bool
    """Whether each query and key is normalised."""
    norm_groups: int
    """Neighbouring heads whose outputs are normalised together: how many such groups there are."""
    scale: float
    """By which the rates of the first layer are multiplied."""
    scale_decrement: float
    """How much less that is in each layer after another."""

    def __post_init__(self) -> None:
        check_positive(self, "heads", "head_dim", "norm_groups", "scale")
        if self.heads % self.norm_groups:
            raise ConfigError(f"{self.heads} heads do not make {self.norm_groups} groups")
        if self.rope is not None:
            check_rotated(self.rope, self.head_dim)

    @property
    def state_shape(self) -> StateShape:
        """What is remembered of a sequence, heads first."""
        return self.heads, self.head_dim, self.head_dim

    @property
    def conv_state_shapes(self) -> tuple[StateShape, ...]:
        """There are no convolutions."""
        return ()


RecurrentConfig = DeltaConfig | MambaConfig | LightningConfig
