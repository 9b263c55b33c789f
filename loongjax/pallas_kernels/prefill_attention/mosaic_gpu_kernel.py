"""The kernel body of Hopper's variant: warp-specialised attention over the key blocks that a query block visits.

A thread block takes block_q query rows of one head at a time. Its last warpgroup copies key and value blocks to shared
memory by TMA, `num_stages` ahead; the others hold 64 rows each and compute as in algorithm 2 of FlashAttention-3
(arXiv:2407.08608), where the tensor cores multiply the weights p of one key block with its values while the softmax of
the next one runs. Softmax is in base 2, with reference m, denominator d and output o:

    m' = c max(s) if that is above m + SLACK, else m
    p = exp2(c s - m'),    d' = exp2(m - m') d + sum(p),    o' = exp2(m - m') o + p v

where s = q . k and c = sm_scale log2(e). In the end o is divided by d, and the log-sum-exp is m ln(2) + ln(d). The
reference may lag behind the maximum, so that it hardly ever changes and o is left alone: weights of up to 2^SLACK are
as exact, and a GPU at its power limit runs as fast as its instructions are few.

A thread block that takes several query blocks, one after another, never runs dry between them: keys of the next one
are copied while the last one ends, its queries as soon as they have met their last keys, and an output is stored while
the next one is computed.
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

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import DenseKeys, PagedKeys
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_pace import Pace, Stand
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_registers import hide_outside, scale_rows, sum_parts
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule, Work, find_work, most_blocks
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_scratch import Scratch
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import WARPGROUP_ROWS, PrefillTuning

LOWEST = float(np.finfo(np.float32).min)
"""The reference before the first visible key: finite, so that differences of references are never NaN."""
HIGHEST = -LOWEST
SLACK = 8.0
"""How far the largest scaled score may be above the reference."""
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def prefill_kernel(
    q_gmem: Any,  # [padded_T, N, H]
    k_gmem: Any,  # [padded_S, K, H]
    v_gmem: Any,  # [padded_S, K, H]
    bounds_gmem: Any,  # [2, q_blocks * block_q]
    visits_gmem: Any,  # [q_blocks, 5]: see `line_up`
    o_gmem: Any,  # [padded_T, N, H]
    lse_gmem: Any,  # [N, q_blocks * block_q]
    *,
    scratch: Scratch,
    scale: float,
    tuning: PrefillTuning,
    schedule: Schedule,
    drops_junk: bool = False,
) -> None:
    """Over keys that lie in order. See `attend_query_blocks` and, of `drops_junk`, `Setting`."""
    keys = DenseKeys(k_gmem, v_gmem)
    rows = RowMemory(q_gmem, bounds_gmem, o_gmem, lse_gmem)
    attend_query_blocks(rows, keys, visits_gmem, Setting(scratch, scale, tuning, schedule, drops_junk))


def extend_kernel(
    q_gmem: Any,  # [padded_T, N, H]
    pool_gmem: Any,  # [L * 2 * P * page_size, K, H]
    page_indices_gmem: Any,  # [I]
    layer_gmem: Any,  # [1]
    bounds_gmem: Any,  # [2, q_blocks * block_q]
    visits_gmem: Any,  # [q_blocks, 5]: see `line_up`
    o_gmem: Any,  # [padded_T, N, H]
    lse_gmem: Any,  # [N, q_blocks * block_q]
    *,
    scratch: Scratch,
    scale: float,
    tuning: PrefillTuning,
    schedule: Schedule,
    num_pages: int,
    page_size: int,
) -> None:
    """Over pages of a pool, where key i is at place i % page_size of entry i // page_size. As `prefill_kernel`."""
    keys = PagedKeys(pool_gmem, page_indices_gmem, layer_gmem, num_pages, page_size)
    rows = RowMemory(q_gmem, bounds_gmem, o_gmem, lse_gmem)
    attend_query_blocks(rows, keys, visits_gmem, Setting(scratch, scale, tuning, schedule, drops_junk=True))


class RowMemory(NamedTuple):
    """What there is of each row in global memory."""

    q: Any
    bounds: Any
    o: Any
    lse: Any


