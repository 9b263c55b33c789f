"""What it costs that only neighbours in length are batched, against all partitions of the requests and instances."""

import numpy as np
import pytest

from tests.scheduler.esp.partitions import Problem
from tests.scheduler.esp.test_batching import cost, solve

NUM_CASES = 60


def excesses(room: float, *, has_even_pools: bool, has_priorities: bool = False) -> np.ndarray:
    """Cost over the least possible cost, of 5 requests of 50 to 50,000 tokens on 2 or 3 instances.

    Args:
        room: free slots over those that the keys need.
        has_even_pools: whether the instances have equally many; or else random parts, in descending order.
        has_priorities: whether weights are off 1 / length by up to 4 times.
    """
    random = np.random.default_rng(0)
    found = []
    for _ in range(NUM_CASES):
        num_instances = int(random.integers(2, 4))
        lengths = np.sort(np.exp(random.uniform(np.log(50), np.log(50_000), 5)).astype(np.int64))[::-1]
        parts = np.full(num_instances, 1 / num_instances)
        if not has_even_pools:
            parts = np.sort(random.dirichlet(np.ones(num_instances)))[::-1]
        factors = np.exp(random.uniform(-np.log(4), np.log(4), 5)) if has_priorities else np.ones(5)
        problem = Problem(
            lengths=tuple(lengths.tolist()),
            weights=tuple((factors / lengths).tolist()),
            free_tokens=tuple((room * lengths.sum() * parts).astype(np.int64).tolist()),
            coefficients=tuple((0.015 + 0.005 * dop, 1e-4 / dop, 4e-9 / dop) for dop in range(1, num_instances + 1)),
        )
        found.append(cost(problem, solve(problem)) / problem.least_of_all())
    return np.array(found)


def test_nothing_where_memory_is_ample():
    assert excesses(100.0, has_even_pools=True) == pytest.approx(1.0, abs=1e-9)


def test_less_than_a_per_cent_where_priorities_disagree_with_lengths():
    found = excesses(100.0, has_even_pools=True, has_priorities=True)
    assert found.mean() < 1.01
    assert found.max() < 1.2


@pytest.mark.parametrize("has_even_pools", [True, False])
def test_some_per_cent_where_memory_is_short(has_even_pools: bool):
    found = excesses(1.2, has_even_pools=has_even_pools)
    assert found.mean() < 1.06
    assert found.max() < 2.5
