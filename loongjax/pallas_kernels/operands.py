"""What the operands of an op must have in common, checked while it is traced: nothing is left of it at run time.

Without it wrong shapes broadcast, and indices beyond the end of a table are clipped to it: both give wrong numbers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike


def check_shapes(op: str, **operands: tuple[ArrayLike, str]) -> None:
    """Raises ValueError unless the operands have the shapes given beside them, such as "T N H".

    Each name stands for one size, that of the first dim called so; a number stands for itself, and "B+1" for one more
    than B, which must come before.
    """
    sizes: dict[str, int] = {}
    for name, (operand, dims) in operands.items():
        shape, expected = jnp.shape(operand), dims.split()
        if is_ranked := len(shape) == len(expected):
            for dim, size in zip(expected, shape, strict=True):
                if dim.isidentifier():
                    sizes.setdefault(dim, size)
        wanted = [_size_of(dim, sizes) for dim in expected]
        if not is_ranked or any(size not in (None, found) for size, found in zip(wanted, shape, strict=True)):
            texts = map(_describe, expected, wanted)
            raise ValueError(f"{op}: {name} must have the shape [{', '.join(texts)}], got {list(shape)}")


def _size_of(dim: str, sizes: dict[str, int]) -> int | None:
    """None while no operand has had such a dim."""
    if dim.isdecimal():
        return int(dim)
    name, _, more = dim.partition("+")
    return sizes[name] + int(more or 0) if name in sizes else None


def _describe(dim: str, size: int | None) -> str:
    return dim if size is None or dim.isdecimal() else f"{dim}={size}"


def check_heads(op: str, num_q_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError where N query heads cannot share K heads of keys and values, N // K each."""
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"{op}: query heads must be a multiple of KV heads, got {num_q_heads} and {num_kv_heads}")


def check_floats(op: str, **operands: ArrayLike) -> None:
    """Raises ValueError for operands that are not of a floating dtype."""
    for name, operand in operands.items():
        if not jnp.issubdtype(dtype := jnp.result_type(operand), jnp.floating):
            raise ValueError(f"{op}: {name} must be of a floating dtype, got {dtype.name}")


def check_one_dtype(op: str, **operands: ArrayLike) -> None:
    """Raises ValueError unless the operands have one floating dtype: which one to round is the caller's choice."""
    check_floats(op, **operands)
    dtypes = [jnp.result_type(operand).name for operand in operands.values()]
    if len(set(dtypes)) > 1:
        raise ValueError(f"{op}: {', '.join(operands)} must have one dtype, got {', '.join(dtypes)}")


def check_indices(op: str, **operands: ArrayLike) -> None:
    """Raises ValueError for operands that are not int32, as kernels read them."""
    for name, operand in operands.items():
        if (dtype := jnp.result_type(operand)) != jnp.int32:
            raise ValueError(f"{op}: {name} must be int32, got {dtype.name}")


def scale_or_default(op: str, sm_scale: float | ArrayLike | None, head_dim: int) -> float:
    """The factor of the scores as a Python number, which becomes part of the program; `head_dim` ** -0.5 for None.

    Raises:
        TypeError: a traced array, whose value is not known yet, or no scalar.
    """
    if sm_scale is None:
        return head_dim**-0.5
    if isinstance(sm_scale, Tracer):
        raise TypeError(f"{op}: sm_scale becomes part of the program, so it cannot be traced: give a Python float")
    if jnp.ndim(sm_scale):
        raise TypeError(f"{op}: sm_scale must be a scalar, got the shape {list(jnp.shape(sm_scale))}")
    return float(sm_scale)  # pyright: ignore[reportArgumentType]
