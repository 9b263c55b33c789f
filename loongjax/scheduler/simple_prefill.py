"""Which waiting requests the simple policy prefills now, on which groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.placement import Shelf, place_keys
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.simple_config import SimplePolicyConfig


@dataclasses.dataclass
class _Batch:
    """A prefill to be: its group, its requests, and what the group has left."""

    instances: list[InstanceId]
    num_pages_left: int
    num_seats_left: int
    requests: list[WaitingView] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_growth_pages: int = 0
    is_closed: bool = False
    """Whether nothing may join, because a suspect is in it."""


@dataclasses.dataclass(frozen=True)
class _Need:
    """What one request asks of a group."""

    num_tokens: int
    num_pages: int
    """For its keys."""
    num_growth_pages: int
    """For some of the tokens that it will generate."""
    min_dop: int
    """Instances without which its tokens exceed what one prefill can hold."""
    dop: int
    """Instances that its length deserves."""
    is_alone: bool
    """Whether it must be the only request of its prefill."""


class PrefillPlanner:
    """Plans the prefills of one answer.

    Requests are taken in queue order, but the oldest request of all comes first, and if nothing else helps younger
    running ones are preempted for it. A long prompt takes idle instances, those without keys first; if it needs more
    than are idle, the idle ones are reserved until decodes on the others have ended their step. Short prompts
    spread over the instances without keys, and are batched when there are more prompts than that.
    """

    def __init__(self, draft: Draft, config: SimplePolicyConfig, fairness: Fairness) -> None:
        self._draft = draft
        self._view = draft.view
        self._config = config
        self._fairness = fairness
        self._batches: list[_Batch] = []
        by_room = sorted(draft.idle, key=lambda instance: (-draft.room(instance), instance))
        self._vacant = [instance for instance in by_room if not draft.residents[instance]]
        """Candidates without keys, those with most room first."""
        self._occupied = [instance for instance in by_room if draft.residents[instance]]
        """Candidates whose decodes would have to wait, those with most room first."""
        self._soon = sorted(draft.decoding)
        """Instances that decode now and will be candidates when their step ends."""

    def plan(self) -> None:
        """Puts the prefills into the draft."""
        first_left: WaitingView | None = None
        senior = self._senior()
        if senior is not None and not self._try(senior, is_senior=True, is_first=True):
            first_left = senior
        self._bar(self._fairness.barred_instances(self._view.residents))
        if self._vacant or self._occupied or self._batches:
            first_left = self._plan_others(senior, first_left)
        if first_left is not None and any(
            request.order > first_left.order for batch in self._batches for request in batch.requests
        ):
            self._fairness.note_overtaken(first_left)
        for batch in self._batches:
            self._commit(batch)

    def _plan_others(self, senior: WaitingView | None, first_left: WaitingView | None) -> WaitingView | None:
        """Tries the queue, but for the senior request, and returns the first request that is left waiting."""
        num_left = 0
        for request in self._view.waiting:
            if first_left is not None and (
                num_left > self._config.max_lookahead or not self._fairness.may_overtake(first_left)
            ):
                break
            if request is not senior and not self._try(request, is_senior=False, is_first=first_left is None):
                first_left = first_left or request
                num_left += 1
        return first_left

    def _senior(self) -> WaitingView | None:
        """The oldest waiting request, if no running one is older."""
        if not self._view.waiting:
            return None
        oldest = min(self._view.waiting, key=lambda request: request.order)
        return None if self._view.residents.is_anybody_older(oldest.order) else oldest

    def _try(self, request: WaitingView, *, is_senior: bool, is_first: bool) -> bool:
        need = self._need(request, is_senior=is_senior)
        batch = self._open_vacant(need) or self._find_open(need) or self._open_any(need, is_senior=is_senior)
        if batch is None and is_first and not self._reserve(need, is_senior=is_senior) and is_senior:
            batch = self._open_by_preempting(need)
        if batch is None:
            return False
        batch.requests.append(request)
        batch.num_tokens += need.num_tokens
        batch.num_growth_pages += need.num_growth_pages
        batch.num_pages_left -= need.num_pages + need.num_growth_pages
        batch.num_seats_left -= 1
        batch.is_closed = need.is_alone
        return True

    def _need(self, request: WaitingView, *, is_senior: bool) -> _Need:
        num_pages = num_growth_pages = 0
        if request.keeps_kv:
            num_pages = self._draft.shape.num_pages_for(request.num_tokens)
            if not is_senior:
                longest = max(request.num_tokens, request.max_total_tokens - 1)
                grown = min(request.num_tokens + self._config.growth_tokens, longest)
                num_growth_pages = self._draft.shape.num_pages_for(grown) - num_pages
        min_dop = -(-request.num_tokens // self._view.max_num_batched_tokens)
        deserved = -(-request.num_tokens // self._config.prefill_tokens_per_instance)
        reachable = len(self._vacant) + len(self._occupied) + len(self._soon)
        dop = max(min_dop, min(deserved, reachable))
        return _Need(request.num_tokens, num_pages, num_growth_pages, min_dop, dop, request.is_suspect)

    def _open_vacant(self, need: _Need) -> _Batch | None:
        if len(self._vacant) < need.dop:
            return None
        instances = self._vacant[: need.dop]
        if sum(self._draft.free[instance] for instance in instances) < need.num_pages + need.num_growth_pages:
            return None
        return self._open(instances)

    def _find_open(self, need: _Need) -> _Batch | None:
        """The least loaded of this answer's prefills that can take the request along."""
        if need.is_alone:
            return None
        best: _Batch | None = None
        tokens_per_instance = min(self._config.prefill_tokens_per_instance, self._view.max_num_batched_tokens)
        for batch in self._batches:
            fits = (
                len(batch.instances) >= need.dop
                and batch.num_tokens + need.num_tokens <= len(batch.instances) * tokens_per_instance
                and batch.num_pages_left >= need.num_pages + need.num_growth_pages
                and batch.num_seats_left > 0
                and len(batch.requests) < self._view.max_num_seqs
                and not batch.is_closed
            )
            if fits and (best is None or batch.num_tokens < best.num_tokens):
                best = batch
        return best

    def _open_any(self, need: _Need, *, is_senior: bool) -> _Batch | None:
        """A new group of idle instances, as many as the length deserves, and more if the keys need them."""
        instances = self._choose([*self._vacant, *self._occupied], need, is_senior=is_senior)
        return self._open(instances) if instances else None

    def _choose(self, candidates: Sequence[InstanceId], need: _Need, *, is_senior: bool) -> list[InstanceId]:
        """The first of the candidates, or else those with most room, that suffice; none if neither do.

        Keys are not scattered over more instances than they need on empty ones, because instances that share a request
        decode together from then on. Only the senior request may, so that it need not wait.
        """
        room = self._draft.free.__getitem__ if is_senior else self._draft.room
        num_pages = need.num_pages + need.num_growth_pages
        most = len(candidates) if is_senior else max(need.dop, -(-num_pages // self._draft.shape.num_pages))
        for ordered in (candidates, sorted(candidates, key=lambda instance: (-room(instance), instance))):
            num_free = num_seats = 0
            for count, instance in enumerate(ordered[:most], start=1):
                num_free += room(instance)
                num_seats += self._num_seats(instance)
                if count >= need.dop and num_free >= num_pages and (num_seats > 0 or is_senior):
                    return list(ordered[:count])
        return []

    def _reserve(self, need: _Need, *, is_senior: bool) -> bool:
        """Whether the request will fit once the decodes in flight have ended their step.

        If it needs several instances, the idle ones among them are kept free until then.
        """
        candidates = [*self._vacant, *self._occupied, *self._soon]
        chosen = self._choose(candidates, need, is_senior=is_senior)
        if not chosen:
            return False
        if len(chosen) > 1:
            self._take([instance for instance in chosen if instance in self._draft.idle])
        return True

    def _open_by_preempting(self, need: _Need) -> _Batch | None:
        """A new group whose younger residents make room, newest first; or reserves what may become one."""
        candidates = [*self._vacant, *self._occupied]
        min_dop = max(need.min_dop, -(-need.num_pages // self._draft.shape.num_pages))
        if len(candidates) < min_dop:
            if len(candidates) + len(self._soon) >= min_dop:
                self._take(candidates)
            return None
        by_free = sorted(candidates, key=lambda instance: (-self._draft.free[instance], instance))
        instances = by_free[: max(min_dop, min(need.dop, len(by_free)))]
        victims = self._newest_holding(instances, need.num_pages)
        if victims is None:
            return None
        for request in victims:
            self._draft.preempt(request)
        return self._open(instances)

    def _newest_holding(self, instances: Sequence[InstanceId], num_pages: int) -> list[RunningView] | None:
        """The newest requests without which these instances have so many free pages; None if that cannot be."""
        draft = self._draft
        num_free = sum(draft.free[instance] for instance in instances)
        victims: list[RunningView] = []
        for request in sorted(draft.residents_of(instances), key=lambda request: -request.order):
            if num_free >= num_pages:
                break
            if not request.is_in_flight:
                victims.append(request)
                num_free += sum(
                    draft.shape.num_pages_for(held) for instance, held in request.kv if instance in instances
                )
        return victims if num_free >= num_pages else None

    def _open(self, instances: Sequence[InstanceId]) -> _Batch:
        batch = _Batch(
            list(instances),
            num_pages_left=sum(self._draft.room(instance) for instance in instances),
            num_seats_left=sum(self._num_seats(instance) for instance in instances),
        )
        self._take(instances)
        self._batches.append(batch)
        return batch

    def _take(self, instances: Sequence[InstanceId]) -> None:
        self._draft.reserve(instances)
        self._bar(instances)

    def _bar(self, instances: Collection[InstanceId]) -> None:
        """Strikes these instances off the candidates."""
        self._soon = [instance for instance in self._soon if instance not in instances]
        self._vacant = [instance for instance in self._vacant if instance not in instances]
        self._occupied = [instance for instance in self._occupied if instance not in instances]

    def _num_seats(self, instance: InstanceId) -> int:
        return max(0, self._view.max_num_seqs - self._draft.num_newest[instance])

    def _commit(self, batch: _Batch) -> None:
        draft = self._draft
        num_needed = sum(
            draft.shape.num_pages_for(request.num_tokens) for request in batch.requests if request.keeps_kv
        )
        has_room = sum(draft.room(instance) for instance in batch.instances) >= num_needed
        shelves = [
            Shelf(instance, draft.room(instance) if has_room else draft.free[instance], self._num_seats(instance))
            for instance in batch.instances
        ]
        requests = place_keys(
            batch.requests, shelves, page_size=draft.shape.page_size, num_spare_pages=batch.num_growth_pages
        )
        draft.prefill(Group.of(batch.instances), requests)
        passed = {request.request_id: request for instance in batch.instances for request in draft.residents[instance]}
        self._fairness.note_prefilled(batch.requests)
        self._fairness.note_passed(passed.values())
