"""Triton kernels as custom calls that command buffers (CUDA graphs) can hold.

They go through jaxlib's typed custom call, which XLA records; at the untyped one every command buffer ends.
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

from loongjax.pallas_kernels.triton_compile import ALIGNMENT, CompiledKernel, compile_kernel
from loongjax.pallas_kernels.triton_gpu import compute_capability

TARGET = "triton_kernel_call_ffi"
UNRECORDED_TARGET = "triton_kernel_call"


def triton_call(
    *operands: jax.Array | int,
    kernel: Any,
    name: str,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    aliases: Mapping[int, int] | None = None,
    ends_graph: bool = False,
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
        max_registers: of one thread; None: as many as the kernel wants.
        aliases: operands whose memory becomes that of a result: place among the operands to place among the results.
        ends_graph: whether CUDA graphs end here, at an untyped call.
        constants: the kernel's `tl.constexpr` parameters; Triton does not know numpy's numbers, so they are converted.

    Raises:
        NotImplementedError: a gradient is asked for.
    """
    compiled = compile_for(
        *operands,
        kernel=kernel,
        out_shape=out_shape,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers,
        **constants,
    )
    arrays = [x for x in operands if not isinstance(x, int)]
    integers = [x for x in operands if isinstance(x, int)]
    library = triton_lib.triton_kernel_call_lib
    num_blocks_per_cluster, no_source = 1, ""
    loadable = library.TritonKernel(
        compiled.name,
        num_warps,
        num_blocks_per_cluster,
        compiled.shared_bytes,
        compiled.ptx,
        no_source,
        compute_capability(),
    )
    parameters = [
        *(library.create_array_parameter(0, ALIGNMENT) for _ in arrays),
        # Triton makes a constant of an argument that is 1.
        *(library.create_scalar_parameter(x, triton_lib.get_triton_type(x)) for x in integers if x != 1),
        *(library.create_array_parameter(0, ALIGNMENT) for _ in out_shape),
    ]
    call = library.TritonKernelCall(loadable, *grid, *(1,) * (3 - len(grid)), parameters)
    opaque: Any = zlib.compress(call.to_proto(name, b""), level=9)
    results: list[jax.ShapeDtypeStruct] = list(out_shape)
    in_place = dict(aliases or {})
    if ends_graph:
        launch = jax.ffi.ffi_call(
            UNRECORDED_TARGET,
            results,
            input_output_aliases=in_place,
            custom_call_api_version=2,
            legacy_backend_config=opaque,
        )
    else:
        launch = functools.partial(jax.ffi.ffi_call(TARGET, results, input_output_aliases=in_place), opaque=opaque)
    forward = jax.custom_jvp(lambda *arrays: launch(*arrays))
    forward.defjvp(functools.partial(_refuse_gradient, name))
    return forward(*arrays)


def compile_for(
    *operands: jax.Array | int,
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    num_warps: int = 4,
    num_stages: int = 2,
    max_registers: int | None = None,
    **constants: Any,
) -> CompiledKernel:
    """What `triton_call` would run with these arguments. Compiled once."""
    arrays = [x for x in operands if not isinstance(x, int)]
    integers = [(i, x) for i, x in enumerate(operands) if isinstance(x, int)]
    assert all(i >= len(arrays) for i, _ in integers), "arrays come first"
    types = [_pointer_type(x) for x in arrays] + [triton_lib.get_triton_type(x) for _, x in integers]
    return compile_kernel(
        kernel,
        (*types, *map(_pointer_type, out_shape)),
        tuple(integers),
        tuple((k, x.item() if isinstance(x, np.generic) else x) for k, x in constants.items()),
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=max_registers,
        capability=compute_capability(),
    )


def _refuse_gradient(name: str, *_: Any) -> Any:
    raise NotImplementedError(f"{name}: the Triton kernel is forward only; 'reference' has gradients")


def _pointer_type(array: jax.Array | jax.ShapeDtypeStruct) -> str:
    return triton_lib.get_triton_type(ShapedArray(array.shape, array.dtype))
