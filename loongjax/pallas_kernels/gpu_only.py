"""Variants that run on NVIDIA GPUs alone say so where a program is compiled for another platform.

Which one that is shows only then: a process without GPUs may compile for them. So an operand passes through a primitive
that is nothing in programs for CUDA, and refuses to be in others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def gpu_only[Results](op: str, implementation: str, variant: Callable[..., Results]) -> Callable[..., Results]:
    """The same variant, which raises NotImplementedError where it is compiled for another platform than CUDA.

    Interpreters call what is inside of it.
    """

    def checked(operand: Any, *operands: Any, **settings: Any) -> Results:
        return variant(_on_gpu.bind(operand, op=op, implementation=implementation), *operands, **settings)

    return checked


def _refuse(op: str, implementation: str, platform: str) -> NotImplementedError:
    return NotImplementedError(f"{op}: implementation {implementation!r} runs on NVIDIA GPUs, not on {platform!r}")


def _run(operand: Any, *, op: str, implementation: str) -> Any:
    """Outside of `jit`."""
    devices = operand.devices() if isinstance(operand, jax.Array) else jax.local_devices()[:1]
    platforms = {device.platform for device in devices}
    if platforms != {"gpu"}:
        raise _refuse(op, implementation, ", ".join(platforms))
    return operand


def _lower(context: mlir.LoweringRuleContext, operand: Any, *, op: str, implementation: str) -> Any:
    raise _refuse(op, implementation, ", ".join(context.module_context.platforms))


_on_gpu = Primitive("on_gpu")
_on_gpu.def_impl(_run)
_on_gpu.def_abstract_eval(lambda operand, **_: operand)
mlir.register_lowering(_on_gpu, _lower)
mlir.register_lowering(_on_gpu, lambda context, operand, **_: [operand], platform="cuda")
batching.defvectorized(_on_gpu)
# A gradient goes past it to the kernels, which have none and say so.
ad.primitive_jvps[_on_gpu] = lambda primals, tangents, **_: (primals[0], tangents[0])
