"""The kernel body of Hopper's variant: warp-specialised attention over the key blocks that a query block visits.

A thread block takes block_q query rows of one head at a time. Its last warpgroup copies key and value blocks to shared
memory by TMA, `num_stages` ahead; the others hold 64 rows each and compute as in algorithm 2 of FlashAttention-3
(arXiv:2407.08608), where the tensor cores multiply the weights p of one key block with its values while the softmax of
the next one runs. Softmax is in base 2, with running maximum m, denominator d and output o:

    m' = max(m, c max(s)),    p = exp2(c s - m'),    d' = exp2(m - m') d + sum(p),    o' = exp2(m - m') o + p v

where s = q . k and c = sm_scale log2(e). In the end o is divided by d, and the log-sum-exp is m ln(2) + ln(d).

A thread block takes several query blocks, one after another, and never runs dry between them: while the values of a
query block's last keys are multiplied, the softmax of the next query block's first keys runs; its keys and queries were
copied before, and an output is stored while the next one is computed. Behind its last query block, a thread block
scores that one's first keys once more, for nobody, which is cheaper than a second form of the last step.
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
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule, Work, find_work
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_scratch import Scratch
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import WARPGROUP_ROWS, PrefillTuning

LOWEST = float(np.finfo(np.float32).min)
"""The maximum before the first visible key: finite, so that differences of maxima are never NaN."""
HIGHEST = -LOWEST
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def prefill_kernel(
    q_gmem: Any,  # [padded_T, N, H]
    k_gmem: Any,  # [padded_S, K, H]
    v_gmem: Any,  # [padded_S, K, H]
    bounds_gmem: Any,  # [2, q_blocks * block_q]
    visits_gmem: Any,  # [q_blocks, 4]: `Visits`
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
    visits_gmem: Any,  # [q_blocks, 4]: `Visits`
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
    compute_registers, copy_registers = setting.tuning.registers

    @pl.when(warpgroup < setting.tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(compute_registers, action="increase")
        pl.run_scoped(
            functools.partial(attend_items, memory, visits_gmem, setting),
            plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, memory.q.shape[-1]), jnp.float32),
        )
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == setting.tuning.num_compute_warpgroups)
    def _():
        plgpu.set_max_registers(copy_registers, action="decrease")
        copy_items(memory, keys, visits_gmem, setting)


def copy_items(memory: RowMemory, keys: DenseKeys | PagedKeys, visits_gmem: Any, setting: Setting) -> None:
    """Brings the visited key and value blocks of all items to shared memory, each as soon as its stage is free."""
    scratch, tuning, schedule = setting.scratch, setting.tuning, setting.schedule
    group_size = memory.q.shape[1] // keys.num_kv_heads

    def copy_block(number: jax.Array, work: Work, step: jax.Array, *, values: bool) -> None:
        _, q_head = schedule.item(number)
        place_in_line = work.num_before + step
        stage = lax.rem(place_in_line, jnp.int32(tuning.num_stages))
        tiles, ready, free = (
            (scratch.v, scratch.v_ready, scratch.v_free) if values else (scratch.k, scratch.k_ready, scratch.k_free)
        )

        @pl.when(place_in_line >= tuning.num_stages)
        def _():
            plgpu.barrier_wait(free.at[stage])

        place = keys.locate(work.block_begin(step, tuning.block_kv), tuning.block_kv)
        keys.copy(place, q_head // group_size, tiles.at[stage], ready.at[stage], values=values)

    def copy_item(number: jax.Array, work: Work) -> Work:
        # Read long before it is needed: global memory takes as long as a key block.
        next_work = find_work(visits_gmem, schedule, number + 1, work.num_before + work.num_blocks)

        @pl.loop(0, work.num_blocks)
        def _(step):
            copy_block(number, work, step, values=False)
            copy_block(number, work, step, values=True)

        return next_work

    first = find_work(visits_gmem, schedule, jnp.int32(0), jnp.int32(0))
    behind = lax.fori_loop(0, schedule.num_rounds, copy_item, first)
    copy_block(schedule.num_rounds, behind, jnp.int32(0), values=False)


class RowTile(NamedTuple):
    """A warpgroup's rows of an item, on their way between global and shared memory."""

    memory: RowMemory
    setting: Setting
    number: jax.Array
    """Of the item."""

    @property
    def queries(self) -> Any:
        """Their tile in shared memory [64, H]."""
        return self.setting.scratch.q.at[lax.rem(self.number, jnp.int32(2)), lax.axis_index("warpgroup")]

    @property
    def source(self) -> tuple[Any, jax.Array]:
        """Rows and query head."""
        q_block, q_head = self.setting.schedule.item(self.number)
        first = q_block * self.setting.tuning.block_q + lax.axis_index("warpgroup") * WARPGROUP_ROWS
        return pl.ds(first, WARPGROUP_ROWS), q_head

    def copy_in(self) -> None:
        """Begins to bring the queries and bounds to shared memory, in place of the last item's bounds."""
        (rows, q_head), scratch, warpgroup = self.source, self.setting.scratch, lax.axis_index("warpgroup")
        ready = scratch.rows_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(self.memory.q.at[rows, q_head], self.queries, ready)
        plgpu.copy_gmem_to_smem(self.memory.bounds.at[:, rows], scratch.bounds.at[warpgroup], ready)

    def await_bounds(self) -> tuple[jax.Array, jax.Array]:
        """First key and one past the last key of each row [64], once they and the queries are in shared memory."""
        scratch, warpgroup = self.setting.scratch, lax.axis_index("warpgroup")
        plgpu.barrier_wait(scratch.rows_ready.at[warpgroup])
        k_start, k_end = (plgpu.load(scratch.bounds.at[warpgroup, i], layout=ROW_LAYOUT) for i in range(2))
        return k_start, k_end

    def store(self, o: jax.Array, lse: jax.Array) -> None:
        """Begins to store the results, once those of the item before are out of shared memory."""
        (rows, q_head), scratch, warpgroup = self.source, self.setting.scratch, lax.axis_index("warpgroup")
        o_tile = scratch.o.at[warpgroup]
        columns = o_tile.shape[-1]
        for first in range(0, o.shape[-1], columns):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_tile[...] = o[:, first : first + columns].astype(o_tile.dtype)
            if first == 0:
                scratch.lse[warpgroup] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, self.memory.o.at[rows, q_head, pl.ds(first, columns)])
        plgpu.copy_smem_to_gmem(scratch.lse.at[warpgroup], self.memory.lse.at[q_head, rows])


