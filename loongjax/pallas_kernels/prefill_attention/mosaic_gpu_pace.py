"""How the thread blocks of Hopper's kernel keep in step, so that what one reads from memory the others find in the L2.

Nothing else does: a thread block waits for nobody, and one that is a little faster gets ahead until its keys are no
longer the others'. On an H200 (4d58107), 32 heads over 128K keys read 1.17 TB from memory at 480 TFLOP/s, and 0.02 TB
at 680 if nobody may be far ahead of the mean.

All count the key blocks that they fetched in one word of global memory, and how many they are in another. Whoever is
ahead waits, but only so long, and only where somebody visits more keys than the L2 keeps. Thread blocks that begin
late, since other kernels hold their multiprocessors, count as if they had been with the others all the time, for what
they missed is missed. Results do not depend on any of this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule

LAP = 16
"""Key blocks after which a thread block counts them, and looks at the others' count."""
MOST_LAPS_AHEAD = 2
"""Of the mean of all."""
MOST_LOOKS = 128
"""In one wait; a look takes a little less than a microsecond."""
MOST_READS = 5
"""Of the mean when a thread block begins, while others do."""
ENDED = -(1 << 16)
"""What a thread block without work adds to how many are at it, so that nobody is."""


class Stand(NamedTuple):
    """Where a thread block stands among the others."""

    first_lap: jax.Array
    """Laps that it is taken to have had when it began."""
    patience: jax.Array
    """How often it may look in one wait."""


class Pace(NamedTuple):
    """What a thread block knows of the others: words in global memory, zero at first."""

    laps: Any
    """The laps of all; None: they do not wait for each other."""
    runners: Any
    """How many thread blocks have begun; below zero once one has ended."""

    @classmethod
    def of(cls, schedule: Schedule) -> Pace:
        """That of a launch."""
        return cls(None, None) if schedule.paced_blocks is None else cls(shared_count(), shared_count())

    def begin(self, *, may_wait: jax.Array) -> Stand:
        """Joins the others, at their mean.

        Args:
            may_wait: whether it waits for them, if it gets ahead.
        """
        patience = jnp.where(may_wait, jnp.int32(MOST_LOOKS), 0)
        if self.laps is None:
            return Stand(jnp.int32(0), patience)
        laps, runners = self._read_both()
        first_lap = jnp.where(runners > 0, lax.div(laps, jnp.maximum(runners, 1)), 0)
        # In this order the mean is at most too high for a moment, when nobody waits.
        count(self.laps, first_lap)
        count(self.runners, jnp.int32(1))
        return Stand(first_lap, patience)

    def _read_both(self) -> tuple[jax.Array, jax.Array]:
        """Laps and runners, with as many runners before as after: who begins between the two is counted in one of them
        only. Where a kernel ends that held many multiprocessors many do, and would be far from the mean for good.
        """

        def must_read(state: tuple[jax.Array, ...]) -> jax.Array:
            *_, is_old, num_reads = state
            return is_old & (num_reads < MOST_READS)

        def read_again(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            laps, runners = read(self.laps), read(self.runners)
            return laps, runners, any_thread(runners != state[1]), state[3] + 1

        runners = read(self.runners)
        state = jnp.int32(0), runners, jnp.bool_(True), jnp.int32(0)
        laps, runners, *_ = lax.while_loop(must_read, read_again, state)
        return laps, runners

    def keep(self, num_fetched: jax.Array, stand: Stand) -> Stand:
        """Counts, and waits if this thread block is ahead; returns how it stands from now on.

        Args:
            num_fetched: key blocks that it fetched before this one.
            stand: what the last call returned.
        """
        if self.laps is None:
            return stand
        is_lap = lax.rem(num_fetched, jnp.int32(LAP)) == 0
        own_laps = stand.first_lap + lax.div(num_fetched, jnp.int32(LAP)) + 1

        @pl.when(is_lap)
        def _():
            count(self.laps, jnp.int32(1))

        def must_look(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            waits, num_looks = state
            return waits & (num_looks < stand.patience)

        def look(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return any_thread(is_ahead(own_laps, read(self.laps), read(self.runners))), state[1] + 1

        waits_still = lax.while_loop(must_look, look, (is_lap, jnp.int32(0)))[0]
        return stand._replace(patience=jnp.where(waits_still, 0, stand.patience))

    def end(self) -> None:
        """Nobody waits any more, for this thread block or another."""
        if self.laps is not None:
            count(self.runners, jnp.int32(ENDED))


def is_ahead(own_laps: jax.Array, all_laps: jax.Array, runners: jax.Array) -> jax.Array:
    """Whether a thread block is too far ahead of the mean. Counts may wrap around: only their difference matters."""
    return (runners > 0) & (own_laps * runners - all_laps > MOST_LAPS_AHEAD * runners)


def shared_count() -> Any:
    """A word that all thread blocks of a launch share, zero at first."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR)


def count(word: Any, amount: jax.Array) -> None:
    """Adds to a word, once for the warpgroup."""

    def add(_: Any, word: Any, amount: Any) -> None:
        semaphore = mgpu_utils.SemaphoreRef(mgpu_utils.memref_ptr(word))
        semaphore.signal(amount.registers.item(), relaxed=True, memory_scope="gpu")

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    inline(add)(word, amount)


def read(word: Any) -> jax.Array:
    """What is in a word."""

    def load(_: Any, word: Any) -> Any:
        address = mgpu_utils.memref_ptr(word)
        int32 = ir.IntegerType.get_signless(32)
        ptx = "ld.relaxed.gpu.global.u32 $0, [$1];"
        found: Any = mgpu_utils.inline_ptx(ptx, address, result_types=int32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    returns = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=returns)
    return inline(load)(word)


def any_thread(holds: jax.Array) -> jax.Array:
    """Whether it holds for any thread of the warpgroup, whose warps read the count one after another.

    They have to go on together: a warp left behind would miss phases of the barriers that it waits at next, and wait
    for others that never come.
    """

    def vote(_: Any, holds: Any) -> Any:
        i1 = ir.IntegerType.get_signless(1)
        barrier, own = mgpu_utils.warpgroup_barrier_idx(sync=False), holds.registers.item()
        ptx = f"bar.red.or.pred $0, $1, {mgpu_utils.WARPGROUP_SIZE}, $2;"
        found: Any = mgpu_utils.inline_ptx(ptx, barrier, own, result_types=i1, has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=False)

    splat = plgpu.Layout.WG_SPLAT
    returns = plgpu.ShapeDtypeStruct((), jnp.bool_, layout=splat)
    inline: Any = plgpu.inline_mgpu(arg_types=(splat,), return_type=returns)
    return inline(vote)(holds)
