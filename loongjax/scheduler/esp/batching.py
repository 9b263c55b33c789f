"""Which waiting requests are prefilled together, and on how many instances: equation 5 of the paper, exactly."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from loongjax.costmodel.work import PrefillTotals

PrefillSeconds = Callable[[int, PrefillTotals], np.ndarray]
"""(degree of parallelism, totals of many batches) to their times in seconds, float64 of the totals' shape."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One prefill: places in the lists of requests and of instances that were split."""

    requests: range
    instances: range


def split(
    lengths: Int[np.ndarray, " requests"],
    weights: Float[np.ndarray, " requests"],
    free_tokens: Int[np.ndarray, " instances"],
    seconds: PrefillSeconds,
    *,
    max_tokens_per_instance: int,
    max_requests: int,
    kept_tokens: Int[np.ndarray, " requests"] | None = None,
) -> tuple[Batch, ...] | None:
    """Splits requests and instances into batches of least weighted latency.

    Each batch takes neighbours of both lists. f[i][k], the least cost of the first i requests on exactly the first k
    instances, is the least over j < i and l < k of f[j][l] + T(R[j, i], E[l, k]) where D[j, i] <= V[l, k]; the answer
    is the least f[n][k] over k. T is a batch's time times the sum of its weights; with 1 / length as weights, the sum
    of normalised input latencies. Nothing is pruned: the bounds of equation 6 lose the optimum where memory is short,
    and with them the reference never forms a second batch.

    Only neighbours are put together, which is the paper's restriction. Against all partitions into sets, for 5
    requests of 50 to 50,000 tokens on 2 or 3 instances, that lost nothing where memory was ample, under 1 % where
    weights were off 1 / length by up to 4 times, and with 1.2 times the memory needed 3 to 5 %, at worst 2.4 times.
    Where memory is shorter still, there may be a partition into sets and none into neighbours.

    Args:
        lengths: tokens to compute of each request, descending.
        weights: what a second of each request's prefill costs, above 0.
        free_tokens: free slots of each instance. If they descend, no instance between two batches is worth leaving
            out; the last ones may be.
        seconds: asked once for each degree of parallelism, about every batch of neighbours.
        max_tokens_per_instance: a batch on d instances computes at most d times as many.
        max_requests: of one batch.
        kept_tokens: slots that each request's keys take; None: as many as its length.

    Returns:
        Batches in the order of the lists, which cover all requests; None if memory or limits allow no split.
    """
    num_requests, num_instances = len(lengths), len(free_tokens)
    if num_requests == 0:
        return ()
    if num_instances == 0:
        return None
    if num_instances == 1:
        num_kept = (lengths if kept_tokens is None else kept_tokens).sum()
        fits = num_kept <= free_tokens[0] and lengths.sum() <= max_tokens_per_instance and num_requests <= max_requests
        return (Batch(range(num_requests), range(1)),) if fits else None
    runs = _runs(num_requests, max_requests)
    num_tokens = runs.sums(lengths)
    totals = PrefillTotals.of_sums(num_tokens, runs.sums(lengths * lengths))
    costs = _costs(num_tokens, totals, runs.sums(weights), seconds, num_instances, max_tokens_per_instance)
    kept = runs.sums(lengths if kept_tokens is None else kept_tokens)
    free = np.concatenate(([0], np.cumsum(free_tokens)))
    return _Search(runs, costs, kept, free).trace_back()


@dataclasses.dataclass(frozen=True, eq=False)
class _Runs:
    """All runs of neighbours that may be a batch, by their last request, and those with the same by their first."""

    first: Int[np.ndarray, " runs"]
    last: Int[np.ndarray, " runs"]
    offsets: Int[np.ndarray, " requests"]
    """Where the runs that end with each request begin."""
    slices: tuple[slice, ...]
    """Those runs."""

    def sums(self, numbers: np.ndarray) -> np.ndarray:
        """Of each run's numbers: [runs]."""
        sums = numbers.cumsum()
        return sums.take(self.last) - (sums - numbers).take(self.first)


