"""The sampler's programs over a mesh, apart from the model's, so that their executables add up and do not multiply.

They run under `jax.set_mesh` with axes "sp" and "tp": another mesh of the same shape costs no new trace.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, UInt32

from loongjax.pallas_kernels.exchange import all_gather, exchange_status
from loongjax.parallel.mesh import SP_AXIS, TP_AXIS
from loongjax.runtime.sampling.counts import TokenCounts, TokenHistory, count_history, token_histories
from loongjax.runtime.sampling.rows import SamplerRows
from loongjax.runtime.sampling.sample import SampleResult, sample
from loongjax.runtime.sampling.variant import SamplerInput, SamplerVariant

_BY_RANK = PartitionSpec(SP_AXIS)
_BY_DEVICE = PartitionSpec((SP_AXIS, TP_AXIS))
_LOGITS = PartitionSpec(SP_AXIS, None, TP_AXIS)


@functools.partial(jax.jit, static_argnames="variant", donate_argnames="counts")
def sample_step(
    variant: SamplerVariant,
    logits: Float[Array, "n B V"],
    positions: Int32[Array, "n B"],
    rows: SamplerRows,
    counts: TokenCounts | None = None,
    peers: UInt32[Array, "n tp 3"] | None = None,
) -> SampleResult:
    """Samples a token for each row of each rank, as `sample` says; every "tp" rank computes the same. Donates `counts`.

    Args:
        variant: what is compiled in.
        logits: the vocabulary cut over "tp".
        positions: of the tokens to sample.
        rows: from `build_rows`, for this variant.
        counts: from `build_counts` or the step before; None unless the variant holds penalties.
        peers: `PeerMemory.table` of the mesh, or None.
    """
    assert (rows.penalties is not None) == variant.has_penalties == (counts is not None), variant

    def body(
        logits: jax.Array, positions: jax.Array, rows: SamplerRows, counts: TokenCounts | None, peers: jax.Array | None
    ) -> tuple[SampleResult, jax.Array | None]:
        positions, rows, counts = _drop_rank_dim((positions, rows, counts))
        shards = all_gather(logits[0], TP_AXIS, peers)
        whole = jnp.moveaxis(shards, 0, 1).reshape(logits.shape[1], -1)
        result = sample(whole, positions, rows, counts, with_logprobs=variant.has_logprobs)
        status = None if peers is None else exchange_status(result.token_ids, peers)
        return _add_rank_dim(result), status

    result, status = jax.shard_map(
        body,
        in_specs=(_LOGITS, _BY_RANK, _BY_RANK, _BY_RANK, PartitionSpec()),
        out_specs=(_BY_RANK, _BY_DEVICE),
        check_vma=False,
    )(logits, positions, rows, counts, peers)
    return result._replace(exchange_status=status)


def build_counts(sub_batches: Sequence[Sequence[SamplerInput]], batch_size: int, vocab_size: int) -> TokenCounts:
    """The counts of a batch, made on the devices of the mesh in use.

    Args:
        sub_batches: the requests of each "sp" rank, as for `build_rows`.
        batch_size: B, the bucket.
        vocab_size: V, padding included.
    """
    counts = zero_counts(batch_size, vocab_size)
    for history in token_histories(sub_batches, batch_size):
        counts = count_step(counts, history)
    return counts


@functools.partial(jax.jit, static_argnames=("batch_size", "vocab_size"))
def zero_counts(batch_size: int, vocab_size: int) -> TokenCounts:
    """Counts of rows that have seen nothing."""

    def body() -> TokenCounts:
        shape = (1, batch_size, vocab_size)
        return TokenCounts(output=jnp.zeros(shape, jnp.int32), in_prompt=jnp.zeros(shape, jnp.bool_))

    return jax.shard_map(body, in_specs=(), out_specs=_BY_RANK, check_vma=False)()


@functools.partial(jax.jit, donate_argnames="counts")
def count_step(counts: TokenCounts, history: TokenHistory) -> TokenCounts:
    """Adds one history, from `token_histories`. Donates `counts`."""

    def body(counts: TokenCounts, history: TokenHistory) -> TokenCounts:
        return _add_rank_dim(count_history(*_drop_rank_dim((counts, history))))

    return jax.shard_map(body, in_specs=_BY_RANK, out_specs=_BY_RANK, check_vma=False)(counts, history)


def _drop_rank_dim(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _add_rank_dim(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)
