"""Who has keys where is the same whether it is followed from change to change or found anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.residents import LocalRequests, Residents
from tests.scheduler.views import running

NUM_INSTANCES = 3


def test_residents_by_hand() -> None:
    young, old = running("young", 2, (0, 7), max_new_tokens=3), running("old", 1, (0, 4), (2, 5), max_new_tokens=10)
    residents = Residents.of((young, old), NUM_INSTANCES)
    assert [local.requests for local in residents.local] == [(old, young), (), (old,)]
    assert [local.newest for local in residents.local] == [(young,), (), (old,)]
    assert residents.straddling == (old,)
    assert residents.running == (young, old)
    assert (len(residents), residents.num_requests, residents.max_total_tokens) == (2, 2, 11 + 20)
    assert residents.is_anybody_older(2)
    assert not residents.is_anybody_older(1)


def test_a_request_without_keys_is_on_no_instance() -> None:
    request = running("partly", 5)
    residents = Residents.of((request,), NUM_INSTANCES)
    assert not any(local.requests for local in residents.local)
    assert residents.num_requests == residents.max_total_tokens == 0
    assert (residents.keyless, residents.running, len(residents)) == ((request,), (request,), 1)
    assert residents.is_anybody_older(6)


def test_the_table_is_of_all_with_keys() -> None:
    requests = (running("a", 0, (1, 7), num_output_tokens=3), running("b", 1, (0, 2), (2, 6), num_output_tokens=4))
    assert Residents.of((*requests, running("keyless", 2)), NUM_INSTANCES).table.tolist() == [
        [7, 8],
        [2, 3],
        [1003, 1004],
    ]
    assert Residents.of((), NUM_INSTANCES).table.shape == (3, 0)


def test_what_has_not_changed_is_shared() -> None:
    views = [running(f"r{order}", order, (order % 2, 5)) for order in range(4)]
    residents = Residents.of(views, NUM_INSTANCES)
    grown = views[1]._replace(kv=((1, 6),), num_tokens=6)
    following = residents.after({"r1": grown}, [1])
    assert following.local[0] is residents.local[0]
    assert following.local[1].requests == (grown, views[3])
    assert residents.local[1].requests == (views[1], views[3])
    assert following != residents
    assert following.after({"r1": views[1]}, [1]) == residents


def test_others_on_an_instance() -> None:
    views = [running(f"r{order}", order, (order, 5)) for order in range(3)]
    residents = Residents.of([*views, running("keyless", 9)], NUM_INSTANCES)
    emptied = residents.with_local([LocalRequests(1)])
    assert [local.requests for local in emptied.local] == [(views[0],), (), (views[2],)]
    assert emptied.keyless == residents.keyless


@st.composite
def changes(draw: st.DrawFn) -> list[dict[str, RunningView | None]]:
    """News one after the other: requests come, grow, move, spread, lose all keys, and go."""
    places = st.lists(st.integers(0, NUM_INSTANCES - 1), max_size=2, unique=True)
    running_now: dict[str, RunningView] = {}
    result = []
    for _ in range(draw(st.integers(1, 6))):
        news: dict[str, RunningView | None] = {}
        for order in draw(st.lists(st.integers(0, 6), max_size=4, unique=True)):
            name = f"r{order}"
            if name in running_now and draw(st.booleans()):
                news[name] = None
                del running_now[name]
            else:
                kv = [(instance, draw(st.integers(1, 9))) for instance in draw(places)]
                news[name] = running_now[name] = running(name, order, *kv)
        result.append(news)
    return result


@given(steps=changes())
def test_following_is_as_good_as_looking_anew(steps: list[dict[str, RunningView | None]]) -> None:
    residents, expected = Residents.of((), NUM_INSTANCES), {}
    for news in steps:
        left = {instance for name in news if name in expected for instance, _ in expected[name].kv}
        residents = residents.after(news, left)
        expected = {name: view for name, view in {**expected, **news}.items() if view is not None}
        assert residents == Residents.of(expected.values(), NUM_INSTANCES)
        oldest_first = sorted(expected.values(), key=lambda request: request.order)
        for instance, local in enumerate(residents.local):
            those = tuple([request for request in oldest_first if instance in dict(request.kv)])
            assert (local.instance, local.requests) == (instance, those)
            assert local.straddling == tuple([request for request in those if len(request.kv) > 1])
            assert local.newest == tuple([request for request in those if request.kv[-1][0] == instance])
        assert residents.straddling == tuple([request for request in oldest_first if len(request.kv) > 1])
        assert sorted(residents.running) == sorted(expected.values())
        for order in range(8):
            assert residents.is_anybody_older(order) == any(request.order < order for request in oldest_first)
