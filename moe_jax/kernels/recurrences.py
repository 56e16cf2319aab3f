"""States of fixed size that positions read and change, a chunk of positions at a time, in float32.

L  lines     C  positions of a chunk     H  heads, or channels     K  width of keys     V  of values
N  width of a channel's state

A chunk of one position is the recurrence as its papers write it; a longer one is the same by products of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Delta(NamedTuple):
    """What `delta_rule` takes of each position."""

    query: Float[Array, "L C H K"]
    key: Float[Array, "L C H K"]
    value: Float[Array, "L C H V"]
    decay: Float[Array, "L C H _"]
    """The logarithm of what is kept of the state, for each number of a key, or one for all."""
    strength: Float[Array, "L C H"]
    """How much of what a key finds is replaced, from 0 to 1."""


def delta_rule(rows: Delta, state: Float[Array, "L H K V"]) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """Each position decays the state, replaces what its key finds there, and reads it with its query
    (Yang et al., arXiv:2406.06484, section 3.2 for the form by chunks).

    What the positions of a chunk write depends on what those before them have written: a triangular system.
    """
    query, key, value, decay, strength = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in rows)
    total, strength = jnp.cumsum(decay, axis=2), strength[..., None]
    kept = jnp.exp(total)  # of the state before the chunk
    written = strength * (value - (key * kept) @ state)
    if key.shape[2] > 1:
        found = jnp.tril(_products(strength * key, key, total), -1)
        written = lax.linalg.triangular_solve(found, written, left_side=True, lower=True, unit_diagonal=True)
    return _read_and_write(query, key, written, total, state)


class Linear(NamedTuple):
    """What `linear_attention` takes of each position."""

    query: Float[Array, "L C H K"]
    key: Float[Array, "L C H K"]
    value: Float[Array, "L C H V"]
    decay: Float[Array, "L C H"]
    """The logarithm of what is kept of the state."""


def linear_attention(
    rows: Linear, state: Float[Array, "L H K V"]
) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """Each position decays the state, adds its value at its key, and reads it with its query (Qin et al.,
    arXiv:2401.04658)."""
    query, key, value, decay = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in rows)
    return _read_and_write(query, key, value, jnp.cumsum(decay, axis=2)[..., None], state)


def _read_and_write(
    query: Float[Array, "L H C K"],
    key: Float[Array, "L H C K"],
    written: Float[Array, "L H C V"],
    total: Float[Array, "L H C _"],
    state: Float[Array, "L H K V"],
) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """What queries find of the state and of what was written up to their own positions; the state after all.

    Args:
      total: the logarithm of what is kept at each position of the state before the chunk.
    """
    output = (query * jnp.exp(total)) @ state + _products(query, key, total) @ written
    last = total[:, :, -1:]
    after = jnp.swapaxes(jnp.exp(last), 2, 3) * state + jnp.swapaxes(key * jnp.exp(last - total), 2, 3) @ written
    return jnp.moveaxis(output, 1, 2), after


def _products(
    later: Float[Array, "L H C K"], earlier: Float[Array, "L H C K"], total: Float[Array, "L H C _"]
) -> Float[Array, "L H C C"]:
    """Of each position with all up to it, less what decays between them; zero beyond the diagonal."""
    below = jnp.tri(total.shape[2], dtype=bool)[..., None]
    between = jnp.where(below, total[:, :, :, None] - total[:, :, None], -jnp.inf)
    if total.shape[-1] == 1:
        return (later @ jnp.swapaxes(earlier, 2, 3)) * jnp.exp(between[..., 0])
    return jnp.sum(later[:, :, :, None] * earlier[:, :, None] * jnp.exp(between), axis=-1)


class Selection(NamedTuple):
    """What `selective_scan` takes of each position."""

    x: Float[Array, "L C H"]
    step: Float[Array, "L C H"]
    """How far the state moves: not at all at 0."""
    into: Float[Array, "L C N"]
    """How a channel's number enters its state."""
    out: Float[Array, "L C N"]
    """How it is read."""


def selective_scan(
    rows: Selection, state: Float[Array, "L H N"], rates: Float[Array, "H N"]
) -> tuple[Float[Array, "L C H"], Float[Array, "L H N"]]:
    """Each number of a state decays by its rate times the step, and takes in the channel's (Gu and Dao,
    arXiv:2312.00752, algorithm 2); all positions of a chunk at once (Blelloch, 1990).

    Args:
      rates: below 0.
    """
    x, step, into, out = (part.astype(jnp.float32) for part in rows)

    def after_both(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (kept, taken), (kept_then, taken_then) = first, second
        return kept * kept_then, taken * kept_then + taken_then

    kept, taken = jnp.exp(step[..., None] * rates), (step * x)[..., None] * into[:, :, None]
    kept, taken = lax.associative_scan(after_both, (kept, taken), axis=1)
    states = kept * state[:, None] + taken
    return jnp.einsum("lchn,lcn->lch", states, out), states[:, -1]
