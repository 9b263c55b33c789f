"""Step 1 of the paper, dispatching: which waiting requests are prefilled next, and which decodes are paused for them.

Requests are taken in the order of weight over length, those first that gain most for the time they take, as far as
instances, pages and the memory admission reach; one that may be overtaken no more goes before all others. Instances
without keys cost nothing. A decode group B with instances G is paused for further requests R' if (equations 1 and 2)

    gain = sum over R' of w_r x (wait without them - wait with them)
    cost = sum over B of w_b x (wait with them + T(R'))

where w is what a second costs (`objective`) and T the prefill's predicted time on G. The paper asks this of all R' at
once, so that one long prompt among them keeps all from starting; here R' is the beginning of the order that gains most.
The paper's wait is until B ends; here it is the least of that, of the end of what was taken before, and of the end of
prefills in flight that leave instances without keys. R' has room on G alone, since keys on two decode groups tie them
together; who has room on none of them alone, see `tying`. A pause that pays is put off while others may come to share
it:

    until sum over R' of w_r x (wait so far) >= A x loss of B

where A is what each prefill takes, however small it is, and what a lost second costs is `outlook.loss_weight`. If
weight comes at a steady rate, what the first ones wait then costs as much as the pauses do, which together is least;
however it comes, it is at most twice the least (the rule for acknowledging packets of Dooly, Goldman and Scott, 2001).
Where pausing does not pay and nothing else can start, one instance of G may be freed instead by moving the keys it
holds, for (weight of R' + weight of B) x the migration's time, and for the longer steps that follow (`moving`). Who may
be overtaken no more gets the cheapest of pausing, moving, and waiting for a prefill to end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision, Sink, Step, Terms
from loongjax.scheduler.esp.memory import MemoryAdmission
from loongjax.scheduler.esp.moving import Move, Mover
from loongjax.scheduler.esp.outlook import Outlook, Site, loss_weight, step_s
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tying import cost_of_tie, tie_for_room, tied
from loongjax.scheduler.esp.window import Window

MAX_REFUSALS = 2
"""Decode groups that may turn out not worth pausing before the rest, which cost more, is not considered."""


@dataclasses.dataclass
class Choice:
    """Requests to prefill and instances to do it on, which later steps add to."""

    places: list[int]
    """Of the requests in the window."""
    instances: list[InstanceId]
    sites: list[Site]
    """Decode groups that are paused for it, and others' instances that it waits for."""
    parts: list[tuple[list[int], list[InstanceId]]] = dataclasses.field(default_factory=list)
    """Its requests by the instances that were chosen for them, where they have room without the others."""
    move: Move | None = None
    """Keys to be moved before any of it can start."""
    is_cut: bool = False
    """Whether it is one request that some instance could hold whole, cut over decode groups for want of room."""
    is_held: bool = False
    """Whether the first request, which nobody may overtake any more, waits for prefills in flight to end."""
    ready_s: float = 0.0
    """In how many seconds all its instances should be idle."""

    @property
    def dop(self) -> int:
        return len(self.instances)

    def loss_weight(self, group: Collection[InstanceId], times: Times) -> float:
        """What a lost second costs on these instances, of which some are decode groups that are paused."""
        if not self.sites:
            return 0.0
        members = set(group)
        return sum([loss_weight(site, times) for site in self.sites if not members.isdisjoint(site.instances)], 0.0)

    def add(self, places: Sequence[int], instances: Sequence[InstanceId]) -> None:
        """Further requests, for instances of its own."""
        self.places.extend(places)
        self.parts.append((list(places), list(instances)))

    def take(self, site: Site) -> None:
        self.sites.append(site)
        self.ready_s = max(self.ready_s, site.ready_s)
        self.instances.extend(site.instances)


