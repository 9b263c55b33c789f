"""The two Triton kernels of decode attention: equal shares of the work, and the merge of rows that were cut.

The work is a line of items, an item being one block of keys: rows in order, in each row its blocks. Every share is the
same number of consecutive items, whatever rows they belong to, so one long row fills the GPU as well as many short
ones; each KV head has a program for every share, and those that run beside each other read the same tokens. A row that
lies in one share is finished there. Of a row that is cut, every share leaves a partial result: share s's of row b is
number s + b, which no other is, since both only grow along the line.

Legend: M query heads of one KV head, padded to what a matrix product takes; S keys of a block, W shares at a time, R
rows at a time, H head dim.
"""

from typing import no_type_check

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def attend_kernel(
    q_ptr,  # [B, N, H]
    kv_pool_ptr,  # [L, 2, P, page_size, K, H]
    layer_ptr,  # int32 [1]
    page_indices_ptr,  # int32 [I]
    page_starts_ptr,  # int32 [B]
    kv_lens_ptr,  # int32 [B]
    num_rows,  # B
    num_pages,  # P
    o_ptr,  # [B, N, H]: of rows that are not cut
    lse_ptr,  # float32 [B, N]: natural, likewise
    partial_o_ptr,  # float32 [num_shares + B, N, H]: normalised
    partial_lse_ptr,  # float32 [num_shares + B, N]: base 2
    scale: tl.constexpr,  # of the scores, times log2(e)
    num_shares: tl.constexpr,
    padded_rows: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Grid: KV heads, shares."""
    head = tl.program_id(0)
    share = tl.program_id(1)
    all_rows = tl.arange(0, padded_rows)
    all_lens = tl.load(kv_lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
    all_starts = tl.load(page_starts_ptr + all_rows, mask=all_rows < num_rows, other=0)
    layer = tl.load(layer_ptr).to(tl.int64)
    all_blocks = (tl.maximum(all_lens, 0) + block - 1) // block
    all_ends = tl.cumsum(all_blocks, 0)
    num_items = tl.sum(all_blocks, 0)
    quota = (num_items + num_shares - 1) // num_shares
    item = share * quota
    end = tl.minimum(item + quota, num_items)

    member_M = tl.arange(0, padded_group)
    is_member = member_M < group_size
    dim_H = tl.arange(0, head_dim)
    key_S = tl.arange(0, block)
    k_ptr = kv_pool_ptr + 2 * layer * num_pages * (page_size * num_kv_heads * head_dim) + head * head_dim
    v_ptr = k_ptr + num_pages.to(tl.int64) * (page_size * num_kv_heads * head_dim)
    while item < end:
        row = tl.sum((all_ends <= item).to(tl.int32), 0)
        is_row = all_rows == row
        kv_len = tl.sum(tl.where(is_row, all_lens, 0), 0)
        page_start = tl.sum(tl.where(is_row, all_starts, 0), 0)
        row_blocks = (kv_len + block - 1) // block
        first_block = item - (tl.sum(tl.where(is_row, all_ends, 0), 0) - row_blocks)
        end_block = tl.minimum(first_block + end - item, row_blocks)

        q_head_M = row * (num_kv_heads * group_size) + head * group_size + member_M
        q_offset = q_head_M[:, None] * head_dim + dim_H[None, :]
        q = tl.load(q_ptr + q_offset, mask=is_member[:, None], other=0.0)
        maximum = tl.full([padded_group], float("-inf"), tl.float32)
        denominator = tl.zeros([padded_group], tl.float32)
        weighted = tl.zeros([padded_group, head_dim], tl.float32)
        for i in tl.range(first_block, end_block, num_stages=stages):
            token_S = i * block + key_S
            is_key = token_S < kv_len
            page_S = tl.load(page_indices_ptr + page_start + token_S // page_size, mask=is_key, other=0)
            slot_S = page_S.to(tl.int64) * page_size + token_S % page_size
            offset = slot_S[:, None] * (num_kv_heads * head_dim) + dim_H[None, :]
            k = tl.load(k_ptr + offset, mask=is_key[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            rescale = tl.exp2(maximum - new_maximum)
            weights = tl.exp2(scores - new_maximum[:, None])
            denominator = denominator * rescale + tl.sum(weights, 1)
            v = tl.load(v_ptr + offset, mask=is_key[:, None], other=0.0)
            weighted = weighted * rescale[:, None] + tl.dot(weights.to(v.dtype), v)
            maximum = new_maximum

        o = weighted / denominator[:, None]
        lse = maximum + tl.log2(denominator)
        if end_block - first_block == row_blocks:
            tl.store(o_ptr + q_offset, o.to(o_ptr.dtype.element_ty), mask=is_member[:, None])
            tl.store(lse_ptr + q_head_M, lse * LN_2, mask=is_member)
        else:
            partial_M = q_head_M + share * (num_kv_heads * group_size)
            tl.store(partial_o_ptr + partial_M[:, None] * head_dim + dim_H[None, :], o, mask=is_member[:, None])
            tl.store(partial_lse_ptr + partial_M, lse, mask=is_member)
        item += end_block - first_block


@triton.jit
@no_type_check
def merge_kernel(
    kv_lens_ptr,  # int32 [B]
    partial_o_ptr,  # float32 [num_shares + B, N, H]
    partial_lse_ptr,  # float32 [num_shares + B, N]
    unmerged_o_ptr,  # what `o_ptr` already holds: the same memory
    unmerged_lse_ptr,
    num_rows,  # B
    o_ptr,  # [B, N, H]
    lse_ptr,  # float32 [B, N]: natural
    num_shares: tl.constexpr,
    padded_rows: tl.constexpr,
    num_q_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    shares_per_step: tl.constexpr,
    rows_per_program: tl.constexpr,
):
    """Grid: query heads, `num_shares` and then rows / `rows_per_program`.

    Of the first, each merges the row whose first cut is at its share's end, if there is one; the others fill in rows
    without keys.
    """
    q_head = tl.program_id(0)
    share = tl.program_id(1)
    dim_H = tl.arange(0, head_dim)
    if share >= num_shares:
        row_R = (share - num_shares) * rows_per_program + tl.arange(0, rows_per_program)
        kv_len_R = tl.load(kv_lens_ptr + row_R, mask=row_R < num_rows, other=1)
        is_empty = kv_len_R <= 0
        head_R = row_R * num_q_heads + q_head
        nothing = tl.zeros([rows_per_program, head_dim], o_ptr.dtype.element_ty)
        tl.store(o_ptr + head_R[:, None] * head_dim + dim_H[None, :], nothing, mask=is_empty[:, None])
        tl.store(lse_ptr + head_R, tl.full([rows_per_program], float("-inf"), tl.float32), mask=is_empty)
    else:
        all_rows = tl.arange(0, padded_rows)
        all_lens = tl.load(kv_lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
        all_blocks = (tl.maximum(all_lens, 0) + block - 1) // block
        all_ends = tl.cumsum(all_blocks, 0)
        num_items = tl.sum(all_blocks, 0)
        quota = (num_items + num_shares - 1) // num_shares
        cut = (share + 1) * quota
        row = tl.sum((all_ends < cut).to(tl.int32), 0)
        is_row = all_rows == row
        row_end = tl.sum(tl.where(is_row, all_ends, 0), 0)
        row_begin = row_end - tl.sum(tl.where(is_row, all_blocks, 0), 0)
        if (cut < num_items) & (row_begin >= share * quota) & (row_begin < cut) & (row_end > cut):
            num_partials = (row_end - 1) // quota - share + 1
            step_W = tl.arange(0, shares_per_step)
            maximum = float("-inf")
            denominator = 0.0
            weighted = tl.zeros([head_dim], tl.float32)
            for start in range(0, num_partials, shares_per_step):
                is_partial = start + step_W < num_partials
                partial_W = (row + share + start + step_W) * num_q_heads + q_head
                lse_W = tl.load(partial_lse_ptr + partial_W, mask=is_partial, other=float("-inf"))
                offset = partial_W[:, None] * head_dim + dim_H[None, :]
                o_WH = tl.load(partial_o_ptr + offset, mask=is_partial[:, None], other=0.0)
                new_maximum = tl.maximum(maximum, tl.max(lse_W, 0))
                rescale = tl.exp2(maximum - new_maximum)
                weight_W = tl.exp2(lse_W - new_maximum)
                denominator = denominator * rescale + tl.sum(weight_W, 0)
                weighted = weighted * rescale + tl.sum(weight_W[:, None] * o_WH, 0)
                maximum = new_maximum
            row_head = row * num_q_heads + q_head
            tl.store(o_ptr + row_head * head_dim + dim_H, (weighted / denominator).to(o_ptr.dtype.element_ty))
            tl.store(lse_ptr + row_head, (maximum + tl.log2(denominator)) * LN_2)
