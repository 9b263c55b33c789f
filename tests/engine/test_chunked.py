"""The engine under chunks: whatever happens amid a prompt, tokens, pages and histories are right."""

from __future__ import annotations

import dataclasses
import random

import pytest

from loongjax.core.iteration import DecodeIteration, ExtendIteration, Iteration, PrefillIteration, RecoverIteration
from loongjax.core.request import FinishReason, Phase
from loongjax.engine.core import EngineCore
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime

CLUSTER = Cluster(
    num_instances=1, num_pages=16, page_size=4, max_model_len=48, max_num_batched_tokens=20, max_whole_prompt_len=20
)
"""Prompts may be longer than a prefill."""


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
    requests = []
    for i in range(40):
        max_tokens = rng.randint(0, 18)
        prompt_logprobs = 0 if i % 7 == 0 else None
        is_whole = prompt_logprobs is not None or max_tokens == 0
        length = rng.randint(1, 20 if is_whole else 30)
        requests.append(
            CLUSTER.request(f"r{i}", length, max_tokens, prompt_logprobs=prompt_logprobs, ignore_eos=i % 3 > 0)
        )
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


def test_a_prompt_may_be_as_long_as_the_pool_however_small_a_prefill() -> None:
    runtime = CLUSTER.runtime()
    core = core_of(runtime, 512)
    request = CLUSTER.request("long", 47, 1)
    core.add(request)
    run(core).check(request)
    assert [len(item.token_ids) for iteration in extends(runtime) for item in iteration.inputs] == [20, 20, 7]


def test_a_prompt_whose_logprobs_are_known_is_cut_after_a_preemption_however_long_it_is() -> None:
    """It was computed in one piece, and has grown beyond that."""
    runtime = CLUSTER.runtime()
    core = core_of(runtime, 8)
    scored, old = CLUSTER.request("scored", 18, 20, prompt_logprobs=0), CLUSTER.request("old", 17, 31)
    core.add(old, scored)
    journal = run(core)
    journal.check(scored)
    journal.check(old)
    assert journal.prompt_logprobs == {"scored/0": 1}
    assert core.stats().num_preemptions
    again = [item for iteration in extends(runtime) for item in iteration.inputs if item.request is scored]
    assert sum(len(item.token_ids) for item in again if len(item.token_ids) > 1) > CLUSTER.max_num_batched_tokens


def poison_amid_its_prompt(iteration: Iteration) -> bool:
    """Whether an iteration computes the 30th token of a request of such a name."""
    return isinstance(iteration, ExtendIteration) and any(
        item.request.request_id.startswith("poison") and item.position <= 29 < item.position + len(item.token_ids)
        for item in iteration.inputs
    )


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_a_long_prompt_that_always_fails_ends_alone_and_nobody_else_does(chunk_tokens: int) -> None:
    runtime = CLUSTER.runtime(fails=poison_amid_its_prompt)
    core = core_of(runtime, chunk_tokens)
    poison = [CLUSTER.request(f"poison{i}", 35, 4) for i in range(3)]
    innocent = [CLUSTER.request(f"innocent{i}", length, 8) for i, length in enumerate([3, 40, 5, 33])]
    core.add(innocent[0], poison[0], innocent[1], poison[1], innocent[2], poison[2], innocent[3])
    journal = run(core)
    for request in innocent:
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    for request in poison:
        last = journal.last[request.request_id]
        assert (last.finish_reason, last.error) == (
            FinishReason.ERROR,
            "2 iterations in a row with it failed: injected failure",
        )
    assert_nothing_leaks(core)


def test_an_innocent_long_prompt_is_computed_alone_after_a_failure_while_decodes_take_turns_with_it() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 8)
    core = core_of(runtime, 4, dataclasses.replace(CLUSTER, run_ahead=False))
    short, long = CLUSTER.request("short", 6, 20), CLUSTER.request("long", 26, 3)
    core.add(short, long)
    journal = run(core)
    journal.check(short)
    journal.check(long)
    failed = runtime.submitted[8]
    assert isinstance(failed, ExtendIteration)
    assert [item.request for item in failed.inputs] == [short, long]
    assert isinstance(runtime.submitted[9], RecoverIteration)
    chunks = [iteration for iteration in extends(runtime) if iteration.iteration_id > 8]
    assert all(len(iteration.inputs) == 1 for iteration in chunks)
    of_long = [iteration for iteration in chunks if iteration.inputs[0].request is long]
    assert [len(iteration.inputs[0].token_ids) for iteration in of_long] == [4] * 6 + [2]
    # The older one was computed anew before that, and decodes.
    beside = runtime.submitted[of_long[0].iteration_id : of_long[-1].iteration_id + 1]
    assert [type(iteration) for iteration in beside] == [ExtendIteration, DecodeIteration] * 6 + [ExtendIteration]


def test_a_suspect_whose_prompt_cannot_be_cut_is_prefilled() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 0)
    core = core_of(runtime, 4)
    request = CLUSTER.request("a", 20, 4, prompt_logprobs=0)
    core.add(request)
    run(core).check(request)
    kinds = [type(iteration) for iteration in runtime.submitted[:4]]
    assert kinds == [PrefillIteration, DecodeIteration, RecoverIteration, PrefillIteration]


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
