"""The running softmax of blockwise attention (arXiv:1805.02867; FlashAttention, arXiv:2205.14135).

Rows of queries take in their keys block by block and never hold more scores than those of one block.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from loongjax.pallas_kernels.einsum import einsum_to_float32


class SoftmaxState(NamedTuple):
    """What R rows have seen so far: with scores s and values v, over all keys seen."""

    maximum: Float32[Array, "*batch R"]
    """max(s); -inf before the first visible key."""
    denominator: Float32[Array, "*batch R"]
    """sum(exp(s - maximum))"""
    weighted_values: Float32[Array, "*batch R H"]
    """sum(exp(s - maximum) * v)"""


def empty_state(rows_shape: tuple[int, ...], head_dim: int) -> SoftmaxState:
    """Rows that have seen no key."""
    return SoftmaxState(
        maximum=jnp.full(rows_shape, -jnp.inf, jnp.float32),
        denominator=jnp.zeros(rows_shape, jnp.float32),
        weighted_values=jnp.zeros((*rows_shape, head_dim), jnp.float32),
    )


def absorb(
    state: SoftmaxState, scores: Float32[Array, "*batch R S"], values: Float[Array, "*batch S H"]
) -> SoftmaxState:
    """The state after S more keys. Scores of invisible keys are -inf, and values that no row sees are finite."""
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
    base = zero_where_infinite(maximum)
    weights = jnp.exp(scores - base[..., None])
    rescale = jnp.exp(state.maximum - base)
    new_values = einsum_to_float32("...rs,...sh->...rh", weights.astype(values.dtype), values)
    return SoftmaxState(
        maximum=maximum,
        denominator=state.denominator * rescale + weights.sum(axis=-1),
        weighted_values=state.weighted_values * rescale[..., None] + new_values,
    )


def finish(state: SoftmaxState) -> tuple[Float32[Array, "*batch R H"], Float32[Array, "*batch R"]]:
    """Output and natural log-sum-exp; zeros and -inf in rows that saw no key."""
    denominator = jnp.where(state.denominator > 0, state.denominator, 1.0)
    return state.weighted_values / denominator[..., None], state.maximum + jnp.log(denominator)


def zero_where_infinite(maximum: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """A base to subtract in an exponent: -inf - -inf would be NaN, -inf - 0 is what is meant."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)
