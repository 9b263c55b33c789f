"""Work that keeps a GPU from whatever it is given next."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

BUSY_S = 2.0


@jax.jit
def _multiply(x: jax.Array) -> jax.Array:
    # The number is static, and small: loops of any other kind hold the dispatching thread until they are nearly over.
    return jax.lax.fori_loop(0, 10, lambda _, x: x @ x / 128, x)


@functools.cache
def _operand_and_seconds(device: jax.Device) -> tuple[jax.Array, float]:
    """What to multiply, and how long that takes: much longer with XLA's first choice of a kernel than with its best."""
    x = jax.device_put(np.random.default_rng(0).standard_normal((16_384, 16_384)).astype(jnp.bfloat16), device)
    _multiply(x).block_until_ready()
    started = time.perf_counter()
    _multiply(x).block_until_ready()
    return x, time.perf_counter() - started


def keep_busy(device: jax.Device) -> jax.Array:
    """Gives the device about `BUSY_S` of work; ready when that is done. Waits for the device the first time only."""
    x, seconds = _operand_and_seconds(device)
    for _ in range(math.ceil(BUSY_S / seconds)):
        x = _multiply(x)
    return x
