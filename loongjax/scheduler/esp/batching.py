"""Which waiting requests are prefilled together, and on how many instances: equation 5 of the paper, exactly."""

from __future__ import annotations

import dataclasses
import functools
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
    if num_instances == 1:
        num_kept = (lengths if kept_tokens is None else kept_tokens).sum()
        fits = num_kept <= free_tokens[0] and lengths.sum() <= max_tokens_per_instance and num_requests <= max_requests
        return (Batch(range(num_requests), range(1)),) if fits else None
    costs = _costs(lengths, weights, seconds, num_instances, max_tokens_per_instance, max_requests)
    kept = _neighbour_sums(lengths if kept_tokens is None else kept_tokens)
    free = np.concatenate(([0], np.cumsum(free_tokens)))
    least = np.full((num_instances + 1, num_requests + 1), np.inf)
    least[0, 0] = 0.0
    candidates = np.empty_like(costs)
    for k in range(1, num_instances + 1):
        # Every batch takes an instance, so a column of f follows from those before it, all its rows at once. Of the
        # last column one row is asked for.
        rows = slice(0, num_requests) if k < num_instances else slice(num_requests - 1, num_requests)
        alone = np.where(kept[0, rows] <= free[k], costs[k - 1, 0, rows], np.inf)
        followed = candidates[: k - 1, :, rows]  # [degree of parallelism, begin, end] of a batch that is not alone
        np.add(least[k - 1 : 0 : -1, :num_requests, None], costs[: k - 1, :, rows], out=followed)
        for dop in range(1, k):
            num_free = free[k] - free[k - dop]
            if kept[0, -1] > num_free:
                np.copyto(followed[dop - 1], np.inf, where=kept[:, rows] > num_free)
        least[k, 1:][rows] = np.minimum(alone, followed.min(axis=(0, 1), initial=np.inf))
    return _trace_back(least, costs, kept, free)


def _costs(
    lengths: Int[np.ndarray, " requests"],
    weights: Float[np.ndarray, " requests"],
    seconds: PrefillSeconds,
    num_instances: int,
    max_tokens_per_instance: int,
    max_requests: int,
) -> Float[np.ndarray, "dops requests requests"]:
    """T of the batch of requests [begin, end] on 1, 2, ... instances; infinite where that may be no batch."""
    num_requests = len(lengths)
    places = _places_of_batches(num_requests, max_requests)
    num_tokens = _neighbour_sums(lengths).take(places)
    totals = PrefillTotals.of_sums(num_tokens, _neighbour_sums(lengths * lengths).take(places))
    weight = _neighbour_sums(weights).take(places)
    most_of_any = num_tokens.max()
    costs = np.full((num_instances, num_requests * num_requests), np.inf)
    for dop, cost in enumerate(costs, start=1):
        most_tokens = dop * max_tokens_per_instance
        batch_costs = seconds(dop, totals) * weight
        if most_of_any > most_tokens:
            batch_costs[num_tokens > most_tokens] = np.inf
        cost[places] = batch_costs
    return costs.reshape(num_instances, num_requests, num_requests)


@functools.lru_cache(maxsize=64)
def _places_of_batches(num_requests: int, max_requests: int) -> Int[np.ndarray, " batches"]:
    """Where a flattened square of [begin, end] may be a batch. Shared: not to be written to."""
    places = np.flatnonzero(np.triu(np.tri(num_requests, k=max_requests - 1, dtype=bool)))
    places.flags.writeable = False
    return places


def _neighbour_sums(numbers: np.ndarray) -> np.ndarray:
    """Sums of numbers [begin, end], for every begin and end: [len, len]; of no meaning where end < begin."""
    sums = np.cumsum(numbers)
    return sums[None, :] - (sums - numbers)[:, None]


def _trace_back(
    least: Float[np.ndarray, "instances_and_1 requests_and_1"],
    costs: Float[np.ndarray, "instances requests requests"],
    kept: Int[np.ndarray, "requests requests"],
    free: Int[np.ndarray, " instances_and_1"],
) -> tuple[Batch, ...] | None:
    """The batches behind the least f[n][k], found again from the last to the first; None if it is infinite."""
    num_requests = kept.shape[0]
    i, k = num_requests, int(np.argmin(least[:, num_requests]))
    if least[k, i] == np.inf:
        return None
    batches: list[Batch] = []
    while i:
        num_free = free[k] - free[k - 1 :: -1]
        candidates = least[k - 1 :: -1, :i] + costs[:k, :i, i - 1]
        candidates[kept[None, :i, i - 1] > num_free[:, None]] = np.inf
        dop_less_1, begin = divmod(int(np.argmin(candidates)), i)
        batches.append(Batch(range(begin, i), range(k - 1 - dop_less_1, k)))
        i, k = begin, k - 1 - dop_less_1
    return tuple(reversed(batches))