@functools.lru_cache(maxsize=64)
def _runs(num_requests: int, max_requests: int) -> _Runs:
    """Shared: not to be written to."""
    last, first = np.nonzero(np.tril(~np.tri(num_requests, k=-max_requests, dtype=bool)))
    offsets = np.searchsorted(last, np.arange(num_requests))
    slices = [slice(begin, end) for begin, end in itertools.pairwise([*offsets.tolist(), len(last)])]
    return _Runs(first.copy(), last.copy(), offsets, tuple(slices))


def _costs(
    num_tokens: Int[np.ndarray, " runs"],
    totals: PrefillTotals,
    weights: Float[np.ndarray, " runs"],
    seconds: PrefillSeconds,
    num_instances: int,
    max_tokens_per_instance: int,
) -> Float[np.ndarray, "dops runs"]:
    """T of each run as a batch on 1, 2, ... instances; infinite where these cannot compute as many tokens."""
    costs = np.empty((num_instances, len(num_tokens)))
    most_of_any = num_tokens.max()
    for dop, cost in enumerate(costs, start=1):
        np.multiply(seconds(dop, totals), weights, out=cost)
        if most_of_any > dop * max_tokens_per_instance:
            cost[num_tokens > dop * max_tokens_per_instance] = np.inf
    return costs


class _Search:
    """The table of f, column by column."""

    def __init__(
        self,
        runs: _Runs,
        costs: Float[np.ndarray, "dops runs"],
        kept: Int[np.ndarray, " runs"],
        free: Int[np.ndarray, " instances_and_1"],
    ) -> None:
        """All of f.

        Args:
            runs: what may be a batch.
            costs: of each on 1, 2, ... instances.
            kept: slots that each takes.
            free: slots on the first 0, 1, ... instances.
        """
        num_instances, num_requests = len(costs), len(runs.offsets)
        self._runs = runs
        self._costs = costs
        self._kept = kept
        self._free = free
        self._is_memory_short = kept.max() > np.diff(free).min()
        """Whether there may be a batch that some instance could not hold."""
        self._least_of_all = np.full(num_instances + 1, np.inf)
        """f[n], of all requests."""
        self._before = np.empty((num_instances, len(kept)))
        """[l, run]: f[j][l] of the requests before the run."""
        column = np.full(num_requests + 1, np.inf)
        column[0] = 0.0
        for k in range(1, num_instances + 1):
            # Every batch takes an instance, so a column of f follows from those before it, all its rows at once. Of
            # the last column one row is asked for.
            column.take(runs.first, out=self._before[k - 1], mode="clip")
            if k < num_instances:
                least = np.minimum.reduce(self._candidates(k, slice(None)))
                column[0], column[1:] = np.inf, np.minimum.reduceat(least, runs.offsets)
                self._least_of_all[k] = column[-1]
        last = self._candidates(num_instances, runs.slices[-1])
        self._least_of_all[num_instances] = last.min()

    def trace_back(self) -> tuple[Batch, ...] | None:
        """The batches behind the least f[n][k], found again from the last to the first; None if it is infinite."""
        i, k = len(self._runs.offsets), int(self._least_of_all.argmin())
        if self._least_of_all[k] == np.inf:
            return None
        batches: list[Batch] = []
        while i:
            runs = self._runs.slices[i - 1]
            dop_less_1, index = divmod(int(self._candidates(k, runs).argmin()), runs.stop - runs.start)
            begin = int(self._runs.first[runs.start + index])
            batches.append(Batch(range(begin, i), range(k - 1 - dop_less_1, k)))
            i, k = begin, k - 1 - dop_less_1
        return tuple(reversed(batches))

    def _candidates(self, k: int, runs: slice) -> Float[np.ndarray, "dops runs"]:
        """The cost of each of these runs on the last 1, 2, ... of k instances, and of what is before it on the others;
        infinite where memory is too short."""
        candidates = self._before[k - 1 :: -1, runs] + self._costs[:k, runs]
        if self._is_memory_short:
            num_free = self._free[k] - self._free[k - 1 :: -1]
            candidates[self._kept[runs] > num_free[:, None]] = np.inf
        return candidates
