"""A request that no decode group has room for by itself, but some have together.

To cut its keys over them ends the fragmentation of memory that instances by themselves suffer from, which is what
elastic instances are for. But it ties the groups together: until the request ends, their decodes take each step, and
stand still for each prefill, together. The paper counts the pause alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.outlook import Site, step_s
from loongjax.scheduler.esp.times import Times


def tie_for_room(draft: Draft, candidates: Sequence[Site], num_pages: int) -> list[Site]:
    """The fewest sites that have room for so many pages, at least two; none if all have not, or one has."""
    rooms = {site: sum([draft.room(instance) for instance in site.instances]) for site in candidates}
    if not rooms or max(rooms.values()) >= num_pages:
        return []
    by_room = sorted(candidates, key=lambda site: (-rooms[site], site.instances))
    totals = itertools.accumulate([rooms[site] for site in by_room])
    count = next((count for count, total in enumerate(totals, start=1) if total >= num_pages), 0)
    return by_room[:count]


def tied(sites: Sequence[Site]) -> Site:
    """All of them as one group."""
    return Site(
        instances=tuple(sorted(itertools.chain.from_iterable([site.instances for site in sites]))),
        ready_s=max([site.ready_s for site in sites]),
        requests=tuple(itertools.chain.from_iterable([site.requests for site in sites])),
        weigh=lambda: sum([site.pause_weight for site in sites]),
    )


def cost_of_tie(sites: Sequence[Site], times: Times, now_s: float) -> float:
    """What it costs, in seconds x weight, that all further steps of these decode groups are those of one.

    Instances without decodes may be among them.
    """
    together_s = step_s(tied(sites), times)
    cost = 0.0
    for site in sites:
        if not site.requests:
            continue
        assert site.facts is not None, site
        apart_s = step_s(site, times)
        cost += site.facts.weight_of_steps(now_s, apart_s) * max(0.0, together_s - apart_s)
    return cost
