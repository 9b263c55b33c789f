"""Decode attention in plain jax, with work proportional to the number of keys.

Every row's keys are cut into blocks, and the blocks of all rows form one list. A loop whose trip count is known only at
run time takes a few blocks a step, of one row or of many, and adds them to their rows' running softmax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.einsum import einsum_to_float32
from loongjax.pallas_kernels.online_softmax import SoftmaxState, absorb, empty_state, finish, zero_where_infinite
from loongjax.pallas_kernels.paged_kv import load_pages
from loongjax.pallas_kernels.varying import vary_as, vary_together


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTuning:
    """How much work one step of the loop takes."""

    block_tokens: int = 64
    """Keys of one block; a whole page at least."""
    blocks_per_step: int = 8
    """Blocks of one step."""

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.blocks_per_step < 1:
            raise ConfigError(f"both must be positive, got {self.block_tokens=} and {self.blocks_per_step=}")


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def blockwise_decode_attention(
    q: Float[Array, "B N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: DecodeTuning = DecodeTuning(),
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `decode_attention`."""
    B, N, H = q.shape
    page_size, K, _ = kv_pool.shape[3:]
    num_entries = page_indices.shape[0]
    q, kv_pool, layer, page_indices, page_starts, kv_lens = vary_together(
        q, kv_pool, layer, page_indices, page_starts, kv_lens
    )
    state = vary_as(empty_state((B, K, N // K), H), q)
    if B > 0 and num_entries > 0:
        block_pages = min(max(tuning.block_tokens // page_size, 1), num_entries)
        blocks_per_step = min(tuning.blocks_per_step, B + num_entries // block_pages)
        block_tokens = block_pages * page_size
        num_blocks = (jnp.maximum(kv_lens, 0) + block_tokens - 1) // block_tokens
        block_ends = jnp.cumsum(num_blocks)
        q_BKGH = q.reshape(B, K, N // K, H)

        def step(index: Int32[Array, ""], state: SoftmaxState) -> SoftmaxState:
            items = index * blocks_per_step + jnp.arange(blocks_per_step, dtype=jnp.int32)
            rows = jnp.searchsorted(block_ends, items, side="right", method="compare_all").astype(jnp.int32)
            row_or_any = jnp.minimum(rows, B - 1)
            block_of_row = items - (block_ends - num_blocks)[row_or_any]
            left = jnp.where(rows < B, kv_lens[row_or_any] - block_of_row * block_tokens, 0)
            entries = page_starts[row_or_any] + block_of_row * block_pages
            load = functools.partial(load_pages, kv_pool, layer, page_indices, num_pages=block_pages)
            k, v, exists = jax.vmap(load)(entries, left)
            return _add_to_rows(state, rows, _attend_blocks(q_BKGH[row_or_any], k, v, exists, sm_scale))

        num_steps = (block_ends[-1] + blocks_per_step - 1) // blocks_per_step
        state = jax.lax.fori_loop(0, num_steps, step, state)
    o, lse = finish(state)
    return o.reshape(B, N, H).astype(out_dtype), lse.reshape(B, N)


def _attend_blocks(
    q: Float[Array, "W K G H"],
    k: Float[Array, "W S K H"],
    v: Float[Array, "W S K H"],
    exists: Bool[Array, "W S"],
    sm_scale: float,
) -> SoftmaxState:
    scores = sm_scale * einsum_to_float32("wkgh,wskh->wkgs", q, k)
    scores = jnp.where(exists[:, None, None, :], scores, -jnp.inf)
    nothing = vary_as(empty_state(q.shape[:-1], q.shape[-1]), q)
    return absorb(nothing, scores, jnp.swapaxes(v, 1, 2))


def _add_to_rows(state: SoftmaxState, rows: Int32[Array, "W"], new: SoftmaxState) -> SoftmaxState:
    """Adds W blocks to the rows they belong to; several may belong to one row, and none to rows past the last.

    Blocks of one row all compute that row's sum over all of them, and write the same value.
    """
    old = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), state)
    same_row = (rows[:, None] == rows[None, :])[:, :, None, None]
    maximum = jnp.maximum(old.maximum, jnp.where(same_row, new.maximum[None], -jnp.inf).max(axis=1))
    base = zero_where_infinite(maximum)
    rescale_old = jnp.exp(old.maximum - base)
    rescale_new = jnp.where(same_row, jnp.exp(new.maximum[None] - base[:, None]), 0.0)
    added_values = einsum_to_float32("xykg,ykgh->xkgh", rescale_new, new.weighted_values)
    total = SoftmaxState(
        maximum=maximum,
        denominator=old.denominator * rescale_old + (rescale_new * new.denominator[None]).sum(axis=1),
        weighted_values=old.weighted_values * rescale_old[..., None] + added_values,
    )
    return jax.tree.map(lambda x, rows_of_x: x.at[rows].set(rows_of_x, mode="drop"), state, total)
