"""Extend attention in plain jax, with work proportional to the number of (query block, key block) pairs there are.

Every request's queries are cut into blocks, and a loop whose trip count is known only at run time takes one block a
step, running over that request's keys page by page.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.einsum import einsum_to_float32
from loongjax.pallas_kernels.online_softmax import SoftmaxState, absorb, empty_state, finish
from loongjax.pallas_kernels.paged_kv import load_pages
from loongjax.pallas_kernels.varying import vary_as, vary_together


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendTuning:
    """How much of the score matrix exists at a time."""

    block_q: int = 64
    """Query tokens."""
    block_tokens: int = 256
    """Keys; a whole page at least."""

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_tokens < 1:
            raise ConfigError(f"both must be positive, got {self.block_q=} and {self.block_tokens=}")


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def blockwise_extend_attention(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: ExtendTuning = ExtendTuning(),
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `extend_attention`."""
    T, N, H = q.shape
    (B,) = kv_lens.shape
    num_entries = page_indices.shape[0]
    page_size, K, _ = kv_pool.shape[3:]
    q, cu_q_lens, kv_pool, layer, page_indices, page_starts, kv_lens = vary_together(
        q, cu_q_lens, kv_pool, layer, page_indices, page_starts, kv_lens
    )
    block_q = min(tuning.block_q, T)
    # The last block of queries may reach past the end.
    o = vary_as(jnp.zeros((T + block_q, N, H), out_dtype), q)
    lse = vary_as(jnp.full((T + block_q, N), -jnp.inf, jnp.float32), q)
    if T == 0 or B == 0 or num_entries == 0:
        return o[:T], lse[:T]
    padded_q = jnp.pad(q, ((0, block_q), (0, 0), (0, 0)))
    block_pages = min(max(tuning.block_tokens // page_size, 1), num_entries)
    block_tokens = block_pages * page_size
    num_blocks = jnp.where(kv_lens > 0, (jnp.diff(cu_q_lens) + block_q - 1) // block_q, 0)
    block_ends = jnp.cumsum(num_blocks)

    def attend_request(q_block: Float[Array, "block_q N H"], request: Int32[Array, ""]) -> SoftmaxState:
        rows = q_block.reshape(block_q, K, N // K, H).transpose(1, 0, 2, 3).reshape(K, -1, H)

        def absorb_block(index: Int32[Array, ""], state: SoftmaxState) -> SoftmaxState:
            left = kv_lens[request] - index * block_tokens
            entry = page_starts[request] + index * block_pages
            k, v, exists = load_pages(kv_pool, layer, page_indices, entry, left, num_pages=block_pages)
            scores = sm_scale * einsum_to_float32("krh,skh->krs", rows, k)
            return absorb(state, jnp.where(exists[None, None, :], scores, -jnp.inf), jnp.swapaxes(v, 0, 1))

        state = vary_as(empty_state(rows.shape[:-1], H), rows)
        num_key_blocks = (kv_lens[request] + block_tokens - 1) // block_tokens
        return jax.lax.fori_loop(0, num_key_blocks, absorb_block, state)

    def step(index: Int32[Array, ""], outputs):
        request = jnp.searchsorted(block_ends, index, side="right", method="compare_all").astype(jnp.int32)
        block_of_request = index - (block_ends - num_blocks)[request]
        begin = cu_q_lens[request] + block_of_request * block_q
        is_own = begin + jnp.arange(block_q, dtype=jnp.int32) < cu_q_lens[request + 1]
        q_block = jax.lax.dynamic_slice_in_dim(padded_q, begin, block_q)
        o_rows, lse_rows = finish(attend_request(q_block, request))
        new = _to_tokens(o_rows, block_q).astype(out_dtype), _to_tokens(lse_rows[..., None], block_q)[..., 0]
        return tuple(_write_own_rows(x, begin, is_own, y) for x, y in zip(outputs, new, strict=True))

    o, lse = jax.lax.fori_loop(0, block_ends[-1], step, (o, lse))
    return o[:T], lse[:T]


def _to_tokens(rows: Float32[Array, "K R H"], block_q: int) -> Float32[Array, "block_q N H"]:
    K, R, H = rows.shape
    return rows.reshape(K, block_q, R // block_q, H).transpose(1, 0, 2, 3).reshape(block_q, -1, H)


def _write_own_rows(output: Array, begin: Array, is_own: Array, block: Array) -> Array:
    """Rows of the block that belong to the next request keep what they have."""
    current = jax.lax.dynamic_slice_in_dim(output, begin, block.shape[0])
    own = is_own.reshape(-1, *[1] * (block.ndim - 1))
    return jax.lax.dynamic_update_slice_in_dim(output, jnp.where(own, block, current), begin, axis=0)
