"""Who has keys where is the same whether it is followed from view to view or found anew."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from loongjax.scheduler.residents import Residents
from loongjax.scheduler.view import RunningView
from tests.scheduler.views import running

NUM_INSTANCES = 3


def described(residents: Residents) -> dict[str, object]:
    names = ("by_instance", "straddling", "num_newest", "num_requests", "max_total_tokens")
    return {name: getattr(residents, name) for name in names}


def test_residents_by_hand() -> None:
    young, old = running("young", 2, (0, 7), max_new_tokens=3), running("old", 1, (0, 4), (2, 5), max_new_tokens=10)
    residents = Residents((young, old), NUM_INSTANCES)
    assert residents.by_instance == [(old, young), (), (old,)]
    assert residents.straddling == (old,)
    assert residents.num_newest == [1, 0, 1]
    assert (residents.num_requests, residents.max_total_tokens) == (2, 10 + 19)


def test_a_request_without_keys_is_nowhere() -> None:
    residents = Residents((running("partly", 0),), NUM_INSTANCES)
    assert residents.by_instance == [()] * NUM_INSTANCES
    assert residents.num_requests == residents.max_total_tokens == 0


def test_what_has_not_changed_is_shared() -> None:
    views = tuple([running(f"r{order}", order, (order % 2, 5)) for order in range(4)])
    residents = Residents(views, NUM_INSTANCES)
    assert residents.after(views) is residents
    grown = dataclasses.replace(views[1], kv=((1, 6),), num_tokens=6)
    following = residents.after((views[0], grown, *views[2:]))
    assert following.by_instance[0] is residents.by_instance[0]
    assert following.by_instance[1] == (grown, views[3])
    assert residents.by_instance[1] == (views[1], views[3])


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[RunningView, ...]]:
    """Views one after the other: requests grow, move, spread, get another age, come, go, and change places."""
    places = st.lists(st.integers(0, NUM_INSTANCES - 1), max_size=2, unique=True)
    keys = places.map(lambda instances: tuple([(instance, 5 + instance) for instance in instances]))
    some = [running(f"r{order}", order, *draw(keys)) for order in draw(st.permutations(range(draw(st.integers(0, 5)))))]
    views = [tuple(some)]
    for _ in range(draw(st.integers(1, 5))):
        for _ in range(draw(st.integers(0, 3))):
            taken = {request.order for request in some}
            order = draw(st.integers(0, 30).filter(lambda order, taken=taken: order not in taken))
            match draw(st.sampled_from(["grow", "put", "age", "come", "go", "swap"])), some:
                case "grow", [first, *rest] if first.kv:
                    *others, (instance, count) = first.kv
                    kv = (*others, (instance, count + 1))
                    some = [dataclasses.replace(first, kv=kv, num_tokens=first.num_tokens + 1), *rest]
                case "put", [*rest, last]:
                    some = [*rest, dataclasses.replace(last, kv=draw(keys))]
                case "age", [first, *rest]:
                    some = [dataclasses.replace(first, order=order), *rest]
                case "come", _:
                    some = [*some, running(f"n{order}", order, *draw(keys))]
                case "go", [_, *rest]:
                    some = rest
                case "swap", [first, *rest]:
                    some = [*rest, first]
                case _:
                    pass
        views.append(tuple(some))
    return views


@given(views=changes())
def test_residents_are_those_of_the_definition(views: list[tuple[RunningView, ...]]) -> None:
    for view in views:
        residents = Residents(view, NUM_INSTANCES)
        oldest_first = sorted(view, key=lambda request: request.order)
        for instance in range(NUM_INSTANCES):
            those = [request for request in oldest_first if instance in dict(request.kv)]
            assert residents.by_instance[instance] == tuple(those)
            assert residents.num_newest[instance] == sum(request.kv[-1][0] == instance for request in those)
        assert residents.straddling == tuple([request for request in view if len(request.kv) > 1])
        holders = [request.max_total_tokens for request in view if request.kv]
        assert (residents.num_requests, residents.max_total_tokens) == (len(holders), sum(holders))


@given(views=changes())
def test_following_is_as_good_as_looking_anew(views: list[tuple[RunningView, ...]]) -> None:
    residents = Residents((), NUM_INSTANCES)
    for view in views:
        residents = residents.after(view)
        assert residents.running is view
        assert described(residents) == described(Residents(view, NUM_INSTANCES))
