"""What holds of the engine's state between two steps."""

from __future__ import annotations

import numpy as np

from loongjax.engine.state import EngineState
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.waiting import Waiting


def check_state(state: EngineState) -> None:
    """Asserts every invariant. It looks at every page: for tests."""
    state.kv_cache.check_integrity()
    waiting_ids = {request.request_id for request in state.waiting}
    assert waiting_ids.isdisjoint(state.kv_cache.request_ids), "a request both waits and runs"
    assert waiting_ids | set(state.kv_cache.request_ids) == set(state.live), "a request is lost, or a dead one lingers"
    state.flights.check_integrity()
    num_in_flight = dict.fromkeys(state.live, 0)
    for flight in state.flights:
        for request in flight.requests:
            if not request.has_ended and not flight.is_void:
                num_in_flight[request.request_id] += 1
    for request_id, request in state.live.items():
        assert request.num_in_flight == num_in_flight[request_id], request_id
        assert request_id not in waiting_ids or request.num_in_flight == 0, request_id
    _check_roster(state)
    views = state.waiting.views()
    assert np.array_equal(views.table, Waiting(views).table), "the queue's table is out of date"


def _check_roster(state: EngineState) -> None:
    """Asserts that nobody has forgotten to tell the roster of a change."""
    residents = state.roster.residents()
    for request in residents.running:
        now = state.live[request.request_id].running_view(state.kv_cache.local_lens(request.request_id))
        assert request == now, f"{request} is out of date: {now}"
    assert sorted(request.request_id for request in residents.running) == sorted(state.kv_cache.request_ids)
    assert residents == Residents.of(residents.running, state.shape.num_instances), "somebody is elsewhere"
    for local in residents.local:
        shared = [request for request in local.requests if len(request.kv) > 1]
        assert list(local.straddling) == shared, "somebody has keys elsewhere, too, or has no more"


def lost_when_idle(state: EngineState) -> str | None:
    """What an engine without requests still holds, if anything, without a look at every page."""
    kv_cache, waiting = state.kv_cache, state.waiting
    num_used = {i: kv_cache.used_pages(i) for i in state.shape.all_instances}
    if not (any(num_used.values()) or len(kv_cache) or len(waiting)):
        return None
    return (
        f"no request lives, but {len(kv_cache)} hold keys, {len(waiting)} wait, and these pages are used, by instance: "
        f"{num_used}"
    )
