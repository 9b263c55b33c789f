"""Choosing a token a row, on one shard: pure functions over whole vocabularies."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from loongjax.runtime.sampling.counts import TokenCounts, count_sampled, penalise
from loongjax.runtime.sampling.filters import filter_logits
from loongjax.runtime.sampling.logprobs import LogprobArrays, token_logprobs
from loongjax.runtime.sampling.noise import gumbel_noise
from loongjax.runtime.sampling.rows import FilterRows, LogitEdits, NoiseRows, SamplerRows


class SampleResult(NamedTuple):
    """What a step's sampling gives. A shard's arrays lack the leading dimension n."""

    token_ids: Int32[Array, "*n B"]
    logprobs: LogprobArrays | None
    """Of the sampled tokens, if the variant holds it."""
    counts: TokenCounts | None
    """With the sampled tokens, if the variant holds penalties."""
    exchange_status: Int32[Array, " n_tp"] | None = None
    """Of every device's exchanges up to here, those of the programs before included; None without peers."""


def sample(
    logits: Float[Array, "B V"],
    positions: Int32[Array, " B"],
    rows: SamplerRows,
    counts: TokenCounts | None = None,
    *,
    with_logprobs: bool = False,
) -> SampleResult:
    """Samples a token a row.

    The order is: log-probabilities, of the logits as they come; logit_bias and banned stop tokens; repetition,
    frequency and presence penalties; then, for greedy rows, the highest logit, the lowest id of equal ones; for the
    others temperature, top_k, top_p, min_p (`filters`), and Gumbel noise (`noise`), whose highest sum is a sample of
    what is left. A row's token depends on its own logits, parameters, seed and position, and on nothing else.

    Args:
        logits: float32, -inf for padding of the vocabulary. A row of nothing but -inf gives token 0.
        positions: of the tokens to sample, from 0, the prompt included.
        rows: a rank's rows, without their leading dimension.
        counts: needed where `rows` has penalties.
        with_logprobs: whether to compute log-probabilities.
    """
    edited = logits
    if rows.edits is not None:
        edited = edit_logits(edited, positions, rows.edits)
    if rows.penalties is not None:
        assert counts is not None, "penalties need token counts"
        with jax.named_scope("penalties"):
            edited = penalise(edited, counts, rows.penalties)
    token_ids = jnp.argmax(edited, axis=-1).astype(jnp.int32)
    if rows.noise is not None:
        token_ids = _sample_noisy(edited, token_ids, positions, rows.noise, rows.filters)
    logprobs = None
    if with_logprobs:
        with jax.named_scope("logprobs"):
            logprobs = token_logprobs(logits, token_ids)
    if counts is not None:
        counts = count_sampled(counts, token_ids)
    return SampleResult(token_ids, logprobs, counts)


def edit_logits(logits: Float[Array, "B V"], positions: Int32[Array, " B"], edits: LogitEdits) -> Float[Array, "B V"]:
    """Logits with the edits that apply at these positions."""
    with jax.named_scope("edits"):
        row, token_id, value, until = map(jnp.asarray, edits)
        is_active = positions.at[row].get(mode="clip") < until
        return logits.at[row, token_id].add(jnp.where(is_active, value, 0.0), mode="drop")


def _sample_noisy(
    logits: jax.Array, greedy_ids: jax.Array, positions: jax.Array, noise: NoiseRows, filters: FilterRows | None
) -> Int32[Array, " B"]:
    temperature = jnp.asarray(noise.temperature)
    is_greedy = temperature == 0.0
    # With the highest logit at 0 no temperature, however small, overflows.
    highest = jnp.max(logits, axis=-1, keepdims=True)
    tempered = (logits - highest) / jnp.where(is_greedy, 1.0, temperature)[:, None]
    if filters is not None:
        with jax.named_scope("filters"):
            tempered = filter_logits(tempered, *map(jnp.asarray, filters))
    with jax.named_scope("gumbel"):
        noisy = tempered + gumbel_noise(jnp.asarray(noise.seed), positions, logits.shape[-1])
        return jnp.where(is_greedy, greedy_ids, jnp.argmax(noisy, axis=-1).astype(jnp.int32))
