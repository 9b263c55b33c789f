"""All ways to batch requests on instances, enumerated: the truth that the dynamic program is held against."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from loongjax.costmodel.work import PrefillTotals


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What there is to split, and what a batch costs."""

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    free_tokens: tuple[int, ...]
    coefficients: tuple[tuple[float, float, float], ...]
    """A, B and C of equation 7, for 1, 2, ... instances."""
    max_tokens_per_instance: int = 10**9
    max_requests: int = 10**9
    kept_tokens: tuple[int, ...] | None = None

    def seconds(self, totals: PrefillTotals[np.ndarray], out: np.ndarray) -> None:
        for row, (constant, per_token, per_square) in zip(out, self.coefficients, strict=False):
            row[:] = constant + per_token * totals.num_tokens + per_square * totals.squared_lens

    def cost(self, requests: Sequence[int], instances: Sequence[int]) -> float:
        """Of one batch; infinite if it cannot be."""
        lengths = [self.lengths[request] for request in requests]
        kept = sum((self.kept_tokens or self.lengths)[request] for request in requests)
        is_possible = (
            len(requests) <= self.max_requests
            and sum(lengths) <= len(instances) * self.max_tokens_per_instance
            and kept <= sum(self.free_tokens[instance] for instance in instances)
        )
        if not is_possible:
            return math.inf
        constant, per_token, per_square = self.coefficients[len(instances) - 1]
        time = constant + per_token * sum(lengths) + per_square * sum(length**2 for length in lengths)
        return time * sum(self.weights[request] for request in requests)

    def least_of_neighbours(self) -> float:
        """Equation 5 by enumeration: neighbouring requests on neighbouring instances, the first ones."""
        best = math.inf
        n = len(self.lengths)
        for k in range(1, len(self.free_tokens) + 1):
            for count in range(1, min(n, k) + 1):
                for request_cuts in itertools.combinations(range(1, n), count - 1):
                    for instance_cuts in itertools.combinations(range(1, k), count - 1):
                        requests = itertools.pairwise((0, *request_cuts, n))
                        instances = itertools.pairwise((0, *instance_cuts, k))
                        cost = sum(
                            self.cost(range(*batch), range(*group))
                            for batch, group in zip(requests, instances, strict=True)
                        )
                        best = min(best, cost)
        return best

    def least_of_all(self) -> float:
        """Over every partition of the requests into sets, each on any instances of its own."""
        num_instances = len(self.free_tokens)
        best = math.inf
        for batches in set_partitions(range(len(self.lengths))):
            if len(batches) > num_instances:
                continue
            # Each instance joins one batch, or none (-1).
            for owners in itertools.product(range(-1, len(batches)), repeat=num_instances):
                groups = [[i for i, owner in enumerate(owners) if owner == batch] for batch in range(len(batches))]
                if all(groups):
                    cost = sum(self.cost(batch, group) for batch, group in zip(batches, groups, strict=True))
                    best = min(best, cost)
        return best


def set_partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every partition of the items into sets."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in set_partitions(rest):
        yield [[first], *smaller]
        for index, batch in enumerate(smaller):
            yield [*smaller[:index], [first, *batch], *smaller[index + 1 :]]
