"""The sizes of iterations, counted against what the runtime was given."""

from __future__ import annotations

import bisect

from loongjax.core.iteration import DecodeIteration, Iteration, PrefillIteration
from tests.engine.cluster import Cluster, run

POWERS = [2**power for power in range(20)]


def num_tokens(iteration: Iteration) -> int | None:
    """Tokens that go in and come out, as an observer of the runtime counts them; None if it is not about tokens."""
    match iteration:
        case PrefillIteration(inputs=inputs):
            return sum(len(item.token_ids) + (item.request.max_tokens > 0) for item in inputs)
        case DecodeIteration(sub_batches=batches):
            return sum(len(batch.inputs) for batch in batches)
    return None


def histogram(sizes: list[int]) -> dict[int, int]:
    """By the first power of two that is no smaller."""
    rounded = [POWERS[bisect.bisect_left(POWERS, size)] for size in sizes]
    return {size: rounded.count(size) for size in sorted(set(rounded))}


def test_every_iteration_is_counted_by_its_tokens() -> None:
    cluster = Cluster(run_ahead=False)
    runtime = cluster.runtime()
    core = cluster.core(runtime)
    core.add(cluster.request("a", 60, 10), cluster.request("b", 4, 3), cluster.request("c", 1, 0, prompt_logprobs=0))
    run(core)
    stats = core.stats()
    sizes = [size for iteration in runtime.submitted if (size := num_tokens(iteration)) is not None]
    assert dict(sorted(stats.iteration_tokens.items())) == histogram(sizes)
    assert stats.num_iteration_tokens == sum(sizes) == stats.num_prompt_tokens + stats.num_generation_tokens


def test_running_ahead_counts_no_token_that_is_thrown_away() -> None:
    cluster = Cluster()
    core = cluster.core()
    core.add(*(cluster.request(f"r{i}", 3 + i, 20, ignore_eos=False) for i in range(12)))
    run(core)
    stats = core.stats()
    assert stats.num_iteration_tokens == stats.num_prompt_tokens + stats.num_generation_tokens
    assert sum(stats.iteration_tokens.values()) == stats.num_iterations


def test_what_is_recomputed_after_a_preemption_counts_again() -> None:
    cluster = Cluster(num_instances=1, num_pages=8, page_size=4, max_model_len=32, run_ahead=False)
    runtime = cluster.runtime()
    core = cluster.core(runtime)
    core.add(cluster.request("a", 8, 20), cluster.request("b", 8, 20))
    run(core)
    stats = core.stats()
    assert stats.num_preemptions > 0
    sizes = [size for iteration in runtime.submitted if (size := num_tokens(iteration)) is not None]
    assert stats.num_iteration_tokens == sum(sizes) > stats.num_prompt_tokens + stats.num_generation_tokens
