"""The Triton kernel of products of few rows with large matrices.

Every program has some rows of one matrix, `block_o` at a time, and reads each of them once, from end to end. One token
takes multiplications and additions as the weights arrive, which no tensor core would speed up; more tokens take tensor
cores, with the weights as the left operand, so that few tokens are a small product rather than a padded one.

Legend: O rows of a matrix at a time, I their elements at a time, T tokens, padded.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def add_product(sums, x, weights, uses_tensor_cores: tl.constexpr):
    """With tensor cores: [O, I] times [I, T], added to [O, T]. Without: [O, I] times [I], to be summed over I later."""
    if uses_tensor_cores:
        sums = tl.dot(weights, x, sums)
    else:
        sums += weights.to(tl.float32) * x.to(tl.float32)[None, :]
    return sums


@triton.jit
@no_type_check
def project_kernel(
    x_ptr,  # [num_tokens, in_dim]
    a_ptr,  # [a_rows, in_dim]
    b_ptr,  # [b_rows, in_dim]; if is_gated: [a_rows, in_dim], and b_rows is 0
    c_ptr,  # [c_rows, in_dim]
    a_out_ptr,  # [num_tokens, a_rows]
    b_out_ptr,  # [num_tokens, b_rows]
    c_out_ptr,  # [num_tokens, c_rows]
    a_rows: tl.constexpr,
    b_rows: tl.constexpr,
    c_rows: tl.constexpr,
    num_tokens: tl.constexpr,
    in_dim: tl.constexpr,
    is_gated: tl.constexpr,
    uses_tensor_cores: tl.constexpr,
    padded_tokens: tl.constexpr,  # 1 without tensor cores
    rows_per_program: tl.constexpr,
    block_o: tl.constexpr,
    block_i: tl.constexpr,
    stages: tl.constexpr,
):
    """Grid: for a, b and c in turn, their rows / rows_per_program. If is_gated, a's result is silu(x a^T) * (x b^T)."""
    a_programs: tl.constexpr = (a_rows + rows_per_program - 1) // rows_per_program
    b_programs: tl.constexpr = (b_rows + rows_per_program - 1) // rows_per_program
    program = tl.program_id(0)
    if program < a_programs:
        w_ptr = a_ptr
        out_ptr = a_out_ptr
        num_rows = a_rows
    elif program < a_programs + b_programs:
        program -= a_programs
        w_ptr = b_ptr
        out_ptr = b_out_ptr
        num_rows = b_rows
    else:
        program -= a_programs + b_programs
        w_ptr = c_ptr
        out_ptr = c_out_ptr
        num_rows = c_rows
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, num_rows)

    place_I = tl.arange(0, block_i)
    row_O = tl.arange(0, block_o)
    token_T = tl.arange(0, padded_tokens)
    is_token_T = token_T < num_tokens
    while first < end:
        is_row_O = first + row_O < end
        w_first = first.to(tl.int64) * in_dim
        offset_OI = row_O[:, None] * in_dim + place_I[None, :]
        if uses_tensor_cores:
            sums = tl.zeros([block_o, padded_tokens], tl.float32)
        else:
            sums = tl.zeros([block_o, block_i], tl.float32)
        up_sums = sums
        for start in tl.range(0, in_dim, block_i, num_stages=stages):
            is_place_I = start + place_I < in_dim
            is_weight_OI = is_row_O[:, None] & is_place_I[None, :]
            if uses_tensor_cores:
                x_offset = start + place_I[:, None] + token_T[None, :] * in_dim
                x = tl.load(x_ptr + x_offset, mask=is_place_I[:, None] & is_token_T[None, :], other=0.0)
            else:
                x = tl.load(x_ptr + start + place_I, mask=is_place_I, other=0.0)
            w_OI = tl.load(
                w_ptr + w_first + start + offset_OI, mask=is_weight_OI, other=0.0, eviction_policy="evict_first"
            )
            sums = add_product(sums, x, w_OI, uses_tensor_cores)
            if is_gated:
                up_OI = tl.load(
                    b_ptr + w_first + start + offset_OI, mask=is_weight_OI, other=0.0, eviction_policy="evict_first"
                )
                up_sums = add_product(up_sums, x, up_OI, uses_tensor_cores)
        if not uses_tensor_cores:
            sums = tl.sum(sums, 1)[:, None]
            up_sums = tl.sum(up_sums, 1)[:, None]
        if is_gated:
            gate = sums.to(x_ptr.dtype.element_ty).to(tl.float32)
            up = up_sums.to(x_ptr.dtype.element_ty).to(tl.float32)
            sums = gate / (1 + tl.exp(-gate)) * up
        out_offset = token_T[None, :] * num_rows + first + row_O[:, None]
        tl.store(out_ptr + out_offset, sums.to(out_ptr.dtype.element_ty), mask=is_row_O[:, None] & is_token_T[None, :])
        first += block_o
