"""Programs of an op repeated, each repetition waiting for the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from loongjax_profiling.kernels.case import Repeat

Attend = Callable[[Any, jax.Array, Any], jax.Array]
"""An op, given its keys and values, the queries, and the number of the repetition."""


def chain(attend: Attend, keys: Any, q: jax.Array, *, keeps_queries: bool = False) -> Repeat:
    """Repetitions of attend(keys, q, i), each with the output of the one before as its queries.

    Args:
        attend: the op.
        keys: its keys and values.
        q: the first queries.
        keeps_queries: a repetition changes one element of the queries instead. Outputs are means, smaller and smaller,
            and matrix products of such numbers draw less power; the change costs a small kernel.
    """

    def step(keys: Any, q: jax.Array, i: Any) -> jax.Array:
        o = attend(keys, q, i)
        if not keeps_queries:
            return o
        first = (0,) * q.ndim
        return q.at[first].add(o[first] * 1e-3)

    return repeat_step(step, keys, q)


def repeat_step(step: Callable[[Any, jax.Array, Any], jax.Array], operands: Any, carried: jax.Array) -> Repeat:
    """Repetitions of carried = step(operands, carried, i)."""
    step = jax.jit(step)  # to be traced once

    def repeat(num: int) -> Callable[[], jax.Array]:
        def run(operands: Any, carried: jax.Array) -> jax.Array:
            if jax.default_backend() != "gpu":
                return jax.lax.fori_loop(0, num, lambda i, carried: step(operands, carried, i), carried)
            for i in range(num):  # on a GPU a loop would launch kernels of its own to count
                carried = step(operands, carried, i)
            return carried

        call = jax.jit(run)
        return lambda: call(operands, carried)

    return repeat
