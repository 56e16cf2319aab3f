"""Recurrences with states of fixed size, computed a chunk of positions at a time, in float32.

L  segments     C  positions of a chunk     H  heads, or channels     K  width of keys     V  width of values
N  width of a channel's state

A chunk of one position is the recurrence of the papers; a longer chunk is the same function by matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


class DeltaInputs(NamedTuple):
    """Inputs of `delta_rule` at each position."""

    query: Float[Array, "L C H K"]
    key: Float[Array, "L C H K"]
    value: Float[Array, "L C H V"]
    log_decay: Float[Array, "L C H _"]
    """Logarithm of the state's decay, for each number of a key or one for all."""
    beta: Float[Array, "L C H"]
    """Share, from 0 to 1, of the value at the key that the new value replaces."""


def delta_rule(
    rows: DeltaInputs, state: Float[Array, "L H K V"]
) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """Gated delta rule: decay the state, replace the value at the key, and read the state with the query.

    The recurrence is that of Yang et al. (arXiv:2412.06464), its form by chunks that of Yang et al. (arXiv:2406.06484,
    section 3.2). The values that the positions of a chunk write depend on each other: they solve a triangular system.

    Returns:
      Outputs of all positions, and the state after the last.
    """
    query, key, value, log_decay, beta = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in rows)
    total, beta = jnp.cumsum(log_decay, axis=2), beta[..., None]
    decay = jnp.exp(total)  # of the state before the chunk
    written = beta * (value - (key * decay) @ state)
    if key.shape[2] > 1:
        overlaps = jnp.tril(_decayed_products(beta * key, key, total), -1)
        written = lax.linalg.triangular_solve(overlaps, written, left_side=True, lower=True, unit_diagonal=True)
    return _read_and_write(query, key, written, total, state)


class LinearInputs(NamedTuple):
    """Inputs of `linear_attention` at each position."""

    query: Float[Array, "L C H K"]
    key: Float[Array, "L C H K"]
    value: Float[Array, "L C H V"]
    log_decay: Float[Array, "L C H"]
    """Logarithm of the state's decay."""


def linear_attention(
    rows: LinearInputs, state: Float[Array, "L H K V"]
) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """Linear attention: decay the state, add the value at the key, and read the state with the query.

    Source: Qin et al., arXiv:2401.04658.

    Returns:
      Outputs of all positions, and the state after the last.
    """
    query, key, value, log_decay = (jnp.moveaxis(part.astype(jnp.float32), 2, 1) for part in rows)
    return _read_and_write(query, key, value, jnp.cumsum(log_decay, axis=2)[..., None], state)


def alibi_slopes(heads: int) -> Float[np.ndarray, "H"]:
    """Slopes from `2 ** (-8 / heads)` to `2 ** -8`, in equal ratios (ALiBi; Press et al., arXiv:2108.12409).

    If `heads` is no power of two, the slopes of the power below are followed by every other slope of twice that power.
    """
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    return first if power == heads else np.concatenate([first, alibi_slopes(2 * power)[::2][: heads - power]])


def _read_and_write(
    query: Float[Array, "L H C K"],
    key: Float[Array, "L H C K"],
    written: Float[Array, "L H C V"],
    total: Float[Array, "L H C _"],
    state: Float[Array, "L H K V"],
) -> tuple[Float[Array, "L C H V"], Float[Array, "L H K V"]]:
    """Read the state and the values written up to each position; return the state after the last position too.

    Args:
      total: logarithm of the decay from the state before the chunk to each position.
    """
    output = (query * jnp.exp(total)) @ state + _decayed_products(query, key, total) @ written
    last = total[:, :, -1:]
    after = jnp.swapaxes(jnp.exp(last), 2, 3) * state + jnp.swapaxes(key * jnp.exp(last - total), 2, 3) @ written
    return jnp.moveaxis(output, 1, 2), after


def _decayed_products(
    later: Float[Array, "L H C K"], earlier: Float[Array, "L H C K"], total: Float[Array, "L H C _"]
) -> Float[Array, "L H C C"]:
    """Multiply each position with all up to it, with the decay between them; zero above the diagonal."""
    lower = jnp.tri(total.shape[2], dtype=bool)[..., None]
    between = jnp.where(lower, total[:, :, :, None] - total[:, :, None], -jnp.inf)
    if total.shape[-1] == 1:
        return (later @ jnp.swapaxes(earlier, 2, 3)) * jnp.exp(between[..., 0])
    return jnp.sum(later[:, :, :, None] * earlier[:, :, None] * jnp.exp(between), axis=-1)


class SelectiveScanInputs(NamedTuple):
    """Inputs of `selective_scan` at each position."""

    x: Float[Array, "L C H"]
    dt: Float[Array, "L C H"]
    """Step size (the paper's Δ): 0 leaves the state as it is."""
    b: Float[Array, "L C N"]
    """Input projection of the state (the paper's B)."""
    c: Float[Array, "L C N"]
    """Output projection of the state (the paper's C)."""


def selective_scan(
    rows: SelectiveScanInputs, state: Float[Array, "L H N"], rates: Float[Array, "H N"]
) -> tuple[Float[Array, "L C H"], Float[Array, "L H N"]]:
    """Selective scan (Gu and Dao, arXiv:2312.00752, algorithm 2), all positions of a chunk at once (Blelloch, 1990).

    Args:
      rates: rate of each number of a state (the paper's A), below 0.

    Returns:
      Outputs of all positions, and the state after the last.
    """
    x, dt, b, c = (part.astype(jnp.float32) for part in rows)

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (decay, added), (later_decay, later_added) = first, second
        return decay * later_decay, added * later_decay + later_added

    decay, added = jnp.exp(dt[..., None] * rates), (dt * x)[..., None] * b[:, :, None]
    decay, added = lax.associative_scan(compose, (decay, added), axis=1)
    states = decay * state[:, None] + added
    return jnp.einsum("lchn,lcn->lch", states, c), states[:, -1]