class Dispatcher:
    """Makes a `Choice` from a window of waiting requests."""

    def __init__(
        self,
        draft: Draft,
        outlook: Outlook,
        window: Window,
        memory: MemoryAdmission,
        times: Times,
        *,
        config: EspConfig,
        mover: Mover | None,
        explain: Sink | None,
    ) -> None:
        self._draft = draft
        self._outlook = outlook
        self._window = window
        self._memory = memory
        self._times = times
        self._config = config
        self._mover = mover
        self._explain = explain

    def dispatch(self) -> Choice:
        """Fills the vacant instances, then pauses decodes one group after the other where the gain exceeds the cost."""
        choice = Choice([], [], [])
        if self._outlook.vacant and (places := self.pick(self._outlook.vacant, [])):
            choice.add(places, self._outlook.vacant)
            choice.instances = list(self._outlook.vacant)
        most = min(self._config.max_picked, len(self._window))
        if len(choice.places) >= most:
            return choice
        num_refusals = 0
        for site in self._outlook.by_pause_cost():
            if num_refusals >= MAX_REFUSALS or len(choice.places) >= most:
                break
            more = self.pick(site.instances, choice.places)
            if more and not choice.places and not self._window.is_patient:
                self._make_way(choice, site)
                break
            num_worth = self._num_worth_pausing(choice, site, more) if more else 0
            if num_worth and not self._is_put_off(site, more[:num_worth]):
                choice.take(site)
                choice.add(more[:num_worth], site.instances)
            elif not num_worth and not choice.places and self._moves_away(choice, site, more):
                break
            else:
                num_refusals += 1
        if not choice.places and not choice.is_held:
            self._tie(choice)
        return choice

    def pick(self, instances: Sequence[InstanceId], taken: Sequence[int]) -> list[int]:
        """Further requests, by their places, that fit on these instances, while those taken are prefilled elsewhere:
        most weight for the length first.

        A few that do not fit are passed over, but not the first of the window once it was overtaken enough.
        """
        window, draft, memory = self._window, self._draft, self._memory
        num_pages = sum([draft.room(i) for i in instances])
        if num_pages < window.sizes.least_pages or not window.sizes.suspects.isdisjoint(taken):
            return []
        max_num_seqs = draft.view.max_num_seqs
        num_tokens = len(instances) * draft.view.max_num_batched_tokens
        num_seats = sum([max(0, max_num_seqs - draft.num_newest[i]) for i in instances])
        num_seats = min(num_seats, self._config.max_picked - len(taken))
        picked: list[int] = []
        if not taken:
            # Mostly all that fit are the first ones.
            num_first = max(0, min(window.num_first_within(num_tokens, num_pages), num_seats))
            if num_first:
                picked = window.order[: min(num_first, window.num_first_of_most(memory.num_free))]
        company = [*taken, *picked]
        if len(picked) >= num_seats or len(company) >= len(window):
            return picked
        num_tokens -= sum([window.lens[place] for place in picked])
        num_pages -= sum([window.pages[place] for place in picked])
        num_seats -= len(picked)
        already, num_skipped = set(company), 0
        for place in window.order:
            request = window[place]
            if num_seats <= 0:
                break
            if place in already:
                continue
            if (
                window.lens[place] <= num_tokens
                and window.pages[place] <= num_pages
                and not (request.is_suspect and company)
                and memory.fits([*company, place])
            ):
                company.append(place)
                num_tokens -= window.lens[place]
                num_pages -= window.pages[place]
                num_seats -= 1
                if request.is_suspect:
                    break
            else:
                num_skipped += 1
                if place == 0 and not window.is_patient:
                    break
                if num_skipped > self._config.max_lookahead:
                    break
        return company[len(taken) :]

    def _make_way(self, choice: Choice, site: Site) -> None:
        """Finds instances for the first request whatever it gains: those of the group, or one that is freed by moving
        keys; or lets it wait for prefills to end, where that costs least. Nobody else starts meanwhile.
        """
        duration_s = self._times.batch_s(len(site.instances), self._window.views([0]))
        pause_cost = site.pause_weight * duration_s
        weight = self._window.weights[0]
        if self._mover is not None:
            longest_s = pause_cost / (weight + site.pause_weight)
            move = self._mover.move_from(site, (), longest_s, is_forced=True)
            if move is not None and self.pick([move.source], []):
                migration_s, slowdown = move.seconds, self._mover.slowdown(site, move)
                cost = (weight + site.pause_weight) * migration_s + slowdown
                if self._judge(
                    "migrate",
                    site,
                    [0],
                    pause_cost,
                    cost,
                    lambda: (
                        ("prefill_s", duration_s),
                        ("migration_s", migration_s),
                        ("slowdown_weight_s", slowdown),
                    ),
                ):
                    choice.places, choice.move = [0], move
                    return
        prefills_s = [self._outlook.until_free_s[instance] for instance in self._draft.prefilling]
        wait_s = min(prefills_s, default=math.inf)
        if wait_s < math.inf and self._judge(
            "wait", site, [0], pause_cost, weight * wait_s, lambda: (("wait_s", wait_s), ("prefill_s", duration_s))
        ):
            choice.is_held = True
            return
        choice.places = [0]
        choice.take(site)

    def _num_worth_pausing(self, choice: Choice, site: Site, more: Sequence[int]) -> int:
        """Equations 1 and 2, of the first of these requests, of the first two, and so on: the best number."""
        window = self._window
        wait_s = max(choice.ready_s, site.ready_s)
        num_tokens, squared_lens, weights = window.growing(more)
        durations_s = self._times.batches_of_s(len(site.instances), num_tokens, squared_lens)
        otherwise_s = self._wait_otherwise_s(choice, site, more)
        gains = weights * max(0.0, otherwise_s - wait_s)
        costs = site.pause_weight * (wait_s - site.ready_s + durations_s)
        best = int((gains - costs).argmax())
        is_taken = self._judge(
            "dispatch",
            site,
            more[: best + 1],
            float(gains[best]),
            float(costs[best]),
            lambda: (
                ("wait_s", wait_s),
                ("wait_otherwise_s", otherwise_s),
                ("group_ready_s", site.ready_s),
                ("prefill_s", float(durations_s[best])),
            ),
        )
        return best + 1 if is_taken else 0

    def _is_put_off(self, site: Site, more: Sequence[int]) -> bool:
        """Whether the group decodes on, so that a pause for these requests, which pays, is for more of them later."""
        window, now_s = self._window, self._draft.view.now_s
        weights, arrivals_s = window.weights, window.sizes.arrivals_s
        waited = sum([weights[place] * (now_s - arrivals_s[place]) for place in more])
        fixed_s = self._times.fixed_prefill_s(len(site.instances))
        lost_weight = loss_weight(site, self._times)
        return self._judge(
            "put-off",
            site,
            more,
            lost_weight * fixed_s,
            waited,
            lambda: (
                ("fixed_s", fixed_s),
                ("loss_weight", lost_weight),
                ("waited_s", waited / window.weight(more)),
            ),
        )

    def _moves_away(self, choice: Choice, site: Site, more: Sequence[int]) -> bool:
        """Chooses those of the requests that fit on one instance of the group, and the move that frees it, if that
        pays.
        """
        if self._mover is None or not more:
            return False
        otherwise_s = self._wait_otherwise_s(choice, site, more)
        # Longer than this, and the cost exceeds the gain.
        weight = self._window.weight(more)
        longest_s = weight * max(0.0, otherwise_s - site.ready_s) / (weight + site.pause_weight)
        move = self._mover.move_from(site, (), longest_s)
        more = [] if move is None else self.pick([move.source], [])
        if move is None or not more:
            return False
        wait_s = site.ready_s + move.seconds
        gain = self._window.weight(more) * max(0.0, otherwise_s - wait_s)
        cost = (self._window.weight(more) + site.pause_weight) * move.seconds
        slowdown = self._mover.slowdown(site, move) if gain > cost else 0.0
        if not self._judge(
            "migrate",
            site,
            more,
            gain,
            cost + slowdown,
            lambda: (
                ("wait_s", wait_s),
                ("wait_otherwise_s", otherwise_s),
                ("migration_s", move.seconds),
                ("slowdown_weight_s", slowdown),
            ),
        ):
            return False
        choice.places, choice.move = more, move
        return True

    def _tie(self, choice: Choice) -> None:
        """Chooses the first request and decode groups that have room for it together, with instances without keys if
        there are any, if to wait until one of them has ended, or a prefill has left room, costs more than the pause and
        the tie.
        """
        window, draft, outlook = self._window, self._draft, self._outlook
        vacant = [Site(instances=tuple(sorted(outlook.vacant)))] if outlook.vacant else []
        sites = tie_for_room(draft, [*vacant, *outlook.decodes], window.pages[0])
        if not sites:
            return
        site = tied(sites)
        if (
            window.lens[0] > len(site.instances) * draft.view.max_num_batched_tokens
            or all(draft.num_newest[instance] >= draft.view.max_num_seqs for instance in site.instances)
            or not self._memory.fits([0])
        ):
            return
        now_s, duration_s = draft.view.now_s, self._times.batch_of_s(len(site.instances), *window.sums([0]))
        otherwise_s = min([self._until_over_s(part) for part in sites if part.requests])
        otherwise_s = min(otherwise_s, self._until_emptied_s(window.pages[0], window.lens[0]))
        gain = window.weights[0] * max(0.0, otherwise_s - site.ready_s)
        tie_cost = cost_of_tie(sites, self._times, now_s) if gain > site.pause_weight * duration_s else 0.0
        cost = site.pause_weight * duration_s + tie_cost
        if self._judge(
            "tie",
            site,
            [0],
            gain,
            cost,
            lambda: (
                ("wait_s", site.ready_s),
                ("wait_otherwise_s", otherwise_s),
                ("prefill_s", duration_s),
                ("tie_weight_s", tie_cost),
            ),
        ):
            for part in sites:
                choice.take(part)
            choice.add([0], site.instances)
            choice.is_cut = window.pages[0] <= draft.shape.num_pages

    def _judge(
        self,
        step: Step,
        site: Site,
        more: Sequence[int],
        gain: float,
        cost: float,
        terms: Callable[[], Terms],
    ) -> bool:
        """Whether the gain exceeds the cost. The terms are asked for only where somebody wants to know them."""
        if self._explain is not None:
            self._explain(
                Decision(
                    now_s=self._draft.view.now_s,
                    step=step,
                    is_taken=gain > cost,
                    gain=gain,
                    cost=cost,
                    instances=site.instances,
                    request_ids=tuple([request.request_id for request in self._window.views(more)]),
                    terms=(
                        *terms(),
                        ("pause_weight", site.pause_weight),
                        ("gain_weight", self._window.weight(more)),
                    ),
                )
            )
        return gain > cost

    def _wait_otherwise_s(self, choice: Choice, site: Site, more: Sequence[int]) -> float:
        """In how many seconds the first of these requests could begin if this group were not paused."""
        first = more[0]
        num_pages, num_tokens = self._window.pages[first], self._window.lens[first]
        waits = [self._until_over_s(site)]
        if choice.places:
            num_free = sum([self._draft.room(instance) for instance in choice.instances])
            num_free -= sum([self._window.pages[place] for place in choice.places])
            if num_free >= num_pages and num_tokens <= choice.dop * self._draft.view.max_num_batched_tokens:
                duration_s = self._times.batch_of_s(choice.dop, *self._window.sums(choice.places))
                waits.append(choice.ready_s + duration_s)
        waits.append(self._until_emptied_s(num_pages, num_tokens))
        return min(waits)

    def _until_emptied_s(self, num_pages: int, num_tokens: int) -> float:
        """In how many seconds prefills in flight leave instances without keys that could take so much; inf: never."""
        for emptied in self._outlook.emptied:
            num_free = sum([self._draft.room(instance) for instance in emptied.instances])
            capacity = len(emptied.instances) * self._draft.view.max_num_batched_tokens
            if num_free >= num_pages and num_tokens <= capacity:
                return emptied.ready_s
        return math.inf

    def _until_over_s(self, site: Site) -> float:
        """In how many seconds the last decode of the group is expected to end: the paper's AvgLat_d - exec_time."""
        assert site.facts is not None, site
        return site.ready_s + site.facts.num_steps_left * step_s(site, self._times)
