"""Decode groups at their limits, by rules that say yes to everything."""

from __future__ import annotations

import dataclasses

import pytest

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Migrate, Plan, SubBatch
from loongjax.scheduler.components import Component
from loongjax.scheduler.decode_planner import DecodePlanner
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.fairness import Fairness
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
