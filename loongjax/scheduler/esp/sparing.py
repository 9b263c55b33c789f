"""Whether a launch leaves an instance idle for requests that are still to come.

Where prefills would take all instances for H seconds, the plan is compared with the same one on an instance less:

    gain = lambda / 2 x (H^2 - H'^2)                                         (`newcomers`; H' is 0 if nothing else is)
    cost = sum over R of w_r x (T'(r) - T(r)) + weight of who waits behind them x (end' - end)

where T and T' are the predicted times of the prefills on all instances and on those that remain, and who waits behind
them does so until the first of them ends. The requests of the only instance may wait for another prefill to end
instead, at (their weight + that of who waits behind them) x that time; but not if they have waited enough, and not if
no prefill is in flight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.explain import Decision, Sink, Terms
from loongjax.scheduler.esp.newcomers import Newcomers
from loongjax.scheduler.esp.outlook import Outlook
from loongjax.scheduler.esp.splitter import PlacedBatch, Splitter
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tipping import OrderedBatch, put_in_order
from loongjax.scheduler.esp.window import Window


class Sparing:
    """Compares ways to start a choice.

    Args:
        draft: the cluster.
        outlook: when instances should be free.
        choice: requests and instances.
        window: where the requests are.
        times: predictions.
        newcomers: for whom an instance may be spared.
        explain: is given the comparison.
    """

    def __init__(
        self,
        draft: Draft,
        outlook: Outlook,
        choice: Choice,
        window: Window,
        times: Times,
        *,
        newcomers: Newcomers,
        explain: Sink | None,
    ) -> None:
        self._draft = draft
        self._outlook = outlook
        self._choice = choice
        self._window = window
        self._times = times
        self._newcomers = newcomers
        self._explain = explain

    @functools.cached_property
    def _weight_behind(self) -> float:
        """Of those who wait for the batches' first to end."""
        return sum(self._window.weights) - self._window.weight(self._choice.places)

    def spareable(self, taken: Collection[InstanceId]) -> list[InstanceId]:
        """Instances that could be left idle if batches took these otherwise; none where that is out of question."""
        if not self._newcomers.have_to_wait(taken):
            return []
        paused = {instance for site in self._choice.sites for instance in site.instances}
        return [instance for instance in self._choice.instances if instance not in paused]

    def decide(
        self,
        batches: list[OrderedBatch],
        vacant: Sequence[InstanceId],
        splitter: Splitter,
    ) -> list[OrderedBatch] | None:
        """These batches, those that leave an instance idle, or None: nothing is to start now.

        Args:
            batches: of the choice, on all its instances.
            vacant: those that could be left idle, at least one.
            splitter: found these batches.
        """
        loss = self._newcomers.cost(self._taken(batches))
        if not loss:
            return batches
        if self._choice.dop == 1:
            return None if self._is_held(batches, vacant, loss) else batches
        # Who comes is short and needs little room.
        spared = min(vacant, key=lambda instance: (self._draft.room(instance), instance))
        fewer_instances = [instance for batch in batches for instance in batch.group if instance != spared]
        here = self._cost([batch[:2] for batch in batches], [batch.whole_s for batch in batches])
        least = splitter.least_cost_on_fewer(len(fewer_instances)) - here
        if loss <= least < math.inf:  # mostly, and what exactly it costs takes longer to find out
            self._judge(loss, least, (spared,), lambda: self._terms(batches, None, here, here + least))
            return batches
        others = splitter.split_on_fewer(fewer_instances)
        if not others:
            return batches
        there = self._cost(others, [self._batch_s(batch) for batch in others])
        cost = there - here
        gain, fewer = loss, None
        if cost < loss:  # more than all of that is not to be gained
            fewer = put_in_order(others, self._choice, self._window, self._times, starting=set(self._choice.instances))
            gain -= self._newcomers.cost(self._taken(fewer))
        is_taken = self._judge(gain, max(0.0, cost), (spared,), lambda: self._terms(batches, fewer, here, there))
        return fewer if is_taken and fewer is not None else batches

    def _is_held(self, batches: list[OrderedBatch], vacant: Sequence[InstanceId], loss: float) -> bool:
        wait_s = self._newcomers.wait_elsewhere_s(vacant)
        if not self._window.is_patient or wait_s == math.inf:
            return False
        weight = self._window.weight(self._choice.places)
        return self._judge(
            loss,
            (self._weight_behind + weight) * wait_s,
            vacant,
            lambda: (
                *self._terms_of_gain(batches, None),
                ("gain_weight", weight),
                ("behind_weight", self._weight_behind),
                ("wait_s", wait_s),
            ),
        )

    def _taken(self, batches: list[OrderedBatch]) -> dict[InstanceId, float]:
        """For how many seconds from now each instance will be, by what starts first."""
        until_free_s = self._outlook.until_free_s
        taken: dict[InstanceId, float] = {}
        for batch in batches:
            ready_s = max([until_free_s[instance] for instance in batch.group])
            taken.update(dict.fromkeys(batch.group, ready_s + batch.starting_s))
        return taken

    def _batch_s(self, batch: PlacedBatch) -> float:
        places, group = batch
        return self._times.batch_of_s(len(group), *self._window.sums(places))

    def _cost(self, batches: Sequence[PlacedBatch], seconds: Sequence[float]) -> float:
        """Of these batches, which take so many seconds: what their requests wait, and those behind them."""
        weights = [self._window.weight(places) for places, _ in batches]
        own = sum([weight * duration_s for weight, duration_s in zip(weights, seconds, strict=True)])
        return own + self._weight_behind * min(seconds)

    def _terms(
        self, batches: list[OrderedBatch], fewer: list[OrderedBatch] | None, cost: float, cost_on_fewer: float
    ) -> Terms:
        """Of these batches, and of others on fewer instances, and what both cost."""
        return (
            *self._terms_of_gain(batches, fewer),
            ("prefills_weight_s", cost),
            ("prefills_spared_weight_s", cost_on_fewer),
        )

    def _terms_of_gain(self, batches: list[OrderedBatch], fewer: list[OrderedBatch] | None) -> Terms:
        """For how long newcomers find all instances taken, and with others on fewer, if there are any."""
        return (
            ("arriving_weight_per_s", self._newcomers.weight_per_s),
            ("slower_s", self._newcomers.slower_alone_s),
            ("taken_s", self._newcomers.wait_s(self._taken(batches))),
            ("taken_spared_s", 0.0 if fewer is None else self._newcomers.wait_s(self._taken(fewer))),
        )

    def _judge(self, gain: float, cost: float, spared: Sequence[InstanceId], terms: Callable[[], Terms]) -> bool:
        """Whether the gain exceeds the cost. The terms are asked for only where somebody wants to know them."""
        if self._explain is not None:
            self._explain(
                Decision(
                    now_s=self._draft.view.now_s,
                    step="spare",
                    is_taken=gain > cost,
                    gain=gain,
                    cost=cost,
                    instances=tuple(spared),
                    request_ids=tuple([request.request_id for request in self._window.views(self._choice.places)]),
                    terms=terms(),
                )
            )
        return gain > cost
