"""The two Triton kernels of decode attention: partial results of equal shares of the work, and their merge.

The work is a line of items, an item being one block of keys for one KV head: rows in order, in each row its KV heads,
in each head its blocks. Every program takes the same number of consecutive items, whatever rows they belong to, so one
long row fills the GPU as well as many short ones. What a program has of one row and head is a segment; program p's
segment of row b and head h is number p + b * K + h, which no other is, since all three only grow along the line.

Legend: M query heads of one KV head, padded to what a matrix product takes; S keys of a block, H head dim.
"""

from typing import no_type_check

import triton
import triton.language as tl


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
    partial_o_ptr,  # float32 [segments, M, H]: normalised outputs
    partial_lse_ptr,  # float32 [segments, M]: base-2 log-sum-exps
    scale: tl.constexpr,  # of the scores, times log2(e)
    num_programs: tl.constexpr,
    padded_rows: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    padded_group: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Grid: one dimension of `num_programs`."""
    program = tl.program_id(0)
    all_rows = tl.arange(0, padded_rows)
    all_lens = tl.load(kv_lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
    items = (tl.maximum(all_lens, 0) + block - 1) // block * num_kv_heads
    item_ends = tl.cumsum(items, 0)
    num_items = tl.sum(items, 0)
    quota = (num_items + num_programs - 1) // num_programs
    item = program * quota
    end = tl.minimum(item + quota, num_items)

    member_M = tl.arange(0, padded_group)
    dim_H = tl.arange(0, head_dim)
    key_S = tl.arange(0, block)
    layer = tl.load(layer_ptr).to(tl.int64)
    k_ptr = kv_pool_ptr + 2 * layer * num_pages * (page_size * num_kv_heads * head_dim)
    v_ptr = kv_pool_ptr + (2 * layer + 1) * num_pages * (page_size * num_kv_heads * head_dim)
    while item < end:
        row = tl.sum((item_ends <= item).to(tl.int32), 0)
        row_end = tl.sum(tl.where(all_rows <= row, items, 0), 0)
        kv_len = tl.load(kv_lens_ptr + row)
        row_blocks = (kv_len + block - 1) // block
        of_row = item - (row_end - row_blocks * num_kv_heads)
        head = of_row // row_blocks
        first_block = of_row - head * row_blocks
        end_block = tl.minimum(first_block + end - item, row_blocks)
        page_start = tl.load(page_starts_ptr + row)

        q_head = row * (num_kv_heads * group_size) + head * group_size
        is_member = member_M[:, None] < group_size
        q = tl.load(q_ptr + (q_head + member_M[:, None]) * head_dim + dim_H[None, :], mask=is_member, other=0.0)
        maximum = tl.full([padded_group], float("-inf"), tl.float32)
        denominator = tl.zeros([padded_group], tl.float32)
        weighted = tl.zeros([padded_group, head_dim], tl.float32)
        for i in tl.range(first_block, end_block, num_stages=stages):
            token_S = i * block + key_S
            is_key = token_S < kv_len
            page_S = tl.load(page_indices_ptr + page_start + token_S // page_size, mask=is_key, other=0)
            slot_S = page_S.to(tl.int64) * page_size + token_S % page_size
            offset = slot_S[:, None] * (num_kv_heads * head_dim) + head * head_dim + dim_H[None, :]
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

        segment = program + row * num_kv_heads + head
        o_offset = (segment * group_size + member_M[:, None]) * head_dim + dim_H[None, :]
        tl.store(partial_o_ptr + o_offset, weighted / denominator[:, None], mask=is_member)
        lse_ptr = partial_lse_ptr + segment * group_size + member_M
        tl.store(lse_ptr, maximum + tl.log2(denominator), mask=member_M < group_size)
        item += end_block - first_block


@triton.jit
@no_type_check
def merge_kernel(
    kv_lens_ptr,  # int32 [B]
    partial_o_ptr,  # float32 [segments, M, H]
    partial_lse_ptr,  # float32 [segments, M]
    num_rows,  # B
    o_ptr,  # [B, N, H]
    lse_ptr,  # float32 [B, N]: natural
    num_programs: tl.constexpr,
    padded_rows: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    segments_per_step: tl.constexpr,
):
    """Grid: rows, query heads. The shares are worked out again, as in `attend_kernel`."""
    row = tl.program_id(0)
    q_head = tl.program_id(1)
    head = q_head // group_size
    all_rows = tl.arange(0, padded_rows)
    all_lens = tl.load(kv_lens_ptr + all_rows, mask=all_rows < num_rows, other=0)
    items = (tl.maximum(all_lens, 0) + block - 1) // block * num_kv_heads
    quota = tl.maximum((tl.sum(items, 0) + num_programs - 1) // num_programs, 1)
    row_begin = tl.sum(tl.where(all_rows < row, items, 0), 0)
    row_blocks = tl.sum(tl.where(all_rows == row, items, 0), 0) // num_kv_heads
    first_item = row_begin + head * row_blocks
    first_program = first_item // quota
    num_segments = tl.where(row_blocks > 0, (first_item + row_blocks - 1) // quota - first_program + 1, 0)

    dim_H = tl.arange(0, head_dim)
    step_W = tl.arange(0, segments_per_step)
    maximum = float("-inf")
    denominator = 0.0
    weighted = tl.zeros([head_dim], tl.float32)
    for start in range(0, num_segments, segments_per_step):
        is_segment = start + step_W < num_segments
        segment_W = first_program + start + step_W + row * num_kv_heads + head
        member_W = segment_W * group_size + q_head % group_size
        lse_W = tl.load(partial_lse_ptr + member_W, mask=is_segment, other=float("-inf"))
        offset = member_W[:, None] * head_dim + dim_H[None, :]
        o_WH = tl.load(partial_o_ptr + offset, mask=is_segment[:, None], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse_W, 0))
        rescale = tl.exp2(maximum - new_maximum)
        weight_W = tl.exp2(lse_W - new_maximum)
        denominator = denominator * rescale + tl.sum(weight_W, 0)
        weighted = weighted * rescale + tl.sum(weight_W[:, None] * o_WH, 0)
        maximum = new_maximum

    row_head = row * (num_kv_heads * group_size) + q_head
    has_keys = num_segments > 0
    o = weighted / tl.where(has_keys, denominator, 1.0)
    tl.store(o_ptr + row_head * head_dim + dim_H, o.to(o_ptr.dtype.element_ty))
    lse = tl.where(has_keys, (maximum + tl.log2(denominator)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + row_head, lse)
