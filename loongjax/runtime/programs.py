"""The device programs: what one iteration runs on a group's mesh.

Each is one module-level `jax.jit` around a `jax.shard_map` without a mesh, called under `jax.set_mesh`: another set of
instances of the same size needs no new trace, and everything that tells groups, masters and slots apart is data.
Arrays carry a leading dim n, the group's instances, cut over "sp"; legend: T tokens and B rows of one rank.

`peers` is `GroupExchange.peers`. Without, the same code compiles to XLA's collectives alone. The exchanges of a program
follow from each other: those of a layer from its queries, those of tensor parallelism from the layer's output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, UInt32

from loongjax.pallas_kernels import extend_attention, kv_update, merge_attention, prefill_attention
from loongjax.pallas_kernels.exchange import all_reduce, exchange_status
from loongjax.pallas_kernels.graph_boundary import end_graph
from loongjax.parallel import RING_COMPILER_OPTIONS, multi_master_decode, ring_attention
from loongjax.parallel.mesh import SP_AXIS, TP_AXIS
from loongjax.parallel.retention import retain
from loongjax.parallel.striped import visible_ranges
from loongjax.runtime.kv_pool import KV_POOL_SPEC
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.sampling import LogprobArrays, prompt_logprobs

BY_RANK = PartitionSpec(SP_AXIS)
BY_DEVICE = PartitionSpec((SP_AXIS, TP_AXIS))
LOGITS_SPEC = PartitionSpec(SP_AXIS, None, TP_AXIS)
REPLICATED = PartitionSpec()

LAYERS_PER_GRAPH = 4
"""Of prefills and extends, so that devices start on the first while the host prepares the others. Decodes are one:
most are submitted long before the devices come to them, and graphs follow each other later than kernels in one do."""

MIGRATION_BUCKET = 256
"""Tokens that one migration program moves."""

Leaf = Any
"""An array: packed on the host, put on devices, or only described."""

Weights = tuple[jax.Array, ...]
KVPoolView = Float[Array, "n L 2 P page_size K H"]
Peers = UInt32[Array, "n tp 3"] | None


class PrefillBatch(NamedTuple):
    """A packed batch in the striped layout: packed token i is row i // n of rank i mod n."""

    token_ids: Leaf
    """int32 [n, T]"""
    positions: Leaf
    """int32 [n, T]: within the row's own request."""
    row_starts: Leaf
    """int32 [n, T]: packed index of the first token of the row's request; for padding see `parallel.striped`."""
    kept_slots: Leaf
    """int32 [n, n, T] by keeper, source rank and row: the keeper's slot for the token, or -1."""
    sample_rows: Leaf
    """int32 [n, n * R]: for each row to be sampled, its index on the rank that has it, -1 on all others. Column
    rank * R + i is the i-th row that `rank` will sample, wherever its token is."""


class ExtendBatch(NamedTuple):
    """Chunks packed one behind the other, on one instance: n is 1. B requests."""

    token_ids: Leaf
    """int32 [n, T]"""
    positions: Leaf
    """int32 [n, T]: within the row's own request."""
    row_starts: Leaf
    """int32 [n, T]: packed index of the first token of the row's chunk; for padding see `parallel.striped`."""
    slots: Leaf
    """int32 [n, T]: where each row's key is kept, or -1."""
    cu_q_lens: Leaf
    """int32 [n, B + 1]: packed index at which each request's chunk begins, and the next one's."""
    kv_lens: Leaf
    """int32 [n, B]: keys that the pool holds of each request, before the chunk's own."""
    page_starts: Leaf
    """int32 [n, B]: index in `page_indices` of each request's first page."""
    page_indices: Leaf
    """int32 [n, I]"""
    sample_rows: Leaf
    """int32 [n, R]: the packed index of each row to be sampled, or -1."""


