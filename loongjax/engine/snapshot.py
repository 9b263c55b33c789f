"""The picture of the cluster that the policy decides on."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from loongjax.core.cluster import ClusterShape, InstanceId
from loongjax.core.plan import Prefill
from loongjax.engine.binding import Flight
from loongjax.engine.roster import Foreseen, Roster
from loongjax.engine.waiting_queue import WaitingQueue
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.view import ClusterView, InstanceView


def take_snapshot(
    *,
    shape: ClusterShape,
    limits: RuntimeLimits,
    kv_cache: KVCache,
    waiting: WaitingQueue,
    roster: Roster,
    flights: Iterable[Flight],
    now_s: float,
    as_if_over: Flight | None = None,
) -> ClusterView:
    """The cluster as it is; with `as_if_over`, as it will be when that flight is over, if it ends no request but those
    that get their last token.

    Pages and tokens need no other foresight: they are accounted for when an iteration is submitted.
    """
    aloft = [flight for flight in flights if flight is not as_if_over]
    busy: dict[InstanceId, bool] = {}
    """Busy instances; whether with a prefill, or with something before or behind one."""
    for flight in aloft:
        is_prefilling = isinstance(flight.plan, Prefill)
        for instance in flight.group.instances:
            busy[instance] = is_prefilling or busy.get(instance, False)
    foreseen = Foreseen(roster.residents(), ()) if as_if_over is None else roster.foresee(as_if_over)
    num_free_pages = kv_cache.all_free_pages()
    for request in foreseen.ended:
        for instance, num_held in request.kv:
            num_free_pages[instance] += shape.num_pages_for(num_held)
    return ClusterView(
        shape=shape,
        instances=tuple(
            [
                _instance_view(instance, num_free, instance in busy, busy.get(instance, False))
                for instance, num_free in enumerate(num_free_pages)
            ]
        ),
        waiting=waiting.views(),
        residents=foreseen.residents,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        now_s=now_s,
        flights=tuple([flight.view() for flight in aloft]),
    )


@functools.lru_cache(maxsize=1 << 14)
def _instance_view(instance: InstanceId, num_free_pages: int, is_busy: bool, is_prefilling: bool) -> InstanceView:
    """Most instances are as they were in the last picture."""
    return InstanceView(instance=instance, num_free_pages=num_free_pages, is_busy=is_busy, is_prefilling=is_prefilling)
