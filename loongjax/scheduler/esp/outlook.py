"""Where prefills could go: instances that are free, that decode, or that other prefills will leave empty."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.core.plan import Prefill
from loongjax.scheduler.components import find_components
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.groups import GroupFacts, GroupMemory
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.request_view import RunningView


@dataclasses.dataclass(kw_only=True, eq=False)
class Site:
    """Instances that prefills can have together, or not at all."""

    instances: tuple[InstanceId, ...]
    """Ascending."""
    ready_s: float = 0.0
    """In how many seconds all of them should be idle."""
    requests: tuple[RunningView, ...] = ()
    """Those decodes."""
    facts: GroupFacts | None = None
    """What is known of them, if they are a decode group as it is."""
    weigh: Callable[[], float] = float
    """Says what `pause_weight` is, if anybody asks."""

    @functools.cached_property
    def pause_weight(self) -> float:
        """What it costs a second that the decodes there stand still."""
        return self.weigh()


def step_s(site: Site, times: Times) -> float:
    """The time of a step of the site's decodes, if one of its instances were the master of all."""
    if site.facts is not None:
        return times.step_s(*site.facts.size_of_step)
    num_keys, dop = sum([request.num_tokens for request in site.requests]), len(site.instances)
    return times.step_s(dop, len(site.requests), -(-num_keys // dop))


def loss_weight(site: Site, times: Times) -> float:
    """What a lost second costs the decodes of a group and those who join them later; 0 without decodes.

    If a step of n rows takes a + b n seconds, and outputs have L tokens, n / (L (a + b n)) rows end a second. Where as
    many come, a lost second leaves so many rows too many, and the surplus is worked off at a / (L (a + b n)^2) of it a
    second: more rows end a second only as far as they share what does not depend on their number. All rows together
    wait n (a + b n) / a seconds for it, the quotient of both, of which n would be those who are there.
    """
    if not site.requests:
        return 0.0
    return site.pause_weight * step_s(site, times) / times.least_step_s(len(site.instances))


class Outlook:
    """All sites, and when each instance should be free.

    Args:
        draft: the cluster.
        times: predictions.
        barred: instances on which a running request is due its next token.
        lengths: of outputs that have ended.
        groups: what was worked out before; None: nothing.
    """

    def __init__(
        self,
        draft: Draft,
        times: Times,
        barred: Collection[InstanceId],
        lengths: OutputLengths,
        groups: GroupMemory | None = None,
    ) -> None:
        view = draft.view
        groups = GroupMemory() if groups is None else groups
        self._groups = groups
        self.barred = barred
        """Instances that no prefill may have now but that of the oldest request of all."""
        self.components = find_components(draft)
        """Every decode group there could be, busy or not."""
        self.until_free_s = times.until_free_s(view)
        """In seconds, by instance."""
        self.vacant = [instance for instance in draft.idle if not draft.residents[instance] and instance not in barred]
        self.vacant.sort(key=lambda instance: (-draft.room(instance), instance))
        """Idle instances without keys, those with most room first."""
        sites = [self._site(groups.facts_of(component, lengths), view.now_s, times) for component in self.components]
        self.decodes = [site for site in sites if site.ready_s < math.inf]
        if barred:
            self.decodes = [site for site in self.decodes if not _meets(site.instances, barred)]
        """Decode groups."""
        self.emptied = self._emptied(draft, barred)
        """Instances that prefills in flight will leave without keys, soonest first."""

    def _site(self, group: GroupFacts, now_s: float, times: Times) -> Site:
        def weigh() -> float:
            step_s = times.step_s(*group.size_of_step) if group.has_paces else 0.0
            return group.pause_weight(now_s, step_s)

        instances, until_free_s = group.instances, self.until_free_s
        return Site(
            instances=instances,
            ready_s=until_free_s[instances[0]] if len(instances) == 1 else max([until_free_s[i] for i in instances]),
            requests=group.requests,
            facts=group,
            weigh=weigh,
        )

    def weigh(self, sites: Sequence[Site]) -> None:
        """Finds the pause weights of all of them at once."""
        self._groups.weigh([site.facts for site in sites if site.facts is not None])

    def by_pause_cost(self) -> list[Site]:
        """Decode groups, those first that are cheapest to pause for each instance."""
        self.weigh(self.decodes)
        return sorted(self.decodes, key=lambda site: (site.pause_weight / len(site.instances), site.instances))

    def _emptied(self, draft: Draft, barred: Collection[InstanceId]) -> list[Site]:
        sites: list[Site] = []
        for flight in draft.view.flights:
            if isinstance(flight.plan, Prefill):
                instances = tuple(
                    [
                        instance
                        for instance in flight.group.instances
                        if not draft.residents[instance] and instance not in barred
                    ]
                )
                if instances:
                    sites.append(Site(instances=instances, ready_s=self.until_free_s[instances[0]]))
        return sorted(sites, key=lambda site: site.ready_s)


def _meets(instances: Collection[InstanceId], barred: Collection[InstanceId]) -> bool:
    return any(instance in barred for instance in instances)
