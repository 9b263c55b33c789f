"""When what is in flight should be over, also when the model is far off."""

from __future__ import annotations

import math

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.hand_model import HandModel, ask
from tests.scheduler.views import cluster, waiting


def prefilling_since(started_s: float, now_s: float, num_tokens: int = 100, **parts: object) -> ClusterView:
    """Two instances; on the second one a prefill is in flight, predicted to take num_tokens / 100 seconds."""
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    work = PrefillWork(new_lens=(num_tokens,))
    flight = FlightView(plan=plan, group=plan.group, work=work, started_s=started_s)
    return cluster(2, num_pages=1000, prefilling=[1], flights=[flight], now_s=now_s, **parts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("now_s", "left_s"),
    [(5.0, 1.0), (5.25, 0.75), (6.0, 0.0), (6.5, 0.5), (15.0, 9.0)],
)
def test_what_is_late_is_taken_to_need_as_long_again_as_it_is_late(now_s: float, left_s: float) -> None:
    assert Times(HandModel(), 1).until_free_s(prefilling_since(5.0, now_s)) == [0.0, pytest.approx(left_s)]


def test_an_iteration_submitted_behind_another_begins_when_that_one_ends() -> None:
    view = prefilling_since(0.0, 0.5)
    (first,) = view.flights
    second = FlightView(plan=first.plan, group=first.group, work=first.work, started_s=0.25)
    both = cluster(2, num_pages=1000, prefilling=[1], flights=[first, second], now_s=0.5)
    assert Times(HandModel(), 1).until_free_s(both) == [0.0, pytest.approx(1.5)]


def test_an_instance_that_recovers_is_never_waited_for() -> None:
    flight = FlightView(plan=None, group=Group.of([1]), work=None, started_s=0.0)
    view = cluster(2, prefilling=[1], flights=[flight], now_s=3.0)
    assert Times(HandModel(), 1).until_free_s(view) == [0.0, math.inf]


def test_nobody_waits_for_a_prefill_that_is_ten_times_as_long_as_predicted() -> None:
    """Predicted: 0.5 s. The prompt takes 20 s on one instance and 10 s on two, so it waits at first, not for ever."""
    waits = [waiting("long", 5, 2000)]
    early, _ = ask(prefilling_since(0.0, 0.0, 50, waits=waits), HandModel(moved_s=1e9))
    assert early == ()
    late, _ = ask(prefilling_since(0.0, 12.0, 50, waits=waits), HandModel(moved_s=1e9))
    assert [plan.group for plan in late if isinstance(plan, Prefill)] == [Group.of([0])]


@pytest.mark.parametrize(
    ("model", "fixed_s"),
    [(HandModel(token_s=0.01), 0.0), (HandModel(token_s=0.01, constant_s=0.3), 0.3), (HandModel(floor_s=0.5), 0.5)],
)
def test_what_prefills_could_share_is_what_each_takes_whatever_it_has_to_do(model: HandModel, fixed_s: float) -> None:
    assert Times(model, tp=1).fixed_prefill_s(2) == pytest.approx(fixed_s)
