"""From a router's logits to the experts of each row and their weights.

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
GROUP_BEST = {GroupScore.BEST: 1, GroupScore.BEST_TWO: 2}
"""How many of a group's best scores are added up to judge it."""
TINY = 1e-20
"""So that scores that are all zero are not divided by zero."""


class Chosen(NamedTuple):
    experts: Int32[Array, "T k"]
    weights: Float[Array, "T k"]
    scores: Float[Array, "T E"]
    """Of all experts."""


@dataclass(frozen=True)
class TopKRouting:
    """The best `top_k` of all scores (Shazeer et al., arXiv:1701.06538)."""

    config: RouterConfig
    top_k: int

    def __call__(self, logits: Float[Array, "T E"], selection_bias: Float[Array, "E"] | None) -> Chosen:
        scores = SCORES[self.config.score](logits)
        judged = self._judged(logits, scores, selection_bias)
        _, experts = lax.top_k(judged, self.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.config.norm is not None:
            weights = weights / (_p_norm(weights, self.config.norm) + TINY)
        return Chosen(experts, weights * self.config.scale, scores)

    def _judged(
        self, logits: Float[Array, "T E"], scores: Float[Array, "T E"], selection_bias: Float[Array, "E"] | None
    ) -> Float[Array, "T E"]:
        """What the best are found by: the logits, where nothing but scores counts, as high scores of a sigmoid are all
        rounded to 1."""
        if selection_bias is None and self.config.limit is None:
            return logits
        judged = scores if selection_bias is None else scores + selection_bias
        return judged if self.config.limit is None else within_best_groups(judged, self.config.limit)


@dataclass(frozen=True)
class SparseMixer:
    """The best expert `top_k` times, each time without those chosen before; weighed against its near rivals only (Liu
    et al., arXiv:2409.12136, the inference form)."""

    config: SparseMixerConfig
    top_k: int

    def __call__(self, logits: Float[Array, "T E"], selection_bias: None) -> Chosen:
        left, experts, weights = logits, [], []
        for _ in range(self.top_k):
            best = jnp.max(left, axis=-1, keepdims=True)
            expert = jnp.argmax(left, axis=-1, keepdims=True)
            behind = (best - logits) / jnp.maximum(jnp.abs(logits), best)
            rivals = jax.nn.softmax(jnp.where(behind <= self.config.tolerance, left, -jnp.inf))
            experts.append(expert)
            weights.append(jnp.take_along_axis(rivals, expert, axis=-1))
            left = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, left)
        return Chosen(jnp.concatenate(experts, axis=-1), jnp.concatenate(weights, axis=-1), jax.nn.softmax(logits))


def within_best_groups(scores: Float[Array, "T E"], limit: GroupLimit) -> Float[Array, "T E"]:
    """The scores, those of experts in other than the best groups so low that none is chosen."""
    grouped = scores.reshape(*scores.shape[:-1], limit.groups, -1)
    best, _ = lax.top_k(grouped, GROUP_BEST[limit.score])
    _, kept = lax.top_k(jnp.sum(best, axis=-1), limit.kept)
    is_kept = jnp.any(kept[..., None] == jnp.arange(limit.groups), axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _p_norm(weights: Float[Array, "T k"], p: float) -> Float[Array, "T 1"]:
    return jnp.sum(weights**p, axis=-1, keepdims=True) ** (1 / p)
