"""The Triton kernel of prefill_attention: a block of query rows of one head against the key blocks that they see.

Which blocks those are, and which of them need no mask, is what `visits` says, found here from the rows' own ranges.

Legend: M query rows, S keys of a block, H head dim.
"""

from typing import no_type_check

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Below every finite score and above those masked: unlike -inf it can be subtracted from itself."""


@triton.jit
@no_type_check
def prefill_kernel(
    q_ptr,  # [T, N, H]
    k_ptr,  # [S, K, H]
    v_ptr,  # [S, K, H]
    k_start_ptr,  # int32 [T]
    k_end_ptr,  # int32 [T]
    num_rows,  # T
    num_keys,  # S
    o_ptr,  # [T, N, H]
    lse_ptr,  # float32 [T, N]: natural
    scale: tl.constexpr,  # of the scores, times log2(e)
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    head_dim: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    """Grid: query heads of a group times query blocks, KV heads.

    Heads of a group run side by side, and the last query blocks, which see most under a causal mask, first.
    """
    num_q_heads: tl.constexpr = num_kv_heads * group_size
    kv_head = tl.program_id(1)
    q_head = kv_head * group_size + tl.program_id(0) % group_size
    q_block = tl.num_programs(0) // group_size - 1 - tl.program_id(0) // group_size

    first_row = q_block * block_q
    row_M = tl.arange(0, block_q)
    is_row_M = first_row + row_M < num_rows
    dim_H = tl.arange(0, head_dim)
    # Of the first row; those of the others fit 32 bits beside it.
    first_offset = first_row.to(tl.int64) * num_q_heads + q_head
    q_offset = row_M[:, None] * (num_q_heads * head_dim) + dim_H[None, :]
    q = tl.load(q_ptr + first_offset * head_dim + q_offset, mask=is_row_M[:, None], other=0.0)
    k_start_M = tl.maximum(tl.load(k_start_ptr + first_row + row_M, mask=is_row_M, other=0), 0)
    k_end_M = tl.minimum(tl.load(k_end_ptr + first_row + row_M, mask=is_row_M, other=0), num_keys)

    has_keys_M = k_end_M > k_start_M
    last_end = tl.max(tl.where(has_keys_M, k_end_M, 0), 0)
    first_key = tl.minimum(tl.min(tl.where(has_keys_M, k_start_M, num_keys), 0), last_end)
    bare_start = tl.max(tl.where(has_keys_M, k_start_M, 0), 0)
    bare_stop = tl.min(tl.where(has_keys_M, k_end_M, num_keys), 0)
    num_blocks = tl.cdiv(last_end - first_key, block_k)
    bare_begin = tl.minimum(tl.cdiv(tl.maximum(bare_start - first_key, 0), block_k), num_blocks)
    bare_end = tl.minimum(tl.maximum((bare_stop - first_key) // block_k, bare_begin), num_blocks)
    num_bare = bare_end - bare_begin

    maximum_M = tl.full([block_q], LOWEST, tl.float32)
    denominator_M = tl.zeros([block_q], tl.float32)
    weighted = tl.zeros([block_q, head_dim], tl.float32)
    k_ptr += kv_head * head_dim
    v_ptr += kv_head * head_dim
    key_S = tl.arange(0, block_k)
    kv_offset = key_S[:, None] * (num_kv_heads * head_dim) + dim_H[None, :]
    for i in tl.range(0, num_blocks - num_bare, num_stages=stages):
        begin = first_key + block_k * (i + tl.where(i < bare_begin, 0, num_bare))
        visible = (begin + key_S[None, :] >= k_start_M[:, None]) & (begin + key_S[None, :] < k_end_M[:, None])
        # What no row sees is not read: it may be NaN, which a weight of zero does not undo. Computed anew, with keys
        # first, it needs no exchange between warps.
        seen = (begin + key_S[:, None] >= k_start_M[None, :]) & (begin + key_S[:, None] < k_end_M[None, :])
        is_seen_S = tl.max(seen.to(tl.int32), 1) > 0
        skipped = begin.to(tl.int64) * (num_kv_heads * head_dim)
        k = tl.load(k_ptr + skipped + kv_offset, mask=is_seen_S[:, None], other=0.0)
        scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        weights, maximum_M, rescale_M = weigh(scores, maximum_M)
        denominator_M = denominator_M * rescale_M + tl.sum(weights, 1)
        v = tl.load(v_ptr + skipped + kv_offset, mask=is_seen_S[:, None], other=0.0)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * rescale_M[:, None])
    for i in tl.range(bare_begin, bare_end, num_stages=stages):
        skipped = (first_key + block_k * i).to(tl.int64) * (num_kv_heads * head_dim)
        k = tl.load(k_ptr + skipped + kv_offset)
        weights, maximum_M, rescale_M = weigh(tl.dot(q, tl.trans(k)) * scale, maximum_M)
        denominator_M = denominator_M * rescale_M + tl.sum(weights, 1)
        v = tl.load(v_ptr + skipped + kv_offset)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * rescale_M[:, None])

    divisor_M = tl.where(has_keys_M, denominator_M, 1.0)
    o = tl.where(has_keys_M[:, None], weighted / divisor_M[:, None], 0.0)
    lse_M = tl.where(has_keys_M, (maximum_M + tl.log2(divisor_M)) * LN_2, float("-inf"))
    tl.store(o_ptr + first_offset * head_dim + q_offset, o.to(o_ptr.dtype.element_ty), mask=is_row_M[:, None])
    tl.store(lse_ptr + first_offset + row_M * num_q_heads, lse_M, mask=is_row_M)


@triton.jit
@no_type_check
def weigh(scores, maximum_M):
    """Weights of a block's values, the new maximum, and what rescales everything so far."""
    new_maximum_M = tl.maximum(maximum_M, tl.max(scores, 1))
    return tl.exp2(scores - new_maximum_M[:, None]), new_maximum_M, tl.exp2(maximum_M - new_maximum_M)
