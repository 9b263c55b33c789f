"""Triton kernels as custom calls that command buffers (CUDA graphs) can hold.

jax_triton compiles the kernels. It calls them through XLA's untyped custom call, at which every command buffer ends, so
here they are called through jaxlib's typed one, which XLA records: a short decode step is bound by its launches.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax_triton import triton_lib

from loongjax.pallas_kernels.triton_gpu import compute_capability

TARGET = "triton_kernel_call_ffi"


def triton_call(
    *operands: jax.Array | int,
    kernel: Any,
    name: str,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> Sequence[jax.Array]:
    """Calls a kernel with pointers to the operands, then to the results.

    Args:
        operands: arrays first, then integers, which become part of the program.
        kernel: a `triton.jit` function.
        name: what profiles show.
        out_shape: of every result.
        grid: one to three dimensions.
        num_warps: of one program.
        num_stages: of the kernel's software pipelines.
        aliases: operands whose memory becomes that of a result: place among the operands to place among the results.
        constants: the kernel's `tl.constexpr` parameters; Triton does not know numpy's numbers, so they are converted.

    Raises:
        NotImplementedError: a gradient is asked for.
    """
    arrays = [x for x in operands if not isinstance(x, int)]
    scalars = [(i, triton_lib.get_triton_type(x), x) for i, x in enumerate(operands) if isinstance(x, int)]
    assert all(i >= len(arrays) for i, _, _ in scalars), "arrays come first"
    pointers = [_pointer_type(x) for x in arrays], [_pointer_type(x) for x in out_shape]
    compiled, attributes = triton_lib.get_or_create_triton_kernel(
        triton_lib.get_cuda_backend,
        "cuda",
        kernel,
        [*pointers[0], *(dtype for _, dtype, _ in scalars), *pointers[1]],
        tuple(scalars),
        num_warps=num_warps,
        num_stages=num_stages,
        num_ctas=1,
        compute_capability=compute_capability(),
        enable_fp_fusion=True,
        metaparams={k: x.item() if isinstance(x, np.generic) else x for k, x in constants.items()},
        dump=False,
    )
    library = triton_lib.triton_kernel_call_lib

    def array_parameter(i: int) -> Any:
        is_aligned = ["tt.divisibility", 16] in attributes[(i,)]
        return library.create_array_parameter(0, 16 if is_aligned else 0)

    first_result = len(operands)
    parameters = [
        *(array_parameter(i) for i in range(len(arrays))),
        # Triton makes a constant of an argument that is 1.
        *(library.create_scalar_parameter(x, dtype) for _, dtype, x in scalars if x != 1),
        *(array_parameter(first_result + i) for i in range(len(out_shape))),
    ]
    call = library.TritonKernelCall(compiled, *grid, *(1,) * (3 - len(grid)), parameters)
    opaque = zlib.compress(call.to_proto(name, b""))
    launch = jax.ffi.ffi_call(TARGET, list(out_shape), input_output_aliases=dict(aliases or {}))
    forward = jax.custom_jvp(lambda *arrays: launch(*arrays, opaque=opaque))
    forward.defjvp(functools.partial(_refuse_gradient, name))
    return forward(*arrays)


def _refuse_gradient(name: str, *_: Any) -> Any:
    raise NotImplementedError(f"{name}: the Triton kernel is forward only; 'reference' has gradients")


def _pointer_type(array: jax.Array | jax.ShapeDtypeStruct) -> str:
    return triton_lib.get_triton_type(ShapedArray(array.shape, array.dtype))
