"""Which instances decode together: those that share requests do."""

from __future__ import annotations

import dataclasses

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.queue import oldest_first
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import Running


@dataclasses.dataclass
class Component:
    """Instances tied together by requests with keys on several of them, and those requests, oldest first."""

    instances: set[InstanceId]
    requests: Running


def find_components(draft: Draft) -> list[Component]:
    """Every decode group there could be, the one with the oldest request first.

    Busy ones are among them. Instances that prefill are not, nor are requests with keys there: those stand still.
    """
    components = _tied_together(draft) if draft.straddling else _each_alone(draft)
    components.sort(key=lambda component: component.requests[0].order)
    return components


def _each_alone(draft: Draft) -> list[Component]:
    """Those of instances that share no request, which is most of the time."""
    prefilling = draft.prefilling
    return [
        Component({instance}, residents)
        for instance, residents in enumerate(draft.residents)
        if residents and instance not in prefilling
    ]


def _tied_together(draft: Draft) -> list[Component]:
    root = list(range(draft.shape.num_instances))
    stalled: set[str] = set()
    shared: set[InstanceId] = set()
    """Instances with keys of requests that have keys elsewhere, too."""
    for request in draft.straddling:
        holders = [instance for instance, _ in request.kv]
        shared.update(holders)
        if not draft.prefilling.isdisjoint(holders):
            stalled.add(request.request_id)
            continue
        first = _find(root, holders[0])
        for instance in holders[1:]:
            root[_find(root, instance)] = first
    components: list[Component] = []
    tied: dict[int, tuple[set[InstanceId], list[RunningView]]] = {}
    for instance, residents in enumerate(draft.residents):
        if not residents or instance in draft.prefilling:
            continue
        if instance not in shared:
            components.append(Component({instance}, residents))
            continue
        instances, requests = tied.setdefault(_find(root, instance), (set(), []))
        instances.add(instance)
        newest = draft.newest[instance]
        requests += [request for request in newest if request.request_id not in stalled] if stalled else newest
    components += [Component(instances, oldest_first(requests)) for instances, requests in tied.values() if requests]
    return components


def _find(root: list[int], instance: InstanceId) -> InstanceId:
    while root[instance] != instance:
        root[instance] = root[root[instance]]
        instance = root[instance]
    return instance
