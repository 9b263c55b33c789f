"""The next token of every request of a fixed group."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Plan, Preempt, SubBatch
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.view import ClusterView


def plan_decode(view: ClusterView, group: Group, running: Sequence[RunningView]) -> tuple[Plan, ...]:
    """A decode of all these requests, the newest of which are preempted if pages are short; nothing if there are none.

    Args:
        view: the cluster, in which the group is idle.
        group: holds all keys of the requests.
        running: at most `view.max_num_seqs`, none of them in flight.
    """
    oldest_first = sorted(running, key=lambda request: request.order)
    free_pages = {instance: view.instances[instance].num_free_pages for instance in group.instances}
    preempted: list[str] = []
    while oldest_first:
        batches = _assign(oldest_first, free_pages, view.shape.page_size)
        if batches is not None:
            preemptions = (Preempt(tuple(preempted)),) if preempted else ()
            sub_batches = [SubBatch(master, tuple(names)) for master, names in sorted(batches.items())]
            return (*preemptions, Decode(group, tuple(sub_batches)))
        newest = oldest_first.pop()
        preempted.append(newest.request_id)
        for instance, num_tokens in newest.kv:
            free_pages[instance] += view.shape.num_pages_for(num_tokens)
    assert not preempted, f"a request alone on {group} has no page to grow into"
    return ()


def masters_first(running: Sequence[RunningView], free_pages: Mapping[InstanceId, int]) -> list[InstanceId]:
    """The instances in the order in which new keys go to them.

    First comes the one that most requests grow on, for a step costs least with one master; the others by room.
    """
    num_growing = collections.Counter(request.kv[-1][0] for request in running)
    return sorted(free_pages, key=lambda instance: (-num_growing[instance], -free_pages[instance], instance))


def _assign(
    requests: Sequence[RunningView], free_pages: Mapping[InstanceId, int], page_size: int
) -> dict[InstanceId, list[str]] | None:
    """Each master's requests, of which there is one as long as it has pages; None if a new key finds none anywhere."""
    left = dict(free_pages)
    batches: dict[InstanceId, list[str]] = {}
    by_preference = masters_first(requests, free_pages)
    for request in requests:
        has_slot = {instance for instance, num_held in request.kv if num_held % page_size}
        master = next((instance for instance in by_preference if left[instance] or instance in has_slot), None)
        if master is None:
            return None
        left[master] -= master not in has_slot
        batches.setdefault(master, []).append(request.request_id)
    return batches
