"""When a decode may stand for many steps, and what the cluster will be like after them."""

import pytest

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import DecodeIteration
from loongjax.core.plan import Decode, SubBatch, TokenInterval
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.binding import Flight, bind
from loongjax.engine.flights import Flights
from loongjax.engine.jumps import Surroundings, foresee, longest_jump
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.roster import Roster
from loongjax.engine.snapshot import take_snapshot
from loongjax.engine.waiting_queue import WaitingQueue
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.view import ClusterView

LIMITS = RuntimeLimits(max_model_len=500, max_num_batched_tokens=64, max_num_seqs=8, vocab_size=8)
PLAN = Decode(Group((0, 1)), (SubBatch(0, ("a",)), SubBatch(1, ("b",))))


class Decoding:
    """Request a (12 tokens on 1, then 7 on 0) and b (5 on 1) in a decode, and c, which is left out, on 2."""

    def __init__(self, num_pages: int = 30, max_tokens: int = 50) -> None:
        self.shape = ClusterShape(num_instances=3, num_pages=num_pages, page_size=4)
        self.kv_cache = KVCache(self.shape)
        self.live: dict[str, LiveRequest] = {}
        self.flights = Flights(row_buckets=(8,))
        kept = {
            "a": (TokenInterval(1, 0, 12), TokenInterval(0, 12, 19)),
            "b": (TokenInterval(1, 0, 5),),
            "c": (TokenInterval(2, 0, 9),),
        }
        for order, (name, intervals) in enumerate(kept.items()):
            request = Request(
                request_id=name,
                prompt_token_ids=(1,) * intervals[-1].end,
                sampling=SamplingParams(),
                max_tokens=max_tokens + order,
                seed=0,
            )
            self.live[name] = LiveRequest(request, order, 0.0)
            self.live[name].output_token_ids.append(1)
            self.kv_cache.keep(name, intervals)
        self.flight = self.bind()

    def bind(self) -> Flight:
        flight = bind(PLAN, iteration_id=0, live=self.live, kv_cache=self.kv_cache, continues=False)
        for live in flight.requests:
            live.num_in_flight = 1
        self.flights.depart(flight, 0.0)
        return flight

    def view(self) -> ClusterView:
        """As if the decode were over."""
        roster = Roster(self.kv_cache, self.live)
        roster.note(self.live.values())
        return take_snapshot(
            shape=self.shape,
            limits=LIMITS,
            kv_cache=self.kv_cache,
            waiting=WaitingQueue(),
            roster=roster,
            flights=self.flights,
            now_s=1.0,
            as_if_over=self.flight,
        )


@pytest.mark.parametrize("num_steps", [1, 3, 17])
def test_the_cluster_is_foreseen_as_it_will_be(num_steps: int):
    decoding = Decoding()
    foreseen = foresee(decoding.view(), PLAN, num_steps)
    for name in ("a", "b"):
        decoding.kv_cache.append_more(name, num_steps)
        decoding.live[name].output_token_ids.extend([1] * num_steps)
    assert foreseen == decoding.view()


def test_a_jump_ends_with_the_first_request_that_ends():
    decoding = Decoding(max_tokens=10)
    # One token came with the prefill, and the step in flight is the first of nine.
    assert longest_jump(decoding.flight, decoding.kv_cache, lambda num_steps: True) == 9


def test_a_jump_takes_no_page_that_is_not_there():
    decoding = Decoding(num_pages=8)
    num_steps = longest_jump(decoding.flight, decoding.kv_cache, lambda num_steps: True)
    assert num_steps > 1
    for name in ("a", "b"):
        decoding.kv_cache.append_more(name, num_steps - 1)
    decoding.kv_cache.check_integrity()


def test_without_a_page_for_the_second_step_there_is_no_jump():
    decoding = Decoding(num_pages=5)
    # Instance 0 holds 8 tokens of a, 1 holds 12 and 6 in five pages: three steps later b finds none.
    decoding.kv_cache.append_more("b", 2)
    assert longest_jump(decoding.flight, decoding.kv_cache, lambda num_steps: True) == 1


def test_the_policy_is_asked_about_the_first_and_the_last_step():
    asked: list[int] = []

    def would_repeat(num_steps: int) -> bool:
        asked.append(num_steps)
        return True

    assert longest_jump(Decoding(max_tokens=10).flight, Decoding().kv_cache, would_repeat) == 9
    assert asked == [1, 8]


def test_a_policy_that_wants_something_else_at_once_gets_its_way():
    assert longest_jump(Decoding().flight, Decoding().kv_cache, lambda num_steps: False) == 1


@pytest.mark.parametrize("limit", [1, 2, 5, 30])
def test_a_policy_that_will_want_something_else_is_asked_in_time(limit: int):
    num_steps = longest_jump(Decoding().flight, Decoding().kv_cache, lambda num_steps: num_steps <= limit)
    assert 1 <= num_steps <= limit + 1


def test_a_request_that_has_ended_meanwhile_stops_it():
    decoding = Decoding()
    decoding.live["b"].has_ended = True
    assert longest_jump(decoding.flight, decoding.kv_cache, lambda num_steps: True) == 1


def test_steps_that_are_over_move_its_start_and_its_work():
    flight = Decoding().flight
    assert isinstance(flight.iteration, DecodeIteration)
    flight.pass_steps(3, 2.5)
    assert flight.started_s == 2.5
    # With this step's, 8 tokens of a on instance 0, and 12 of a and 6 of b on instance 1; three steps later 11 and 21.
    assert flight.works(2)[0].keys == (11, 21)
    assert flight.works(2)[1].keys == (12, 22)


@pytest.mark.parametrize(
    ("idle", "left", "is_quieter"),
    [
        ({1}, {"c"}, True),
        (set(), {"c"}, True),
        (set(), set(), True),
        ({1, 2}, {"c"}, False),
        ({1}, {"c", "d"}, False),
        ({1}, {"d"}, False),
    ],
)
def test_nothing_new_around_it_is_quiet(idle: set[int], left: set[str], is_quieter: bool):
    before = Surroundings(idle=frozenset({1}), left=frozenset({"c"}))
    assert Surroundings(idle=frozenset(idle), left=frozenset(left)).are_quieter_than(before) is is_quieter


def test_one_of_several_that_were_left_may_have_stood_in_the_way_of_another():
    before = Surroundings(idle=frozenset(), left=frozenset({"c", "d"}))
    assert not Surroundings(idle=frozenset(), left=frozenset({"d"})).are_quieter_than(before)
