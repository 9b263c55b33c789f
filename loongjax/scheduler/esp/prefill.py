"""The prefills of one answer: dispatching, allocation, batching and placement, one after the other."""

from __future__ import annotations

from collections.abc import Collection

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.allocation import Allocator
from loongjax.scheduler.esp.arrivals import Arrivals
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.candidates import Candidates
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.dispatch import Dispatcher
from loongjax.scheduler.esp.explain import Decision, Sink
from loongjax.scheduler.esp.groups import GroupMemory
from loongjax.scheduler.esp.launch import launch
from loongjax.scheduler.esp.memory import MemoryAdmission
from loongjax.scheduler.esp.moving import Mover
from loongjax.scheduler.esp.newcomers import Newcomers
from loongjax.scheduler.esp.outlook import Outlook
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.senior import SeniorPlanner, senior_of
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.request_view import WaitingView
from loongjax.scheduler.waiting import Waiting

LEAST_OVERTAKE = 1 / 16
"""What being overtaken counts at least; once, if those who overtake take as long as the request itself."""


class PrefillPlanner:
    """Plans the prefills of one answer, and the migrations that make way for them."""

    def __init__(
        self,
        draft: Draft,
        times: Times,
        *,
        config: EspConfig,
        fairness: Fairness,
        lengths: OutputLengths,
        arrivals: Arrivals,
        candidates: Candidates,
        groups: GroupMemory,
        splits: SplitMemory,
        can_migrate: bool,
        explain: Sink | None,
    ) -> None:
        self._draft = draft
        self._view = draft.view
        self._times = times
        self._config = config
        self._fairness = fairness
        self._lengths = lengths
        self._arrivals = arrivals
        self._candidates = candidates
        self._groups = groups
        self._splits = splits
        self._can_migrate = can_migrate
        self._explain = explain

    def plan(self) -> list[Component]:
        """Puts prefills and migrations into the draft, and holds instances for those that cannot start yet.

        Returns:
            The decode groups there could have been before.
        """
        view, draft = self._view, self._draft
        senior = senior_of(view)
        requests = self._candidates.of(view.waiting)
        if senior is not None and senior is not requests[0]:
            requests = Waiting([senior, *[request for request in requests if request is not senior]])
        first = requests[0]
        is_patient = self._fairness.may_overtake(first)
        window = self._candidates.window_of(requests, view, is_patient=is_patient)
        idle_before = set(draft.idle)
        barred = self._fairness.barred_instances(view.residents)
        outlook = Outlook(draft, self._times, barred, self._lengths, self._groups)
        started, coming = self._optimise(window, outlook)
        must_start = not is_patient or not len(view.residents)
        is_left = 0 not in started and 0 not in coming
        if must_start and is_left and self._force(first, outlook, is_oldest=senior is not None):
            started = [*started, 0]
        self._note(window, started, idle_before - draft.idle)
        return outlook.components

    def _optimise(self, window: Window, outlook: Outlook) -> tuple[list[int], Collection[int]]:
        """Places of requests (whose prefill starts, for which instances are held or keys moved or that come next).

        If the first request was overtaken too often, it is not put off again, nor made to wait for other prefills.
        """
        draft = self._draft
        memory = MemoryAdmission(self._view, window, self._lengths, self._config.admission)
        mover = None
        if self._can_migrate:
            least = self._config.min_tokens_between_migrations
            mover = Mover(
                draft, outlook, self._times, self._fairness, self._lengths, min_tokens_between_migrations=least
            )
        dispatcher = Dispatcher(
            draft,
            outlook,
            window,
            memory,
            self._times,
            config=self._config,
            mover=mover,
            explain=self._explain,
        )
        newcomers = Newcomers(self._arrivals, draft, outlook, self._times)
        choice = dispatcher.dispatch()
        if not choice.places:
            return [], [0] if choice.is_held else ()
        if choice.move is None:
            allocator = Allocator(
                draft,
                outlook,
                window,
                self._times,
                may_wait=window.is_patient,
                mover=mover,
                newcomers=newcomers,
                explain=self._explain,
            )
            choice.move = allocator.allocate(choice)
        if mover is not None and choice.move is not None:
            mover.start(choice.move)
            draft.reserve(choice.instances)
            return [], choice.places
        launched = launch(
            draft,
            outlook,
            choice,
            window,
            self._times,
            newcomers=newcomers,
            growth_tokens=self._config.growth_tokens,
            splits=self._splits,
            explain=self._explain,
        )
        return launched.places, launched.coming

    def _force(self, request: WaitingView, outlook: Outlook, *, is_oldest: bool) -> bool:
        is_started = SeniorPlanner(self._draft, outlook, self._config.growth_tokens).plan(request, is_oldest=is_oldest)
        if self._explain is not None:
            self._explain(
                Decision(
                    now_s=self._view.now_s,
                    step="senior",
                    is_taken=is_started,
                    gain=0.0,
                    cost=0.0,
                    instances=tuple(sorted(self._draft.prefilling)),
                    request_ids=(request.request_id,),
                )
            )
        return is_started

    def _note(self, window: Window, started: list[int], taken: set[InstanceId]) -> None:
        """Remembers who was overtaken and who had to stand still."""
        if not started:
            return
        requests, starting = window.requests, set(started)
        first_left = next((place for place in range(len(window)) if place not in starting), None)
        if first_left is not None:
            order = requests[first_left].order
            later = [place for place in started if requests[place].order > order]
            if later:
                share = self._alone_s(window, later) / self._alone_s(window, [first_left])
                self._fairness.note_overtaken(requests[first_left], min(1.0, max(share, LEAST_OVERTAKE)))
        self._fairness.note_prefilled(window.views(started))
        passed = [request for request in self._draft.residents_of(taken) if not request.is_in_flight]
        self._fairness.note_passed(passed)

    def _alone_s(self, window: Window, places: list[int]) -> float:
        return self._times.batch_of_s(1, *window.sums(places))
