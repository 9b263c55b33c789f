"""Device time of one repetition of an op, and the rival of everything that is bound by memory: a copy."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loongjax_profiling.kernels.chain import repeat_step


class SlopeTimer:
    """Seconds of one repetition of an op: the median of slopes between one call and three of a program of `num`
    dependent repetitions, in which what a call itself costs cancels out.

    Compiles it, if it is not, and runs it once.

    Args:
        repeat: makes a call of so many dependent repetitions.
        num: repetitions of a call.
    """

    def __init__(self, repeat: Callable[[int], Callable[[], Any]], num: int) -> None:
        self._slopes: list[float] = []
        self._num = num
        self._call = repeat(num)
        jax.block_until_ready(self._call())

    def sample(self) -> None:
        """Takes one more slope."""
        self._slopes.append((_elapsed_s(self._call, 3) - _elapsed_s(self._call, 1)) / (2 * self._num))

    @property
    def seconds(self) -> float:
        return statistics.median(self._slopes)


LEAST_SAMPLES = 3


def sample_in_turn(timers: Sequence[SlopeTimer], samples: int, *, enough_s: float = math.inf) -> None:
    """So many slopes of each, in another order every round: a GPU's clock falls under load, and rises behind what takes
    less power, so what always comes first or behind the same rival is not timed fairly.

    Args:
        timers: of the same work.
        samples: rounds.
        enough_s: seconds after which no round is begun any more but the first `LEAST_SAMPLES`.
    """
    rng = random.Random(0)
    started = time.perf_counter()
    for number in range(samples):
        if number >= LEAST_SAMPLES and time.perf_counter() - started > enough_s:
            break
        for timer in rng.sample(timers, len(timers)):
            timer.sample()


def device_seconds(repeat: Callable[[int], Callable[[], Any]], num: int, samples: int = 5) -> float:
    """Seconds of one repetition, by `samples` slopes of a `SlopeTimer`."""
    timer = SlopeTimer(repeat, num)
    sample_in_turn([timer], samples)
    return timer.seconds


def _elapsed_s(call: Callable[[], Any], num_calls: int) -> float:
    started = time.perf_counter()
    result = call()
    for _ in range(num_calls - 1):
        result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - started


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
    repeat = repeat_step(lambda _, x, i: x + jnp.uint32(1), None, values, as_loop=True)
    return 2 * num_bytes / device_seconds(repeat, 10)
