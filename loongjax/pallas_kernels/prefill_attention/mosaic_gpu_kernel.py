"""The kernel body of Hopper's variant: warp-specialised attention over the key blocks that a query block visits.

A thread block takes block_q query rows of one head. Its last warpgroup copies key and value blocks to shared memory by
TMA, `num_stages` ahead; the others hold 64 rows each and compute (FlashAttention-3, arXiv:2407.08608): one key block
after another, as in algorithm 1, or as in algorithm 2, where the tensor cores multiply the weights p of one key block
with its values while the softmax of the next one runs. Softmax is in base 2, with running maximum m, denominator d and
output o:

    m' = max(m, c max(s)),    p = exp2(c s - m'),    d' = exp2(m - m') d + sum(p),    o' = exp2(m - m') o + p v

where s = q . k and c = sm_scale log2(e). In the end o is divided by d, and the log-sum-exp is m ln(2) + ln(d).

A cluster of thread blocks visits the same key blocks, for as many query heads of one KV head or else for as many
neighbouring query blocks. Each brings its part of every key block to the shared memory of all: with 128 rows a thread
block, the L2 would otherwise have to give 5 TB/s at 650 TFLOP/s.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS, DenseKeys, PagedKeys
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import WARPGROUP_ROWS, PrefillTuning

LOWEST = float(np.finfo(np.float32).min)
"""The maximum before the first visible key: finite, so that differences of maxima are never NaN."""
HIGHEST = -LOWEST
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


class Scratch(NamedTuple):
    """Shared memory and barriers; a tile for each warpgroup that computes, or for each stage."""

    q: Any  # [warpgroups, 64, H]
    k: Any  # [stages, block_kv, H]
    v: Any  # [stages, block_kv, H]
    o: Any  # [warpgroups, 64, H]; None if q's tile can hold it
    bounds: Any  # [warpgroups, 2, 64]
    lse: Any  # [warpgroups, 64]
    rows_ready: Any  # [warpgroups], of queries and their bounds
    k_ready: Any  # [stages]
    v_ready: Any  # [stages]
    k_free: Any  # [stages]
    v_free: Any  # [stages]
    turn: Any  # [warpgroups]


def make_scratch(
    tuning: PrefillTuning, head_dim: int, dtype: Any, out_dtype: Any, *, copies_per_block: int = 1
) -> Scratch:
    """What a thread block allocates, if every block of keys, or of values, comes in so many copies."""
    warpgroups, stages = tuning.num_compute_warpgroups, tuning.num_stages

    def swizzled(*shape: int, dtype: Any) -> Any:
        # Pyright takes both transforms for abstract.
        tiling = plgpu.TilingTransform((TMA_ROWS, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
        swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

    row_tiles = functools.partial(swizzled, warpgroups, WARPGROUP_ROWS, head_dim)
    key_tiles = functools.partial(swizzled, stages, tuning.block_kv, head_dim, dtype=dtype)
    free: Callable[..., Any] = plgpu.Barrier
    if tuning.cluster > 1:
        free = functools.partial(plgpu.ClusterBarrier, collective_axes=("member",))
    return Scratch(
        q=row_tiles(dtype=dtype),
        k=key_tiles(),
        v=key_tiles(),
        o=None if out_dtype == dtype else row_tiles(dtype=out_dtype),
        bounds=plgpu.SMEM((warpgroups, 2, WARPGROUP_ROWS), jnp.int32),
        lse=plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32),
        rows_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_arrivals=copies_per_block, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies_per_block, num_barriers=stages),
        k_free=free(num_arrivals=warpgroups, num_barriers=stages),
        v_free=free(num_arrivals=warpgroups, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=warpgroups),
    )


class Work(NamedTuple):
    """A thread block's share."""

    q_head: jax.Array
    kv_head: jax.Array
    q_block: jax.Array
    first_key: jax.Array
    num_blocks: jax.Array
    """Of these, all steps below `num_masked` mask."""
    num_masked: jax.Array
    bare_begin: jax.Array

    def block_begin(self, step: jax.Array, block_kv: int) -> jax.Array:
        """The first key of the block visited at this step: masked blocks come first, in order, then bare ones."""
        num_bare = self.num_blocks - self.num_masked
        masked = step + jnp.where(step < self.bare_begin, 0, num_bare)
        bare = step - self.num_masked + self.bare_begin
        return self.first_key + block_kv * jnp.where(step < self.num_masked, masked, bare)


