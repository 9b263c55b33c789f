"""What the policy chunked puts into an iteration, and that every request ends however small its pieces are."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Chunk, Decode, Extend, Plan, Preempt, Prefill, SubBatch
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView
from tests.scheduler.baselines.questions import tell
from tests.scheduler.toy_engine import ToyEngine
from tests.scheduler.views import cluster, running, waiting

ZERO = Group((0,))


def ask(view: ClusterView, chunk_tokens: int, policy: ChunkedPolicy | None = None) -> tuple[Plan, ...]:
    plans = (policy or ChunkedPolicy(view.shape, chunk_tokens)).plan(view)
    check_plan(view, plans)
    return plans


def extend(*chunks: tuple[str, int]) -> Extend:
    return Extend(ZERO, tuple(Chunk(*chunk) for chunk in chunks))


def test_decodes_come_first_and_prompts_get_the_rest_in_order_of_arrival():
    view = cluster(
        1,
        runs=[running("part", 0, (0, 8), num_uncomputed_tokens=5), running("b", 2, (0, 9)), running("a", 1, (0, 9))],
        waits=[waiting("next", 3, 7), waiting("late", 4, 9)],
    )
    assert ask(view, 10) == (extend(("a", 1), ("b", 1), ("part", 5), ("next", 3)),)
    assert ask(view, 6) == (extend(("a", 1), ("b", 1), ("part", 4)),)
    assert ask(view, 16) == (extend(("a", 1), ("b", 1), ("part", 5), ("next", 7), ("late", 2)),)


def test_an_iteration_holds_no_more_than_a_prefill_may():
    view = cluster(1, waits=[waiting("w", 0, 40)], max_num_batched_tokens=24)
    view_of_two = cluster(1, waits=[waiting("w", 0, 20), waiting("v", 1, 20)], max_num_batched_tokens=24)
    assert ask(view_of_two, 512) == (extend(("w", 20), ("v", 4)),)
    assert ask(view, 512) == (extend(("w", 24)),)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 512])
def test_without_a_prompt_to_cut_it_is_a_decode(chunk_tokens: int):
    view = cluster(1, runs=[running("a", 0, (0, 9)), running("b", 1, (0, 9))])
    assert ask(view, chunk_tokens) == (Decode(ZERO, (SubBatch(0, ("a", "b")),)),)


def test_no_decode_is_left_out_if_their_tokens_are_too_many():
    view = cluster(
        1,
        runs=[running("a", 0, (0, 9)), running("b", 1, (0, 9)), running("part", 2, (0, 8), num_uncomputed_tokens=5)],
        waits=[waiting("w", 3, 7)],
    )
    assert ask(view, 2) == (Decode(ZERO, (SubBatch(0, ("a", "b")),)),)


def test_a_prompt_is_let_in_if_all_of_it_has_room():
    """Beside what the others have yet to compute, and a hundredth of the pool."""
    part = running("part", 0, (0, 4), num_uncomputed_tokens=24)  # 1 page, and 6 more to come
    assert ask(cluster(1, num_pages=12, runs=[part], waits=[waiting("w", 1, 17)]), 32) == (extend(("part", 24)),)
    fits = cluster(1, num_pages=12, runs=[part], waits=[waiting("w", 1, 16)])
    assert ask(fits, 32) == (extend(("part", 24), ("w", 8)),)


def test_the_newest_is_preempted_if_the_others_lack_pages():
    runs = [
        running("a", 0, (0, 16)),
        running("part", 1, (0, 16), num_uncomputed_tokens=9),
        running("newest", 2, (0, 7), num_uncomputed_tokens=3),
    ]
    view = cluster(1, num_pages=10, runs=runs, waits=[waiting("w", 3, 2)])
    assert ask(view, 32) == (Preempt(("newest",)), extend(("a", 1), ("part", 4)))


def test_a_prompt_that_lacks_pages_waits_for_decodes_or_takes_them_from_a_newer_one():
    old = running("old", 0, (0, 16), num_uncomputed_tokens=9)
    decoding = cluster(1, num_pages=6, runs=[old, running("new", 1, (0, 7))])
    assert ask(decoding, 32) == (Decode(ZERO, (SubBatch(0, ("new",)),)),)
    in_part = cluster(1, num_pages=6, runs=[old, running("new", 1, (0, 8), num_uncomputed_tokens=2)])
    assert ask(in_part, 32) == (Preempt(("new",)), extend(("old", 8)))


@pytest.mark.parametrize("is_suspect", [False, True])
def test_what_cannot_be_cut_is_prefilled_alone_and_takes_turns_with_decodes(is_suspect: bool):
    whole = waiting("whole", 1, 9, needs_whole_prefill=True, is_suspect=is_suspect)
    view = cluster(1, runs=[running("a", 0, (0, 9))], waits=[whole, waiting("w", 2, 5)])
    policy = ChunkedPolicy(view.shape, 4)
    (plan,) = ask(view, 4, policy)
    assert isinstance(plan, Prefill)
    assert [request.request_id for request in plan.requests] == ["whole"]
    tell(policy, plan)
    turn = Decode(ZERO, (SubBatch(0, ("a",)),))
    assert ask(view, 4, policy) == (turn,)
    tell(policy, turn)
    assert ask(view, 4, policy) == (plan,)


@pytest.mark.parametrize("reason", ["needs_whole_prefill", "is_suspect"])
def test_what_goes_alone_waits_for_prompts_in_part(reason: str):
    alone = waiting(
        "alone", 1, 9, needs_whole_prefill=reason == "needs_whole_prefill", is_suspect=reason == "is_suspect"
    )
    part = running("part", 0, (0, 8), num_uncomputed_tokens=9)
    assert ask(cluster(1, runs=[part], waits=[alone, waiting("w", 2, 5)]), 32) == (extend(("part", 9)),)


DECODING = running("a", 0, (0, 9))
TURN = Decode(ZERO, (SubBatch(0, ("a",)),))


def test_a_suspect_is_cut_alone_and_takes_turns_with_decodes():
    """Until its last chunk, be it of one token; nobody is let in meanwhile."""
    policy = ChunkedPolicy(cluster(1).shape, 4)
    late = waiting("w", 2, 5)
    begins = cluster(1, runs=[DECODING], waits=[waiting("s", 1, 9, is_suspect=True), late])
    assert ask(begins, 4, policy) == (extend(("s", 4)),)
    for num_held, num_tokens in ((4, 4), (8, 1)):
        tell(policy, extend(("s", 4)))
        suspect = running("s", 1, (0, num_held), num_uncomputed_tokens=9 - num_held, is_suspect=True)
        view = cluster(1, runs=[DECODING, suspect], waits=[late])
        assert ask(view, 4, policy) == (TURN,)
        tell(policy, TURN)
        assert ask(view, 4, policy) == (extend(("s", num_tokens)),)
        by_itself = cluster(1, runs=[suspect], waits=[late])
        assert ask(by_itself, 4, policy) == (extend(("s", num_tokens)),)
    tell(policy, extend(("s", 1)))
    cleared = cluster(1, runs=[DECODING, running("s", 1, (0, 9))], waits=[late])
    assert ask(cleared, 4, policy) == (extend(("a", 1), ("s", 1), ("w", 2)),)


def test_a_suspect_goes_on_by_itself_where_nobody_decodes():
    policy = ChunkedPolicy(cluster(1).shape, 4)
    tell(policy, extend(("s", 4)))
    view = cluster(1, runs=[running("s", 1, (0, 4), num_uncomputed_tokens=5, is_suspect=True)])
    assert ask(view, 4, policy) == (extend(("s", 4)),)


def test_a_suspect_that_lacks_pages_waits_for_decodes_which_take_them_from_it():
    suspect = running("s", 1, (0, 8), num_uncomputed_tokens=5, is_suspect=True)
    waits_for = cluster(1, num_pages=5, runs=[DECODING, suspect])
    assert ask(waits_for, 4) == (TURN,)
    full = cluster(1, num_pages=5, runs=[running("a", 0, (0, 12)), suspect])
    assert ask(full, 4) == (Preempt(("s",)), TURN)


def test_a_prompt_longer_than_a_prefill_is_let_in_behind_another():
    view = cluster(1, waits=[waiting("w", 0, 3), waiting("long", 1, 60)], max_num_batched_tokens=24)
    assert ask(view, 8) == (extend(("w", 3), ("long", 5)),)


def test_replicas_know_nothing_of_each_other():
    view = cluster(2, runs=[running("a", 0, (0, 9))], waits=[waiting("w", 1, 5)])
    assert ask(view, 4) == (Decode(ZERO, (SubBatch(0, ("a",)),)), Extend(Group((1,)), (Chunk("w", 4),)))


@settings(max_examples=40, deadline=None)
@given(
    chunk_tokens=st.sampled_from([1, 3, 7]),
    page_size=st.sampled_from([1, 4]),
    num_instances=st.integers(1, 2),
    max_num_seqs=st.sampled_from([1, 2, 8]),
    num_requests=st.integers(1, 10),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_and_nothing_leaks(
    chunk_tokens: int, page_size: int, num_instances: int, max_num_seqs: int, num_requests: int, seed: int
):
    """Arrivals, aborts, failures and completions in any order, on pools of one longest request and more."""
    rng = random.Random(seed)
    num_pages = rng.randint(2, 24 // page_size)
    shape = ClusterShape(num_instances=num_instances, num_pages=num_pages, page_size=page_size)
    most = rng.choice([2, 5, shape.num_slots])
    engine = ToyEngine(
        ChunkedPolicy(shape, chunk_tokens), shape, max_num_batched_tokens=most, max_num_seqs=max_num_seqs
    )
    failure_rate = rng.choice([0.0, 0.1])
    budget = 0
    while num_requests or engine.in_flight:
        if num_requests and (not engine.in_flight or rng.random() < 0.3):
            num_requests -= 1
            total = rng.randint(2, shape.num_slots)
            num_prompt_tokens = rng.randint(1, total)
            if num_prompt_tokens == total > most:  # one that asks for no output is computed in one piece
                num_prompt_tokens = total = most
            engine.add(num_prompt_tokens, total - num_prompt_tokens)
            # Each token may be computed again whenever an older request preempts.
            budget += 10 * (total + 1)
        elif rng.random() < 0.05:
            engine.abort(rng.choice(sorted(engine.jobs)))
        elif rng.random() < failure_rate:
            suspects = {name for name, job in engine.jobs.items() if job.num_failures}
            failed = engine.fail(rng.randrange(len(engine.in_flight)))
            assert len(failed.request_ids) == 1 or suspects.isdisjoint(failed.request_ids), "others share the blame"
            budget += 10 * sum(job.num_prompt_tokens + job.max_tokens for job in engine.jobs.values())
        else:
            engine.complete(rng.randrange(len(engine.in_flight)))
        oldest = min(engine.jobs.values(), key=lambda job: job.order, default=None)
        for plan in engine.ask():
            assert not isinstance(plan, Preempt) or oldest is None or oldest.request_id not in plan.request_ids
            assert not isinstance(plan, Extend) or plan.num_tokens <= chunk_tokens
        assert len(engine.history) <= budget, "iterations without progress"
    assert not engine.jobs
    assert all(engine.cache.used_pages(instance) == 0 for instance in shape.all_instances)
