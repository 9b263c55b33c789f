"""Step 2 of the paper, elastic allocation: which further instances the chosen requests are worth.

An instance set e is added to the chosen E while (equation 3)

    gain = sum over R of w_r x (seconds until R is done on E - the same on E u e)

is no less than what it takes to free e, the cheapest of

    pausing its decodes:          their weight x the seconds they stand still
    moving their keys (eq. 4):    (weight of R + weight of the decodes) x the time of the migration, after which they
                                  decode elsewhere, in longer steps (`moving`)
    waiting for prefills to end:  the weight of the decodes paused already x the wait, which the gain has in it

From each gain is taken what requests that are still to come lose where e was the last instance that they could start on
(`newcomers`). The paper looks at used slots only, fewest first, and moves keys at a fixed rate; the seconds here all
come from the cost model. Keys are moved to one instance that has room for all of them, and free one instance at a time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.explain import Decision, Sink, Terms
from loongjax.scheduler.esp.moving import Move, Mover
from loongjax.scheduler.esp.newcomers import Newcomers
from loongjax.scheduler.esp.outlook import Outlook, Site
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window

MAX_REFUSALS = 2
"""Sites that may be refused before the rest, which hold more keys, is not asked."""


class _Offer(NamedTuple):
    """One way to have a site."""

    step: Literal["allocate", "migrate", "wait"]
    gain: float
    cost: float
    prefill_s: float
    """With the site, or the instance of it that is freed."""
    newcomers: float = 0.0
    """What requests that are still to come lose, which the gain is less by."""
    move: Move | None = None
    slowdown: float = 0.0
    """What longer steps cost after the move, in seconds x weight."""


class Allocator:
    """Adds instances to a choice.

    Args:
        draft: the cluster.
        outlook: what could be added.
        window: where the requests are.
        times: predictions.
        may_wait: whether the choice may wait for prefills to end.
        mover: finds migrations; None: no keys are moved.
        newcomers: who might find no instance to start on.
        explain: is given each offer.
    """

    def __init__(
        self,
        draft: Draft,
        outlook: Outlook,
        window: Window,
        times: Times,
        *,
        may_wait: bool,
        mover: Mover | None,
        newcomers: Newcomers,
        explain: Sink | None,
    ) -> None:
        self._may_wait = may_wait
        self._draft = draft
        self._outlook = outlook
        self._window = window
        self._times = times
        self._mover = mover
        self._newcomers = newcomers
        self._explain = explain

    def allocate(self, choice: Choice) -> Move | None:
        """Adds what pays to the choice, and says what keys have to be moved first, if any."""
        num_refusals = 0
        weight, sums = self._window.weight(choice.places), self._window.sums(choice.places)
        duration_s = self._times.batch_of_s(choice.dop, *sums)
        for site in self._candidates(choice):
            then_s = self._times.batch_of_s(choice.dop + len(site.instances), *sums)
            offer = self._best_offer(choice, site, weight, sums, duration_s, then_s)
            is_taken = offer.gain > 0.0 and offer.gain >= offer.cost
            if self._explain is not None:
                self._explain(self._decision(choice, site, offer, is_taken, weight, duration_s))
            if not is_taken:
                num_refusals += 1
                if num_refusals >= MAX_REFUSALS:
                    break
            elif offer.move is not None:
                return offer.move
            else:
                choice.take(site)
                duration_s = then_s
        return None

    def _candidates(self, choice: Choice) -> list[Site]:
        """Sites that are not taken: decode groups, those with fewest keys first, then prefills, the soonest first."""
        decodes = [site for site in self._outlook.decodes if site not in choice.sites]
        decodes.sort(key=_num_keys)
        self._outlook.weigh(decodes)
        return [*decodes, *self._outlook.emptied] if self._may_wait else decodes

    def _best_offer(
        self, choice: Choice, site: Site, weight: float, sums: tuple[int, int], duration_s: float, then_s: float
    ) -> _Offer:
        """The choice's requests weigh so much, have so many tokens and squared tokens, and take so long without the
        site and with it.
        """
        begin_s = choice.ready_s
        now_s = begin_s + duration_s
        ready_s = max(begin_s, site.ready_s)
        newcomers = self._loss_of_newcomers(choice, site, now_s, ready_s + then_s)
        gain = weight * (now_s - ready_s - then_s) - newcomers
        if not site.requests:
            return _Offer("wait", gain, _paused_weight(choice) * max(0.0, ready_s - begin_s), then_s, newcomers)
        pause = _Offer("allocate", gain, site.pause_weight * (ready_s - site.ready_s + then_s), then_s, newcomers)
        mover = self._mover
        if gain <= 0.0 or mover is None:
            return pause
        moved_s = then_s if len(site.instances) == 1 else self._times.batch_of_s(choice.dop + 1, *sums)
        moved_gain = weight * (now_s - ready_s - moved_s)
        # Longer than this, and the cost of moving exceeds the gain, or the pause is the better offer anyway.
        longest_s = min(gain, moved_gain - _net_gain(pause)) / (weight + site.pause_weight)
        move = mover.move_from(site, choice.sites, longest_s)
        if move is None:
            return pause
        cost = (weight + site.pause_weight) * move.seconds
        slowdown = mover.slowdown(site, move) if moved_gain > cost else 0.0
        moved = _Offer("migrate", moved_gain, cost + slowdown, moved_s, move=move, slowdown=slowdown)
        return max(pause, moved, key=_net_gain)

    def _loss_of_newcomers(self, choice: Choice, site: Site, now_s: float, then_s: float) -> float:
        """What it costs them if the choice ends in `then_s` seconds on the site too, instead of in `now_s` without."""
        both = [*choice.instances, *site.instances]
        if not self._newcomers.have_to_wait(both):
            return 0.0
        without = self._newcomers.cost(dict.fromkeys(choice.instances, now_s))
        return self._newcomers.cost(dict.fromkeys(both, then_s)) - without

    def _decision(
        self, choice: Choice, site: Site, offer: _Offer, is_taken: bool, weight: float, duration_s: float
    ) -> Decision:
        """For who wants to know. The choice's requests weigh so much, and take so long without the site."""
        terms: Terms = (
            ("gain_weight", weight),
            ("ready_without_s", choice.ready_s),
            ("prefill_without_s", duration_s),
            ("ready_s", max(choice.ready_s, site.ready_s)),
            ("prefill_s", offer.prefill_s),
        )
        if offer.move is None:
            terms += (("newcomers_weight_s", offer.newcomers),)
        if offer.step == "wait":
            terms += (("paused_weight", _paused_weight(choice)),)
        else:
            terms += (("pause_weight", site.pause_weight), ("group_ready_s", site.ready_s))
        if offer.move is not None:
            terms += (("migration_s", offer.move.seconds), ("slowdown_weight_s", offer.slowdown))
        return Decision(
            now_s=self._draft.view.now_s,
            step=offer.step,
            is_taken=is_taken,
            gain=offer.gain,
            cost=offer.cost,
            instances=site.instances,
            request_ids=tuple([request.request_id for request in self._window.views(choice.places)]),
            terms=terms,
        )


def _paused_weight(choice: Choice) -> float:
    """What a second costs those who are paused for the choice already."""
    return sum([taken.pause_weight for taken in choice.sites], 0.0)


def _net_gain(offer: _Offer) -> float:
    return offer.gain - offer.cost


def _num_keys(site: Site) -> tuple[int, tuple[InstanceId, ...]]:
    assert site.facts is not None, site
    return site.facts.requests.num_tokens, site.instances
