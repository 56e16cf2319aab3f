"""Routers: from a router's logits to the experts of each row and their weights.

T  rows     E  experts     k  experts per row     G  groups of experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.config import GroupLimit, GroupScore, RouterConfig, Score, SparseMixerConfig

SCORES = {Score.SOFTMAX: jax.nn.softmax, Score.SIGMOID: jax.nn.sigmoid}
GROUP_TOP = {GroupScore.BEST: 1, GroupScore.BEST_TWO: 2}
"""Number of a group's highest scores whose sum ranks the group."""
TINY = 1e-20
"""Added to a norm, so that scores that are all zero are not divided by zero."""


class SelectedExperts(NamedTuple):
    """Experts of each row."""

    experts: Int32[Array, "T k"]
    weights: Float[Array, "T k"]
    """Weight of each selected expert's output."""
    scores: Float[Array, "T E"]
    """Scores of all experts."""


@dataclass(frozen=True)
class TopKRouting:
    """Select the `top_k` experts of the highest scores (Shazeer et al., arXiv:1701.06538)."""

    config: RouterConfig
    top_k: int

    def __call__(self, logits: Float[Array, "T E"], selection_bias: Float[Array, "E"] | None) -> SelectedExperts:
        scores = SCORES[self.config.score](logits)
        _, experts = lax.top_k(self._selection_scores(logits, scores, selection_bias), self.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.norm is not None:
            weights = weights / (_p_norm(weights, self.config.norm) + TINY)
        return SelectedExperts(experts, weights * self.config.scale, scores)

    def _selection_scores(
        self, logits: Float[Array, "T E"], scores: Float[Array, "T E"], selection_bias: Float[Array, "E"] | None
    ) -> Float[Array, "T E"]:
        """Scores by which experts are selected.

        Without a bias and a group limit, these are the logits: the sigmoids of all high logits round to 1.
        """
        if selection_bias is None and self.config.limit is None:
            return logits
        biased = scores if selection_bias is None else scores + selection_bias
        return biased if self.config.limit is None else limit_to_top_groups(biased, self.config.limit)


@dataclass(frozen=True)
class SparseMixer:
    """Select the best remaining expert `top_k` times (Liu et al., arXiv:2409.12136, the inference form).

    An expert's weight is its softmax among the remaining experts whose logits come close to its own.
    """

    config: SparseMixerConfig
    top_k: int

    def __call__(self, logits: Float[Array, "T E"], selection_bias: None) -> SelectedExperts:
        remaining, experts, weights = logits, [], []
        for _ in range(self.top_k):
            best = jnp.max(remaining, axis=-1, keepdims=True)
            expert = jnp.argmax(remaining, axis=-1, keepdims=True)
            distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
            rivals = jax.nn.softmax(jnp.where(distance <= self.config.tolerance, remaining, -jnp.inf))
            experts.append(expert)
            weights.append(jnp.take_along_axis(rivals, expert, axis=-1))
            remaining = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, remaining)
        joined_experts, joined_weights = (jnp.concatenate(parts, axis=-1) for parts in (experts, weights))
        return SelectedExperts(joined_experts, joined_weights, jax.nn.softmax(logits))


def limit_to_top_groups(scores: Float[Array, "T E"], limit: GroupLimit) -> Float[Array, "T E"]:
    """Replace the scores of experts outside the best groups by minus infinity (DeepSeek-V3, arXiv:2412.19437)."""
    grouped = scores.reshape(*scores.shape[:-1], limit.groups, -1)
    top, _ = lax.top_k(grouped, GROUP_TOP[limit.score])
    _, kept = lax.top_k(jnp.sum(top, axis=-1), limit.kept)
    is_kept = jnp.any(kept[..., None] == jnp.arange(limit.groups), axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _p_norm(weights: Float[Array, "T k"], p: float) -> Float[Array, "T 1"]:
    return jnp.sum(weights**p, axis=-1, keepdims=True) ** (1 / p)
