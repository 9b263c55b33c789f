"""The roster shows what is there, made of what has changed; that nobody forgets to tell it, traces of engines show."""

from __future__ import annotations

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import DecodeIteration
from loongjax.core.plan import Decode, SubBatch, TokenInterval
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.binding import Flight
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.roster import Roster
from loongjax.kvcache.kv_cache import KVCache

SHAPE = ClusterShape(num_instances=3, num_pages=10, page_size=4)


class Scene:
    """a has 6 tokens on instance 2, b 3 on instance 0, c 4 on 0 and 1 on 2; a and c are decoded."""

    def __init__(self) -> None:
        self.kv_cache = KVCache(SHAPE)
        self.live: dict[str, LiveRequest] = {}
        self.roster = Roster(self.kv_cache, self.live)
        keys = {"a": [TokenInterval(2, 0, 6)], "b": [TokenInterval(0, 0, 3)]}
        keys["c"] = [TokenInterval(0, 0, 4), TokenInterval(2, 4, 5)]
        for order, (name, intervals) in enumerate(keys.items()):
            self.kv_cache.keep(name, intervals)
            num_tokens = intervals[-1].end
            request = Request(
                request_id=name,
                prompt_token_ids=(0,) * num_tokens,
                sampling=SamplingParams(),
                max_tokens=1 + order,
                seed=0,
            )
            self.live[name] = LiveRequest(request, order, 0.0)
        self.roster.note(self.live.values())
        group, batch = Group.of([0, 2]), SubBatch(2, ("a", "c"))
        iteration = DecodeIteration(0, group, (), False)
        self.flight = Flight(iteration, Decode(group, (batch,)), (self.live["a"], self.live["c"]))

    def depart(self) -> None:
        for live in self.flight.requests:
            self.kv_cache.append(live.request_id, 2)
            live.num_in_flight += 1
        self.roster.note(self.flight.requests)


def test_requests_are_where_their_keys_are() -> None:
    residents = Scene().roster.residents()
    assert [[request.request_id for request in local.requests] for local in residents.local] == [
        ["b", "c"],
        [],
        ["a", "c"],
    ]


def test_nothing_is_made_anew_while_nothing_changes() -> None:
    scene = Scene()
    first = scene.roster.residents()
    assert scene.roster.residents() is first
    scene.roster.note([scene.live["a"]])
    assert scene.roster.residents() == first
    assert scene.roster.residents().local[2] is first.local[2]


def test_a_change_is_shown_where_it_was_made() -> None:
    scene = Scene()
    before = scene.roster.residents()
    scene.live["b"].num_in_flight += 1
    scene.roster.note([scene.live["b"]])
    after = scene.roster.residents()
    assert [request.is_in_flight for request in after.local[0].requests] == [True, False]
    assert after.local[2] is before.local[2]


def test_who_has_ended_is_gone_and_who_has_moved_is_elsewhere() -> None:
    scene = Scene()
    scene.roster.residents()
    scene.kv_cache.release("a")
    scene.roster.note([scene.live.pop("a")])
    scene.kv_cache.migrate("c", 0, 1, 4)
    scene.roster.note([scene.live["c"]])
    residents = scene.roster.residents()
    assert [[request.request_id for request in local.requests] for local in residents.local] == [["b"], ["c"], ["c"]]


def test_a_step_that_counts_as_over_has_ended_whoever_got_the_last_token() -> None:
    scene = Scene()
    scene.depart()
    now, then = scene.roster.residents(), scene.roster.foresee(scene.flight).residents
    assert [request.is_in_flight for request in now.local[2].requests] == [True, True]
    assert [[request.request_id for request in local.requests] for local in then.local] == [["b", "c"], [], ["c"]]
    (landed,) = then.local[2].requests
    assert (landed.is_in_flight, landed.num_output_tokens, landed.num_tokens) == (False, 1, 6)
    assert scene.roster.residents() is now


def test_a_step_that_comes_as_foreseen_shows_the_same_views() -> None:
    scene = Scene()
    scene.depart()
    then = scene.roster.foresee(scene.flight).residents
    assert scene.roster.foresee(scene.flight).residents.local[2] is then.local[2]
    a, c = scene.flight.requests
    c.num_in_flight -= 1
    c.output_token_ids.append(7)
    scene.kv_cache.release("a")
    del scene.live["a"]
    scene.roster.note([a, c])
    now = scene.roster.residents()
    assert now == then
    assert now.local[2].requests[0] is then.local[2].requests[0]


def test_what_is_foreseen_follows_what_happens_to_others_on_the_same_instances() -> None:
    scene = Scene()
    scene.depart()
    scene.roster.foresee(scene.flight)
    scene.kv_cache.release("b")
    scene.roster.note([scene.live.pop("b")])
    then = scene.roster.foresee(scene.flight).residents
    assert [[request.request_id for request in local.requests] for local in then.local] == [["c"], [], ["c"]]


def test_an_id_that_is_used_again_is_that_of_the_request_that_lives() -> None:
    """The dead one is still in flight, and both have something new."""
    scene = Scene()
    scene.roster.residents()
    dead = scene.live["b"]
    dead.has_ended = True
    scene.kv_cache.release("b")
    scene.kv_cache.keep("b", [TokenInterval(1, 0, 2)])
    scene.live["b"] = LiveRequest(dead.request, 7, 1.0)
    for order in ([dead, scene.live["b"]], [scene.live["b"], dead]):
        scene.roster.note(order)
        (request,) = scene.roster.residents().local[1].requests
        assert (request.request_id, request.order) == ("b", 7)
