"""Requests end, and those who decode with them go on without a pause."""

from __future__ import annotations

import dataclasses

import pytest

from loongjax.core.iteration import DecodeIteration, PrefillIteration
from loongjax.core.request import FinishReason, Request
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import EOS, FakeRuntime, expected_tokens

CLUSTER = Cluster(num_instances=1, num_pages=64, max_model_len=64, prefill_tokens_per_instance=64)


def decodes(runtime: FakeRuntime) -> list[DecodeIteration]:
    return [iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration)]


def members(iteration: DecodeIteration) -> list[str]:
    return [item.request.request_id.removesuffix("/0") for batch in iteration.sub_batches for item in batch.inputs]


def begins(runtime: FakeRuntime) -> list[list[str]]:
    """The requests of each decode that went on from nothing."""
    return [members(iteration) for iteration in decodes(runtime) if not iteration.continues]


def serve(runtime: FakeRuntime, *requests: Request, cluster: Cluster = CLUSTER) -> Journal:
    """All at once, to their end."""
    core = cluster.core(runtime)
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)
    return journal


def test_who_gets_the_last_token_leaves_behind_a_decode_that_never_stops() -> None:
    runtime = CLUSTER.runtime()
    serve(runtime, *(CLUSTER.request(f"r{i}", 8, max_tokens) for i, max_tokens in enumerate((6, 12, 20, 20))))
    assert begins(runtime) == [["r0", "r1", "r2", "r3"]]
    assert [len(members(iteration)) for iteration in decodes(runtime)] == [4] * 5 + [3] * 6 + [2] * 8
    # As long as anybody decodes, one step is in flight behind another.
    assert runtime.now_s() == 1.0 + 19.0


def with_stop_after(num_tokens: int) -> Request:
    """A request whose first stop token is the one of that number."""
    for seed in range(10_000):
        request = dataclasses.replace(CLUSTER.request("stops", 5, 40), seed=seed, stop_token_ids=frozenset([EOS]))
        if len(expected_tokens(request)) == num_tokens:
            return request
    raise AssertionError("no seed does that")


def test_who_meets_a_stop_token_leaves_after_one_more_step() -> None:
    runtime = CLUSTER.runtime()
    others = [CLUSTER.request(f"r{i}", 8, 20) for i in range(3)]
    journal = serve(runtime, with_stop_after(7), *others)
    assert journal.last["stops/0"].finish_reason is FinishReason.STOP
    assert begins(runtime) == [["stops", "r0", "r1", "r2"]]
    # Six steps gave it tokens, and the one behind the last of them was submitted before that was known.
    assert [len(members(iteration)) for iteration in decodes(runtime)] == [4] * 7 + [3] * 12


def test_an_abort_leaves_the_others_going_on() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    requests = [CLUSTER.request(f"r{i}", 8, 20) for i in range(4)]
    core.add(*requests)
    journal = Journal()
    while len(decodes(runtime)) < 5:
        journal.write(core.step(1.0))
    core.abort(requests[1].request_id)
    run(core, journal)
    assert journal.last[requests[1].request_id].finish_reason is FinishReason.ABORT
    assert begins(runtime) == [["r0", "r1", "r2", "r3"]]
    assert members(decodes(runtime)[-1]) == ["r0", "r2", "r3"]
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_a_decode_begins_again_where_fewer_rows_of_padding_do() -> None:
    """Up to eight requests of one instance are padded to 1, 4 or 8 rows."""
    runtime = CLUSTER.runtime()
    serve(runtime, *(CLUSTER.request(f"r{i}", 4, max_tokens) for i, max_tokens in enumerate((5, 8, 11, 14, 17, 20))))
    assert begins(runtime) == [["r0", "r1", "r2", "r3", "r4", "r5"], ["r2", "r3", "r4", "r5"], ["r5"]]


def test_one_who_joins_makes_it_begin_again() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("a", 8, 10), CLUSTER.request("b", 8, 30))
    journal = Journal()
    while len(decodes(runtime)) < 4:
        journal.write(core.step(1.0))
    core.add(late := CLUSTER.request("late", 8, 10))
    run(core, journal)
    journal.check(late)
    assert begins(runtime)[:2] == [["a", "b"], ["a", "b", "late"]]
    assert_nothing_leaks(core)


THREE_WHO_FILL_TWELVE_PAGES = (("short", 12, 5), ("long", 12, 10), ("other", 12, 10))
"""Names, prompt tokens and output tokens."""


def test_pages_of_those_who_are_about_to_end_are_not_counted_on_before_they_are_free() -> None:
    """Each holds four of twelve pages when the first gets its last token, and the others need a fifth behind that."""
    cluster = dataclasses.replace(CLUSTER, num_pages=12, max_model_len=32)
    runtime = cluster.runtime()
    serve(runtime, *(cluster.request(*request) for request in THREE_WHO_FILL_TWELVE_PAGES), cluster=cluster)
    at_end = [len(members(iteration)) for iteration in decodes(runtime)]
    assert at_end == [3] * 4 + [2] * 5
    assert sum(isinstance(iteration, PrefillIteration) for iteration in runtime.submitted) == 1, "nobody starts again"
    # The step behind the last token waited until that was there, and went on from what the devices hold all the same.
    assert begins(runtime) == [["short", "long", "other"]]
    assert runtime.now_s() == 1.0 + 9.0


def test_pages_of_one_who_was_about_to_end_are_counted_on_once_an_abort_frees_them() -> None:
    cluster = dataclasses.replace(CLUSTER, num_pages=12, max_model_len=32)
    runtime = cluster.runtime()
    core, journal = cluster.core(runtime), Journal()
    short, *others = [cluster.request(*request) for request in THREE_WHO_FILL_TWELVE_PAGES]
    core.add(short, *others)
    while len(journal.tokens.get("short/0", ())) < 4:
        journal.write(core.step(1.0))
    assert len(decodes(runtime)) == 4, "nothing is behind the last token: the others need a page each"
    core.abort("short/0")
    journal.write(core.step(0.0))
    assert [members(iteration) for iteration in decodes(runtime)[4:]] == [["long", "other"]]
    run(core, journal)
    for request in others:
        journal.check(request)
    assert_nothing_leaks(core)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_steps_result_for_those_who_have_left_is_nobodys(run_ahead: bool) -> None:
    cluster = dataclasses.replace(CLUSTER, run_ahead=run_ahead)
    runtime = cluster.runtime()
    requests = [cluster.request(f"r{i}", 3 + i, 2 + 3 * i) for i in range(8)]
    journal = serve(runtime, *requests, cluster=cluster)
    for request in requests:
        assert journal.tokens[request.request_id] == list(expected_tokens(request))
