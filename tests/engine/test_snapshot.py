"""The picture of the cluster: it shows what is there, and is made of what has changed since the last one."""

from __future__ import annotations

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import RecoverIteration
from loongjax.core.plan import TokenInterval
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.binding import Flight
from loongjax.engine.flights import Flights
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.roster import Roster
from loongjax.engine.snapshot import take_snapshot
from loongjax.engine.waiting_queue import WaitingQueue
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.view import ClusterView

SHAPE = ClusterShape(num_instances=3, num_pages=10, page_size=4)
LIMITS = RuntimeLimits(max_model_len=100, max_num_batched_tokens=64, max_num_seqs=8, vocab_size=2)


class Scene:
    """A request with 6 tokens on instance 2, and a recovery of instance 1 in flight."""

    def __init__(self) -> None:
        self.kv_cache = KVCache(SHAPE)
        self.kv_cache.keep("a", [TokenInterval(2, 0, 6)])
        request = Request(request_id="a", prompt_token_ids=(0,) * 6, sampling=SamplingParams(), max_tokens=10, seed=0)
        self.live = {"a": LiveRequest(request, 0, 0.0)}
        self.roster = Roster(self.kv_cache, self.live)
        self.roster.note(self.live.values())
        self.flights = Flights(row_buckets=(8,))
        self.flights.depart(Flight(RecoverIteration(0, Group.of([1])), None, ()), now_s=1.0)

    def picture(self, now_s: float) -> ClusterView:
        return take_snapshot(
            shape=SHAPE,
            limits=LIMITS,
            kv_cache=self.kv_cache,
            waiting=WaitingQueue(),
            roster=self.roster,
            flights=self.flights,
            now_s=now_s,
        )


def test_a_picture_shows_pages_flights_and_requests() -> None:
    view = Scene().picture(2.0)
    assert [instance.num_free_pages for instance in view.instances] == [10, 10, 8]
    assert [instance.is_busy for instance in view.instances] == [False, True, False]
    assert [(request.request_id, request.kv) for request in view.running] == [("a", ((2, 6),))]
    assert [(flight.group, flight.started_s) for flight in view.flights] == [(Group.of([1]), 1.0)]


def test_what_stays_as_it_is_is_the_same_object_in_the_next_picture() -> None:
    scene = Scene()
    first, second = scene.picture(2.0), scene.picture(3.0)
    assert second.running[0] is first.running[0]
    assert second.flights[0] is first.flights[0]
    assert all(new is old for new, old in zip(second.instances, first.instances, strict=True))


def test_what_changes_is_shown_anew_and_old_pictures_stay_as_they_were() -> None:
    scene = Scene()
    first = scene.picture(2.0)
    (flight,) = scene.flights
    flight.started_s = 2.5
    scene.kv_cache.append_more("a", 3)
    scene.roster.note(scene.live.values())
    second = scene.picture(3.0)
    assert (first.flights[0].started_s, second.flights[0].started_s) == (1.0, 2.5)
    assert (first.running[0].num_tokens, second.running[0].num_tokens) == (6, 9)
    assert (first.instances[2].num_free_pages, second.instances[2].num_free_pages) == (8, 7)
    assert second.instances[0] is first.instances[0]


def test_an_instance_is_busy_as_long_as_something_in_flight_names_it() -> None:
    scene = Scene()
    assert scene.flights.busy_instances == {1}
    scene.flights.land(0, 0.5)
    assert scene.flights.busy_instances == set()
    assert not scene.picture(2.0).instances[1].is_busy
