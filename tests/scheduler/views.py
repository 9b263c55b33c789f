"""Short ways to write down a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loongjax.core.cluster import ClusterShape
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.view import ClusterView, FlightView, InstanceView
from loongjax.scheduler.waiting import Waiting


def waiting(
    request_id: str,
    order: int,
    num_tokens: int,
    *,
    max_total_tokens: int | None = None,
    keeps_kv: bool = True,
    is_suspect: bool = False,
    needs_whole_prefill: bool = False,
    arrival_s: float = 0.0,
    priority: int = 0,
    slo: ServiceLevel = NO_SLO,
) -> WaitingView:
    if max_total_tokens is None:
        max_total_tokens = num_tokens + 100
    return WaitingView(
        request_id=request_id,
        order=order,
        num_tokens=num_tokens,
        max_total_tokens=max_total_tokens,
        keeps_kv=keeps_kv,
        is_suspect=is_suspect,
        needs_whole_prefill=needs_whole_prefill,
        arrival_s=arrival_s,
        priority=priority,
        slo=slo,
    )


def running(
    request_id: str,
    order: int,
    *kv: tuple[int, int],
    is_in_flight: bool = False,
    num_uncomputed_tokens: int = 1,
    is_suspect: bool = False,
    num_output_tokens: int = 0,
    max_new_tokens: int = 1000,
    first_token_s: float | None = None,
    priority: int = 0,
    slo: ServiceLevel = NO_SLO,
) -> RunningView:
    """It may generate `max_new_tokens` more; at rest its newest token has no keys yet."""
    num_tokens = sum(held for _, held in kv)
    num_known = num_tokens + (0 if is_in_flight else num_uncomputed_tokens)
    return RunningView(
        request_id=request_id,
        order=order,
        num_tokens=num_tokens,
        max_total_tokens=num_known + max_new_tokens,
        max_output_tokens=num_output_tokens + max_new_tokens,
        kv=kv,
        is_in_flight=is_in_flight,
        num_uncomputed_tokens=num_uncomputed_tokens,
        is_suspect=is_suspect,
        num_output_tokens=num_output_tokens,
        first_token_s=first_token_s,
        priority=priority,
        slo=slo,
    )


def cluster(
    num_instances: int = 4,
    *,
    num_pages: int = 100,
    page_size: int = 4,
    waits: Sequence[WaitingView] = (),
    runs: Sequence[RunningView] = (),
    decoding: Sequence[int] = (),
    prefilling: Sequence[int] = (),
    taken: Mapping[int, int] | None = None,
    max_num_batched_tokens: int = 10_000,
    max_num_seqs: int = 64,
    now_s: float = 0.0,
    flights: Sequence[FlightView] = (),
) -> ClusterView:
    """A cluster whose free pages are those that neither the running requests hold nor `taken` takes away."""
    shape = ClusterShape(num_instances=num_instances, num_pages=num_pages, page_size=page_size)
    used = {instance: (taken or {}).get(instance, 0) for instance in range(num_instances)}
    for request in runs:
        for instance, held in request.kv:
            used[instance] += -(-held // page_size)
    return ClusterView(
        shape=shape,
        instances=tuple(
            InstanceView(
                instance=instance,
                num_free_pages=num_pages - used[instance],
                is_busy=instance in decoding or instance in prefilling,
                is_prefilling=instance in prefilling,
            )
            for instance in range(num_instances)
        ),
        waiting=Waiting(waits),
        residents=Residents.of(runs, num_instances),
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        now_s=now_s,
        flights=tuple(flights),
    )
