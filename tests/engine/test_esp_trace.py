"""The step loop under the ESP policy: random lives of an engine, with a cost model that knows little of its times."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.core.iteration import DecodeIteration, Iteration, PrefillIteration
from loongjax.core.request import FinishReason, Request
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.policy import EspPolicy
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.scheduler.esp.hand_model import HandModel


def policy() -> EspPolicy:
    model = HandModel(token_s=0.1, step_s=1.0, row_s=0.2, exchange_s=0.05, moved_s=0.01)
    return EspPolicy(EspConfig(growth_tokens=4, min_tokens_between_migrations=4), model)


@settings(max_examples=25, deadline=None)
@given(
    num_instances=st.integers(1, 5),
    num_pages=st.integers(3, 12),
    page_size=st.sampled_from([1, 2, 4]),
    max_num_seqs=st.integers(1, 4),
    run_ahead=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_once_with_the_tokens_that_it_has_alone(
    num_instances: int, num_pages: int, page_size: int, max_num_seqs: int, run_ahead: bool, seed: int
) -> None:
    rng = random.Random(seed)
    num_slots = num_instances * num_pages * page_size
    cluster = Cluster(
        num_instances=num_instances,
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=num_slots + 1,
        max_num_batched_tokens=num_pages * page_size + 1,
        max_num_seqs=max_num_seqs,
        run_ahead=run_ahead,
    )
    has_failures = rng.random() < 0.3
    runtime = cluster.runtime(
        duration_s=lambda iteration: rng.choice([0.5, 1.0, 7.0]),
        fails=lambda iteration: has_failures and rng.random() < 0.02,
    )
    core, journal = cluster.core(runtime, policy()), Journal()
    requests: dict[str, Request] = {}
    aborted: set[str] = set()
    num_to_come = rng.randint(1, 10)
    while (num_to_come or not core.is_idle) and core.death is None:
        if num_to_come and (core.is_idle or rng.random() < 0.3):
            num_to_come -= 1
            num_prompt_tokens = rng.randint(1, num_slots)
            request = cluster.request(
                f"r{num_to_come}", num_prompt_tokens, rng.randint(0, min(20, num_slots + 1 - num_prompt_tokens))
            )
            requests[request.request_id] = request
            core.add(request)
        live = sorted(requests.keys() - journal.last.keys())
        if live and rng.random() < 0.02:
            aborted.add(name := rng.choice(live))
            core.abort(name)
        journal.write(core.step(1.0))
        core.check_integrity()
    assert journal.last.keys() == requests.keys()
    for name, request in requests.items():
        journal.check(request)
        assert journal.last[name].finish_reason is not FinishReason.ABORT or name in aborted
    assert_nothing_leaks(core)


def test_steady_decodes_run_ahead() -> None:
    """The policy answers the same a step later, so the next step is submitted before the last one is read."""
    cluster = Cluster(num_instances=2)
    runtime = cluster.runtime()
    core = cluster.core(runtime, policy())
    core.add(*(cluster.request(f"r{i}", 8, 20) for i in range(6)))
    run(core)
    decodes = [iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration)]
    assert sum(iteration.continues for iteration in decodes) > len(decodes) / 2


def test_a_short_request_does_not_wait_for_a_long_prefill_in_flight() -> None:
    def duration_s(iteration: Iteration) -> float:
        if isinstance(iteration, PrefillIteration):
            return 0.1 * sum(len(item.token_ids) for item in iteration.inputs) / iteration.group.dop
        return 1.0

    cluster = Cluster(num_instances=4, num_pages=100, max_model_len=1000, max_num_batched_tokens=400)
    runtime = cluster.runtime(duration_s=duration_s)
    core, journal = cluster.core(runtime, policy()), Journal()
    core.add(cluster.request("long", 350, 4), cluster.request("first", 10, 4))
    journal.write(core.step(0.0))
    core.add(cluster.request("second", 10, 4))
    while "second/0" not in journal.last:
        journal.write(core.step(1.0))
    assert "long/0" not in journal.tokens
