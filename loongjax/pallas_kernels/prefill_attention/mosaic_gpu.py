"""Hopper's variant, in Pallas Mosaic GPU: what surrounds the kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_kernel import (
    TMA_ROWS,
    PrefillTuning,
    make_scratch,
    prefill_kernel,
)
from loongjax.pallas_kernels.prefill_attention.visits import plan_visits
from loongjax.pallas_kernels.varying import vary_as, vary_together

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16", "float16")
DEFAULT_TUNING = PrefillTuning()


def is_supported(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim."""
    return jnp.dtype(dtype).name in DTYPES and head_dim in HEAD_DIMS


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def mosaic_gpu_prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PrefillTuning = DEFAULT_TUNING,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `prefill_attention`.

    A T or S that is no multiple of 8 costs a copy of the queries, or of the keys and values.

    Raises:
        ValueError: a dtype or head dim that there is no kernel for.
        NotImplementedError: a gradient is asked for.
    """
    T, N, H = q.shape
    if not is_supported(q.dtype, H):
        raise ValueError(
            f"prefill_attention: implementation 'mosaic_gpu' takes {' and '.join(DTYPES)} with head_dim "
            f"{' and '.join(map(str, HEAD_DIMS))}, got {q.dtype} with {H}; 'blockwise' takes any"
        )
    q, k, v, k_start, k_end = vary_together(q, k, v, k_start, k_end)
    if T == 0 or k.shape[0] == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, q)
    o, lse = _attend(sm_scale, out_dtype, tuning, q, k, v, k_start, k_end)
    return o.astype(out_dtype), lse


def _attend_forward(
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PrefillTuning,
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    T, S = q.shape[0], k.shape[0]
    if sm_scale <= 0:
        # The running maximum is taken before scaling, which only a positive factor allows.
        q, sm_scale = q * jnp.sign(sm_scale).astype(q.dtype), abs(sm_scale) or 1.0
    q = _pad_rows(q, at_least=tuning.block_q)
    k, v = (_pad_rows(x, at_least=tuning.block_kv) for x in (k, v))
    # Rows beyond T see what the last one sees, so that they change no visit. Their output is cut off.
    bounds = jnp.clip(jnp.stack([k_start, k_end]), 0, S)
    clustered_rows = tuning.clustered_rows(q.shape[1] // k.shape[1])
    bounds = jnp.pad(bounds, ((0, 0), (0, -T % clustered_rows)), mode="edge")
    visits = plan_visits(
        bounds[0],
        bounds[1],
        num_keys=S,
        block_q=clustered_rows,
        block_kv=tuning.block_kv,
        alignment=TMA_ROWS,
    )
    o, lse = _call_kernel(sm_scale, out_dtype, tuning, q, k, v, bounds, jnp.stack(visits, axis=1))
    return o[:T], lse[:, :T].T


def _refuse_gradient(*_):
    raise NotImplementedError(
        "prefill_attention: implementation 'mosaic_gpu' is forward only; 'blockwise' has gradients"
    )


_attend = jax.custom_vjp(_attend_forward, nondiff_argnums=(0, 1, 2))
_attend.defvjp(_refuse_gradient, _refuse_gradient)


def _pad_rows(x: Float[Array, "rows heads H"], *, at_least: int) -> Float[Array, "padded_rows heads H"]:
    rows = x.shape[0]
    missing = max(at_least - rows, -rows % TMA_ROWS)
    return jnp.pad(x, ((0, missing), (0, 0), (0, 0))) if missing else x


def _call_kernel(
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PrefillTuning,
    q: Float[Array, "padded_T N H"],
    k: Float[Array, "padded_S K H"],
    v: Float[Array, "padded_S K H"],
    bounds: Int32[Array, "2 rows"],
    visits: Int32[Array, "clusters 4"],
) -> tuple[Float[Array, "padded_T N H"], Float32[Array, "N rows"]]:
    N, H = q.shape[1:]
    K = k.shape[1]
    kernel_dtype = q.dtype if out_dtype == q.dtype else jnp.dtype("float32")
    axes = jax.typeof(q).manual_axis_type
    clustered_heads = tuning.cluster * tuning.block_q // tuning.clustered_rows(N // K)
    return plgpu.kernel(
        functools.partial(prefill_kernel, scale=sm_scale * math.log2(math.e), tuning=tuning),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, kernel_dtype, manual_axis_type=axes),
            jax.ShapeDtypeStruct((N, bounds.shape[1]), jnp.float32, manual_axis_type=axes),
        ),
        scratch_types={"scratch": make_scratch(tuning, H, q.dtype, kernel_dtype)},
        grid=(N // K // clustered_heads, visits.shape[0], K),
        grid_names=("head_in_group", "q_block", "kv_head"),
        cluster=(tuning.cluster,),
        cluster_names=("member",),
        num_threads=tuning.num_compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="prefill_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(q, k, v, bounds, visits)