class DecodeState(NamedTuple):
    """What the devices hold of a decode between steps: a cache of host truth. Rows of all masters: b + B * master."""

    positions: Leaf
    """int32 [n, B]: of the next input token."""
    kv_lens: Leaf
    """int32 [n, n * B]: keys that this instance holds of every master's rows, before the step's own."""
    page_starts: Leaf
    """int32 [n, n * B]: index in `page_indices` of each row's first page."""
    page_indices: Leaf
    """int32 [n, I]"""


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="kv_pool", compiler_options=RING_COMPILER_OPTIONS)
def prefill_step(
    spec: ModelSpec, weights: Weights, kv_pool: KVPoolView, batch: PrefillBatch, peers: Peers = None
) -> tuple[KVPoolView, Float[Array, "n T D"], Float[Array, "n R D"], Int32[Array, " n_tp"] | None]:
    """Ring-attention prefill; each instance keeps the keys that `kept_slots` gives it. Donates `kv_pool`.

    Returns:
        The pool, the final hidden states, those of the rows to be sampled, on the ranks that will, and the status of
        every device's exchanges if there are peers.
    """

    def body(
        weights: Weights, kv_pool: jax.Array, batch: PrefillBatch, peers: Peers
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        batch = _drop_rank_dim(batch)

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array) -> tuple[jax.Array, Any]:
            q = _cut_graph(layer, q)

            def visit(source_rank: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array) -> jax.Array:
                return retain(pool, jnp.int32(layer), batch.kept_slots, source_rank, k, v)

            out, _, pool = ring_attention(q, k, v, batch.row_starts, axis_name=SP_AXIS, visit=visit, carry=pool)
            return out, pool

        model = spec.restore(weights)
        hidden, pool = model.hidden(batch.token_ids, batch.positions, attend, kv_pool[0], reduce=_sum_over_tp(peers))
        is_here = (batch.sample_rows >= 0)[:, None]
        picked = jnp.where(is_here, hidden[jnp.maximum(batch.sample_rows, 0)], jnp.zeros((), hidden.dtype))
        picked = jax.lax.psum_scatter(picked, SP_AXIS, scatter_dimension=0, tiled=True)
        status = None if peers is None else exchange_status(hidden, peers)
        return pool[None], hidden[None], picked[None], status

    return jax.shard_map(
        body,
        in_specs=(spec.weight_specs, KV_POOL_SPEC, BY_RANK, REPLICATED),
        out_specs=(KV_POOL_SPEC, BY_RANK, BY_RANK, BY_DEVICE),
        check_vma=False,
    )(weights, kv_pool, batch, peers)


@functools.partial(jax.jit, static_argnames=("spec", "num_rows"))
def head_step(spec: ModelSpec, weights: Weights, hidden: Float[Array, "n R D"], num_rows: int) -> Float[Array, "n B V"]:
    """Logits of the first B = `num_rows` rows of each rank."""

    def body(weights: Weights, hidden: jax.Array) -> jax.Array:
        return spec.restore(weights).logits(hidden[0, :num_rows])[None]

    return jax.shard_map(body, in_specs=(spec.weight_specs, BY_RANK), out_specs=LOGITS_SPEC, check_vma=False)(
        weights, hidden
    )


@functools.partial(jax.jit, static_argnames="spec")
def prompt_logprobs_step(
    spec: ModelSpec, weights: Weights, hidden: Float[Array, "n T D"], target_ids: Int32[Array, "n T"]
) -> LogprobArrays:
    """Scores the token after each of a prefill's rows; arrays [n, T, ...].

    Args:
        spec: the model.
        weights: its weights.
        hidden: a prefill's hidden states.
        target_ids: the token that follows each row's; -1 where none is to be scored.
    """

    def body(weights: Weights, hidden: jax.Array, target_ids: jax.Array) -> LogprobArrays:
        logits_fn = spec.restore(weights).logits
        scores = prompt_logprobs(hidden[0], target_ids[0], logits_fn, axis_name=TP_AXIS)
        return jax.tree.map(lambda leaf: leaf[None], scores)

    return jax.shard_map(body, in_specs=(spec.weight_specs, BY_RANK, BY_RANK), out_specs=BY_RANK, check_vma=False)(
        weights, hidden, target_ids
    )


