"""Which tokens each row has seen, for penalties: kept on the devices, built from flat lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from loongjax.runtime.sampling.rows import PenaltyRows
from loongjax.runtime.sampling.variant import SamplerInput

Leaf = np.ndarray | jax.Array

HISTORY_CAPACITIES = (4096, 65536)
"""Tokens of one rank that one counting program takes; more of them take several calls."""


class TokenCounts(NamedTuple):
    """What each row has seen. A shard's arrays lack the leading dimension n."""

    output: Int32[Array, "*n B V"]
    """How often the row has generated the token."""
    in_prompt: Bool[Array, "*n B V"]


class TokenHistory(NamedTuple):
    """Tokens to count: a flat list over the rows of a rank, padded to its capacity."""

    row: Leaf
    """int32 [n, capacity]; B for padding."""
    token_id: Leaf
    """int32 [n, capacity]"""
    is_output: Leaf
    """bool [n, capacity]: generated, rather than in the prompt."""


def token_histories(sub_batches: Sequence[Sequence[SamplerInput]], batch_size: int) -> list[TokenHistory]:
    """What there is to count for a batch, as numpy arrays of as few sizes as possible. At least one.

    Rows without penalties are left out, and so are prompts that nothing penalises. Of a prompt each token is named
    once: batches change often, and this is made anew for each.
    """
    per_rank = [_flat_history(inputs) for inputs in sub_batches]
    longest = max((flat.shape[1] for flat in per_rank), default=0)
    capacity = next((size for size in HISTORY_CAPACITIES if size >= longest), HISTORY_CAPACITIES[-1])
    histories = []
    for start in range(0, max(longest, 1), capacity):
        history = empty_history(len(per_rank), batch_size, capacity)
        for rank, flat in enumerate(per_rank):
            part = flat[:, start : start + capacity]
            for column, values in zip(history, part, strict=True):
                column[rank, : part.shape[1]] = values
        histories.append(history)
    return histories


def empty_history(num_ranks: int, batch_size: int, capacity: int) -> TokenHistory:
    """A history of nothing but padding."""
    shape = (num_ranks, capacity)
    return TokenHistory(
        row=np.full(shape, batch_size, np.int32),
        token_id=np.zeros(shape, np.int32),
        is_output=np.zeros(shape, np.bool_),
    )


def _flat_history(inputs: Sequence[SamplerInput]) -> np.ndarray:
    """int32 [3, number of tokens]: row, token id, whether it is output."""
    parts = [np.zeros((3, 0), np.int32)]
    for row, item in enumerate(inputs):
        params = item.request.sampling
        if not params.has_penalties:
            continue
        parts.append(_part(row, item.output_token_ids, is_output=True))
        if params.repetition_penalty != 1.0:
            parts.append(_part(row, item.request.prompt_vocabulary, is_output=False))
    return np.concatenate(parts, axis=1)


def _part(row: int, token_ids: Sequence[int] | np.ndarray, *, is_output: bool) -> np.ndarray:
    part = np.empty((3, len(token_ids)), np.int32)
    part[0], part[1], part[2] = row, token_ids, is_output
    return part


def count_history(counts: TokenCounts, history: TokenHistory) -> TokenCounts:
    """Adds a history to one shard's counts."""
    is_output = jnp.asarray(history.is_output)
    at = (jnp.asarray(history.row), jnp.asarray(history.token_id))
    return TokenCounts(
        output=counts.output.at[at].add(is_output.astype(jnp.int32), mode="drop"),
        in_prompt=counts.in_prompt.at[at].max(~is_output, mode="drop"),
    )


def count_sampled(counts: TokenCounts, token_ids: Int32[Array, " B"]) -> TokenCounts:
    """Adds each row's newest token to one shard's counts."""
    rows = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    return counts._replace(output=counts.output.at[rows, token_ids].add(1, mode="drop"))


def penalise(logits: Float[Array, "B V"], counts: TokenCounts, rows: PenaltyRows) -> Float[Array, "B V"]:
    """Logits less what each row's penalties take.

    Repetition (Keskar et al. 2019, section 4.1, as it is now used: negative logits are multiplied) counts the prompt;
    presence and frequency, as the OpenAI API defines them, count the output alone.
    """
    presence, frequency, repetition = (jnp.asarray(column)[:, None] for column in rows)
    is_generated = counts.output > 0
    repeated = jnp.where(logits > 0.0, logits / repetition, logits * repetition)
    logits = jnp.where(is_generated | counts.in_prompt, repeated, logits)
    return logits - frequency * counts.output.astype(jnp.float32) - presence * is_generated.astype(jnp.float32)
