"""Log-probabilities of a prompt's own tokens, a chunk at a time: the logits of all its tokens never exist together."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from loongjax.runtime.sampling.logprobs import LogprobArrays, token_logprobs

DEFAULT_CHUNK_SIZE = 128
"""Rows of logits that exist at a time: 64 MiB of them for a vocabulary of 128K."""


def prompt_logprobs(
    hidden: Shaped[Array, "T D"],
    target_ids: Int32[Array, " T"],
    logits_fn: Callable[[jax.Array], jax.Array],
    *,
    axis_name: str | None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> LogprobArrays:
    """Scores the token that follows each row. Runs on one shard.

    Args:
        hidden: final hidden states, equal on every shard of the vocabulary.
        target_ids: the token after each row's; -1, which scores -inf, where there is none.
        logits_fn: hidden states [C, D] to this shard's float32 logits [C, V], -inf for padding.
        axis_name: the mesh axis that shards the vocabulary; None: it is whole.
        chunk_size: rows to score at a time. T that is no multiple of it costs a second, shorter body.
    """
    num_tokens = hidden.shape[0]
    chunk_size = min(chunk_size, num_tokens)
    num_chunked = num_tokens - num_tokens % chunk_size

    def score(chunk: tuple[jax.Array, jax.Array]) -> LogprobArrays:
        rows, targets = chunk
        return token_logprobs(logits_fn(rows), targets, axis_name=axis_name)

    chunks = (
        hidden[:num_chunked].reshape(-1, chunk_size, hidden.shape[1]),
        target_ids[:num_chunked].reshape(-1, chunk_size),
    )
    with jax.named_scope("prompt_logprobs"):
        scores = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(score, chunks))
        if num_chunked == num_tokens:
            return scores
        rest = score((hidden[num_chunked:], target_ids[num_chunked:]))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), scores, rest)
