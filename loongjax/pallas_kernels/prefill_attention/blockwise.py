"""Blockwise attention in plain jax: by blocks of queries, and for each only the key blocks that one of its rows sees.

The backward pass recomputes the scores from the log-sum-exp (FlashAttention-2, arXiv:2307.08691, algorithm 2). With
p = exp(s - lse), and do and dlse the cotangents of o and lse:

    dv = p^T do,    ds = p * (do v^T - rowsum(do * o) + dlse),    dq = sm_scale * ds k,    dk = sm_scale * ds^T q
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.einsum import einsum_to_float32
from loongjax.pallas_kernels.online_softmax import SoftmaxState, absorb, empty_state, finish
from loongjax.pallas_kernels.varying import vary_as, vary_together


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """How much of the score matrix exists at a time."""

    block_q: int = 128
    """Query rows."""
    block_k: int = 256
    """Keys."""

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1:
            raise ConfigError(f"block sizes must be positive, got {self.block_q=} and {self.block_k=}")


class RowRanges(NamedTuple):
    """Which keys each of the R rows of a block of queries sees. Its rows are (token, head in group), token-major."""

    k_start: Int32[Array, "*blocks R"]
    k_end: Int32[Array, "*blocks R"]

    @property
    def has_keys(self) -> Bool[Array, "*blocks R"]:
        return self.k_end > self.k_start


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "block_sizes"))
def blockwise_prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    block_sizes: BlockSizes = BlockSizes(),
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `prefill_attention`."""
    T, N, H = q.shape
    S, K, _ = k.shape
    q, k, v, k_start, k_end = vary_together(q, k, v, k_start, k_end)
    if T == 0 or S == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, q)
    block_q = min(block_sizes.block_q, T)
    block_k = min(block_sizes.block_k, S)
    ranges = _split_ranges(jnp.maximum(k_start, 0), jnp.minimum(k_end, S), block_q, N // K)
    o, lse = _attend(sm_scale, block_k, _split(q, block_q, K), ranges, k, v)
    return _join(o, block_q)[:T].astype(out_dtype), _join(lse[..., None], block_q)[:T, :, 0]


def _split(q: Float[Array, "T N H"], block_q: int, num_kv_heads: int) -> Float[Array, "blocks K R H"]:
    T, N, H = q.shape
    q = jnp.pad(q, ((0, -T % block_q), (0, 0), (0, 0)))
    blocks = q.reshape(-1, block_q, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(blocks.shape[0], num_kv_heads, -1, H)


def _split_ranges(k_start: Int32[Array, "T"], k_end: Int32[Array, "T"], block_q: int, group_size: int) -> RowRanges:
    def rows(bound: Int32[Array, "T"]) -> Int32[Array, "blocks R"]:
        padded = jnp.pad(bound, (0, -bound.shape[0] % block_q))
        return jnp.repeat(padded, group_size).reshape(-1, block_q * group_size)

    return RowRanges(rows(k_start), rows(k_end))


def _join(blocks: Float32[Array, "blocks K R H"], block_q: int) -> Float32[Array, "padded_T N H"]:
    num_blocks, K, R, H = blocks.shape
    tokens = blocks.reshape(num_blocks, K, block_q, R // block_q, H).transpose(0, 2, 1, 3, 4)
    return tokens.reshape(num_blocks * block_q, K * (R // block_q), H)


def _attend_blocks(
    sm_scale: float,
    block_k: int,
    q: Float[Array, "blocks K R H"],
    ranges: RowRanges,
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
) -> tuple[Float32[Array, "blocks K R H"], Float32[Array, "blocks K R"]]:
    def attend_block(block: tuple[Array, RowRanges]) -> tuple[Float32[Array, "K R H"], Float32[Array, "K R"]]:
        q, ranges = block

        def absorb_block(key_block: KeyBlock, state: SoftmaxState) -> SoftmaxState:
            return absorb(state, _scores(sm_scale, q, key_block), jnp.swapaxes(key_block.v, 0, 1))

        state = vary_as(empty_state(q.shape[:-1], q.shape[-1]), q)
        return finish(_visit_key_blocks(block_k, ranges, k, v, absorb_block, state))

    return jax.lax.map(attend_block, (q, ranges))


def _attend_forward(sm_scale, block_k, q, ranges, k, v):
    o, lse = _attend_blocks(sm_scale, block_k, q, ranges, k, v)
    return (o, lse), (q, ranges, k, v, o, lse)


def _attend_backward(sm_scale, block_k, residuals, cotangents):
    q, ranges, k, v, o, lse = residuals
    do, dlse = cotangents
    # Added to every score's cotangent alike: what the normalisation and the log-sum-exp pass back.
    shift = dlse - (do * o).sum(axis=-1)

    def block_backward(dkv, inputs):
        q, ranges, lse, do, shift = inputs
        has_keys = ranges.has_keys[None, :]
        q = jnp.where(has_keys[..., None], q, jnp.zeros((), q.dtype))
        base = jnp.where(has_keys, lse, 0.0)
        do = do.astype(v.dtype)

        def add_block(key_block: KeyBlock, gradients):
            dq, dk, dv = gradients
            p = jnp.exp(_scores(sm_scale, q, key_block) - base[..., None])
            dp = einsum_to_float32("krh,skh->krs", do, key_block.v)
            ds = (sm_scale * p * (dp + shift[..., None])).astype(k.dtype)
            dq = dq + einsum_to_float32("krs,skh->krh", ds, key_block.k)
            dk = _add_at(dk, key_block.begin, einsum_to_float32("krs,krh->skh", ds, q))
            dv = _add_at(dv, key_block.begin, einsum_to_float32("krs,krh->skh", p.astype(v.dtype), do))
            return dq, dk, dv

        nothing = jnp.zeros_like(q, dtype=jnp.float32)
        dq, dk, dv = _visit_key_blocks(block_k, ranges, k, v, add_block, (nothing, *dkv))
        return (dk, dv), dq

    nothing = jnp.zeros_like(k, dtype=jnp.float32), jnp.zeros_like(v, dtype=jnp.float32)
    (dk, dv), dq = jax.lax.scan(block_backward, vary_as(nothing, k), (q, ranges, lse, do, shift))
    return dq.astype(q.dtype), None, dk.astype(k.dtype), dv.astype(v.dtype)


_attend = jax.custom_vjp(_attend_blocks, nondiff_argnums=(0, 1))
_attend.defvjp(_attend_forward, _attend_backward)


class KeyBlock(NamedTuple):
    """A block of keys. Those that no row of the query block sees are zero."""

    begin: Int32[Array, ""]
    """Index of its first key."""
    k: Float[Array, "block_k K H"]
    v: Float[Array, "block_k K H"]
    visible: Bool[Array, "R block_k"]
    """Each key is visible in one block only, even where the last block reaches back into the one before."""


def _visit_key_blocks[State](
    block_k: int,
    ranges: RowRanges,
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    visit: Callable[[KeyBlock, State], State],
    state: State,
) -> State:
    """Folds `visit` over the key blocks of which some row of the query block sees a key."""
    S = k.shape[0]
    first = jnp.where(ranges.has_keys, ranges.k_start, S).min() // block_k
    end = (jnp.where(ranges.has_keys, ranges.k_end, 0).max() + block_k - 1) // block_k

    def visit_if_seen(index, state):
        begin = jnp.minimum(index * block_k, S - block_k)
        position = (begin + jnp.arange(block_k, dtype=jnp.int32))[None, :]
        k_start = jnp.maximum(ranges.k_start, index * block_k)
        visible = (position >= k_start[:, None]) & (position < ranges.k_end[:, None])

        def visit_block(state):
            seen = visible.any(axis=0)[:, None, None]
            load = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=block_k)
            key_block, value_block = (jnp.where(seen, load(x), jnp.zeros((), x.dtype)) for x in (k, v))
            return visit(KeyBlock(begin, key_block, value_block, visible), state)

        return jax.lax.cond(visible.any(), visit_block, lambda state: state, state)

    return jax.lax.fori_loop(first, end, visit_if_seen, state)


def _scores(sm_scale: float, q: Float[Array, "K R H"], key_block: KeyBlock) -> Float32[Array, "K R block_k"]:
    scores = sm_scale * einsum_to_float32("krh,skh->krs", q, key_block.k)
    return jnp.where(key_block.visible[None], scores, -jnp.inf)


def _add_at(
    total: Float32[Array, "S K H"], begin: Int32[Array, ""], block: Float32[Array, "block_k K H"]
) -> Float32[Array, "S K H"]:
    current = jax.lax.dynamic_slice_in_dim(total, begin, block.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, current + block, begin, axis=0)
