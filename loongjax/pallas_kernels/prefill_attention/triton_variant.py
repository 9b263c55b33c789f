"""The variant for GPUs from Ampere on, in Triton: how the kernel is called."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.prefill_attention.triton_kernel import prefill_kernel
from loongjax.pallas_kernels.triton_call import triton_call
from loongjax.pallas_kernels.varying import vary_as

DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonPrefillTuning:
    """How the work is cut."""

    block_q: int = 128
    """Query rows of a program: a power of two, at least 16."""
    block_k: int = 64
    """Keys of a block, likewise."""
    num_stages: int = 3
    """Key blocks in flight."""
    num_warps: int = 8

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ConfigError(f"{name} must be a power of two of at least 16, got {size}")


TUNINGS = {
    32: TritonPrefillTuning(),
    64: TritonPrefillTuning(),
    128: TritonPrefillTuning(),
    256: TritonPrefillTuning(block_q=64, block_k=32, num_stages=2),
}
"""By head dim. The blocks in flight fit the 99 KiB of shared memory that GPUs have at least, from Ampere on."""


def is_supported(dtype: str, head_dim: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim."""
    return dtype in DTYPES and head_dim in TUNINGS


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def triton_prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, " T"],
    k_end: Int32[Array, " T"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: TritonPrefillTuning | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `prefill_attention`; `tuning` is that of the head dim if None.

    Raises:
        ValueError: a dtype or head dim that there is no kernel for.
        NotImplementedError: a gradient is asked for.
    """
    T, N, H = q.shape
    if not is_supported(q.dtype.name, H):
        raise ValueError(
            f"prefill_attention: implementation 'triton' takes {' and '.join(DTYPES)} with head_dim "
            f"{', '.join(map(str, TUNINGS))}, got {q.dtype} with {H}; 'blockwise' takes any"
        )
    operands = (q, k, v, k_start, k_end)
    if T == 0 or k.shape[0] == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, operands)
    return vary_as(_attend(sm_scale, out_dtype, tuning or TUNINGS[H], *operands), operands)


def _attend_forward(
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: TritonPrefillTuning,
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, " T"],
    k_end: Int32[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    T, N, H = q.shape
    S, K, _ = k.shape
    group_size = N // K
    o, lse = triton_call(
        q,
        k,
        v,
        k_start,
        k_end,
        T,
        S,
        kernel=prefill_kernel,
        name="prefill_attention",
        out_shape=[jax.ShapeDtypeStruct((T, N, H), out_dtype), jax.ShapeDtypeStruct((T, N), jnp.float32)],
        grid=(group_size * -(-T // tuning.block_q), K),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        scale=sm_scale * math.log2(math.e),
        num_kv_heads=K,
        group_size=group_size,
        head_dim=H,
        block_q=tuning.block_q,
        block_k=tuning.block_k,
        stages=tuning.num_stages,
    )
    return o, lse


def _refuse_gradient(*_):
    raise NotImplementedError("prefill_attention: implementation 'triton' is forward only; 'blockwise' has gradients")


_attend = jax.custom_vjp(_attend_forward, nondiff_argnums=(0, 1, 2))
_attend.defvjp(_refuse_gradient, _refuse_gradient)