def find_work(visits_gmem: Any, group_size: int, tuning: PrefillTuning) -> Work:
    """The share of this thread block: heads of a group run side by side, and the last query blocks, which see most
    under a causal mask, first.
    """
    kv_head = lax.axis_index("kv_head")
    head_in_group = lax.axis_index("head_in_group")
    q_block = visit = visits_gmem.shape[0] - 1 - lax.axis_index("q_block")
    if group_size % tuning.cluster == 0:
        head_in_group = head_in_group * tuning.cluster + lax.axis_index("member")
    else:
        q_block = visit * tuning.cluster + lax.axis_index("member")
    first_key, num_blocks, bare_begin, bare_end = (visits_gmem[visit, column] for column in range(4))
    return Work(
        q_head=kv_head * group_size + head_in_group,
        kv_head=kv_head,
        q_block=q_block,
        first_key=first_key,
        num_blocks=num_blocks,
        num_masked=num_blocks - (bare_end - bare_begin),
        bare_begin=bare_begin,
    )


def prefill_kernel(
    q_gmem: Any,  # [padded_T, N, H]
    k_gmem: Any,  # [padded_S, K, H]
    v_gmem: Any,  # [padded_S, K, H]
    bounds_gmem: Any,  # [2, q_blocks * block_q]
    visits_gmem: Any,  # [clustered q_blocks, 4]
    o_gmem: Any,  # [padded_T, N, H]
    lse_gmem: Any,  # [N, q_blocks * block_q]
    *,
    scratch: Scratch,
    scale: float,
    tuning: PrefillTuning,
) -> None:
    """Over keys that lie in order. See `attend_query_block`."""
    keys = DenseKeys(k_gmem, v_gmem)
    group_size = q_gmem.shape[1] // k_gmem.shape[1]
    rows = RowMemory(q_gmem, bounds_gmem, o_gmem, lse_gmem)
    attend_query_block(rows, keys, visits_gmem, Setting(scratch, scale, tuning, group_size))


def extend_kernel(
    q_gmem: Any,  # [padded_T, N, H]
    pool_gmem: Any,  # [L * 2 * P * page_size, K, H]
    page_indices_gmem: Any,  # [I]
    layer_gmem: Any,  # [1]
    bounds_gmem: Any,  # [2, q_blocks * block_q]
    visits_gmem: Any,  # [clustered q_blocks, 4]
    o_gmem: Any,  # [padded_T, N, H]
    lse_gmem: Any,  # [N, q_blocks * block_q]
    *,
    scratch: Scratch,
    scale: float,
    tuning: PrefillTuning,
    num_pages: int,
    page_size: int,
) -> None:
    """Over pages of a pool, where key i is at place i % page_size of entry i // page_size. See `attend_query_block`."""
    keys = PagedKeys(pool_gmem, page_indices_gmem, layer_gmem, num_pages, page_size)
    group_size = q_gmem.shape[1] // pool_gmem.shape[1]
    rows = RowMemory(q_gmem, bounds_gmem, o_gmem, lse_gmem)
    attend_query_block(rows, keys, visits_gmem, Setting(scratch, scale, tuning, group_size, drops_junk=True))


class RowMemory(NamedTuple):
    """What there is of each row in global memory."""

    q: Any
    bounds: Any
    o: Any
    lse: Any


