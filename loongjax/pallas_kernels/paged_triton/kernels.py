"""The two Triton kernels of attention over the paged pool: equal shares of the work, and the merge of what was cut.

The queries are cut into tiles, a few query tokens of one request each (for decode: one), and the work is a line of
items, an item being one block of keys of one tile: tiles in order, in each tile its request's blocks. Every share is
the same number of consecutive items, whatever tiles they belong to, so one long request fills the GPU as well as many
short ones; each KV head has a program for every share, and those that run beside each other read the same tokens. A
tile that lies in one share is finished there. Of a tile that is cut, every share leaves a partial result: share s's of
tile i is number s + i, which no other is, since both only grow along the line.

Legend: M queries of a tile times query heads of one KV head, padded to what a matrix product takes; S keys of a block,
W shares at a time, R query tokens at a time, H head dim.
"""

from typing import no_type_check

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def attend_kernel(
    q_ptr,  # [T, N, H]
    kv_pool_ptr,  # [L, 2, P, page_size, K, H]
    layer_ptr,  # int32 [1]
    page_indices_ptr,  # int32 [I]
    q_starts_ptr,  # int32 [tiles]: first query token; not read if tile_queries is 1, when tile i is query i
    q_lens_ptr,  # int32 [tiles]: query tokens, likewise
    page_starts_ptr,  # int32 [tiles]
    kv_lens_ptr,  # int32 [tiles]: keys, 0 for a tile of no queries
    num_tiles,
    o_ptr,  # [T, N, H]: of tiles that are not cut
    lse_ptr,  # float32 [T, N]: natural, likewise
    partial_o_ptr,  # float32 [num_shares + tiles, tile_queries, N, H]: normalised
    partial_lse_ptr,  # float32 [num_shares + tiles, tile_queries, N]: base 2
    scale: tl.constexpr,  # of the scores, times log2(e)
    num_shares: tl.constexpr,
    padded_tiles: tl.constexpr,
    tile_queries: tl.constexpr,
    num_pages: tl.constexpr,  # P
    num_kv_heads: tl.constexpr,
    group_size: tl.constexpr,
    padded_members: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Grid: KV heads, shares."""
    head = tl.program_id(0)
    share = tl.program_id(1)
    all_tiles = tl.arange(0, padded_tiles)
    all_lens = tl.load(kv_lens_ptr + all_tiles, mask=all_tiles < num_tiles, other=0)
    all_starts = tl.load(page_starts_ptr + all_tiles, mask=all_tiles < num_tiles, other=0)
    layer = tl.load(layer_ptr).to(tl.int64)
    all_blocks = (tl.maximum(all_lens, 0) + block - 1) // block
    all_ends = tl.cumsum(all_blocks, 0)
    num_items = tl.sum(all_blocks, 0)
    quota = (num_items + num_shares - 1) // num_shares
    item = share * quota
    end = tl.minimum(item + quota, num_items)

    num_q_heads: tl.constexpr = num_kv_heads * group_size
    # Pages that are known a block ahead let keys and values be on their way for longer. They cost registers.
    reads_ahead: tl.constexpr = stages > 2
    member_M = tl.arange(0, padded_members)
    query_M = member_M // group_size
    q_head_M = head * group_size + member_M % group_size
    dim_H = tl.arange(0, head_dim)
    key_S = tl.arange(0, block)
    k_ptr = kv_pool_ptr + 2 * layer * num_pages * (page_size * num_kv_heads * head_dim) + head * head_dim
    v_ptr = k_ptr + num_pages * (page_size * num_kv_heads * head_dim)
    while item < end:
        is_before = all_ends <= item
        tile = tl.sum(is_before.to(tl.int32), 0)
        first_block = item - tl.max(tl.where(is_before, all_ends, 0), 0)
        if tile_queries == 1:
            is_tile = all_tiles == tile
            kv_len = tl.sum(tl.where(is_tile, all_lens, 0), 0)
            page_start = tl.sum(tl.where(is_tile, all_starts, 0), 0)
            q_start = tile
            q_len = 1
        else:
            # Of many tiles, lengths and starts would take the registers that programs beside this one need.
            kv_len = tl.load(kv_lens_ptr + tile)
            page_start = tl.load(page_starts_ptr + tile)
            q_start = tl.load(q_starts_ptr + tile)
            q_len = tl.load(q_lens_ptr + tile)
        tile_blocks = (kv_len + block - 1) // block
        end_block = tl.minimum(first_block + end - item, tile_blocks)

        is_member = (member_M < tile_queries * group_size) & (query_M < q_len)
        row_M = (q_start + query_M) * num_q_heads + q_head_M
        q_offset = row_M[:, None] * head_dim + dim_H[None, :]
        q = tl.load(q_ptr + q_offset, mask=is_member[:, None], other=0.0)
        maximum = tl.full([padded_members], float("-inf"), tl.float32)
        denominator = tl.zeros([padded_members], tl.float32)
        weighted = tl.zeros([padded_members, head_dim], tl.float32)
        if reads_ahead:
            next_S = first_block * block + key_S
            next_page_S = tl.load(page_indices_ptr + page_start + next_S // page_size, mask=next_S < kv_len, other=0)
        for i in tl.range(first_block, end_block, num_stages=stages):
            token_S = i * block + key_S
            is_key = token_S < kv_len
            if reads_ahead:
                page_S = next_page_S
                next_S = token_S + block
                next_page_S = tl.load(
                    page_indices_ptr + page_start + next_S // page_size, mask=next_S < kv_len, other=0
                )
            else:
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
        if end_block - first_block == tile_blocks:
            tl.store(o_ptr + q_offset, o.to(o_ptr.dtype.element_ty), mask=is_member[:, None])
            tl.store(lse_ptr + row_M, lse * LN_2, mask=is_member)
        else:
            partial_M = ((share + tile) * tile_queries + query_M) * num_q_heads + q_head_M
            tl.store(partial_o_ptr + partial_M[:, None] * head_dim + dim_H[None, :], o, mask=is_member[:, None])
            tl.store(partial_lse_ptr + partial_M, lse, mask=is_member)
        item += end_block - first_block


@triton.jit
@no_type_check
def merge_kernel(
    q_starts_ptr,  # int32 [tiles]; as in `attend_kernel`
    q_lens_ptr,  # int32 [tiles]
    kv_lens_ptr,  # int32 [tiles]
    row_kv_lens_ptr,  # int32 [T]: keys of each query token's request
    partial_o_ptr,  # float32 [num_shares + tiles, tile_queries, N, H]
    partial_lse_ptr,  # float32 [num_shares + tiles, tile_queries, N]
    unmerged_o_ptr,  # what `o_ptr` already holds: the same memory
    unmerged_lse_ptr,
    num_tiles,
    num_rows,  # T
    o_ptr,  # [T, N, H]
    lse_ptr,  # float32 [T, N]: natural
    num_shares: tl.constexpr,
    padded_tiles: tl.constexpr,
    tile_queries: tl.constexpr,
    num_q_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    shares_per_step: tl.constexpr,
    rows_per_program: tl.constexpr,
):
    """Grid: query heads; `num_shares` times `tile_queries`, and then T / `rows_per_program`.

    Of the first, each merges a query of the tile whose first cut is at the end of its share, if there is one; the
    others fill in query tokens without keys.
    """
    q_head = tl.program_id(0)
    share = tl.program_id(1) // tile_queries
    query = tl.program_id(1) % tile_queries
    dim_H = tl.arange(0, head_dim)
    if share >= num_shares:
        row_R = (tl.program_id(1) - num_shares * tile_queries) * rows_per_program + tl.arange(0, rows_per_program)
        kv_len_R = tl.load(row_kv_lens_ptr + row_R, mask=row_R < num_rows, other=1)
        is_empty = kv_len_R <= 0
        head_R = row_R * num_q_heads + q_head
        nothing = tl.zeros([rows_per_program, head_dim], o_ptr.dtype.element_ty)
        tl.store(o_ptr + head_R[:, None] * head_dim + dim_H[None, :], nothing, mask=is_empty[:, None])
        tl.store(lse_ptr + head_R, tl.full([rows_per_program], float("-inf"), tl.float32), mask=is_empty)
    else:
        all_tiles = tl.arange(0, padded_tiles)
        all_lens = tl.load(kv_lens_ptr + all_tiles, mask=all_tiles < num_tiles, other=0)
        all_blocks = (tl.maximum(all_lens, 0) + block - 1) // block
        all_ends = tl.cumsum(all_blocks, 0)
        num_items = tl.sum(all_blocks, 0)
        quota = (num_items + num_shares - 1) // num_shares
        cut = (share + 1) * quota
        tile = tl.sum((all_ends < cut).to(tl.int32), 0)
        is_tile = all_tiles == tile
        tile_end = tl.sum(tl.where(is_tile, all_ends, 0), 0)
        tile_begin = tile_end - tl.sum(tl.where(is_tile, all_blocks, 0), 0)
        is_first_cut = (cut < num_items) & (tile_begin >= share * quota) & (tile_begin < cut) & (tile_end > cut)
        if is_first_cut:
            if tile_queries == 1:
                row = tile
                q_len = 1
            else:
                row = tl.load(q_starts_ptr + tile) + query
                q_len = tl.load(q_lens_ptr + tile)
            num_partials = tl.where(query < q_len, (tile_end - 1) // quota - share + 1, 0)
            step_W = tl.arange(0, shares_per_step)
            maximum = float("-inf")
            denominator = 0.0
            weighted = tl.zeros([head_dim], tl.float32)
            for start in range(0, num_partials, shares_per_step):
                is_partial = start + step_W < num_partials
                partial_W = ((tile + share + start + step_W) * tile_queries + query) * num_q_heads + q_head
                lse_W = tl.load(partial_lse_ptr + partial_W, mask=is_partial, other=float("-inf"))
                offset = partial_W[:, None] * head_dim + dim_H[None, :]
                o_WH = tl.load(partial_o_ptr + offset, mask=is_partial[:, None], other=0.0)
                new_maximum = tl.maximum(maximum, tl.max(lse_W, 0))
                rescale = tl.exp2(maximum - new_maximum)
                weight_W = tl.exp2(lse_W - new_maximum)
                denominator = denominator * rescale + tl.sum(weight_W, 0)
                weighted = weighted * rescale + tl.sum(weight_W[:, None] * o_WH, 0)
                maximum = new_maximum
            if query < q_len:
                row_head = row * num_q_heads + q_head
                tl.store(o_ptr + row_head * head_dim + dim_H, (weighted / denominator).to(o_ptr.dtype.element_ty))
                tl.store(lse_ptr + row_head, (maximum + tl.log2(denominator)) * LN_2)
