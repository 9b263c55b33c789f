"""How the kernels for Hopper are called: prefill over keys in order, extend over keys in pages."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.merge import merge_partials
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule, line_up
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_scratch import has_room, make_scratch
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_split import (
    choose_num_parts,
    cut_ranges,
    fold_heads,
    folds_heads,
    repeat_rows,
    unfold_heads,
)
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax.pallas_kernels.prefill_attention.visits import Visits, plan_visits
from loongjax.pallas_kernels.triton_gpu import num_multiprocessors

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
MOST_IMBALANCE = 1.02
"""Work of the busiest thread block under a causal mask, by the mean."""
SORTED_ROUNDS = 64
"""Items a thread block from which on it pays to sort them."""
PACED_BYTES = 16 << 20
"""Of the keys and values that a query block visits: what surely stays in the L2, which keeps two copies of what all
read.
"""


def is_supported(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim."""
    return jnp.dtype(dtype).name in DTYPES and head_dim in HEAD_DIMS


def check_supported(op: str, dtype: DTypeLike, head_dim: int) -> None:
    """Raises ValueError for a dtype or head dim that there is no kernel for."""
    if not is_supported(dtype, head_dim):
        raise ValueError(
            f"{op}: implementation 'mosaic_gpu' takes {' and '.join(DTYPES)} with head_dim "
            f"{' and '.join(map(str, HEAD_DIMS))}, got {jnp.dtype(dtype).name} with {head_dim}; 'blockwise' takes any"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What a call is made of, its arrays apart."""

    body: Callable[..., None]
    """Takes the queries, the operands that hold the keys, bounds, visits and the results, as `prefill_kernel` does."""
    name: str
    """What profiles show."""
    num_keys: int
    """Rows' ranges are cut to [0, num_keys)."""
    key_alignment: int
    """Key blocks begin at multiples of it."""
    copies_per_block: int
    """In which a block of keys comes, and one of values."""
    sm_scale: float
    out_dtype: np.dtype
    tuning: PrefillTuning
    is_uneven: bool = False
    """Whether the last rows need not be those that see most keys."""
    num_requests: int = 1
    """That have the rows and keys of their own, at most; 1 also where that is not known."""


def attend_rows_over(
    launch: Launch,
    q: Float[Array, "T N H"],
    keys: tuple[jax.Array, ...],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """Output and natural log-sum-exp of rows that see the keys [k_start, k_end). There is a row, and a key.

    Args:
        launch: the call.
        q: the queries.
        keys: the operands of the kernel that hold the keys, the first one [..., K, H].
        k_start: each row's first key.
        k_end: one past each row's last key.
    """
    (T, N, H), K, tuning = q.shape, keys[0].shape[1], launch.tuning
    if folds_heads(T, N, K, launch.num_keys, tuning.block_q, launch.num_requests):
        folded = dataclasses.replace(launch, tuning=dataclasses.replace(tuning, num_heads_abreast=None))
        bounds = (jnp.repeat(x, N // K) for x in (k_start, k_end))
        o, lse = attend_rows_over(folded, fold_heads(q, K), keys, *bounds)
        return unfold_heads(o, N), unfold_heads(lse, N)
    num_items = N * -(-T // tuning.block_q)
    # More thread blocks than multiprocessors do not work at the same time.
    num_programs = min(tuning.num_programs or num_multiprocessors(), num_multiprocessors())
    num_parts = choose_num_parts(num_items, num_programs, launch.num_keys)
    if num_parts == 1 or not has_room(tuning, H, q.dtype, jnp.float32):
        return _attend_rows(launch, q, keys, k_start, k_end)
    rows = repeat_rows(q, num_parts, tuning.block_q)
    k_start, k_end = _clip_bounds(launch, k_start, k_end)
    bounds = cut_ranges(
        k_start,
        k_end,
        num_parts,
        block_q=tuning.block_q,
        block_kv=tuning.block_kv,
        alignment=launch.key_alignment,
    )
    partial = dataclasses.replace(launch, out_dtype=jnp.dtype("float32"))
    partials = _attend_rows(partial, rows, keys, *(x.ravel() for x in bounds))
    o, lse = merge_partials(*(x.reshape(num_parts, -1, *x.shape[1:])[:, :T] for x in partials))
    return o.astype(launch.out_dtype), lse


def _attend_rows(
    launch: Launch,
    q: Float[Array, "T N H"],
    keys: tuple[jax.Array, ...],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """As `attend_rows_over`, by one thread block for each block of rows of a head."""
    T = q.shape[0]
    tuning, sm_scale = launch.tuning, launch.sm_scale
    if sm_scale <= 0:
        # The running maximum is taken before scaling, which only a positive factor allows.
        q, sm_scale = q * jnp.sign(sm_scale).astype(q.dtype), abs(sm_scale) or 1.0
    q = pad_rows(q, at_least=tuning.block_q)
    # Rows beyond T see what the last one sees, so that they change no visit. Their output is cut off.
    bounds = jnp.pad(_clip_bounds(launch, k_start, k_end), ((0, 0), (0, -T % tuning.block_q)), mode="edge")
    visits = plan_visits(
        bounds[0],
        bounds[1],
        num_keys=launch.num_keys,
        block_q=tuning.block_q,
        block_kv=tuning.block_kv,
        alignment=launch.key_alignment,
    )
    o, lse = _call(launch, sm_scale, q, keys, bounds, visits)
    return o[:T].astype(launch.out_dtype), lse[:, :T].T


def _clip_bounds(launch: Launch, k_start: Int32[Array, "T"], k_end: Int32[Array, "T"]) -> Int32[Array, "2 T"]:
    return jnp.clip(jnp.stack([k_start, k_end]), 0, launch.num_keys)


@functools.cache
def choose_heads_abreast(num_q_heads: int, num_kv_heads: int, num_q_blocks: int, num_programs: int) -> int:
    """How many query heads to compute at a time: the fewest, with all queries of their KV heads, that keep all thread
    blocks equally busy under a causal mask.

    Thread blocks that are at the same keys read them from memory once, and the fewer heads, the more are.
    """
    group_size = num_q_heads // num_kv_heads
    for num_sets in range(num_kv_heads, 1, -1):
        abreast = group_size * (num_kv_heads // num_sets)
        schedule = Schedule(num_q_heads, num_q_blocks, num_programs, abreast)
        if num_kv_heads % num_sets == 0 and causal_imbalance(schedule) <= MOST_IMBALANCE:
            return abreast
    return num_q_heads


def causal_imbalance(schedule: Schedule) -> float:
    """Key blocks that the busiest thread block visits under a causal mask, by the mean of all."""
    num_items, num_programs = schedule.num_q_heads * schedule.num_q_blocks, schedule.num_programs
    visits = np.repeat(np.arange(schedule.num_q_blocks, 0, -1), schedule.num_heads_abreast)
    sets = np.tile(visits, (schedule.num_q_heads // schedule.num_heads_abreast, 1))
    sets[-2::-2] = sets[-2::-2, ::-1]
    rounds = np.pad(sets.ravel(), (0, -num_items % num_programs)).reshape(-1, num_programs)
    rounds[1::2] = rounds[1::2, ::-1]
    busy = rounds.sum(axis=0)
    return float(busy.max() / busy.mean())


def choose_paced_blocks(num_key_blocks: int, block_bytes: int, num_items: int, num_programs: int) -> int | None:
    """Key blocks of an item from which on thread blocks that do not wait for each other would come so far apart that
    each reads for itself; None: no item visits so many.

    Args:
        num_key_blocks: that there are.
        block_bytes: of the keys and values of a block.
        num_items: query blocks of all heads.
        num_programs: thread blocks.
    """
    least = -(-PACED_BYTES // block_bytes)
    return least if num_key_blocks >= least and num_items > num_programs else None


def pad_rows(x: Float[Array, "rows heads H"], *, at_least: int) -> Float[Array, "padded_rows heads H"]:
    """As many rows as a copy to shared memory wants."""
    rows = x.shape[0]
    missing = max(at_least - rows, -rows % TMA_ROWS)
    return jnp.pad(x, ((0, missing), (0, 0), (0, 0))) if missing else x


def _call(
    launch: Launch,
    sm_scale: float,
    q: Float[Array, "padded_T N H"],
    keys: tuple[jax.Array, ...],
    bounds: Int32[Array, "2 rows"],
    visits: Visits,
) -> Any:
    N, H = q.shape[1:]
    tuning = launch.tuning
    kernel_dtype = q.dtype if launch.out_dtype == q.dtype else jnp.dtype("float32")
    axes = jax.typeof(q).manual_axis_type
    num_q_blocks = visits.num_blocks.shape[0]
    num_programs = min(tuning.num_programs or num_multiprocessors(), N * num_q_blocks)
    abreast = tuning.num_heads_abreast or choose_heads_abreast(N, keys[0].shape[1], num_q_blocks, num_programs)
    abreast = min(abreast, N)
    if N % abreast:
        raise ConfigError(f"num_heads_abreast must divide the {N} query heads, got {abreast}")
    num_key_blocks = -(-launch.num_keys // tuning.block_kv)
    block_bytes = 2 * tuning.block_kv * H * q.dtype.itemsize
    paced_blocks = choose_paced_blocks(num_key_blocks, block_bytes, N * num_q_blocks, num_programs)
    schedule = Schedule(N, num_q_blocks, num_programs, abreast, paced_blocks)
    is_sorted = launch.is_uneven or paced_blocks is not None or N * num_q_blocks >= SORTED_ROUNDS * num_programs
    line = line_up(visits, by_length=is_sorted)
    scratch = make_scratch(tuning, H, q.dtype, kernel_dtype, copies_per_block=launch.copies_per_block)
    return plgpu.kernel(
        functools.partial(launch.body, scale=sm_scale * math.log2(math.e), tuning=tuning, schedule=schedule),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, kernel_dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct((N, bounds.shape[1]), jnp.float32, manual_axis_type=axes),
        ),
        scratch_types={"scratch": scratch},
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=tuning.num_compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=launch.name,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, *keys, bounds, line)
