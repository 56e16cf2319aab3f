"""Feed-forward blocks, dense and of experts, as choices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class SwiGLUConfig:
    """`silu(gate) * up` (Shazeer, arXiv:2002.05202)."""


@dataclass(frozen=True)
class ClampedSwiGLUConfig:
    """`gate * sigmoid(slope * gate) * (up + 1)`, of gates limited from above and ups from both sides."""

    limit: float
    slope: float

    def __post_init__(self) -> None:
        check_positive(self, "limit", "slope")


@dataclass(frozen=True)
class LimitedSwiGLUConfig:
    """`silu(gate) * up`, of gates limited from above once activated, and ups from both sides."""

    limit: float

    def __post_init__(self) -> None:
        check_positive(self, "limit")


Activation = SwiGLUConfig | ClampedSwiGLUConfig | LimitedSwiGLUConfig
"""How a feed-forward joins its gates and ups."""


@dataclass(frozen=True)
class DenseConfig:
    """A gated feed-forward of one intermediate width."""

    width: int
    activation: Activation = SwiGLUConfig()

    def __post_init__(self) -> None:
        check_positive(self, "width")


@dataclass(frozen=True)
class SharedExpertConfig:
    """An expert that every token visits."""

    width: int
    gated: bool
    """Whether a sigmoid of a projection of the token scales its output."""
    activation: Activation = SwiGLUConfig()

    def __post_init__(self) -> None:
        check_positive(self, "width")


class Score(Enum):
    """What makes scores of a router's logits.

    There is no softmax over the kept logits alone: it is the softmax over all, renormalised.
    """

    SOFTMAX = auto()
    SIGMOID = auto()


class GroupScore(Enum):
    """What a group of experts is judged by."""

    BEST = auto()
    BEST_TWO = auto()
    """The sum of its two best."""


@dataclass(frozen=True)
class GroupLimit:
    """Experts are chosen from the best few of equal groups of neighbours (DeepSeek-V2, arXiv:2405.04434)."""

    groups: int
    kept: int
    score: GroupScore

    def __post_init__(self) -> None:
        check_positive(self, "groups", "kept")
        if self.kept > self.groups:
            raise ConfigError(f"{self.kept} groups cannot be kept of {self.groups}")


@dataclass(frozen=True)
class RouterConfig:
    """Score all experts, keep the best, weigh them by their scores."""

    score: Score = Score.SOFTMAX
    bias: bool = False
    """Whether the logits have a bias."""
    selection_bias: bool = False
    """Whether a bias is added to the scores for the choice, though not for the weights (DeepSeek-V3,
    arXiv:2412.19437)."""
    limit: GroupLimit | None = None
    norm: float | None = None
    """The kept scores are divided by their p-norm, this p: 1 for their sum. `None` leaves them."""
    scale: float = 1.0
    """By which the weights are multiplied in the end."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "norm")


@dataclass(frozen=True)
class SparseMixerConfig:
    """SparseMixer (Liu et al., arXiv:2409.12136): experts chosen one after the other, each with the softmax of it and
    its near rivals as weight."""

    tolerance: float
    """Rivals are behind the best by no more than this, relative to the larger of the two logits' absolute values."""

    def __post_init__(self) -> None:
        check_positive(self, "tolerance")


class Weighted(Enum):
    """What of an expert the router's weight multiplies."""

    OUTPUT = auto()
    INPUT = auto()


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts and, in some models, a shared one."""

    experts: int
    top_k: int
    width: int
    router: RouterConfig | SparseMixerConfig
    shared: SharedExpertConfig | None = None
    activation: Activation = SwiGLUConfig()
    """Of the routed experts."""
    bias: bool = False
    """Whether the routed experts' projections add biases."""
    weighted: Weighted = Weighted.OUTPUT

    def __post_init__(self) -> None:
        check_positive(self, "experts", "top_k", "width")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k {self.top_k} exceeds the number of experts, {self.experts}")
        if isinstance(self.router, RouterConfig) and self.router.limit is not None:
            self._check_limit(self.router.limit)

    def _check_limit(self, limit: GroupLimit) -> None:
        each, rest = divmod(self.experts, limit.groups)
        if rest or (limit.score is GroupScore.BEST_TWO and each < 2):
            raise ConfigError(f"{self.experts} experts do not make {limit.groups} groups to choose from")
        if self.top_k > each * limit.kept:
            raise ConfigError(f"top_k {self.top_k} exceeds the {each * limit.kept} experts of {limit.kept} groups")
