"""Hopper's variant, in Pallas Mosaic GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_kernel import prefill_kernel
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import (
    Launch,
    attend_rows_over,
    check_supported,
    pad_rows,
)
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import is_supported as is_supported
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax.pallas_kernels.varying import vary_as, vary_together

DEFAULT_TUNING = PrefillTuning()


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
    check_supported("prefill_attention", q.dtype, H)
    q, k, v, k_start, k_end = vary_together(q, k, v, k_start, k_end)
    if T == 0 or k.shape[0] == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, q)
    return _attend(sm_scale, out_dtype, tuning, q, k, v, k_start, k_end)


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
    keys = (pad_rows(x, at_least=tuning.block_kv) for x in (k, v))
    work = Launch(
        body=prefill_kernel,
        name="prefill_attention",
        num_keys=k.shape[0],
        key_alignment=TMA_ROWS,
        copies_per_block=1,
        sm_scale=sm_scale,
        out_dtype=out_dtype,
        tuning=tuning,
    )
    return attend_rows_over(work, q, tuple(keys), k_start, k_end)


def _refuse_gradient(*_):
    raise NotImplementedError(
        "prefill_attention: implementation 'mosaic_gpu' is forward only; 'blockwise' has gradients"
    )


_attend = jax.custom_vjp(_attend_forward, nondiff_argnums=(0, 1, 2))
_attend.defvjp(_refuse_gradient, _refuse_gradient)
