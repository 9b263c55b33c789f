"""What holds of the engine's state between two steps."""

from __future__ import annotations

from loongjax.engine.state import EngineState


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
