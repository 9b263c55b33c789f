"""Who decodes together, against its definition: instances are tied by requests with keys on both, unless one of their
instances prefills."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component, find_components
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.queue import oldest_first
from loongjax.scheduler.request_view import RunningView
from tests.scheduler.views import cluster, running

NUM_INSTANCES = 5
INSTANCES = st.integers(0, NUM_INSTANCES - 1)
HOLDERS = st.lists(st.lists(INSTANCES, min_size=1, max_size=3, unique=True), max_size=8)


def defined(runs: list[RunningView], prefilling: set[InstanceId]) -> list[Component]:
    moving = [request for request in runs if prefilling.isdisjoint(dict(request.kv))]
    groups = [{instance} for instance in range(NUM_INSTANCES) if instance not in prefilling]
    for request in moving:
        touched = [group for group in groups if not group.isdisjoint(dict(request.kv))]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    components = []
    for group in groups:
        requests = [request for request in moving if request.kv[-1][0] in group]
        if requests:
            components.append(Component(group, oldest_first(requests)))
    return sorted(components, key=lambda component: component.requests[0].order)


@given(holders=HOLDERS, prefilling=st.sets(INSTANCES, max_size=2), data=st.data())
def test_decode_groups_are_those_of_the_definition(
    holders: list[list[InstanceId]], prefilling: set[InstanceId], data: st.DataObject
) -> None:
    orders = data.draw(st.permutations(range(len(holders))))
    runs = [
        running(f"r{order}", order, *[(instance, 5) for instance in instances])
        for order, instances in zip(orders, holders, strict=True)
    ]
    draft = Draft(cluster(NUM_INSTANCES, runs=runs, prefilling=sorted(prefilling)), 0)
    assert find_components(draft) == defined(runs, prefilling)


def test_a_group_that_shares_nothing_has_the_residents_of_its_instance() -> None:
    runs = [running("tied", 0, (0, 4), (1, 4)), running("alone", 1, (2, 4))]
    draft = Draft(cluster(3, runs=runs), 0)
    tied, alone = find_components(draft)
    assert (tied.instances, alone.instances) == ({0, 1}, {2})
    assert alone.requests is draft.residents[2]