class Setting(NamedTuple):
    """What is the same for all items."""

    scratch: Scratch
    scale: float
    """Of scores, into base 2."""
    tuning: PrefillTuning
    schedule: Schedule
    drops_junk: bool = False
    """Whether values that are not finite count as zero in masked blocks, where slots that nobody named may be."""


def attend_query_blocks(memory: RowMemory, keys: DenseKeys | PagedKeys, visits_gmem: Any, setting: Setting) -> None:
    """The whole of a thread block. The grid is ("program",), the thread axis "warpgroup"."""
    warpgroup = lax.axis_index("warpgroup")
    tuning, schedule = setting.tuning, setting.schedule
    compute_registers, copy_registers = tuning.registers

    def first_work() -> Work:
        return find_work(visits_gmem, schedule, jnp.int32(0), jnp.int32(0))

    def work_behind(number: jax.Array, work: Work) -> Work:
        # Read while this item is computed: global memory takes as long as half a key block.
        return find_work(visits_gmem, schedule, number + 1, work.num_before + work.num_blocks)

    @pl.when(warpgroup < tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(compute_registers, action="increase")

        def tile_of(work: Work) -> RowTile:
            first = work.q_block * tuning.block_q + warpgroup * WARPGROUP_ROWS
            return RowTile(memory, setting.scratch, warpgroup, pl.ds(first, WARPGROUP_ROWS), work.q_head)

        def attend_item(number: jax.Array, work: Work) -> Work:
            next_work = work_behind(number, work)

            def copy_next() -> None:
                @pl.when(number + 1 < schedule.num_rounds)
                def _():
                    # No warp reads the queries and bounds any more.
                    plgpu.commit_smem()
                    tile_of(next_work).copy_in()

            tile_of(work).store(*attend_rows(setting, work, copy_next))
            return next_work

        work = first_work()
        tile_of(work).copy_in()
        lax.fori_loop(0, schedule.num_rounds, attend_item, work)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(copy_registers, action="decrease")
        group_size = memory.q.shape[1] // keys.num_kv_heads
        pace = Pace.of(schedule)

        def copy_item(number: jax.Array, carry: tuple[Work, Stand]) -> tuple[Work, Stand]:
            work, stand = carry
            next_work = work_behind(number, work)
            return next_work, copy_key_blocks(keys, setting, work, work.q_head // group_size, pace, stand)

        may_wait = most_blocks(visits_gmem) >= (schedule.paced_blocks or 0)
        lax.fori_loop(0, schedule.num_rounds, copy_item, (first_work(), pace.begin(may_wait=may_wait)))
        pace.end()


class RowTile(NamedTuple):
    """A warpgroup's rows of an item, on their way between global and shared memory."""

    memory: RowMemory
    scratch: Scratch
    warpgroup: jax.Array
    rows: Any
    q_head: jax.Array

    def copy_in(self) -> None:
        """Begins to bring the queries and bounds to shared memory."""
        ready = self.scratch.rows_ready.at[self.warpgroup]
        queries, bounds = self.memory.q.at[self.rows, self.q_head], self.memory.bounds.at[:, self.rows]
        plgpu.copy_gmem_to_smem(queries, self.scratch.q.at[self.warpgroup], ready)
        plgpu.copy_gmem_to_smem(bounds, self.scratch.bounds.at[self.warpgroup], ready)

    def store(self, o: jax.Array, lse: jax.Array) -> None:
        """Begins to store the results, once those of the item before are out of shared memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        o_tile = self.scratch.o.at[self.warpgroup]
        o_tile[...] = o.astype(o_tile.dtype)
        self.scratch.lse[self.warpgroup] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, self.memory.o.at[self.rows, self.q_head])
        plgpu.copy_smem_to_gmem(self.scratch.lse.at[self.warpgroup], self.memory.lse.at[self.q_head, self.rows])


def copy_key_blocks(
    keys: DenseKeys | PagedKeys, setting: Setting, work: Work, kv_head: jax.Array, pace: Pace, stand: Stand
) -> Stand:
    """Brings the visited key and value blocks to shared memory, each as soon as its stage is free and the pace allows.
    Returns how the thread block stands then.
    """
    scratch, tuning = setting.scratch, setting.tuning

    def copy_block(step: jax.Array, stand: Stand) -> Stand:
        place_in_line = work.num_before + step
        stage = lax.rem(place_in_line, jnp.int32(tuning.num_stages))
        place = keys.locate(work.block_begin(step, tuning.block_kv), tuning.block_kv)
        for tiles, ready, free in (
            (scratch.k, scratch.k_ready, scratch.k_free),
            (scratch.v, scratch.v_ready, scratch.v_free),
        ):

            @pl.when(place_in_line >= tuning.num_stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[stage])

            keys.copy(place, kv_head, tiles.at[stage], ready.at[stage], values=tiles is scratch.v)
        return pace.keep(place_in_line, stand)

    return lax.fori_loop(0, work.num_blocks, copy_block, stand)


def attend_rows(setting: Setting, work: Work, copy_next_rows: Callable[[], None]) -> tuple[jax.Array, jax.Array]:
    """Output [64, H] and log-sum-exp [64] of this warpgroup's rows.

    Args:
        setting: what is the same for all items.
        work: the key blocks.
        copy_next_rows: called when the queries and bounds in shared memory are no longer needed.
    """
    warpgroup = lax.axis_index("warpgroup")
    scratch = setting.scratch
    plgpu.barrier_wait(scratch.rows_ready.at[warpgroup])
    k_start, k_end = (plgpu.load(scratch.bounds.at[warpgroup, i], layout=ROW_LAYOUT) for i in range(2))
    rows = Rows(setting, work, warpgroup, k_start, k_end)
    o, reference, denominator = pl.run_scoped(
        functools.partial(attend_blocks, rows, copy_next_rows),
        plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, scratch.q.shape[-1]), jnp.float32),
    )
    has_keys = k_end > k_start
    divisor = jnp.where(has_keys, denominator, 1.0)
    o = jnp.where(across(k_end, o) > across(k_start, o), o * across(1 / divisor, o), 0.0)
    return o, jnp.where(has_keys, reference * math.log(2) + jnp.log(divisor), -jnp.inf)


class Rows(NamedTuple):
    """The 64 rows of a warpgroup that computes, and its steps over the key blocks."""

    setting: Setting
    work: Work
    warpgroup: jax.Array
    k_start: jax.Array  # [64]
    k_end: jax.Array  # [64]

    @property
    def scratch(self) -> Scratch:
        return self.setting.scratch

    @property
    def tuning(self) -> PrefillTuning:
        return self.setting.tuning

    @property
    def q_tile(self) -> Any:
        return self.scratch.q.at[self.warpgroup]

    def stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(self.work.num_before + step, jnp.int32(self.tuning.num_stages))

    def release(self, free: Any, step: jax.Array) -> None:
        """Gives the stage of this step back."""
        plgpu.barrier_arrive(free.at[self.stage(step)])

    def await_values(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.scratch.v_ready.at[self.stage(step)])

    def drop_junk(self, step: jax.Array) -> None:
        """Sets values of a step to zero that nobody named, of which a masked block may hold some."""
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
        plgpu.wgmma(s_acc, self.q_tile, self.scratch.k.at[self.stage(step)].transpose((1, 0)))

    def issue_output(self, step: jax.Array, weights: jax.Array, o_acc: Any) -> None:
        plgpu.wgmma(o_acc, weights.astype(self.q_tile.dtype), self.scratch.v.at[self.stage(step)])

    def multiply_keys(self, issue: Callable[[Any], None], step: jax.Array, *, num_behind: int) -> jax.Array:
        """Scores [64, block_kv] of the key block that `issue` multiplies, whose stage is then free.

        Args:
            issue: issues the products, given the accumulator of the scores.
            step: that of the key block.
            num_behind: products issued behind that of the scores, which stay in flight.
        """

        def multiply(s_acc: Any) -> jax.Array:
            issue(s_acc)
            return plgpu.wgmma_accumulator_load(s_acc, wait_n=num_behind)

        s_type = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self.tuning.block_kv), jnp.float32)
        # The barrier keeps reads of the accumulator behind the wait.
        scores = lax.optimization_barrier(pl.run_scoped(multiply, s_type))
        self.release(self.scratch.k_free, step)
        return scores

    def weigh(
        self, step: jax.Array, scores: jax.Array, reference: jax.Array, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights p of this block's values, the new reference, and what rescales the denominator and output so far."""
        if masked:
            begin = self.work.block_begin(step, self.tuning.block_kv)
            scores = hide_outside(scores, self.k_start - begin, self.k_end - begin)
        maximum = scores.max(axis=1) * self.setting.scale
        new_reference = jnp.where(maximum > reference + SLACK, maximum, reference)
        weights = jnp.exp2(scores * self.setting.scale - across(new_reference, scores))
        return weights, new_reference, jnp.exp2(reference - new_reference)

    def loop(self, attend_block: Callable[..., Any], carry: Any) -> Any:
        """What is carried after all blocks but the first: masked ones, then bare ones."""
        masked, bare = (functools.partial(attend_block, masked=masked) for masked in (True, False))
        carry = lax.fori_loop(1, self.work.num_masked, masked, carry)
        return lax.fori_loop(jnp.maximum(self.work.num_masked, 1), self.work.num_blocks, bare, carry)


def attend_blocks(rows: Rows, copy_next_rows: Callable[[], None], o_acc: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [64, H] before its division, reference and denominator [64]."""
    scratch = rows.scratch

    def rescale_output(rescale: jax.Array, *, num_behind: int) -> None:
        o_acc[...] = scale_rows(plgpu.wgmma_accumulator_load(o_acc, wait_n=num_behind), rescale)

    def attend_block(step, carry, *, masked):
        weights, rescale, reference, denominator = carry
        plgpu.barrier_wait(scratch.k_ready.at[rows.stage(step)])
        # Not where the values are waited for: there are too few registers while scores are held.
        rows.drop_junk(step - 1)

        def issue(s_acc):
            rows.issue_scores(step, s_acc)
            rescale_output(rescale, num_behind=1)
            rows.issue_output(step - 1, weights, o_acc)

        scores = rows.multiply_keys(issue, step, num_behind=1)
        new_weights, reference, rescale = rows.weigh(step, scores, reference, masked=masked)
        denominator = denominator * across(rescale, denominator) + sum_parts(new_weights)
        # This wait, in fact over already, is what keeps the exponentials ahead of the next one: ptxas moves no
        # arithmetic across a loop, but would move all of it behind products in flight.
        rows.await_values(step)
        # Behind the wait, the weights in half precision can take the registers of those before.
        o, new_weights = lax.optimization_barrier((plgpu.wgmma_accumulator_load(o_acc, wait_n=0), new_weights))
        o_acc[...] = o
        rows.release(scratch.v_free, step - 1)
        return new_weights.astype(weights.dtype), rescale, reference, denominator

    first = jnp.int32(0)
    plgpu.barrier_wait(scratch.k_ready.at[rows.stage(first)])
    scores = rows.multiply_keys(functools.partial(rows.issue_scores, first), first, num_behind=0)
    weights, reference, rescale = rows.weigh(first, scores, full_row(LOWEST), masked=True)
    rows.await_values(first)
    carry = weights.astype(rows.q_tile.dtype), rescale, reference, sum_parts(weights)
    weights, rescale, reference, denominator = rows.loop(attend_block, carry)

    last = rows.work.num_blocks - 1
    rows.drop_junk(last)
    rescale_output(rescale, num_behind=0)
    rows.issue_output(last, weights, o_acc)
    copy_next_rows()
    o = lax.optimization_barrier(plgpu.wgmma_accumulator_load(o_acc, wait_n=0))
    rows.release(scratch.v_free, last)
    return o, reference, denominator.sum(axis=1)


def full_row(value: float) -> jax.Array:
    """The value for each of a warpgroup's rows."""
    return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)


def across(per_row: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, in every column."""
    return lax.broadcast_in_dim(per_row, like.shape, [0])
