"""Which running requests are decoded now, in which groups and under which masters."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import SubBatch
from loongjax.scheduler.components import Component, find_components
from loongjax.scheduler.decode_rules import DecodeRules
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.queue import oldest_first
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import NOBODY, Running


class DecodePlanner:
    """Plans the decodes of one answer.

    A decode group is a connected component: instances that share a request decode together. A group of which one
    instance is still in a step waits for it. Masters are chosen request by request: the holder of the newest token,
    unless it is full or has enough to compute, or another holder that is a master anyway has fewer requests. Evenness
    alone moves nobody whose keys lie on one instance: a key elsewhere would tie both for as long as the request lives.
    A group that lacks pages takes in another instance (scale-up), waits for one that ends its step soon, or preempts
    its newest request.
    """

    def __init__(
        self, draft: Draft, rules: DecodeRules, fairness: Fairness, components: list[Component] | None = None
    ) -> None:
        """Plans for this draft.

        Args:
            draft: what is left of the cluster.
            rules: when masters and migrations pay.
            fairness: remembers who had to stand back.
            components: the draft's, if they were found since its last prefill or preemption.
        """
        self._draft = draft
        self._rules = rules
        self._fairness = fairness
        self._page_size = draft.shape.page_size
        self._max_num_seqs = draft.view.max_num_seqs
        self._components = find_components(draft) if components is None else components

    def plan(self) -> None:
        """Puts the decodes into the draft, the group with the oldest request first."""
        for component in self._components:
            if component.requests and component.instances <= self._draft.idle:
                self._plan_component(component)

    def _plan_component(self, component: Component) -> None:
        self._add_masters(component)
        while component.requests:
            assignment, short = self._assign(component)
            if not short:
                if not self._consolidate(component):
                    self._commit(component, assignment)
                return
            if not self._find_memory(component, short):
                self._fairness.note_starved(short)
                if self._draft.has_prefills:
                    self._fairness.note_passed(component.requests)
                self._draft.reserve(component.instances)
                return

    def _assign(self, component: Component) -> tuple[dict[InstanceId, list[str]], list[RunningView]]:
        """A master for each request, oldest first, and the requests for which no instance has a page.

        Requests beyond what all masters together may decode stand back, the newest ones.
        """
        cap = min(self._max_num_seqs, self._rules.rows_per_master(component))
        if (alone := self._assign_to_only_one(component, cap)) is not None:
            return alone, []
        free = {instance: self._draft.free[instance] for instance in component.instances}
        batches: dict[InstanceId, list[str]] = {instance: [] for instance in sorted(component.instances)}
        page_size = self._page_size
        rows = collections.Counter([request.kv[-1][0] for request in component.requests])
        short: list[RunningView] = []
        for request in component.requests:
            newest, num_held = request.kv[-1]
            master = newest
            if len(request.kv) > 1:
                master, num_held = self._even_master(request, rows, batches, free, cap)
            batch = batches[master]
            has_slot = num_held % page_size != 0
            if len(batch) >= cap or not (has_slot or free[master]):
                master, has_slot, is_short = self._other_master(request, batches, free, cap)
                if is_short:
                    short.append(request)
                if master < 0:
                    continue
                batch = batches[master]
            if not has_slot:
                free[master] -= 1
            if master != newest:
                rows[newest] -= 1
                rows[master] += 1
            batch.append(request.request_id)
        return batches, short

    def _assign_to_only_one(self, component: Component, cap: int) -> dict[InstanceId, list[str]] | None:
        """The only instance as the master of all requests, if it has seats and pages for them, as it mostly has."""
        if len(component.instances) > 1 or len(component.requests) > cap:
            return None
        (master,) = component.instances
        page_size = self._page_size
        num_new_pages = [request.num_tokens % page_size for request in component.requests].count(0)
        if num_new_pages > self._draft.free[master]:
            return None
        return {master: [request.request_id for request in component.requests]}

    def _even_master(
        self,
        request: RunningView,
        rows: Mapping[InstanceId, int],
        batches: dict[InstanceId, list[str]],
        free: dict[InstanceId, int],
        cap: int,
    ) -> tuple[InstanceId, int]:
        """(master, keys of the request there): of its holders that of the newest, or where that makes both more even,
        another one that is a master anyway, and has a seat for it, and a page beside one for each of its own.

        Nobody goes back, for that would make them less even again: the next step has the same masters.
        """
        newest, num_held = request.kv[-1]
        fewer = [
            (rows[instance], instance, held)
            for instance, held in request.kv[:-1]
            if 0 < rows[instance] < rows[newest] - 1
            and len(batches[instance]) < cap
            and free[instance] > rows[instance]
        ]
        return min(fewer)[1:] if fewer else (newest, num_held)

    def _other_master(
        self, request: RunningView, batches: dict[InstanceId, list[str]], free: dict[InstanceId, int], cap: int
    ) -> tuple[InstanceId, bool, bool]:
        """(master or -1, whether it has a slot in a page of the request, whether pages are what is lacking)."""
        held = dict(request.kv)
        with_memory = [
            (len(batch) >= cap, held.get(instance, 0) % self._page_size == 0, -free[instance], instance)
            for instance, batch in batches.items()
            if free[instance] or held.get(instance, 0) % self._page_size
        ]
        with_seat = [choice for choice in with_memory if len(batches[choice[3]]) < self._max_num_seqs]
        if not with_seat:
            return -1, False, not with_memory
        _, needs_page, _, instance = min(with_seat)
        return instance, not needs_page, False

    def _add_masters(self, component: Component) -> None:
        """Compute scale-up: idle instances without keys join while the masters have too much to compute."""
        vacant = [i for i in self._draft.idle - component.instances if not self._draft.residents[i]]
        for instance in sorted(vacant, key=lambda instance: (-self._draft.free[instance], instance)):
            if not self._draft.free[instance] or not self._rules.wants_instance(component):
                break
            component.instances.add(instance)

    def _find_memory(self, component: Component, short: list[RunningView]) -> bool:
        """Mends a lack of pages, at least in part; False if the group has to wait for somebody else's step to end."""
        draft = self._draft
        is_overdue = any(self._fairness.is_overdue(request) for request in short)
        outside = self._joinable(component)
        if self._rules.allows_memory_scale_up():
            partner = self._roomiest(outside, len(short))
            if partner is not None:
                self._join(component, partner)
                return True
            if not is_overdue and self._roomiest(draft.decoding, len(short)) is not None:
                return False
        if len(component.requests) > 1:
            *others, newest = component.requests
            component.requests = Running(others)
            draft.preempt(newest)
            return True
        return self._find_last_page(component, outside)

    def _find_last_page(self, component: Component, outside: set[InstanceId]) -> bool:
        """Memory for a request that is alone in its group: any page that is free, or that a younger request holds."""
        draft = self._draft
        (request,) = component.requests
        partner = max(outside, key=lambda instance: draft.free[instance], default=None)
        if partner is not None and draft.free[partner]:
            self._join(component, partner)
            return True
        younger = [
            (other.order, instance, other)
            for instance in outside
            for other in draft.residents[instance]
            if other.order > request.order and not other.is_in_flight
        ]
        if not younger:
            return False
        _, instance, newest = max(younger, key=lambda entry: entry[:2])
        self._drop(newest)
        self._join(component, instance)
        return True

    def _joinable(self, component: Component) -> set[InstanceId]:
        """Idle instances outside the group that are tied to idle ones only."""
        joinable = self._draft.idle - component.instances
        for other in self._components:
            if not other.instances <= self._draft.idle:
                joinable -= other.instances
        return joinable

    def _roomiest(self, instances: Iterable[InstanceId], num_pages: int) -> InstanceId | None:
        """The instance with most pages beyond what its own requests will need; one without keys if there is one."""
        draft = self._draft
        fitting = [instance for instance in instances if draft.room(instance) >= num_pages]
        return min(fitting, key=lambda instance: (bool(draft.residents[instance]), -draft.room(instance)), default=None)

    def _join(self, component: Component, instance: InstanceId) -> None:
        """Memory scale-up: the instance joins, with all that it is tied to."""
        component.instances.add(instance)
        for other in self._components:
            if other is not component and instance in other.instances:
                component.instances |= other.instances
                component.requests = oldest_first(component.requests + other.requests)
                other.requests = NOBODY

    def _drop(self, request: RunningView) -> None:
        self._draft.preempt(request)
        for component in self._components:
            component.requests = Running([other for other in component.requests if other is not request])

    def _consolidate(self, component: Component) -> bool:
        """Moves one request's keys off an instance, if a few such moves take the instance out of the group.

        Only into ample room, and seldom for the same request, so that moving and scaling up never alternate.
        """
        if len(component.instances) < 2:
            return False
        draft = self._draft
        held_by = [(request, dict(request.kv)) for request in draft.straddling]
        for source in sorted(component.instances):
            straddling = [(request, held) for request, held in held_by if source in held]
            if not straddling or not all(component.instances.issuperset(held) for _, held in straddling):
                continue
            num_tokens = sum([held[source] for _, held in straddling])
            request = straddling[0][0]
            held = dict(request.kv)
            num_moved = held.pop(source)
            target = max(held, key=lambda instance: (held[instance], instance))
            num_new_pages = draft.shape.num_pages_for(held[target] + num_moved)
            num_new_pages -= draft.shape.num_pages_for(held[target])
            has_room = draft.room(target) >= num_new_pages + draft.shape.num_pages // 8
            num_others = draft.num_newest[target] - (request.kv[-1][0] == target)
            has_seat = num_others < min(self._rules.rows_per_master(component), self._max_num_seqs)
            may_move = self._fairness.may_migrate(request, self._rules.min_tokens_between_migrations)
            is_smaller = num_moved < held[target]
            is_possible = has_room and has_seat and may_move and is_smaller and not self._fairness.is_overdue(request)
            if is_possible and self._rules.is_worth_moving(component, source, num_tokens):
                self._fairness.note_migrated(request)
                draft.reserve(component.instances)
                draft.migrate(request.request_id, source, target, num_moved)
                return True
        return False

    def _commit(self, component: Component, batches: dict[InstanceId, list[str]]) -> None:
        sub_batches = [SubBatch(master, tuple(names)) for master, names in batches.items() if names]
        group = Group.of(self._holders(component).union([batch.master for batch in sub_batches]))
        self._draft.decode(group, sub_batches)
        self._fairness.note_decoded(component.requests)

    def _holders(self, component: Component) -> set[InstanceId]:
        """Instances with keys of the group's requests; who has joined for its computing or its pages may have none."""
        if len(component.instances) == 1:
            return component.instances
        return {instance for request in component.requests for instance, _ in request.kv}