class Rows(NamedTuple):
    """The 64 rows of a warpgroup that computes, and what it does with key blocks."""

    tile: RowTile
    work: Work
    k_start: jax.Array  # [64]
    k_end: jax.Array  # [64]

    @property
    def setting(self) -> Setting:
        return self.tile.setting

    @property
    def scratch(self) -> Scratch:
        return self.setting.scratch

    @property
    def block_kv(self) -> int:
        return self.setting.tuning.block_kv

    def stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(self.work.num_before + step, jnp.int32(self.setting.tuning.num_stages))

    def release(self, free: Any, step: jax.Array) -> None:
        """Gives the stage of this step back."""
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
            for first in range(0, self.block_kv, WARPGROUP_ROWS):
                part = tile.at[pl.ds(first, WARPGROUP_ROWS)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                is_finite = (values <= HIGHEST) & (values >= LOWEST)
                part[...] = jnp.where(is_finite, values, 0.0).astype(part.dtype)
            plgpu.commit_smem()

    def score(self, step: jax.Array, issue_behind: Callable[[], None] | None) -> jax.Array:
        """Scores [64, block_kv] of a key block, whose stage is then free.

        Args:
            step: that of the key block.
            issue_behind: issues products behind that of the scores, which stay in flight.
        """
        plgpu.barrier_wait(self.scratch.k_ready.at[self.stage(step)])

        def multiply(s_acc: Any) -> jax.Array:
            plgpu.wgmma(s_acc, self.tile.queries, self.scratch.k.at[self.stage(step)].transpose((1, 0)))
            if issue_behind is not None:
                issue_behind()
            return plgpu.wgmma_accumulator_load(s_acc, wait_n=int(issue_behind is not None))

        s_type = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self.block_kv), jnp.float32)
        # The barrier keeps reads of the accumulator behind the wait.
        scores = lax.optimization_barrier(pl.run_scoped(multiply, s_type))
        self.release(self.scratch.k_free, step)
        return scores

    def weigh(
        self, step: jax.Array, scores: jax.Array, maximum: jax.Array, *, masked: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights p of this block's values, the new maximum, and what rescales the denominator and output so far."""
        if masked:
            begin = self.work.block_begin(step, self.block_kv)
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            visible = (key >= across(self.k_start - begin, scores)) & (key < across(self.k_end - begin, scores))
            scores = jnp.where(visible, scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=1) * self.setting.scale)
        weights = jnp.exp2(scores * self.setting.scale - across(new_maximum, scores))
        return weights, new_maximum, jnp.exp2(maximum - new_maximum)

    def finish(self, o: jax.Array, maximum: jax.Array, denominator: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output [64, H] and natural log-sum-exp [64]."""
        has_keys = self.k_end > self.k_start
        divisor = jnp.where(has_keys, denominator, 1.0)
        o = jnp.where(across(self.k_end, o) > across(self.k_start, o), o * across(1 / divisor, o), 0.0)
        return o, jnp.where(has_keys, maximum * math.log(2) + jnp.log(divisor), -jnp.inf)


class Softmax(NamedTuple):
    """Of a warpgroup's rows over the key blocks so far, of which the values of the last one are not yet multiplied."""

    weights: jax.Array  # [64, block_kv], of the last key block
    maximum: jax.Array  # [64]
    denominator: jax.Array  # [64]


def attend_items(memory: RowMemory, visits_gmem: Any, setting: Setting, o_acc: Any) -> None:
    """All items of this warpgroup, one after another."""
    schedule, first = setting.schedule, jnp.int32(0)

    def tile_of(number: jax.Array) -> RowTile:
        return RowTile(memory, setting, number)

    def attend_item(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        *known, softmax = carry
        rows = Rows(tile_of(number), *known)
        work = find_work(visits_gmem, schedule, number + 1, rows.work.num_before + rows.work.num_blocks)
        softmax = attend_blocks(rows, softmax, o_acc)
        next_tile = tile_of(number + 1)
        next_rows = Rows(next_tile, work, *next_tile.await_bounds())
        last = Pending(rows, rows.work.num_blocks - 1, softmax.weights)
        next_softmax, _, o = step_ahead(next_rows, first, full_row(LOWEST), last, o_acc, masked=True)
        o_acc[...] = jnp.zeros_like(o)
        rows.tile.store(*rows.finish(o, softmax.maximum, softmax.denominator))

        @pl.when(number + 1 < schedule.num_rounds)
        def _():
            # No warp reads this item's queries or the next one's bounds any more: all have met in `store`.
            tile_of(number + 2).copy_in()

        return next_rows.work, next_rows.k_start, next_rows.k_end, next_softmax

    tile_of(first).copy_in()
    rows = Rows(tile_of(first), find_work(visits_gmem, schedule, first, first), *tile_of(first).await_bounds())
    plgpu.commit_smem()
    tile_of(first + 1).copy_in()
    weights, maximum, _ = rows.weigh(first, rows.score(first, None), full_row(LOWEST), masked=True)
    softmax = Softmax(weights.astype(memory.q.dtype), maximum, weights.sum(axis=1))
    lax.fori_loop(0, schedule.num_rounds, attend_item, (rows.work, rows.k_start, rows.k_end, softmax))


def attend_blocks(rows: Rows, softmax: Softmax, o_acc: Any) -> Softmax:
    """All key blocks of an item but the first, and the values of all but the last: masked ones, then bare ones."""

    def attend_block(step: jax.Array, softmax: Softmax, *, masked: bool) -> Softmax:
        behind = Pending(rows, step - 1, softmax.weights)
        ahead, rescale, o = step_ahead(rows, step, softmax.maximum, behind, o_acc, masked=masked)
        o_acc[...] = o * across(rescale, o)
        return ahead._replace(denominator=softmax.denominator * rescale + ahead.denominator)

    num_masked, num_blocks = rows.work.num_masked, rows.work.num_blocks
    softmax = lax.fori_loop(1, num_masked, functools.partial(attend_block, masked=True), softmax)
    return lax.fori_loop(jnp.maximum(num_masked, 1), num_blocks, functools.partial(attend_block, masked=False), softmax)


class Pending(NamedTuple):
    """A key block whose values are yet to be multiplied."""

    rows: Rows
    step: jax.Array
    weights: jax.Array  # [64, block_kv]


def step_ahead(
    rows: Rows, step: jax.Array, maximum: jax.Array, behind: Pending, o_acc: Any, *, masked: bool
) -> tuple[Softmax, jax.Array, jax.Array]:
    """Scores a key block, and weighs it while the values of the block before are multiplied.

    Args:
        rows: of the key block.
        step: likewise.
        maximum: of the rows' scores so far.
        behind: the block before, of these rows or the last one of the item before.
        o_acc: the output so far, without the block before.
        masked: whether there are keys in the key block that not all rows see.

    Returns:
        The softmax, whose denominator is that of this block alone; what rescales the denominator and output so far; and
        the output with the values of the block before.
    """
    behind.rows.await_values(behind.step)

    def issue_output() -> None:
        plgpu.wgmma(o_acc, behind.weights, rows.scratch.v.at[behind.rows.stage(behind.step)])

    weights, maximum, rescale = rows.weigh(step, rows.score(step, issue_output), maximum, masked=masked)
    denominator = weights.sum(axis=1)
    # Behind the wait, the weights in half precision can take the registers of those before.
    o, weights = lax.optimization_barrier((plgpu.wgmma_accumulator_load(o_acc, wait_n=0), weights))
    behind.rows.release(rows.scratch.v_free, behind.step)
    return Softmax(weights.astype(behind.weights.dtype), maximum, denominator), rescale, o


def full_row(value: float) -> jax.Array:
    """The value for each of a warpgroup's rows."""
    return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), ROW_LAYOUT)


def across(per_row: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, in every column."""
    return lax.broadcast_in_dim(per_row, like.shape, [0])
