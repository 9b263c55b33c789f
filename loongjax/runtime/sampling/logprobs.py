"""Log-probabilities of the model's own distribution, over a vocabulary that may be sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from loongjax.core.prompt_logprobs import PromptLogprobs
from loongjax.core.request import TokenLogprobs
from loongjax.core.sampling import MAX_LOGPROBS

Leaf = np.ndarray | jax.Array


class LogprobArrays(NamedTuple):
    """Log-probabilities of one token a row, and of the most probable ones there."""

    logprob: Leaf
    """float32 [*B]"""
    rank: Leaf
    """int32 [*B]; 1 for the most probable token, equal ones ranked by id."""
    top_ids: Leaf
    """int32 [*B, MAX_LOGPROBS], most probable first, equal ones by id; -1 beyond the vocabulary."""
    top_logprobs: Leaf
    """float32 [*B, MAX_LOGPROBS]; -inf beyond the vocabulary."""

    def at(self, index: tuple[int, ...], token_id: int, num_top: int) -> TokenLogprobs:
        """The host's value for one row of fetched arrays."""
        ids, logprobs = self.top_ids[index][:num_top], self.top_logprobs[index][:num_top]
        return TokenLogprobs(
            token_id=token_id,
            logprob=float(self.logprob[index]),
            rank=int(self.rank[index]),
            top=tuple((int(i), float(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0),
        )

    def from_row(self, start: int, token_ids: np.ndarray, num_top: int) -> PromptLogprobs:
        """The host's values for as many rows as there are `token_ids` (int32), from row `start` of fetched arrays.

        They are copies, so that a short prompt does not keep the arrays of a whole batch alive.
        """
        rows = slice(start, start + len(token_ids))
        return PromptLogprobs(
            token_ids=token_ids.copy(),
            logprobs=np.array(self.logprob[rows]),
            ranks=np.array(self.rank[rows]),
            top_ids=np.array(self.top_ids[rows, :num_top]),
            top_logprobs=np.array(self.top_logprobs[rows, :num_top]),
        )


def token_logprobs(
    logits: Float[Array, "B V"], token_ids: Int32[Array, " B"], *, axis_name: str | None = None
) -> LogprobArrays:
    """Log-probability and rank of one token a row, and the most probable tokens.

    Args:
        logits: this shard's part of the vocabulary, the shards in id order; -inf for padding.
        token_ids: over the whole vocabulary; rows with an id outside of it get -inf.
        axis_name: the mesh axis that shards the vocabulary; None: it is whole.
    """
    vocab_size = logits.shape[-1]
    first_id = 0 if axis_name is None else jax.lax.axis_index(axis_name).astype(jnp.int32) * jnp.int32(vocab_size)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + first_id

    highest = _reduce(jnp.max(logits, axis=-1), jax.lax.pmax, axis_name)
    total = _reduce(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1), jax.lax.psum, axis_name)
    lse = highest + jnp.log(total)

    is_token = ids == token_ids[:, None]
    chosen = _reduce(jnp.max(jnp.where(is_token, logits, -jnp.inf), axis=-1), jax.lax.pmax, axis_name)
    is_before = (logits > chosen[:, None]) | ((logits == chosen[:, None]) & (ids < token_ids[:, None]))
    num_before = _reduce(jnp.sum(is_before, axis=-1, dtype=jnp.int32), jax.lax.psum, axis_name)

    top_ids, top_logits = _most_probable(logits, first_id, axis_name)
    return LogprobArrays(chosen - lse, num_before + 1, top_ids, top_logits - lse[:, None])


def _reduce(values: jax.Array, collective: Callable[[jax.Array, str], jax.Array], axis_name: str | None) -> jax.Array:
    return values if axis_name is None else collective(values, axis_name)


def _most_probable(
    logits: jax.Array, first_id: int | jax.Array, axis_name: str | None
) -> tuple[Int32[Array, "B M"], Float[Array, "B M"]]:
    ids, values = _top_in_order(logits)
    if axis_name is not None:
        ids = jax.lax.all_gather(ids + first_id, axis_name, axis=1, tiled=True)
        values = jax.lax.all_gather(values, axis_name, axis=1, tiled=True)
        # Shards come in id order, so equal values are still ordered by id.
        order, values = _top_in_order(values)
        ids = jnp.take_along_axis(ids, order, axis=1)
    return jnp.where(values > -jnp.inf, ids, -1), values


def _top_in_order(values: Float[Array, "B V"]) -> tuple[Int32[Array, "B M"], Float[Array, "B M"]]:
    """Indices and values of the MAX_LOGPROBS highest, equal ones by index.

    One pass each, which never writes: each finds what comes next after the last one found. `lax.top_k` sorts whole rows
    on GPU for as many as these.
    """
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    shape = (values.shape[0], MAX_LOGPROBS)

    def find_next(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found_indices, found_values = found
        last_index, last_value = found_indices[:, i - 1, None], found_values[:, i - 1, None]
        is_left = (values < last_value) | ((values == last_value) & (indices > last_index)) | (i == 0)
        left = jnp.where(is_left, values, -jnp.inf)
        index = jnp.argmax(left, axis=-1).astype(jnp.int32)
        return found_indices.at[:, i].set(index), found_values.at[:, i].set(jnp.max(left, axis=-1))

    nothing = (jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32))
    return jax.lax.fori_loop(0, MAX_LOGPROBS, find_next, nothing)
