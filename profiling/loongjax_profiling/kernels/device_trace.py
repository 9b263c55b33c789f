"""Device time of an op by the profiler (CUPTI on NVIDIA GPUs): when each kernel started and how long it ran.

For ops so short that launching them takes longer than running them. There the slope between one call and three times
the host; kernels that were queued behind a long one follow each other as fast as the device can take them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData, ProfileOptions

HEAD_START_DIM = 8192
HEAD_START_PRODUCTS = 3
"""Of square bfloat16 matrices, on each GPU for each GPU, which go first: 4 ms on one H200, in which a host launches
some hundreds of kernels."""

WARM_UP_CALLS = 3
"""In which XLA records what it then launches as CUDA graphs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelEvent:
    """One run of one kernel."""

    device: str
    name: str
    start_ns: float
    duration_ns: float

    @property
    def end_ns(self) -> float:
        return self.start_ns + self.duration_ns


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceTimes:
    """Medians over the repetitions of an op."""

    span_s: float
    """From the start of its first kernel to the end of its last."""
    period_s: float
    """From the start of its first kernel to that of the next repetition's; the span where there is but one."""
    kernel_s: dict[str, float]
    """By name, seconds in one repetition, in the order of their first runs."""


def device_times(repeat: Callable[[int], Callable[[], Any]], num: int) -> DeviceTimes:
    """Times one call of `num` dependent repetitions, all launched while the devices are still busy with something else;
    of several devices that work together, the slowest.

    Args:
        repeat: as in `device_seconds`; its program may run other kernels, fewer than `num` times each.
        num: repetitions, at least 8, to be told from what runs but a few times.

    Raises:
        ValueError: the trace holds no kernels of a GPU, or none that run a multiple of `num` times.
    """
    assert num >= 8, num
    call, head_start = repeat(num), _head_start()
    for _ in range(WARM_UP_CALLS):
        jax.block_until_ready(call())
    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready((head_start(), call()))
        events = [event for path in pathlib.Path(folder).rglob("*.xplane.pb") for event in read_kernels(path)]
    return times_of_repetitions(events, num)


def _head_start() -> Callable[[], Any]:
    """Keeps all GPUs busy: what is launched in the meantime waits in their streams."""
    if jax.default_backend() != "gpu":
        return lambda: None
    multiply = jax.jit(jnp.matmul)
    factor = jax.random.normal(jax.random.key(0), (HEAD_START_DIM, HEAD_START_DIM), jnp.bfloat16)
    factors = [jax.device_put(factor, device) for device in jax.local_devices()]
    num_products = HEAD_START_PRODUCTS * len(factors)
    jax.block_until_ready([multiply(factor, factor) for factor in factors])
    return lambda: [multiply(factor, factor) for _ in range(num_products) for factor in factors]


def read_kernels(path: str | os.PathLike[str]) -> list[KernelEvent]:
    """The kernels and copies that ran on GPUs, from an xplane file. Only lines of streams count: others sum them up."""
    return [
        KernelEvent(device=plane.name, name=event.name, start_ns=event.start_ns, duration_ns=event.duration_ns)
        for plane in ProfileData.from_file(os.fspath(path)).planes
        if "/device:GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def times_of_repetitions(events: Iterable[KernelEvent], num: int) -> DeviceTimes:
    """Cuts the kernels of each device into `num` equal repetitions, and gives the times of the slowest device.

    XLA numbers kernels of the same kind: names that differ by such a number count as one. Names that run some other
    number of times than a multiple of `num` belong to no repetition.

    Raises:
        ValueError: there are no kernels, or none is left to belong to a repetition.
    """
    by_device: dict[str, list[KernelEvent]] = collections.defaultdict(list)
    for event in events:
        named = dataclasses.replace(event, name=re.sub(r"([._]\d+)+$", "", event.name))
        by_device[event.device].append(named)
    if not by_device:
        raise ValueError("no kernels of a GPU in the trace: the profiler sees them only where the program ran on one")
    times = [_times_of_device(named, num) for named in by_device.values()]
    if not (found := [time for time in times if time is not None]):
        counts = collections.Counter(event.name for named in by_device.values() for event in named)
        raise ValueError(f"no kernel ran a multiple of {num} times: {dict(counts)}")
    return max(found, key=lambda times: times.period_s)


def _times_of_device(named: Sequence[KernelEvent], num: int) -> DeviceTimes | None:
    """None if it ran no repetitions."""
    counts = collections.Counter(event.name for event in named)
    own = sorted((event for event in named if counts[event.name] % num == 0), key=lambda event: event.start_ns)
    if not own:
        return None
    repetitions: list[Sequence[KernelEvent]] = list(itertools.batched(own, len(own) // num))
    starts = [repetition[0].start_ns for repetition in repetitions]
    spans = [
        max(event.end_ns for event in repetition) - start for repetition, start in zip(repetitions, starts, strict=True)
    ]
    periods = [later - earlier for earlier, later in itertools.pairwise(starts)]
    durations: dict[str, list[float]] = {}
    for event in own:
        durations.setdefault(event.name, []).append(event.duration_ns)
    return DeviceTimes(
        span_s=statistics.median(spans) / 1e9,
        period_s=statistics.median(periods or spans) / 1e9,
        kernel_s={name: statistics.median(ns) * counts[name] / num / 1e9 for name, ns in durations.items()},
    )
