"""The engine under chunks: whatever happens amid a prompt, tokens, pages and histories are right."""

from __future__ import annotations

import random

import pytest

from loongjax.core.iteration import DecodeIteration, ExtendIteration, Iteration, PrefillIteration, RecoverIteration
from loongjax.core.request import FinishReason, Phase
from loongjax.engine.core import EngineCore
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime

CLUSTER = Cluster(num_instances=1, num_pages=16, page_size=4, max_model_len=48)


def core_of(runtime: FakeRuntime, chunk_tokens: int, cluster: Cluster = CLUSTER) -> EngineCore:
    return cluster.core(runtime, ChunkedPolicy(cluster.shape, chunk_tokens))


def extends(runtime: FakeRuntime) -> list[ExtendIteration]:
    return [iteration for iteration in runtime.submitted if isinstance(iteration, ExtendIteration)]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
@pytest.mark.parametrize("failure_rate", [0.0, 0.03])
def test_every_request_gets_its_own_tokens(chunk_tokens: int, failure_rate: float) -> None:
    """With arrivals, aborts, preemptions and failures at any moment."""
    rng = random.Random(chunk_tokens)

    def fails(iteration: Iteration) -> bool:
        return not isinstance(iteration, RecoverIteration) and rng.random() < failure_rate

    runtime = CLUSTER.runtime(duration_s=lambda iteration: rng.uniform(0.5, 1.5), fails=fails)
    core, journal = core_of(runtime, chunk_tokens), Journal()
    requests = [
        CLUSTER.request(
            f"r{i}",
            rng.randint(1, 30),
            rng.randint(0, 18),
            prompt_logprobs=0 if i % 7 == 0 else None,
            ignore_eos=i % 3 > 0,
        )
        for i in range(40)
    ]
    for request in requests:
        core.add(request)
        for _ in range(rng.randint(0, 3)):
            journal.write(core.step(1.0))
        if rng.random() < 0.2:
            core.abort(rng.choice(requests).request_id)
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)
    assert extends(runtime)
    assert core.stats().num_preemptions or chunk_tokens == 1


def test_decodes_go_on_beside_a_long_prompt() -> None:
    runtime = CLUSTER.runtime()
    core, journal = core_of(runtime, 6), Journal()
    short, long = CLUSTER.request("short", 4, 12), CLUSTER.request("long", 30, 2)
    core.add(short)
    for _ in range(3):
        journal.write(core.step(1.0))
    core.add(long)
    run(core, journal)
    beside = [iteration for iteration in extends(runtime) if len(iteration.inputs) == 2]
    assert [[len(item.token_ids) for item in iteration.inputs] for iteration in beside] == [[1, 5]] * 6
    for request in (short, long):
        journal.check(request)
    assert journal.last["long/0"].history == (Phase("extend", (0,), (0,), 30), Phase("decode", (0,), (0,), 1))
    # Its steps beside chunks are decodes like the others.
    assert journal.last["short/0"].history == (Phase("extend", (0,), (0,), 4), Phase("decode", (0,), (0,), 11))


def test_a_prompt_whose_logprobs_are_wanted_is_prefilled_whole() -> None:
    runtime = CLUSTER.runtime()
    core = core_of(runtime, 4)
    request = CLUSTER.request("echo", 20, 3, prompt_logprobs=0)
    core.add(request)
    journal = run(core)
    journal.check(request)
    assert journal.prompt_logprobs == {"echo/0": 1}
    assert isinstance(runtime.submitted[0], PrefillIteration)
    assert not extends(runtime)


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_an_abort_amid_a_prompt_frees_its_pages_at_once(num_steps: int) -> None:
    core, journal = core_of(CLUSTER.runtime(), 4), Journal()
    gone, stays = CLUSTER.request("gone", 24, 4), CLUSTER.request("stays", 20, 4)
    core.add(gone, stays)
    for _ in range(num_steps):
        journal.write(core.step(1.0))
    core.abort(gone.request_id)
    core.check_integrity()
    run(core, journal)
    assert journal.last["gone/0"].finish_reason is FinishReason.ABORT
    journal.check(stays)
    assert_nothing_leaks(core)


def test_a_request_that_fails_amid_its_prompt_is_prefilled_alone() -> None:
    count = iter(range(100))
    runtime = CLUSTER.runtime(fails=lambda iteration: next(count) == 2)
    core = core_of(runtime, 4)
    request = CLUSTER.request("a", 20, 4)
    core.add(request)
    run(core).check(request)
    kinds = [type(iteration) for iteration in runtime.submitted[:5]]
    assert kinds == [ExtendIteration] * 3 + [RecoverIteration, PrefillIteration]


def test_steps_run_ahead_again_once_the_prompt_is_computed() -> None:
    runtime = CLUSTER.runtime()
    core = core_of(runtime, 4)
    request = CLUSTER.request("alone", 10, 12)
    core.add(request)
    run(core).check(request)
    assert runtime.max_in_flight == 2
    decodes = [iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration)]
    assert [iteration.continues for iteration in decodes] == [False] + [True] * 10


def test_every_token_is_counted_once() -> None:
    runtime = CLUSTER.runtime()
    core = core_of(runtime, 6)
    core.add(CLUSTER.request("a", 20, 5), CLUSTER.request("b", 13, 5))
    run(core)
    stats = core.stats()
    assert stats.num_preemptions == 0
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (33, 10)
    assert stats.num_iteration_tokens == 43
    assert (stats.num_scale_ups, stats.num_scale_downs) == (0, 0)
