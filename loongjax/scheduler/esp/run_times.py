"""What runs of waiting requests take as a batch, on any number of instances: what equation 5 of the paper asks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from loongjax.costmodel.work import PrefillTotals

PrefillSeconds = Callable[[PrefillTotals[np.ndarray], np.ndarray], None]
"""Writes the times in seconds of batches, given by their totals, on 1, 2, ... instances: float64 [dops, batches]."""

MAX_RUNS_OF_BLOCK = 4096
"""What a search looks at a time, which on all instances should stay in the processor's cache."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Requests that follow each other, and all runs of neighbours that end with one of them and may be a batch: by
    their last request, and those with the same by their first."""

    requests: range
    part: slice
    """Where its runs are among all."""
    first: Int[np.ndarray, " runs"]
    last: Int[np.ndarray, " runs"]
    offsets: Int[np.ndarray, " requests"]
    """Where the runs that end with each request begin, in the block."""
    prefixes: slice
    """Those of the requests with which a run ends that begins with the first of all: it comes first, at the offset."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """All runs that may be a batch, in blocks that fit into the processor's cache."""

    blocks: tuple[Block, ...]
    parts: tuple[slice, ...]
    """Where the runs that end with each request are."""

    @property
    def num_runs(self) -> int:
        return self.parts[-1].stop


@functools.lru_cache(maxsize=64)
def runs_of(num_requests: int, max_requests: int) -> Runs:
    """Shared: not to be written to."""
    last, first = np.nonzero(np.tril(~np.tri(num_requests, k=-max_requests, dtype=bool)))
    offsets = np.searchsorted(last, np.arange(num_requests + 1)).tolist()
    blocks: list[Block] = []
    begin = 0
    for end in range(1, num_requests + 1):
        if end == num_requests or offsets[end + 1] - offsets[begin] > MAX_RUNS_OF_BLOCK:
            part = slice(offsets[begin], offsets[end])
            blocks.append(
                Block(
                    requests=range(begin, end),
                    part=part,
                    first=first[part].copy(),
                    last=last[part].copy(),
                    offsets=np.array(offsets[begin:end]) - part.start,
                    prefixes=slice(0, max(0, min(end, max_requests) - begin)),
                )
            )
            begin = end
    return Runs(tuple(blocks), tuple(itertools.starmap(slice, itertools.pairwise(offsets))))


class RunTimes:
    """What each run takes as a batch on 1, 2, ... instances, found block by block, whatever its requests weigh.

    Args:
        runs: those.
        sizes: of each request the tokens to compute and their square.
        seconds: see `Question`.
        out: where to keep the times.
    """

    def __init__(
        self,
        runs: Runs,
        sizes: Float[np.ndarray, "2 requests"],
        seconds: PrefillSeconds,
        out: Float[np.ndarray, "dops runs"],
    ) -> None:
        self._runs = runs
        self._sizes = sizes
        self._seconds = seconds
        self._out = out
        self._upto = sizes.cumsum(axis=1)
        self._num_known = 0
        """Of all runs, in their order."""

    def are_those_of(
        self, runs: Runs, sizes: Float[np.ndarray, "2 requests"], seconds: PrefillSeconds, num_instances: int
    ) -> bool:
        """Whether these are asked for."""
        return (
            self._runs is runs
            and len(self._out) == num_instances
            and self._seconds == seconds
            and self._sizes.tobytes() == sizes.tobytes()
        )

    def of(self, block: Block) -> Float[np.ndarray, "dops block_runs"]:
        """Of the runs of a block; those of blocks before it must have been asked for. Not to be written to."""
        times = self._out[:, block.part]
        if self._num_known < block.part.stop:
            before = self._upto - self._sizes
            sums = self._upto.take(block.last, axis=1) - before.take(block.first, axis=1)
            self._seconds(PrefillTotals.of_sums(*sums), times)
            self._num_known = block.part.stop
        return times


class Workspace:
    """Arrays that one search after the other uses: to get memory from the operating system takes longer than all that
    is written to it. And the times that the last one has found, for requests that wait on come to weigh more, and
    mostly nothing else changes.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self._times: RunTimes | None = None

    def times_of(
        self, runs: Runs, sizes: Float[np.ndarray, "2 requests"], seconds: PrefillSeconds, num_instances: int
    ) -> RunTimes:
        """See `RunTimes`."""
        if self._times is None or not self._times.are_those_of(runs, sizes, seconds, num_instances):
            out = self.array("times", num_instances, runs.num_runs)
            self._times = RunTimes(runs, sizes, seconds, out)
        return self._times

    def array(self, name: str, num_rows: int, num_columns: int) -> Float[np.ndarray, "rows columns"]:
        """One of this size, of any content, until it is asked for by the same name again."""
        size = num_rows * num_columns
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.empty(size)
        return buffer[:size].reshape(num_rows, num_columns)