@functools.partial(jax.jit, static_argnames="spec", donate_argnames=("kv_pool", "state"))
def decode_step(
    spec: ModelSpec,
    weights: Weights,
    kv_pool: KVPoolView,
    state: DecodeState,
    token_ids: Int32[Array, "n B"],
    slots: Int32[Array, "n B"],
    peers: Peers = None,
) -> tuple[KVPoolView, DecodeState, Float[Array, "n B V"]]:
    """One multi-master decode step. Donates `kv_pool` and `state`.

    How its exchanges went, the sampler's program behind it will say: a status stays until it is reset.

    Args:
        spec: the model.
        weights: its weights.
        kv_pool: the group's view of the pool.
        state: as the previous step left it.
        token_ids: each master's input tokens.
        slots: where the master keeps each row's new key; -1 marks padding rows.
        peers: as for all programs.

    Returns:
        The pool, the state for the next step, and the logits.
    """
    page_size = kv_pool.shape[4]

    def body(
        weights: Weights,
        kv_pool: jax.Array,
        state: DecodeState,
        token_ids: jax.Array,
        slots: jax.Array,
        peers: Peers,
    ) -> tuple[jax.Array, DecodeState, jax.Array]:
        state, token_ids, slots = _drop_rank_dim((state, token_ids, slots))
        state = _append_rows(state, slots, page_size)

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array) -> tuple[jax.Array, Any]:
            index = jnp.int32(layer)
            pool = kv_update(pool, k, v, index, slots)
            out, _ = multi_master_decode(
                q, pool, index, state.page_indices, state.page_starts, state.kv_lens, axis_name=SP_AXIS, peers=peers
            )
            return out, pool

        model = spec.restore(weights)
        hidden, pool = model.hidden(token_ids, state.positions, attend, kv_pool[0], reduce=_sum_over_tp(peers))
        state = state._replace(positions=state.positions + 1)
        return pool[None], jax.tree.map(lambda leaf: leaf[None], state), model.logits(hidden)[None]

    return jax.shard_map(
        body,
        in_specs=(spec.weight_specs, KV_POOL_SPEC, BY_RANK, BY_RANK, BY_RANK, REPLICATED),
        out_specs=(KV_POOL_SPEC, BY_RANK, LOGITS_SPEC),
        check_vma=False,
    )(weights, kv_pool, state, token_ids, slots, peers)


@jax.jit
def await_step(
    token_ids: Int32[Array, "n rows"], sources: Int32[Array, "n rows"], sampled: Int32[Array, "n R"]
) -> Int32[Array, "n rows"]:
    """Input tokens of which the iteration right before samples some, on whatever rank.

    Args:
        token_ids: those that the host knows.
        sources: for all others, rank * R + row of the sampled one; -1 for those that the host knows.
        sampled: by the iteration before.
    """

    def body(token_ids: jax.Array, sources: jax.Array, sampled: jax.Array) -> jax.Array:
        everybodys = jax.lax.all_gather(sampled[0], SP_AXIS, tiled=True)
        return jnp.where(sources >= 0, everybodys[jnp.maximum(sources, 0)], token_ids)

    return jax.shard_map(body, in_specs=BY_RANK, out_specs=BY_RANK, check_vma=False)(token_ids, sources, sampled)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="kv_pool")
