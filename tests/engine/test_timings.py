"""Where the time of requests went, on a virtual clock whose every tick can be worked out by hand."""

from __future__ import annotations

import dataclasses

from loongjax.core.iteration import Iteration, PrefillIteration
from loongjax.core.request import FinishReason, Timings
from loongjax.engine.live_request import LiveRequest
from tests.engine.cluster import Cluster, Journal, run

CLUSTER = Cluster()
ONE_INSTANCE = dataclasses.replace(CLUSTER, num_instances=1, max_model_len=64)


def duration_s(iteration: Iteration) -> float:
    return 10.0 if isinstance(iteration, PrefillIteration) else 1.0


def test_a_lone_request_does_not_queue_and_its_parts_add_up() -> None:
    core = CLUSTER.core(CLUSTER.runtime(duration_s=duration_s))
    core.add(CLUSTER.request("a", 8, 5))
    timings = run(core).last["a/0"].timings
    assert timings is not None
    assert timings == Timings(queue_s=0.0, prefill_s=10.0, decode_s=4.0)
    assert timings.inference_s == 14.0


def test_a_request_queues_while_another_one_holds_the_instance() -> None:
    core = ONE_INSTANCE.core(ONE_INSTANCE.runtime(duration_s=duration_s))
    core.add(ONE_INSTANCE.request("a", 8, 1))
    journal = Journal()
    journal.write(core.step(0.0))
    core.add(ONE_INSTANCE.request("b", 8, 1))
    run(core, journal)
    assert journal.last["a/0"].timings == Timings(queue_s=0.0, prefill_s=10.0, decode_s=0.0)
    assert journal.last["b/0"].timings == Timings(queue_s=10.0, prefill_s=10.0, decode_s=0.0)


def test_only_the_last_event_has_timings() -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 8, 5))
    events = []
    while not core.is_idle:
        events += core.step(1.0)
    assert [event.timings is not None for event in events] == [event.finish_reason is not None for event in events]


def test_a_request_that_ends_in_the_queue_only_queued() -> None:
    live = LiveRequest(CLUSTER.request("a", 8, 1), 0, accepted_s=5.0)
    assert live.timings(8.0) == Timings(queue_s=3.0)


def test_a_request_that_ends_during_its_prefill_did_not_decode() -> None:
    live = LiveRequest(CLUSTER.request("a", 8, 1), 0, accepted_s=5.0)
    live.note_prefill(6.0)
    assert live.timings(8.0) == Timings(queue_s=1.0, prefill_s=2.0)


def test_the_time_of_a_failed_prefill_is_prefill_time() -> None:
    seen: list[Iteration] = []

    def fails(iteration: Iteration) -> bool:
        seen.append(iteration)
        return len(seen) == 1

    core = CLUSTER.core(CLUSTER.runtime(duration_s=duration_s, fails=fails))
    core.add(CLUSTER.request("a", 8, 3))
    last = run(core).last["a/0"]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.timings == Timings(queue_s=0.0, prefill_s=20.0, decode_s=2.0)


def test_a_request_without_output_ends_with_its_prefill() -> None:
    core = CLUSTER.core(CLUSTER.runtime(duration_s=duration_s))
    core.add(CLUSTER.request("a", 8, 0, prompt_logprobs=0))
    assert run(core).last["a/0"].timings == Timings(queue_s=0.0, prefill_s=10.0, decode_s=0.0)
