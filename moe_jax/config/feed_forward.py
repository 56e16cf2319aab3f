"""Feed-forward configurations: dense and Mixture-of-Experts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class SwiGLUConfig:
    """SwiGLU: `silu(gate) * up` (Shazeer, arXiv:2002.05202)."""


@dataclass(frozen=True)
class ClampedSwiGLUConfig:
    """SwiGLU of gpt-oss: `gate * sigmoid(slope * gate) * (up + 1)`.

    Gates are at most `limit`; ups lie between `-limit` and `limit`.
    """

    limit: float
    """`swiglu_limit`: bound on gates and ups."""
    slope: float
    """`swiglu_alpha`: slope of the sigmoid."""

    def __post_init__(self) -> None:
        check_positive(self, "limit", "slope")


@dataclass(frozen=True)
class LimitedSwiGLUConfig:
    """SwiGLU with bounds: `min(silu(gate), limit) * clip(up, -limit, limit)`."""

    limit: float
    """`swiglu_limits` of the layer: bound on activated gates and on ups."""

    def __post_init__(self) -> None:
        check_positive(self, "limit")


Activation = SwiGLUConfig | ClampedSwiGLUConfig | LimitedSwiGLUConfig
"""Gated activation of a feed-forward block."""


@dataclass(frozen=True)
class DenseConfig:
    """Dense gated feed-forward block."""

    width: int
    """`intermediate_size`: width of the hidden layer."""
    activation: Activation = SwiGLUConfig()
    """Gated activation."""

    def __post_init__(self) -> None:
        check_positive(self, "width")


@dataclass(frozen=True)
class SharedExpertConfig:
    """Shared expert: a feed-forward block that every token visits."""

    width: int
    """`shared_expert_intermediate_size`: width of the hidden layer."""
    gated: bool
    """True if a sigmoid of a projection of the token multiplies the output."""
    activation: Activation = SwiGLUConfig()
    """Gated activation."""

    def __post_init__(self) -> None:
        check_positive(self, "width")


class Score(Enum):
    """`scoring_func`: function from router logits to scores.

    A softmax over the selected logits alone is `SOFTMAX` with `norm=1`.
    """

    SOFTMAX = auto()
    SIGMOID = auto()


class GroupScore(Enum):
    """Score of a group of experts."""

    BEST = auto()
    """Best score in the group."""
    BEST_TWO = auto()
    """Sum of the two best scores in the group."""


@dataclass(frozen=True)
class GroupLimit:
    """Group-limited routing: select experts from the best groups only (DeepSeek-V2, arXiv:2405.04434)."""

    groups: int
    """`n_group`: number of groups of neighbouring experts, all of one size."""
    kept: int
    """`topk_group`: number of groups to select experts from."""
    score: GroupScore
    """Score by which groups are ranked."""

    def __post_init__(self) -> None:
        check_positive(self, "groups", "kept")
        if self.kept > self.groups:
            raise ConfigError(f"GroupLimit.kept must be at most the number of groups, {self.groups}, got {self.kept}")


@dataclass(frozen=True)
class RouterConfig:
    """Top-k router: score all experts, select the best, weight their outputs by the scores."""

    score: Score = Score.SOFTMAX
    """`scoring_func`: function from logits to scores."""
    bias: bool = False
    """True if the logits have a bias."""
    selection_bias: bool = False
    """`e_score_correction_bias`: True if a bias on the scores affects the selection but not the weights (DeepSeek-V3,
    arXiv:2412.19437)."""
    limit: GroupLimit | None = None
    """`n_group`, `topk_group`: group-limited routing; `None` for selection from all experts."""
    norm: float | None = None
    """`norm_topk_prob`: p of the p-norm that divides the selected scores, 1 for their sum; `None` for no division."""
    scale: float = 1.0
    """`routed_scaling_factor`: factor on the weights, after `norm`."""

    def __post_init__(self) -> None:
        check_positive(self, "scale", "norm")


@dataclass(frozen=True)
class SparseMixerConfig:
    """SparseMixer routing (Liu et al., arXiv:2409.12136).

    Select experts one after the other. The weight of each is its probability in a softmax over the logits near its own.
    """

    tolerance: float
    """Twice `router_jitter_noise`: largest relative gap between the best logit and another in its softmax.

    The gap is relative to the larger absolute value of the two logits.
    """

    def __post_init__(self) -> None:
        check_positive(self, "tolerance")


class Weighted(Enum):
    """Side of an expert that the router weight multiplies."""

    OUTPUT = auto()
    """Output of the expert."""
    INPUT = auto()
    """Input of the expert (Llama 4)."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-Experts block: routed experts and an optional shared expert.

    Raises:
      ConfigError: a size that is not positive, or a `top_k` or group limit that the experts cannot satisfy.
    """

    experts: int
    """`num_experts`: number of routed experts."""
    top_k: int
    """`num_experts_per_tok`: number of experts that each token visits."""
    width: int
    """`moe_intermediate_size`: width of the hidden layer of each routed expert."""
    router: RouterConfig | SparseMixerConfig
    """Router that selects and weights the experts."""
    shared: SharedExpertConfig | None = None
    """Shared expert; `None` for no shared expert."""
    activation: Activation = SwiGLUConfig()
    """Gated activation of the routed experts."""
    bias: bool = False
    """True if the projections of the routed experts add a bias."""
    weighted: Weighted = Weighted.OUTPUT
    """Side of an expert that the router weight multiplies."""

    def __post_init__(self) -> None:
        check_positive(self, "experts", "top_k", "width")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k {self.top_k} exceeds the number of experts, {self.experts}")
        if isinstance(self.router, RouterConfig) and self.router.limit is not None:
            self._check_limit(self.router.limit)

    def _check_limit(self, limit: GroupLimit) -> None:
        size, rest = divmod(self.experts, limit.groups)
        if rest:
            raise ConfigError(f"{self.experts} experts do not make {limit.groups} groups of one size")
        if limit.score is GroupScore.BEST_TWO and size < 2:
            raise ConfigError(f"groups ranked by their two best experts need two experts each, got {size}")
        if self.top_k > size * limit.kept:
            raise ConfigError(f"top_k {self.top_k} exceeds the {size * limit.kept} experts of {limit.kept} groups")