def extend_step(
    spec: ModelSpec, weights: Weights, kv_pool: KVPoolView, batch: ExtendBatch, peers: Peers = None
) -> tuple[KVPoolView, Float[Array, "n R D"], Int32[Array, " n_tp"] | None]:
    """Chunks of requests that follow the keys which one instance holds of them, and keys there. Donates `kv_pool`.

    Returns:
        The pool, the final hidden states of the rows to be sampled, and the status of every device's exchanges if there
        are peers.
    """

    def body(
        weights: Weights, kv_pool: jax.Array, batch: ExtendBatch, peers: Peers
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        batch = _drop_rank_dim(batch)
        k_start, k_end = visible_ranges(batch.row_starts, 0, 0, 1)

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array) -> tuple[jax.Array, Any]:
            q = _cut_graph(layer, q)
            index = jnp.int32(layer)
            # First, so that whoever reads the pool reads the one that is updated in place.
            pool = kv_update(pool, k, v, index, batch.slots)
            tables = batch.page_indices, batch.page_starts, batch.kv_lens
            past = extend_attention(q, batch.cu_q_lens, pool, index, *tables, out_dtype=jnp.float32)
            own = prefill_attention(q, k, v, k_start, k_end, out_dtype=jnp.float32)
            out, _ = merge_attention(*past, *own)
            return out.astype(q.dtype), pool

        model = spec.restore(weights)
        hidden, pool = model.hidden(batch.token_ids, batch.positions, attend, kv_pool[0], reduce=_sum_over_tp(peers))
        picked = hidden[jnp.maximum(batch.sample_rows, 0)]
        status = None if peers is None else exchange_status(hidden, peers)
        return pool[None], picked[None], status

    return jax.shard_map(
        body,
        in_specs=(spec.weight_specs, KV_POOL_SPEC, BY_RANK, REPLICATED),
        out_specs=(KV_POOL_SPEC, BY_RANK, BY_DEVICE),
        check_vma=False,
    )(weights, kv_pool, batch, peers)


@functools.partial(jax.jit, donate_argnames="kv_pool")
def migrate_step(
    kv_pool: KVPoolView, source_slots: Int32[Array, "n M"], target_slots: Int32[Array, "n M"]
) -> tuple[KVPoolView, Int32[Array, "n M"]]:
    """Copies keys and values between the two instances of a group. Donates `kv_pool`.

    Args:
        kv_pool: the pair's view of the pool.
        source_slots: on the source its slots, elsewhere anything in range.
        target_slots: on the target its slots, -1 everywhere else and for padding.

    Returns:
        The pool, and an array that is ready when the copy is done, which the pool's next donation leaves alone.
    """

    def body(kv_pool: jax.Array, source_slots: jax.Array, target_slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        pool, source_slots, target_slots = kv_pool[0], source_slots[0], target_slots[0]
        page_size = pool.shape[3]
        sent = pool[:, :, source_slots // page_size, source_slots % page_size]
        received = jax.lax.ppermute(sent, SP_AXIS, [(0, 1), (1, 0)])
        pages = jnp.where(target_slots >= 0, target_slots // page_size, pool.shape[2])
        pool = pool.at[:, :, pages, target_slots % page_size].set(received, mode="drop")
        return pool[None], pages[None]

    return jax.shard_map(
        body, in_specs=(KV_POOL_SPEC, BY_RANK, BY_RANK), out_specs=(KV_POOL_SPEC, BY_RANK), check_vma=False
    )(kv_pool, source_slots, target_slots)


def _sum_over_tp(peers: Peers) -> Callable[[jax.Array], jax.Array]:
    return functools.partial(all_reduce, axis_name=TP_AXIS, peers=peers)


def _append_rows(state: DecodeState, slots: Int32[Array, " B"], page_size: int) -> DecodeState:
    """This step's keys enter the tables of the rows that this rank masters."""
    num_rows = slots.shape[0]
    is_live = slots >= 0
    rows = jax.lax.axis_index(SP_AXIS) * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
    entry = state.page_starts[rows] + state.kv_lens[rows] // page_size
    entry = jnp.where(is_live, entry, state.page_indices.shape[0])
    return state._replace(
        page_indices=state.page_indices.at[entry].set(slots // page_size, mode="drop"),
        kv_lens=state.kv_lens.at[rows].add(is_live.astype(jnp.int32)),
    )


def _drop_rank_dim(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _cut_graph(layer: int, q: jax.Array) -> jax.Array:
    """Ends a CUDA graph at the queries of every `LAYERS_PER_GRAPH`th layer, on a single device.

    Among several a ring ends graphs already, and the cut's kernel, which is loaded when it is launched for the first
    time, could meet kernels that wait for another device.
    """
    is_alone = jax.lax.axis_size(SP_AXIS) * jax.lax.axis_size(TP_AXIS) == 1
    return end_graph(q) if is_alone and layer % LAYERS_PER_GRAPH == LAYERS_PER_GRAPH - 1 else q