class Setting(NamedTuple):
    """What is the same for all thread blocks."""

    scratch: Scratch
    scale: float
    """Of scores, into base 2."""
    tuning: PrefillTuning
    group_size: int
    drops_junk: bool = False
    """Whether values that are not finite count as zero in masked blocks, where slots that nobody named may be."""


def attend_query_block(memory: RowMemory, keys: DenseKeys | PagedKeys, visits_gmem: Any, setting: Setting) -> None:
    """The whole of a thread block. The grid is ("head_in_group", "q_block", "kv_head"), the cluster axis "member", the
    thread axis "warpgroup".
    """
    warpgroup = lax.axis_index("warpgroup")
    scratch, tuning = setting.scratch, setting.tuning
    work = find_work(visits_gmem, setting.group_size, tuning)
    compute_registers, copy_registers = tuning.registers

    @pl.when(warpgroup < tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(compute_registers, action="increase")
        rows = pl.ds(work.q_block * tuning.block_q + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        ready = scratch.rows_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(memory.q.at[rows, work.q_head], scratch.q.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(memory.bounds.at[:, rows], scratch.bounds.at[warpgroup], ready)
        plgpu.barrier_wait(ready)

        o, lse = attend_rows(setting, work)
        o_tile = (scratch.q if scratch.o is None else scratch.o).at[warpgroup]
        o_tile[...] = o.astype(o_tile.dtype)
        scratch.lse[warpgroup] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, memory.o.at[rows, work.q_head])
        plgpu.copy_smem_to_gmem(scratch.lse.at[warpgroup], memory.lse.at[work.q_head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(copy_registers, action="decrease")
        copy_key_blocks(keys, scratch, work, tuning)


def copy_key_blocks(keys: DenseKeys | PagedKeys, scratch: Scratch, work: Work, tuning: PrefillTuning) -> None:
    """Brings the visited key and value blocks to shared memory, each as soon as its stage is free."""
    axes = "member" if tuning.cluster > 1 else None

    @pl.loop(0, work.num_blocks)
    def _(step):
        stage = lax.rem(step, jnp.int32(tuning.num_stages))
        place = keys.locate(work.block_begin(step, tuning.block_kv), tuning.block_kv)
        for tiles, ready, free in (
            (scratch.k, scratch.k_ready, scratch.k_free),
            (scratch.v, scratch.v_ready, scratch.v_free),
        ):

            @pl.when(step >= tuning.num_stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[stage])

            tile, is_values = tiles.at[stage], tiles is scratch.v
            keys.copy(place, work.kv_head, tile, ready.at[stage], values=is_values, collective_axes=axes)


def attend_rows(setting: Setting, work: Work) -> tuple[jax.Array, jax.Array]:
    """Output [64, H] and log-sum-exp [64] of this warpgroup's rows."""
    warpgroup = lax.axis_index("warpgroup")
    scratch, tuning = setting.scratch, setting.tuning
    k_start, k_end = (plgpu.load(scratch.bounds.at[warpgroup, i], layout=ROW_LAYOUT) for i in range(2))
    q = scratch.q.at[warpgroup]
    if tuning.q_in_registers:
        q = plgpu.load(q, layout=plgpu.Layout.WGMMA)
    rows = Rows(setting, work, warpgroup, q, k_start, k_end)

    @pl.when(warpgroup == 0)
    def _():
        if tuning.take_turns:
            plgpu.barrier_arrive(scratch.turn.at[0])

    o, maximum, denominator = pl.run_scoped(
        functools.partial(attend_overlapped if tuning.overlap else attend_in_order, rows),
        plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, scratch.q.shape[-1]), jnp.float32),
    )
    has_keys = k_end > k_start
    divisor = jnp.where(has_keys, denominator, 1.0)
    o = jnp.where(across(k_end, o) > across(k_start, o), o * across(1 / divisor, o), 0.0)
    return o, jnp.where(has_keys, maximum * math.log(2) + jnp.log(divisor), -jnp.inf)


class Rows(NamedTuple):
    """The 64 rows of a warpgroup that computes, and its steps over the key blocks."""

    setting: Setting
    work: Work
    warpgroup: jax.Array
    q: Any  # [64, H]
    k_start: jax.Array  # [64]
    k_end: jax.Array  # [64]

    @property
    def scratch(self) -> Scratch:
        return self.setting.scratch

    @property
    def tuning(self) -> PrefillTuning:
        return self.setting.tuning

    def stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.tuning.num_stages))

    def take_turn(self) -> None:
        if self.tuning.take_turns:
            plgpu.barrier_wait(self.scratch.turn.at[self.warpgroup])

    def pass_turn(self) -> None:
        if self.tuning.take_turns:
            next_warpgroup = lax.rem(self.warpgroup + 1, jnp.int32(self.tuning.num_compute_warpgroups))
            plgpu.barrier_arrive(self.scratch.turn.at[next_warpgroup])

    def release(self, free: Any, step: jax.Array) -> None:
        """Gives the stage of this step back, if a later block takes it: thread blocks may have ended otherwise."""

        @pl.when(step + self.tuning.num_stages < self.work.num_blocks)
        def _():
            plgpu.barrier_arrive(free.at[self.stage(step)])

    def await_values(self, step: jax.Array) -> None:
        """Waits for the values of a step, of which a masked block may hold some that nobody named."""
        plgpu.barrier_wait(self.scratch.v_ready.at[self.stage(step)])
        if not self.setting.drops_junk:
            return

        # Every warpgroup does it for itself, and writes what the others do: zero times what is not finite is not zero.
        @pl.when(step < self.work.num_masked)
        def _():
            tile = self.scratch.v.at[self.stage(step)]
            for first in range(0, self.tuning.block_kv, WARPGROUP_ROWS):
                part = tile.at[pl.ds(first, WARPGROUP_ROWS)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                is_finite = (values <= HIGHEST) & (values >= LOWEST)
                part[...] = jnp.where(is_finite, values, 0.0).astype(part.dtype)
            plgpu.commit_smem()

    def issue_scores(self, step: jax.Array, s_acc: Any) -> None:
        plgpu.wgmma(s_acc, self.q, self.scratch.k.at[self.stage(step)].transpose((1, 0)))

    def issue_output(self, step: jax.Array, weights: jax.Array, o_acc: Any) -> None:
        plgpu.wgmma(o_acc, weights.astype(self.q.dtype), self.scratch.v.at[self.stage(step)])

    def multiply_keys(self, issue: Callable[[Any], None], step: jax.Array, *, num_behind: int) -> jax.Array:
        """Scores [64, block_kv] of the key block that `issue` multiplies, whose stage is then free.

        Args:
            issue: issues the products, given the accumulator of the scores.
            step: that of the key block.
            num_behind: products issued behind that of the scores, which stay in flight.
        """

        def multiply(s_acc: Any) -> jax.Array:
            issue(s_acc)
            self.pass_turn()
            return plgpu.wgmma_accumulator_load(s_acc, wait_n=num_behind)

        s_type = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self.tuning.block_kv), jnp.float32)
        # The barrier keeps reads of the accumulator behind the wait.
        scores = lax.optimization_barrier(pl.run_scoped(multiply, s_type))
        self.release(self.scratch.k_free, step)
        return scores

    def weigh(
        self, step: jax.Array, scores: jax.Array, maximum: jax.Array, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights p of this block's values, the new maximum, and what rescales the denominator and output so far."""
        if masked:
            begin = self.work.block_begin(step, self.tuning.block_kv)
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            visible = (key >= across(self.k_start - begin, scores)) & (key < across(self.k_end - begin, scores))
            scores = jnp.where(visible, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=1) * self.setting.scale)
        weights = jnp.exp2(scores * self.setting.scale - across(new_maximum, scores))
        return weights, new_maximum, jnp.exp2(maximum - new_maximum)

    def loop(self, attend_block: Callable[..., Any], carry: Any, *, first: int) -> Any:
        """What is carried after the blocks from step `first` on: masked ones, then bare ones."""
        masked, bare = (functools.partial(attend_block, masked=masked) for masked in (True, False))
        carry = lax.fori_loop(first, self.work.num_masked, masked, carry)
        return lax.fori_loop(jnp.maximum(self.work.num_masked, first), self.work.num_blocks, bare, carry)


