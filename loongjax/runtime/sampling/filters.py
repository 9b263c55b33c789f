"""top_k, top_p and min_p without a sort: the least probable token that each row keeps is found by radix search.

Tokens are ranked by logit, highest first, and equal logits by id, lowest first. In this order:

1. top_k keeps the first k tokens.
2. top_p keeps the shortest run of first tokens whose probabilities, renormalised over what top_k kept, reach top_p.
3. min_p keeps the tokens whose probability is at least min_p times that of the first.

The first token always stays. A search reads the logits once for every `DIGIT_BITS` bits of what it looks for, whatever
the distribution; sorting 256 rows of 128K tokens would move many times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

DIGIT_BITS = 2
"""Bits settled by one pass over the logits; a divisor of 32."""

_INFINITY_BITS = 0x7F800000


def filter_logits(
    logits: Float[Array, "B V"],
    top_k: Int32[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
) -> Float[Array, "B V"]:
    """The logits of the tokens that stay, and -inf for the others.

    Args:
        logits: after temperature, shifted so that every row's highest is 0.
        top_k: tokens to keep; the largest int32 keeps all.
        top_p: probability to keep; 1 keeps all.
        min_p: least probability relative to the first token's; 0 keeps all.
    """
    last = _last_kept(logits, top_k, top_p)
    distance, token_ids = _distance(logits), _token_ids(logits)
    before = distance < last.distance[:, None]
    tied = (distance == last.distance[:, None]) & (token_ids <= last.token_id[:, None])
    return jnp.where((before | tied) & (jnp.exp(logits) >= min_p[:, None]), logits, -jnp.inf)


class _Cutoff(NamedTuple):
    """The last token that a row keeps."""

    distance: UInt32[Array, " B"]
    token_id: UInt32[Array, " B"]


def _last_kept(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> _Cutoff:
    distance, token_ids = _distance(logits), _token_ids(logits)
    weight = jnp.exp(logits)

    def count(within: jax.Array) -> jax.Array:
        return jnp.sum(within, axis=-1, dtype=jnp.int32)

    def mass(within: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(within, _rows_like(weight, within), 0.0), axis=-1)

    def has_k(trial: jax.Array) -> jax.Array:
        return count(_at_most(distance, trial)) >= top_k[:, None]

    k_distance = jnp.minimum(_smallest(has_k, top_k.shape[0], 32), jnp.uint32(_INFINITY_BITS))
    k_before = distance < k_distance[:, None]
    k_ties = top_k - count(k_before)
    k_mass = mass(k_before) + k_ties.astype(jnp.float32) * _weight_at(k_distance)
    p_mass = jnp.where(top_p < 1.0, top_p * k_mass, jnp.inf)

    def has_p(trial: jax.Array) -> jax.Array:
        return mass(_at_most(distance, trial)) >= p_mass[:, None]

    p_distance = _smallest(has_p, top_k.shape[0], 32)
    last = jnp.minimum(k_distance, p_distance)
    tie_weight = _weight_at(last)
    missing = jnp.ceil((p_mass - mass(distance < last[:, None])) / jnp.where(tie_weight > 0.0, tie_weight, 1.0))
    p_ties = jnp.clip(missing, 1.0, logits.shape[-1]).astype(jnp.int32)
    num_ties = jnp.where(last == k_distance, jnp.minimum(k_ties, p_ties), p_ties)

    def has_ties(trial: jax.Array) -> jax.Array:
        tied = (distance == last[:, None])[:, None, :]
        return count(_at_most(token_ids, trial) & tied) >= num_ties[:, None]

    return _Cutoff(last, _smallest(has_ties, top_k.shape[0], logits.shape[-1].bit_length()))


def _smallest(reaches: Callable[[jax.Array], jax.Array], batch_size: int, num_bits: int) -> UInt32[Array, " B"]:
    """The smallest integer of `num_bits` bits that `reaches` holds for in each row; all ones where it never does.

    Args:
        reaches: trial values [B, R] to booleans [B, R]; monotone in the value.
    """
    num_digits = -(-num_bits // DIGIT_BITS)
    steps = jnp.arange(1, 2**DIGIT_BITS, dtype=jnp.uint32)

    def settle_digit(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (jnp.uint32(num_digits - 1) - i.astype(jnp.uint32)) * jnp.uint32(DIGIT_BITS)
        trial = found[:, None] + ((steps << shift) - jnp.uint32(1))[None, :]
        digit = jnp.sum(~reaches(trial), axis=-1, dtype=jnp.uint32)
        return found + (digit << shift)

    return jax.lax.fori_loop(0, num_digits, settle_digit, jnp.zeros(batch_size, jnp.uint32))


def _distance(logits: jax.Array) -> jax.Array:
    """How far below the row's highest, as an unsigned integer of the same order: the bits of a non-negative float."""
    return jax.lax.bitcast_convert_type(jnp.abs(logits), jnp.uint32)


def _weight_at(distance: jax.Array) -> jax.Array:
    return jnp.exp(-jax.lax.bitcast_convert_type(distance, jnp.float32))


def _token_ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.uint32, logits.shape, 1)


def _at_most(values_BV: jax.Array, trial_BR: jax.Array) -> jax.Array:
    return values_BV[:, None, :] <= trial_BR[:, :, None]


def _rows_like(values_BV: jax.Array, within: jax.Array) -> jax.Array:
    return values_BV if within.ndim == 2 else jnp.broadcast_to(values_BV[:, None, :], within.shape)
