"""Programs of an op repeated, each repetition waiting for the one before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from loongjax_profiling.kernels.case import Repeat

Attend = Callable[[Any, jax.Array, Any], jax.Array]
"""An op, given its keys and values, the queries, and the number of the repetition."""


def chain(attend: Attend, keys: Any, q: jax.Array, *, keeps_queries: bool = False) -> Repeat:
    """Repetitions of attend(keys, q, i), each with the output of the one before as its queries.

    Args:
        attend: the op.
        keys: its keys and values.
        q: the first queries.
        keeps_queries: the queries stay as they are, and only wait for the repetition before. Outputs are means, smaller
            and smaller, and matrix products of such numbers draw less power.
    """
    if not keeps_queries:
        return repeat_step(attend, keys, q)

    def step(operands: tuple[Any, jax.Array], token: jax.Array, i: Any) -> jax.Array:
        keys, q = operands
        # What is carried is small, since XLA may copy it. It has to come back and to count, or XLA would leave out the
        # repetitions whose output nobody sees.
        awaited, token = jax.lax.optimization_barrier((q, token))
        return token / 2 + attend(keys, awaited, i).ravel()[0].astype(jnp.float32)

    return repeat_step(step, (keys, q), jnp.float32(0), as_loop=True)


def repeat_step(
    step: Callable[[Any, Any, Any], Any],
    operands: Any,
    carried: Any,
    *,
    as_loop: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
) -> Repeat:
    """Repetitions of carried = step(operands, carried, i). Programs are compiled once for each number of them.

    A call goes on with what the one before has carried, and in its memory: else each would begin with a copy.

    Args:
        step: one repetition.
        operands: what does not change.
        carried: what the first one of the first call is given, arrays in any structure.
        as_loop: on a GPU, too, where a loop launches kernels of its own to count. Steps on the same operands need one:
            side by side, XLA could make one of them.
        compiler_options: of the program, for XLA.
    """
    step = jax.jit(step)  # to be traced once

    @functools.cache
    def repeat(num: int) -> Callable[[], Any]:
        def run(operands: Any, carried: Any) -> Any:
            if as_loop or jax.default_backend() != "gpu":
                return jax.lax.fori_loop(0, num, lambda i, carried: step(operands, carried, i), carried)
            for i in range(num):
                carried = step(operands, carried, i)
            return carried

        options = None if compiler_options is None else dict(compiler_options)
        program = jax.jit(run, donate_argnums=1).lower(operands, carried).compile(compiler_options=options)
        last: Any = None

        def call() -> Any:
            nonlocal last
            last = result = program(operands, jax.tree.map(jnp.copy, carried) if last is None else last)
            return result

        return call

    return repeat