def attend_overlapped(rows: Rows, o_acc: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [64, H] before its division, maximum and denominator [64]; each block's values are multiplied while the
    softmax of the next one runs.
    """
    scratch = rows.scratch

    def attend_block(step, carry, *, masked):
        weights, maximum, denominator = carry
        plgpu.barrier_wait(scratch.k_ready.at[rows.stage(step)])
        rows.await_values(step - 1)
        rows.take_turn()

        def issue(s_acc):
            rows.issue_scores(step, s_acc)
            rows.issue_output(step - 1, weights, o_acc)

        scores = rows.multiply_keys(issue, step, num_behind=1)
        new_weights, maximum, rescale = rows.weigh(step, scores, maximum, masked=masked)
        denominator = denominator * rescale + new_weights.sum(axis=1)
        # Behind the wait, the weights in half precision can take the registers of those before.
        o, new_weights = lax.optimization_barrier((plgpu.wgmma_accumulator_load(o_acc, wait_n=0), new_weights))
        rows.release(scratch.v_free, step - 1)
        o_acc[...] = o * across(rescale, o)
        return new_weights.astype(weights.dtype), maximum, denominator

    first = jnp.int32(0)
    plgpu.barrier_wait(scratch.k_ready.at[first])
    rows.take_turn()
    scores = rows.multiply_keys(functools.partial(rows.issue_scores, first), first, num_behind=0)
    weights, maximum, _ = rows.weigh(first, scores, full_row(LOWEST), masked=True)
    carry = weights.astype(rows.q.dtype), maximum, weights.sum(axis=1)
    weights, maximum, denominator = rows.loop(attend_block, carry, first=1)

    last = rows.work.num_blocks - 1
    rows.await_values(last)
    rows.issue_output(last, weights, o_acc)
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(o_acc, wait_n=0)), maximum, denominator


def attend_in_order(rows: Rows, o_acc: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `attend_overlapped`, but each block's scores, softmax and output follow one another: only the products of the
    other warpgroups run under the softmax. A turn lasts from the values of one block to the keys of the next.
    """
    scratch = rows.scratch

    def attend_block(step, carry, *, masked):
        maximum, denominator = carry
        plgpu.barrier_wait(scratch.k_ready.at[rows.stage(step)])
        scores = rows.multiply_keys(functools.partial(rows.issue_scores, step), step, num_behind=0)
        weights, maximum, rescale = rows.weigh(step, scores, maximum, masked=masked)
        o = plgpu.wgmma_accumulator_load(o_acc, wait_n=None)
        o_acc[...] = o * across(rescale, o)
        rows.await_values(step)
        rows.take_turn()
        rows.issue_output(step, weights, o_acc)
        # Summed here, the weights' shuffles run under the product.
        denominator = denominator * rescale + weights.sum(axis=1)
        plgpu.wgmma_wait(0)
        rows.release(scratch.v_free, step)
        return maximum, denominator

    rows.take_turn()
    maximum, denominator = rows.loop(attend_block, (full_row(LOWEST), full_row(0.0)), first=0)
    rows.pass_turn()
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(o_acc, wait_n=0)), maximum, denominator


def full_row(value: float) -> jax.Array:
    """The value for each of a warpgroup's rows."""
    return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)


def across(per_row: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, in every column."""
    return lax.broadcast_in_dim(per_row, like.shape, [0])
