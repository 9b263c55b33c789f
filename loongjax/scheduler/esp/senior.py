"""What keeps everybody from waiting for ever: instances for one request, whatever it costs the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.launch import start
from loongjax.scheduler.esp.outlook import Outlook
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView


def senior_of(view: ClusterView) -> WaitingView | None:
    """The oldest request of all, if it waits."""
    if not view.waiting:
        return None
    oldest = view.waiting.oldest
    return None if view.residents.is_anybody_older(oldest.order) else oldest


class SeniorPlanner:
    """Prefills a request regardless of gain and cost.

    On as few idle instances as hold its tokens and its keys, vacant ones first. Where decodes have to end their step
    first, the idle instances are held meanwhile. Only the oldest request of all may have instances that are barred,
    where younger ones are due their next token, and only for it, where memory is short, are those preempted, the newest
    first.
    """

    def __init__(self, draft: Draft, outlook: Outlook, growth_tokens: int) -> None:
        self._draft = draft
        self._outlook = outlook
        self._growth_tokens = growth_tokens

    def plan(self, request: WaitingView, *, is_oldest: bool) -> bool:
        """Whether the request is prefilled now."""
        draft = self._draft
        barred = () if is_oldest else self._outlook.barred
        num_pages = draft.shape.num_pages_for(request.num_tokens) if request.keeps_kv else 0
        min_dop = -(-request.num_tokens // draft.view.max_num_batched_tokens)
        idle = self._idle(barred)
        chosen = self._fewest(idle, num_pages, min_dop)
        if not chosen:
            soon = sorted(
                draft.decoding.difference(barred),
                key=lambda instance: (self._outlook.until_free_s[instance], instance),
            )
            if self._fewest([*idle, *soon], num_pages, min_dop):
                draft.reserve(idle)
                return False
            if is_oldest:
                chosen = self._preempting(idle, soon, num_pages, min_dop)
        if not chosen:
            return False
        start(draft, chosen, [request], self._growth_tokens)
        return True

    def _idle(self, barred: Collection[InstanceId]) -> list[InstanceId]:
        """Idle instances, vacant ones first, those with most free pages first."""
        draft = self._draft
        return sorted(
            draft.idle.difference(barred),
            key=lambda instance: (bool(draft.residents[instance]), -draft.free[instance], instance),
        )

    def _fewest(self, candidates: Sequence[InstanceId], num_pages: int, min_dop: int) -> list[InstanceId]:
        """The first of the candidates, or else those with most free pages, that suffice; none if neither do."""
        free = self._draft.free
        for ordered in (candidates, sorted(candidates, key=lambda instance: (-free[instance], instance))):
            num_free = 0
            most = max(min_dop, -(-num_pages // self._draft.shape.num_pages)) if ordered is candidates else len(ordered)
            for count, instance in enumerate(ordered[:most], start=1):
                num_free += free[instance]
                if count >= min_dop and num_free >= num_pages:
                    return list(ordered[:count])
        return []

    def _preempting(
        self, idle: Sequence[InstanceId], soon: Sequence[InstanceId], num_pages: int, min_dop: int
    ) -> list[InstanceId]:
        """Instances whose newest residents make room, or none, holding what may become enough."""
        draft = self._draft
        least = max(min_dop, -(-num_pages // draft.shape.num_pages))
        if len(idle) < least:
            if len(idle) + len(soon) >= least:
                draft.reserve(idle)
            return []
        instances = sorted(idle, key=lambda instance: (-draft.free[instance], instance))[:least]
        num_free = sum([draft.free[instance] for instance in instances])
        victims: list[RunningView] = []
        for request in sorted(draft.residents_of(instances), key=lambda request: -request.order):
            if num_free >= num_pages:
                break
            if not request.is_in_flight:
                victims.append(request)
                held = [draft.shape.num_pages_for(count) for instance, count in request.kv if instance in instances]
                num_free += sum(held)
        if num_free < num_pages:
            return []
        for victim in victims:
            draft.preempt(victim)
        return instances
