"""Memory admission: the peak over all ends against a step by step count, and what is let in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.plan import Prefill
from loongjax.core.request import FinishReason
from loongjax.scheduler.esp.memory import MemoryAdmission, peak_tokens
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.observation import RequestEnded
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel, ask, policy_of
from tests.scheduler.views import cluster, running, waiting


def counted_peak(held: list[int], left: list[int]) -> int:
    """Every request adds a token a step; one whose last token is added gives all back before the next step."""
    peak = 0
    for step in range(max(left, default=0) + 1):
        peak = max(peak, sum(h + step for h, n in zip(held, left, strict=True) if n >= step))
    return peak


@given(requests=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_the_peak_is_what_counting_step_by_step_finds(requests: list[tuple[int, int]]):
    held, left = [h for h, _ in requests], [n for _, n in requests]
    assert peak_tokens(np.array(held, np.int64), np.array(left, np.int64)) == counted_peak(held, left)


def two_vacant() -> ClusterView:
    """800 slots, of which a request may come to need 699; w and v may need as much."""
    return cluster(
        3,
        num_pages=67,
        runs=[running("a", 0, (0, 100), num_output_tokens=1, max_new_tokens=600)],
        waits=[waiting("w", 1, 200, max_total_tokens=800), waiting("v", 2, 8, max_total_tokens=700)],
    )


def test_what_running_requests_may_still_need_counts_for_every_request_that_is_tried() -> None:
    """The reference forgets all reservations at the first request that it is undecided about, and lets v in."""
    plans, _ = ask(two_vacant(), HandModel(step_s=1e6), admission="worst-case")
    assert not [plan for plan in plans if isinstance(plan, Prefill)]


def test_a_short_output_is_let_in_where_a_long_one_is_not() -> None:
    view = two_vacant()
    short = [waiting("w", 1, 200, max_total_tokens=800), waiting("v", 2, 8, max_total_tokens=18)]
    plans, _ = ask(cluster(3, num_pages=67, runs=view.running, waits=short), admission="worst-case")
    assert [request.request_id for plan in plans if isinstance(plan, Prefill) for request in plan.requests] == ["v"]


def test_outputs_that_ended_early_let_more_requests_in() -> None:
    for admission, expected in (("quantile", {"w", "v"}), ("worst-case", set())):
        policy = policy_of(HandModel(step_s=1e6), admission=admission)
        end = RequestEnded(num_prompt_tokens=9, num_output_tokens=12, finish_reason=FinishReason.STOP)
        policy.observe([end] * 20)
        plans = policy.plan(two_vacant())
        found = {request.request_id for plan in plans if isinstance(plan, Prefill) for request in plan.requests}
        assert found == expected


def test_an_aborted_request_teaches_nothing() -> None:
    policy = policy_of(HandModel(step_s=1e6))
    end = RequestEnded(num_prompt_tokens=9, num_output_tokens=1, finish_reason=FinishReason.ABORT)
    policy.observe([end] * 50)
    assert not [plan for plan in policy.plan(two_vacant()) if isinstance(plan, Prefill)]


def worst_case(view: ClusterView) -> MemoryAdmission:
    candidates = Window(Sizes(view.waiting, view.shape, math.inf), 0.0, is_patient=True)
    return MemoryAdmission(view, candidates, OutputLengths(), "worst-case")


def test_a_request_that_keeps_no_keys_takes_no_memory() -> None:
    waits = [waiting("echo", 0, 80, keeps_kv=False), waiting("w", 1, 80, max_total_tokens=90)]
    for num_pages in (22, 1000):
        view = cluster(1, num_pages=num_pages, waits=waits)
        assert worst_case(view).most[0] == 0


def test_where_memory_is_short_a_request_counts_with_all_its_tokens_but_the_last() -> None:
    view = cluster(1, num_pages=22, waits=[waiting("w", 1, 80, max_total_tokens=90)])
    assert worst_case(view).most == [80 + 9]


def test_a_request_is_let_in_that_fills_memory_to_the_last_slot() -> None:
    """80 + 8 of 88 slots."""
    for max_total_tokens, does_fit in ((89, True), (90, False)):
        view = cluster(1, num_pages=22, waits=[waiting("w", 0, 80, max_total_tokens=max_total_tokens)])
        assert worst_case(view).fits([0]) == does_fit


def test_what_is_free_is_beside_the_peak_of_those_that_run_or_their_most_where_memory_is_ample() -> None:
    """The peak is when the second ends: 8 + 2 and 20 + 2. The most are their 19 and 23 tokens and the rest of a page;
    with the 94 of w that is 144, or 36 pages."""
    runs = [
        running("a", 0, (0, 8), num_output_tokens=1, max_new_tokens=10),
        running("b", 1, (0, 20), num_output_tokens=1, max_new_tokens=2),
    ]
    waits = [waiting("w", 2, 80, max_total_tokens=90)]
    for num_pages, taken in ((35, 10 + 22), (36, 19 + 4 + 23 + 4)):
        view = cluster(1, num_pages=num_pages, runs=runs, waits=waits)
        assert worst_case(view).num_free == 4 * num_pages - taken


def test_outputs_are_taken_to_become_as_long_as_nine_of_ten_with_what_is_there_of_them_already() -> None:
    """12 tokens: of a 5 have keys and 6 are to get them, the last one none; so it is with w, whose 5 were preempted."""
    preempted = dataclasses.replace(waiting("w", 1, 80), num_output_tokens=5)
    view = cluster(1, num_pages=24, runs=[running("a", 0, (0, 8), num_output_tokens=6)], waits=[preempted])
    lengths = OutputLengths()
    for _ in range(20):
        lengths.add(12)
    candidates = Window(Sizes(view.waiting, view.shape, math.inf), 0.0, is_patient=True)
    memory = MemoryAdmission(view, candidates, lengths, "quantile")
    assert memory.most == [80 + 6]
    assert memory.num_free == 4 * 24 - (8 + 6)


SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=4)


@given(runs=SIZES, waits=SIZES, num_pages=st.integers(1, 60))
def test_what_fits_is_what_counting_step_by_step_finds_however_ample_memory_is(
    runs: list[tuple[int, int]], waits: list[tuple[int, int]], num_pages: int
):
    """Pages hold 4 tokens; a running request at rest has keys of all its tokens but the newest, and the last token of
    any gets none."""
    view = cluster(
        2,
        num_pages=num_pages,
        runs=[
            running(f"r{order}", order, (0, held), num_output_tokens=1, max_new_tokens=new)
            for order, (held, new) in enumerate(runs)
        ],
        waits=[
            waiting(f"w{order}", 10 + order, held, max_total_tokens=held + new)
            for order, (held, new) in enumerate(waits)
        ],
        taken={0: 0},
    )
    memory = worst_case(view)
    candidates = list(range(len(waits)))
    at_most = 2 * 4 * num_pages - memory.num_free
    peak = counted_peak([-(-count // 4) * 4 for count, _ in runs], [new for _, new in runs])
    assert at_most >= peak
    held = [-(-count // 4) * 4 for count, _ in (*runs, *waits)]
    left = [*[new for _, new in runs], *[new - 1 for _, new in waits]]
    does_fit = counted_peak(held, left) <= 2 * 4 * num_pages
    assert memory.fits(candidates) == does_fit
    if sum([memory.most[place] for place in candidates]) <= memory.num_free:
        assert does_fit
