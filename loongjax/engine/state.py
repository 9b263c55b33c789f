"""What the step loop knows: who lives, where every request is, and what is in flight."""

from __future__ import annotations

from loongjax.core.cluster import ClusterShape, InstanceId
from loongjax.core.request import Request
from loongjax.engine.flights import Flights
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.roster import Roster
from loongjax.engine.waiting_queue import WaitingQueue
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.protocol import RuntimeLimits


class EngineState:
    """Every live request is either in the waiting queue or in the KV cache; its moves between them are made here."""

    def __init__(self, shape: ClusterShape, limits: RuntimeLimits) -> None:
        """Of a cluster on which nothing runs yet, and of its runtime's limits."""
        self.kv_cache = KVCache(shape)
        self.live: dict[str, LiveRequest] = {}
        """By request id."""
        self.waiting = WaitingQueue()
        self.roster = Roster(self.kv_cache, self.live)
        """Is told of all that changes of running requests, here or elsewhere."""
        self.flights = Flights(Buckets.of(shape, limits).num_rows)
        self._num_accepted = 0

    @property
    def shape(self) -> ClusterShape:
        return self.kv_cache.shape

    @property
    def idle_instances(self) -> frozenset[InstanceId]:
        """Those that nothing in flight occupies."""
        return frozenset(self.shape.all_instances).difference(self.flights.busy_instances)

    @property
    def has_request_out_of_flight(self) -> bool:
        """Whether some live request, waiting or running, takes part in nothing that is in flight."""
        return bool(len(self.waiting)) or any(live.num_in_flight == 0 for live in self.live.values())

    def accept(self, request: Request, now_s: float) -> None:
        """A request joins the queue, behind all that were accepted before it with its priority."""
        live = LiveRequest(request, self._num_accepted, now_s)
        self._num_accepted += 1
        self.live[request.request_id] = live
        self.waiting.add(live)

    def requeue(self, live: LiveRequest) -> None:
        """Gives up a request's keys; it is recomputed with the tokens it has, before all that arrived after it."""
        self.roster.note([live])
        self.kv_cache.release(live.request_id)
        self.flights.leave_out(live)
        live.num_in_flight = 0
        self.waiting.add(live)

    def forget(self, live: LiveRequest) -> None:
        """A request is over, wherever it was. Its pages are free; iterations in flight may still name them."""
        live.has_ended = True
        self.roster.note([live])
        del self.live[live.request_id]
        if live.request_id in self.kv_cache:
            self.kv_cache.release(live.request_id)
        else:
            self.waiting.remove(live)
