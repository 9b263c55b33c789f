"""How the kernels are called."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.paged_triton.kernels import attend_kernel, merge_kernel
from loongjax.pallas_kernels.triton_call import compile_for, triton_call
from loongjax.pallas_kernels.triton_compile import WARP_SIZE
from loongjax.pallas_kernels.triton_gpu import num_multiprocessors, shared_memory_bytes

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (32, 64, 128, 256)
REGISTERS = 65_536
"""Of a multiprocessor, of all GPUs that there are kernels for."""
REGISTER_UNIT = 8
"""What a thread's registers are given out in."""
MOST_REGISTERS = 255
"""Of a thread."""
RESERVED_SHARED_BYTES = 1024
"""Of each program, for CUDA itself."""
LEAST_MEMBERS = 16
"""Rows that a matrix product of tensor cores takes at least."""
MERGED_SHARES = 32
"""Partial results that the merge takes at a time."""
MERGED_ROWS = 16
"""Query tokens that one of its programs looks at for keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedTuning:
    """How the work is cut."""

    block: int = 64
    """Keys of one item of work: a power of two, at least 16."""
    stages: int = 3
    """One block is computed on, the others are on their way."""
    num_warps: int = 4
    programs_per_processor: int = 3
    """Fewer if no more fit, for all have to run at once."""

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ConfigError(f"block must be a power of two of at least 16, got {self.block}")


class Tiles(NamedTuple):
    """Query tokens by tile, and the keys that all of them see: int32 [tiles] each."""

    q_starts: Any
    """First query token; ignored if a tile is one query, when tile i is query i."""
    q_lens: Any
    """Query tokens; likewise."""
    page_starts: Any
    """First entry in the table."""
    kv_lens: Any
    """Keys; 0 for a tile of no queries."""


def is_supported(dtype: str, head_dim: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim."""
    return dtype in DTYPES and head_dim in HEAD_DIMS


def check_supported(op: str, dtype: str, head_dim: int) -> None:
    """Raises ValueError for a dtype or head dim that there is no kernel for."""
    if not is_supported(dtype, head_dim):
        raise ValueError(
            f"{op}: implementation 'triton' takes {' and '.join(DTYPES)} and head dims "
            f"{', '.join(map(str, HEAD_DIMS))}, got {dtype} and {head_dim}: 'blockwise' takes any"
        )


class Cut(NamedTuple):
    """Sizes of a call."""

    num_queries: int
    num_q_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    num_tiles: int
    tile_queries: int

    @property
    def padded_tiles(self) -> int:
        """Tiles, as a power of two."""
        return max(2, 1 << (self.num_tiles - 1).bit_length())

    def num_shares(self, num_programs: int) -> int:
        """Programs of a KV head, if a multiprocessor runs so many of any."""
        return max(1, num_multiprocessors() * num_programs // self.num_kv_heads)

    def results(self, out_dtype: np.dtype) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Output and log-sum-exp."""
        T, N, H = self[:3]
        return jax.ShapeDtypeStruct((T, N, H), out_dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)


def attend_tiles(
    q: Float[Array, "T N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, " I"],
    tiles: Tiles,
    row_kv_lens: Int32[Array, " T"],
    *,
    tile_queries: int,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PagedTuning,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """Output and natural log-sum-exp. T, I and the number of tiles are at least 1.

    Args:
        q: the queries.
        kv_pool: the pool.
        layer: which layer.
        page_indices: the table.
        tiles: every query token that sees keys is in one of them.
        row_kv_lens: of every query token, how many keys it sees.
        tile_queries: query tokens of a tile at most.
        sm_scale: factor of the scores.
        out_dtype: dtype of the output.
        tuning: how the work is cut.
    """
    T, N, H = q.shape
    _, _, num_pages, page_size, K, _ = kv_pool.shape
    (num_tiles,) = tiles.kv_lens.shape
    operands = (q, kv_pool, layer[None], page_indices, *tiles, num_tiles)
    cut = Cut(T, N, H, num_pages, page_size, K, num_tiles, tile_queries)

    def settings(num_programs: int) -> dict[str, Any]:
        return _attend_settings(cut, num_programs, sm_scale, out_dtype, tuning)

    def fit(num_programs: int) -> bool:
        each = compile_for(*operands, **settings(num_programs)).shared_bytes + RESERVED_SHARED_BYTES
        return num_programs * each <= shared_memory_bytes()

    num_programs = next(filter(fit, range(tuning.programs_per_processor, 1, -1)), 1)
    num_shares = cut.num_shares(num_programs)
    results = triton_call(*operands, name="paged_attend", grid=(K, num_shares), **settings(num_programs))
    return _merge_shares(cut, num_shares, tiles, row_kv_lens, results, block=tuning.block)


def _attend_settings(
    cut: Cut, num_programs: int, sm_scale: float, out_dtype: np.dtype, tuning: PagedTuning
) -> dict[str, Any]:
    """Of the first kernel, with so many programs a multiprocessor: results of whole tiles, then of shares of tiles."""
    num_shares, group_size = cut.num_shares(num_programs), cut.num_q_heads // cut.num_kv_heads
    partials = (num_shares + cut.num_tiles, cut.tile_queries, cut.num_q_heads)
    return {
        "kernel": attend_kernel,
        "out_shape": (
            *cut.results(out_dtype),
            jax.ShapeDtypeStruct((*partials, cut.head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        "num_warps": tuning.num_warps,
        "num_stages": tuning.stages,
        "max_registers": _max_registers(num_programs * tuning.num_warps * WARP_SIZE),
        "scale": sm_scale * math.log2(math.e),
        "num_shares": num_shares,
        "padded_tiles": cut.padded_tiles,
        "tile_queries": cut.tile_queries,
        "num_pages": cut.num_pages,
        "num_kv_heads": cut.num_kv_heads,
        "group_size": group_size,
        "padded_members": max(LEAST_MEMBERS, 1 << (cut.tile_queries * group_size - 1).bit_length()),
        "head_dim": cut.head_dim,
        "page_size": cut.page_size,
        "block": tuning.block,
        "stages": tuning.stages,
    }


def _merge_shares(
    cut: Cut,
    num_shares: int,
    tiles: Tiles,
    row_kv_lens: Int32[Array, " T"],
    results: Any,
    *,
    block: int,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """The results of the first kernel as one: those of shares of a tile merged, and of rows without keys filled in."""
    o, lse, partial_o, partial_lse = results
    merged_o, merged_lse = triton_call(
        tiles.q_starts,
        tiles.q_lens,
        tiles.kv_lens,
        row_kv_lens,
        partial_o,
        partial_lse,
        o,
        lse,
        cut.num_tiles,
        cut.num_queries,
        kernel=merge_kernel,
        name="paged_merge",
        out_shape=cut.results(o.dtype),
        aliases={6: 0, 7: 1},
        grid=(cut.num_q_heads, num_shares * cut.tile_queries + -(-cut.num_queries // MERGED_ROWS)),
        num_warps=4,
        num_q_heads=cut.num_q_heads,
        shares_per_step=MERGED_SHARES,
        rows_per_program=MERGED_ROWS,
        num_shares=num_shares,
        padded_tiles=cut.padded_tiles,
        tile_queries=cut.tile_queries,
        head_dim=cut.head_dim,
        block=block,
    )
    return merged_o, merged_lse


def _max_registers(num_threads: int) -> int | None:
    """With which so many threads fit a multiprocessor; None: with any number."""
    each = REGISTERS // num_threads // REGISTER_UNIT * REGISTER_UNIT
    return None if each > MOST_REGISTERS else each
