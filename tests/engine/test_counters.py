"""The sizes of iterations, counted against what the runtime was given."""

from __future__ import annotations

import bisect

import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import DecodeIteration, Iteration, PrefillIteration, RecoverIteration
from loongjax.core.plan import Decode, Migrate, SubBatch
from loongjax.engine.binding import Flight
from loongjax.engine.counters import Counters
from loongjax.engine.live_request import LiveRequest
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


def live(name: str, *instances: int) -> LiveRequest:
    """A request whose keys a prefill has left on these instances."""
    request = LiveRequest(Cluster().request(name, 3), order=0, accepted_s=0.0)
    request.instances = instances
    return request


def decode(counters: Counters, lives: list[LiveRequest], *instances: int, num_steps: int = 1) -> int:
    """How many instances have joined when these decode together there."""
    group, before = Group.of(instances), counters.num_scale_ups
    plan = Decode(group, (SubBatch(instances[0], tuple([each.request_id for each in lives])),))
    counters.record(Flight(RecoverIteration(0, group), plan, tuple(lives)), num_steps)
    return counters.num_scale_ups - before


def test_who_joins_a_decode_group_is_counted_once_whatever_the_number_of_requests() -> None:
    counters, lives = Counters(kv_bytes_per_token=1), [live("a", 0), live("b", 0)]
    joined = [decode(counters, lives, *group) for group in ([0], [0, 2], [0, 2], [0, 1, 2, 3], [0], [0, 1])]
    assert joined == [0, 1, 0, 2, 0, 1]
    assert counters.decode_dop == {1: 2, 2: 3, 4: 1}


def test_steps_are_counted_by_their_degree_of_parallelism_and_who_joins_them_once() -> None:
    counters = Counters(kv_bytes_per_token=1)
    assert decode(counters, [live("a", 0)], 0, 1, num_steps=7) == 1
    assert counters.decode_dop == {2: 7}


def test_a_decode_group_that_takes_in_another_one_has_gained_an_instance() -> None:
    lives = [live("a", 0), live("b", 1, 2)]
    assert decode(Counters(kv_bytes_per_token=1), lives, 0, 1, 2) == 1


def test_groups_that_a_prefill_has_tied_together_have_gained_nothing() -> None:
    counters, lives = Counters(kv_bytes_per_token=1), [live("a", 0), live("b", 1)]
    assert decode(counters, [*lives, live("long", 1, 0)], 0, 1) == 0
    assert [decode(counters, [each], index) for index, each in enumerate(lives)] == [0, 0], "it has ended"


@pytest.mark.parametrize("then", [[1], [1, 2]])
def test_a_group_whose_keys_were_moved_has_gained_nothing(then: list[int]) -> None:
    counters = Counters(kv_bytes_per_token=1)
    moved, other = live("moved", *([0] if then == [1] else [0, 2])), live("other", 1)
    group = Group.of([0, 1])
    counters.record(Flight(RecoverIteration(0, group), Migrate("moved", 0, 1, 3), (moved,)))
    assert decode(counters, [moved, other], *then) == 0
    assert counters.num_scale_downs == 1
