"""How the thread blocks of Hopper's kernel keep in step, so that what one reads from memory the others find in the L2.

Nothing else does: a thread block waits for nobody, and one that is a little faster gets ahead until its keys are no
longer the others'. On an H200 (4d58107), 32 heads over 128K keys read 1.17 TB from memory at 480 TFLOP/s, and 0.02 TB
at 680 if nobody may be far ahead of the mean.

All count the key blocks that they fetched in one word of global memory. Whoever is ahead waits, but only so long: if
some thread blocks have not begun, since other kernels hold their multiprocessors, they are not waited for again.
Results do not depend on any of this.
"""

from __future__ import annotations

from collections.abc import Callable
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
ENDED = 1 << 20
"""Laps that a thread block without work counts: the mean is then far ahead of everybody, and nobody waits any more."""


class Pace(NamedTuple):
    """What a thread block knows of the others."""

    laps: Any
    """The count of all, in global memory, zero at first; None: they do not wait for each other."""
    num_programs: int

    @classmethod
    def of(cls, schedule: Schedule) -> Pace:
        """That of a launch."""
        return cls(shared_count() if schedule.is_paced else None, schedule.num_programs)

    @property
    def patience(self) -> jax.Array:
        """How often a thread block may look in one wait, at first."""
        return jnp.int32(MOST_LOOKS)

    def keep(self, num_fetched: jax.Array, patience: jax.Array) -> jax.Array:
        """Counts, and waits if this thread block is ahead; returns its patience from now on.

        Args:
            num_fetched: key blocks that it fetched before this one.
            patience: what the last call returned.
        """
        if self.laps is None:
            return patience
        is_lap = lax.rem(num_fetched, jnp.int32(LAP)) == 0
        own_laps = lax.div(num_fetched, jnp.int32(LAP)) + 1

        @pl.when(is_lap)
        def _():
            count(self.laps, 1)

        def must_look(state: tuple[jax.Array, jax.Array]) -> jax.Array:
            waits, num_looks = state
            return waits & (num_looks < patience)

        def look(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return any_thread(is_ahead(own_laps, read(self.laps), self.num_programs)), state[1] + 1

        waits_still = lax.while_loop(must_look, look, (is_lap, jnp.int32(0)))[0]
        return jnp.where(waits_still, 0, patience)

    def end(self) -> None:
        """Nobody waits any more, for this thread block or another."""
        if self.laps is not None:
            count(self.laps, ENDED)


def is_ahead(own_laps: jax.Array, all_laps: jax.Array, num_programs: int) -> jax.Array:
    """Whether a thread block is too far ahead of the mean. Counts may wrap around: only their difference matters."""
    return own_laps * num_programs - all_laps > MOST_LAPS_AHEAD * num_programs


def shared_count() -> Any:
    """A word that all thread blocks of a launch share, zero at first."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR)


def count(laps: Any, amount: int) -> None:
    """Adds to the count of all, once for the warpgroup."""

    def add(address: ir.Value) -> None:
        mgpu_utils.SemaphoreRef(address).signal(amount, relaxed=True, memory_scope="gpu")

    _at_word(laps, add)


def read(laps: Any) -> jax.Array:
    """The count of all."""

    def load(address: ir.Value) -> Any:
        int32 = ir.IntegerType.get_signless(32)
        ptx = "ld.relaxed.gpu.global.u32 $0, [$1];"
        word: Any = mgpu_utils.inline_ptx(ptx, address, result_types=int32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(word, (), is_signed=True)

    return _at_word(laps, load, plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))


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


def _at_word(word: Any, act: Callable[[ir.Value], Any], returns: plgpu.ShapeDtypeStruct | None = None) -> Any:
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=returns)
    return inline(lambda _, word: act(mgpu_utils.memref_ptr(word)))(word)
