"""Device time of one repetition of an op, and the rival of everything that is bound by memory: a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def device_seconds(repeat: Callable[[int], Callable[[], jax.Array]], num: int, samples: int = 5) -> float:
    """Seconds of one repetition: the slope between `num` and twice as many dependent ones inside one jitted program.

    Args:
        repeat: makes a jitted call of so many dependent repetitions.
        num: repetitions of the shorter program.
        samples: the median of so many slopes is returned.
    """
    short, long = repeat(num), repeat(2 * num)
    for call in (short, long):
        jax.block_until_ready(call())

    def seconds(call: Callable[[], jax.Array]) -> float:
        started = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - started

    return statistics.median((seconds(long) - seconds(short)) / num for _ in range(samples))


def copy_bytes_per_second(num_bytes: int = 2 << 30) -> float:
    """Bytes read plus bytes written, per second, of a device-to-device copy by CUDA events (torch), or else of adding
    one to every element (jax)."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _add_bytes_per_second(num_bytes)
    source = torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 4e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * num_bytes / statistics.median(seconds[2:])


def _add_bytes_per_second(num_bytes: int) -> float:
    values = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)

    def repeat(num: int) -> Callable[[], jax.Array]:
        call = jax.jit(lambda x: jax.lax.fori_loop(0, num, lambda i, x: x + jnp.uint32(1), x))
        return lambda: call(values)

    return 2 * num_bytes / device_seconds(repeat, 10)
