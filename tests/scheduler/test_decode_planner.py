"""Decode groups at their limits, by rules that say yes to everything."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Migrate, Plan, SubBatch
from loongjax.scheduler.components import Component
from loongjax.scheduler.decode_planner import DecodePlanner
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView
from tests.scheduler.views import cluster, running


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandRules:
    """`DecodeRules` without arithmetic."""

    max_rows: int = 1000
    moves: bool = False
    min_tokens_between_migrations: int = 1

    def rows_per_master(self, component: Component) -> int:
        return self.max_rows

    def wants_instance(self, component: Component) -> bool:
        return False

    def allows_memory_scale_up(self) -> bool:
        return True

    def is_worth_moving(self, component: Component, source: InstanceId, num_tokens: int) -> bool:
        return self.moves


def plans_of(view: ClusterView, rules: HandRules, fairness: Fairness | None = None) -> tuple[Plan, ...]:
    """Plans that can be executed; a request of each group is promised a page where it grows."""
    draft = Draft(view, growth_tokens=view.shape.page_size)
    fairness = fairness or Fairness(max_prefills_before_decode=1, max_overtakes=1)
    DecodePlanner(draft, rules, fairness).plan()
    check_plan(view, draft.plans)
    return draft.plans


STRADDLING = running("a", 0, (1, 8), (0, 40))


@pytest.mark.parametrize(("num_free", "is_moved"), [(15, False), (16, True)])
def test_keys_are_moved_into_ample_room_only(num_free: int, is_moved: bool) -> None:
    """They take 2 pages, a is promised another, and an eighth of the pool's 104 has to be left, 13."""
    view = cluster(2, num_pages=104, runs=[STRADDLING], taken={0: 104 - 10 - num_free})
    (plan,) = plans_of(view, HandRules(moves=True))
    assert plan == (Migrate("a", 1, 0, 8) if is_moved else Decode(Group.of([0, 1]), (SubBatch(0, ("a",)),)))


def test_keys_of_an_overdue_request_are_not_moved_before_its_next_token() -> None:
    view, fairness = cluster(2, runs=[STRADDLING]), Fairness(max_prefills_before_decode=2, max_overtakes=1)
    fairness.note_passed([STRADDLING])
    assert [type(plan) for plan in plans_of(view, HandRules(moves=True), fairness.copy())] == [Migrate]
    fairness.note_passed([STRADDLING])
    assert [type(plan) for plan in plans_of(view, HandRules(moves=True), fairness)] == [Decode]
    assert [type(plan) for plan in plans_of(view, HandRules(moves=True), fairness)] == [Migrate]


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_group_without_pages_takes_in_no_instance_that_is_tied_to_a_busy_one(is_tied: bool) -> None:
    """Instance 0 is full, 1 is idle, and 2 in a step: who has keys on 1 and 2 decodes on both or not at all."""
    other = running("b", 1, (2, 4), (1, 4)) if is_tied else running("b", 1, (1, 4))
    stepping = running("c", 2, (2, 4), is_in_flight=True)
    view = cluster(3, num_pages=5, runs=[running("a", 0, (0, 20)), other, stepping], decoding=[2])
    plans = plans_of(view, HandRules())
    assert plans == (() if is_tied else (Decode(Group.of([0, 1]), (SubBatch(1, ("a", "b")),)),))


def rows(plans: tuple[Plan, ...]) -> dict[InstanceId, tuple[str, ...]]:
    return {batch.master: batch.request_ids for plan in plans if isinstance(plan, Decode) for batch in plan.sub_batches}


def own(num_on_0: int, num_on_1: int) -> list[RunningView]:
    """Requests with keys on one instance each, older than the others."""
    return [running(f"r{order}", order, (int(order >= num_on_0), 8)) for order in range(num_on_0 + num_on_1)]


ACROSS = [running("s", 90, (1, 8), (0, 8)), running("t", 91, (1, 8), (0, 8))]


def test_requests_with_keys_on_two_masters_go_to_the_one_with_fewer_requests() -> None:
    """Of 5, 1 and 2: to 7 and 1 as the newest keys lie, or to 5 and 3."""
    plans = plans_of(cluster(2, runs=[*own(5, 1), *ACROSS]), HandRules())
    assert rows(plans) == {0: ("r0", "r1", "r2", "r3", "r4"), 1: ("r5", "s", "t")}


@pytest.mark.parametrize(("num_on_0", "num_on_1"), [(2, 2), (2, 3), (0, 2), (4, 0)])
def test_no_request_changes_its_master_for_nothing(num_on_0: int, num_on_1: int) -> None:
    """Where they are about even already, or an instance would have to become a master for it."""
    runs = [*own(num_on_0, num_on_1), ACROSS[0]]
    assert "s" in rows(plans_of(cluster(2, runs=runs), HandRules()))[0]


@pytest.mark.parametrize(("num_free", "expected"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_evenness_takes_no_page_that_a_master_needs_for_its_own(num_free: int, expected: int) -> None:
    """r5 takes a page of 1 now, and s and t one each if they come; each that was there before has to find another."""
    view = cluster(2, runs=[*own(5, 1), *ACROSS], taken={1: 100 - 6 - num_free})
    assert len(rows(plans_of(view, HandRules()))[1]) == expected


def test_who_would_find_no_seat_for_evenness_stays_where_the_newest_key_is() -> None:
    """1 has fewer requests than 0, but all that it may compute, and would send s on to 2, which is emptiest."""
    runs = [
        *[running(f"b{order}", order, (1, 8)) for order in range(2)],
        running("s", 2, (1, 8), (0, 8)),
        *[running(f"a{order}", order, (0, 8)) for order in range(3, 7)],
        running("u", 7, (0, 8), (2, 8)),
    ]
    masters = rows(plans_of(cluster(3, runs=runs), HandRules(max_rows=2)))
    assert (masters[0], masters[1][:2]) == (("s", "a3"), ("b0", "b1"))


HOLDERS = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)


@given(holders=st.lists(HOLDERS, min_size=1, max_size=12), max_rows=st.sampled_from([4, 1000]))
def test_masters_become_more_even_from_step_to_step_and_then_stay_as_they_are(
    holders: list[list[int]], max_rows: int
) -> None:
    """Or the engine could never submit a step before the last one is read. A sum of squares says how even they are."""
    runs = [running(f"r{i}", i, *[(instance, 6) for instance in instances]) for i, instances in enumerate(holders)]
    last, changes = None, 0
    squares = sum([sum([run.kv[-1][0] == instance for run in runs]) ** 2 for instance in range(3)])
    for _ in range(20):
        masters = rows(plans_of(cluster(3, runs=runs), HandRules(max_rows=max_rows)))
        if masters != last:
            changes += 1
            now = sum([len(names) ** 2 for names in masters.values()])
            assert now < squares or last is None
            last, squares = masters, now
        master_of = {name: master for master, names in masters.items() for name in names}
        runs = [stepped(run, master_of[run.request_id]) if run.request_id in master_of else run for run in runs]
    assert changes <= 4


def stepped(run: RunningView, master: InstanceId) -> RunningView:
    """With another key, on this instance."""
    held = dict(run.kv)
    num_keys = held.pop(master, 0) + 1
    return running(run.request_id, run.order, *held.items(), (master, num_keys))
