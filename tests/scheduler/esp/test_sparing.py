"""Instances left idle for requests that are still to come: the term by hand, and what the policy makes of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import Group
from loongjax.core.plan import Plan, Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.arrivals import Arrivals
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.newcomers import Newcomers
from loongjax.scheduler.esp.outlook import Outlook, Site
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.sparing import Sparing
from loongjax.scheduler.esp.splitter import Splitter
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tipping import OrderedBatch
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView, FlightView
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.esp.explained import check_terms
from tests.scheduler.esp.hand_model import HandModel, only, policy_of
from tests.scheduler.views import cluster, running, waiting

LONG = waiting("long", 999, 4000, arrival_s=100.0)
"""10 s on four instances, 13.3 s on three, 40 s on one."""


def who_saw_short_ones(decisions: list[Decision] | None = None, **settings: object) -> EspPolicy:
    """A prompt of ten tokens a second, for 101 s: lambda is 1 / 10 a second."""
    policy = policy_of(HandModel(moved_s=1e9), decisions, **settings)
    for second in range(101):
        short = waiting(f"short{second}", second, 10, arrival_s=float(second))
        policy.plan(cluster(4, num_pages=2000, waits=[short], now_s=float(second)))
    if decisions is not None:
        decisions.clear()
    return policy


def groups(policy: EspPolicy, view: ClusterView) -> list[Group]:
    plans: tuple[Plan, ...] = policy.plan(view)
    check_plan(view, plans)
    return [plan.group for plan in plans if isinstance(plan, Prefill)]


def while_another_prefills(num_instances: int = 2) -> ClusterView:
    """All instances but the first prefill for another 5 s."""
    others = list(range(1, num_instances))
    flight = FlightView(
        plan=Prefill(Group.of(others), (PrefillRequest("old", ()),)),
        group=Group.of(others),
        work=PrefillWork(new_lens=(1000 * len(others),)),
        started_s=95.0,
    )
    runs = [running("old", 0, (1, 1000), is_in_flight=True)]
    return cluster(
        num_instances, num_pages=2000, runs=runs, waits=[LONG], prefilling=others, flights=[flight], now_s=100.0
    )


def test_what_newcomers_lose_by_hand() -> None:
    """One of 10 tokens takes 0.1 s alone, 0.05 s on two instances."""
    shorts = [waiting(f"short{i}", i, 10, arrival_s=float(i)) for i in range(101)]
    model = HandModel()
    for view, seconds in ((while_another_prefills(), 5.0), (cluster(2, now_s=100.0), 0.0)):
        draft, times = Draft(view, 0), Times(model, 1)
        outlook = Outlook(draft, times, (), OutputLengths())
        newcomers = Newcomers(Arrivals().after(shorts), draft, outlook, times)
        assert newcomers.wait_s({0: 40.0}) == seconds
        assert newcomers.wait_s({}) == 0.0
        assert newcomers.cost({0: 40.0}) == pytest.approx(0.1 * max(0.0, seconds - 0.05) ** 2 / 2)
        assert newcomers.cost({0: 3.0, 1: 7.0}) == pytest.approx(0.1 * 2.95**2 / 2)
        # On an instance of its own it would be done no sooner.
        assert newcomers.cost({0: 0.02, 1: 7.0}) == 0.0


@given(
    instances=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 90, 100]), st.sampled_from([0.0, 2.0, 5.0, math.inf])),
        min_size=1,
        max_size=5,
    ),
    taken=st.sets(st.integers(0, 4)),
)
def test_newcomers_wait_for_the_first_instance_that_has_room_unless_they_can_pause_decodes(
    instances: list[tuple[bool, int, float]], taken: set[int]
) -> None:
    """Of each: whether it prefills, pages that are taken of 100, and in how many seconds it is free."""
    view = cluster(
        len(instances),
        prefilling=[index for index, (is_prefilling, _, _) in enumerate(instances) if is_prefilling],
        taken={index: num_taken for index, (_, num_taken, _) in enumerate(instances)},
    )
    draft, times = Draft(view, 0), Times(HandModel(), 1)
    outlook = Outlook(draft, times, (), OutputLengths())
    outlook.until_free_s = [until_free_s for _, _, until_free_s in instances]
    expected = math.inf
    for index, (is_prefilling, num_taken, until_free_s) in enumerate(instances):
        if index not in taken and num_taken < 100 and until_free_s < math.inf:
            expected = min(expected, until_free_s if is_prefilling else 0.0)
    two = [waiting(f"w{second}", second, 10, arrival_s=float(second)) for second in range(2)]
    newcomers = Newcomers(Arrivals().after(two), draft, outlook, times)
    assert newcomers.wait_elsewhere_s(taken) == expected
    assert newcomers.have_to_wait(taken) == (expected > 0.0)


def test_without_arrivals_a_long_prompt_takes_all_instances() -> None:
    view = cluster(4, num_pages=2000, waits=[LONG], now_s=100.0)
    assert groups(policy_of(HandModel()), view) == [Group.of([0, 1, 2, 3])]


def test_where_short_ones_arrive_a_long_prompt_leaves_an_instance_idle() -> None:
    decisions: list[Decision] = []
    (group,) = groups(who_saw_short_ones(decisions), cluster(4, num_pages=2000, waits=[LONG], now_s=100.0))
    assert group.dop == 3
    spare = only(decisions, "spare")
    assert spare.gain == pytest.approx(0.1 * (10.0 - 0.075) ** 2 / 2, rel=1e-3)
    assert spare.cost == pytest.approx((40 / 3 - 10) / 4000)


def test_who_waits_behind_counts_too() -> None:
    """An instance computes 1,500 tokens at once, so that the second long one has to wait for the first."""
    decisions: list[Decision] = []
    second = waiting("second", 1000, 4000, arrival_s=100.0)
    view = cluster(4, num_pages=2000, waits=[LONG, second], max_num_batched_tokens=1500, now_s=100.0)
    (group,) = groups(who_saw_short_ones(decisions), view)
    assert group.dop == 3
    assert only(decisions, "spare").cost == pytest.approx(2 * (40 / 3 - 10) / 4000)


def test_who_needs_the_memory_of_all_instances_gets_them() -> None:
    view = cluster(4, num_pages=260, waits=[LONG], now_s=100.0)
    assert groups(who_saw_short_ones(), view) == [Group.of([0, 1, 2, 3])]


def test_an_instance_that_decodes_is_enough_for_newcomers() -> None:
    view = cluster(4, num_pages=2000, runs=[running("d", 0, (3, 40))], waits=[LONG], decoding=[3], now_s=100.0)
    assert groups(who_saw_short_ones(), view) == [Group.of([0, 1, 2])]


def test_decodes_are_not_paused_on_the_last_instance_that_newcomers_could_have() -> None:
    """Though this one is in no hurry."""
    runs = [running("d", 0, (3, 40), priority=20, num_output_tokens=50)]
    view = cluster(4, num_pages=2000, runs=runs, waits=[LONG], now_s=100.0)
    assert groups(policy_of(HandModel(moved_s=1e9)), view) == [Group.of([0, 1, 2, 3])]
    assert groups(who_saw_short_ones(), view) == [Group.of([0, 1, 2])]


def test_a_long_prompt_leaves_the_only_idle_instance_while_another_one_is_prefilled() -> None:
    assert groups(policy_of(HandModel(moved_s=1e9)), while_another_prefills()) == [Group.of([0])]
    assert groups(who_saw_short_ones(), while_another_prefills()) == []


def test_who_was_overtaken_enough_is_not_held_back_for_others_to_come() -> None:
    assert groups(who_saw_short_ones(max_overtakes=0), while_another_prefills()) == [Group.of([0])]


def test_the_only_instance_of_a_cluster_is_never_left_idle() -> None:
    decisions: list[Decision] = []
    view = cluster(1, num_pages=2000, waits=[LONG], now_s=100.0)
    assert groups(who_saw_short_ones(decisions), view) == [Group.of([0])]
    assert "spare" not in {decision.step for decision in decisions}


class Scene:
    """A choice of the first waiting requests of a view, after a prompt of ten tokens a second: lambda is 1 / 10."""

    def __init__(
        self,
        view: ClusterView,
        instances: list[int],
        sites: list[Site],
        *,
        num_arrivals: int = 101,
        num_chosen: int = 1,
    ) -> None:
        shorts = [waiting(f"short{second}", second, 10, arrival_s=float(second)) for second in range(num_arrivals)]
        self.draft, self.times = Draft(view, 0), Times(HandModel(), 1)
        self.window = Window(Sizes(view.waiting, view.shape, math.inf), view.now_s, is_patient=True)
        self.outlook = Outlook(self.draft, self.times, (), OutputLengths())
        self.newcomers = Newcomers(Arrivals().after(shorts), self.draft, self.outlook, self.times)
        self.decisions: list[Decision] = []
        self.sparing = Sparing(
            self.draft,
            self.outlook,
            Choice(list(range(num_chosen)), instances, sites),
            self.window,
            self.times,
            newcomers=self.newcomers,
            explain=self.decisions.append,
        )
        self.splitter = Splitter(self.draft, self.window, self.times, SplitMemory())


def test_neither_instances_of_paused_decodes_are_left_idle_nor_any_for_nobody() -> None:
    view = cluster(2, num_pages=2000, runs=[running("d", 0, (1, 40))], waits=[LONG], now_s=100.0)
    paused = Site(instances=(1,), requests=view.running)
    assert Scene(view, [0, 1], [paused]).sparing.spareable([0, 1]) == [0]
    assert Scene(view, [0, 1], [paused]).sparing.spareable([0]) == []
    assert Scene(view, [0, 1], [paused], num_arrivals=1).sparing.spareable([0, 1]) == []


def test_an_instance_is_taken_until_what_starts_first_on_it_has_ended() -> None:
    """It is idle in 1 s, and the first of the batch take 3 s of the 7 that all take: H is 4, less than the 5 s until
    the other prefill ends. To wait for that costs LONG and who waits behind it 5 s each."""
    behind = waiting("behind", 1000, 2000, arrival_s=100.0)
    view = dataclasses.replace(while_another_prefills(), waiting=Waiting([LONG, behind]))
    scene = Scene(view, [0], [])
    scene.outlook.until_free_s = [1.0, 5.0]
    assert scene.sparing.decide([OrderedBatch([0], [0], 1, 3.0, 7.0)], [0], scene.splitter) is None
    decision = only(scene.decisions, "spare")
    assert decision.gain == pytest.approx(0.1 * (1.0 + 3.0 - 0.05) ** 2 / 2)
    assert decision.cost == pytest.approx((1 / 4000 + 1 / 2000) * 5.0)


def two_prefills(priority: int) -> tuple[Scene, list[OrderedBatch]]:
    """On four instances the long one takes 20 s and the short one 5 s, each on two; on three 20 s and 10 s. Per unit of
    2^-priority they weigh 2 / 4000 and 1 / 1000, and who waits behind them 1 / 2000."""
    waits = [
        waiting("long", 999, 4000, arrival_s=100.0, priority=priority - 1),
        waiting("short", 1000, 1000, arrival_s=100.0, priority=priority),
        waiting("behind", 1001, 2000, arrival_s=100.0, priority=priority),
    ]
    instances = [2, 0, 3, 1]
    scene = Scene(cluster(4, num_pages=2000, waits=waits, now_s=100.0), instances, [], num_chosen=2)
    assert scene.splitter.split([0, 1], instances) == [([0], [2, 0]), ([1], [3, 1])]
    return scene, [OrderedBatch([0], [2, 0], 1, 20.0, 20.0), OrderedBatch([1], [3, 1], 1, 5.0, 5.0)]


def test_who_waits_behind_several_prefills_does_so_until_the_first_of_them_ends() -> None:
    """Newcomers as long, from when the last instance of its group is idle, in 1 s."""
    scene, batches = two_prefills(-7)
    scene.outlook.until_free_s = [2.0, 0.25, 0.0, 1.0]
    fewer = scene.sparing.decide(batches, [2, 0, 3, 1], scene.splitter)
    assert fewer is not None
    assert [(batch.places, batch.group) for batch in fewer] == [([0], [2, 3]), ([1], [1])]
    decision = only(scene.decisions, "spare")
    assert decision.instances == (0,)
    assert decision.gain == pytest.approx(0.1 * (1.0 + 5.0 - 0.075) ** 2 / 2)
    assert decision.cost == pytest.approx(2**7 * ((10.0 - 5.0) / 1000 + (10.0 - 5.0) / 2000))


def test_that_an_instance_less_costs_too_much_may_show_without_those_who_wait_behind() -> None:
    """Then what they cost on three instances is left out."""
    scene, batches = two_prefills(-12)
    assert scene.sparing.decide(batches, [2, 0, 3, 1], scene.splitter) == batches
    decision = only(scene.decisions, "spare")
    assert decision.cost == pytest.approx(2**12 * ((10.0 - 5.0) / 1000 - 5.0 / 2000))
    assert dict(decision.terms)["taken_spared_s"] == 0.0


def test_where_newcomers_lose_nothing_no_plans_are_compared() -> None:
    """They would start in 0.05 s, and take 0.075 s longer on an instance of their own."""
    scene = Scene(cluster(4, num_pages=2000, waits=[LONG], now_s=100.0), [0, 1, 2, 3], [])
    batches = [OrderedBatch([0], [0, 1, 2, 3], 1, 0.05, 10.0)]
    assert scene.sparing.decide(batches, [0, 1, 2, 3], scene.splitter) == batches
    assert scene.decisions == []


def test_who_needs_all_instances_to_be_computed_at_once_gets_them() -> None:
    decisions: list[Decision] = []
    view = cluster(4, num_pages=2000, waits=[LONG], max_num_batched_tokens=1000, now_s=100.0)
    assert groups(who_saw_short_ones(decisions), view) == [Group.of([0, 1, 2, 3])]
    assert "spare" not in {decision.step for decision in decisions}


def test_what_is_quicker_on_fewer_instances_costs_nothing_but_gains_no_more() -> None:
    """The batch takes 20 s, more than the 13.3 s of three instances."""
    scene = Scene(cluster(4, num_pages=2000, waits=[LONG], now_s=100.0), [0, 1, 2, 3], [])
    assert scene.splitter.split([0], [0, 1, 2, 3]) == [([0], [0, 1, 2, 3])]
    fewer = scene.sparing.decide([OrderedBatch([0], [0, 1, 2, 3], 1, 20.0, 20.0)], [0, 1, 2, 3], scene.splitter)
    assert fewer is not None
    assert [batch.group for batch in fewer] == [[1, 2, 3]]
    decision = only(scene.decisions, "spare")
    assert (decision.gain, decision.cost) == (pytest.approx(0.1 * (20.0 - 0.075) ** 2 / 2), 0.0)


@pytest.mark.parametrize("seconds", [10.0, 40 / 3])
def test_an_instance_without_room_is_left_idle_for_nobody(seconds: float) -> None:
    """Newcomers would have to wait until the prefill on the other three ends."""
    view = cluster(4, num_pages=2000, waits=[LONG], taken={2: 2000}, now_s=100.0)
    scene = Scene(view, [0, 1, 2, 3], [])
    assert scene.splitter.split([0], [0, 1, 2, 3]) == [([0], [0, 1, 2, 3])]
    batches = [OrderedBatch([0], [0, 1, 2, 3], 1, seconds, seconds)]
    assert scene.sparing.decide(batches, [0, 1, 2, 3], scene.splitter) == batches
    decision = only(scene.decisions, "spare")
    check_terms(decision)
    assert not decision.is_taken
    assert decision.instances == (2,)
    assert decision.gain == pytest.approx(0.1 / 2 * ((seconds - 0.075) ** 2 - (40 / 3 - 0.075) ** 2))


def test_the_instance_with_least_room_is_left_idle() -> None:
    """Who comes is short."""
    view = cluster(4, num_pages=2000, waits=[LONG], taken={2: 500}, now_s=100.0)
    assert groups(who_saw_short_ones(), view) == [Group.of([0, 1, 3])]


def test_without_room_anywhere_nobody_is_waited_for() -> None:
    view = cluster(2, waits=[LONG], taken={0: 100, 1: 100}, now_s=100.0)
    newcomers = Scene(view, [0], []).newcomers
    assert (newcomers.wait_elsewhere_s([]), newcomers.wait_s({}), newcomers.cost({})) == (math.inf, 0.0, 0.0)
