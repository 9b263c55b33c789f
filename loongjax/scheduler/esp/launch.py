"""Steps 3 and 4 of the paper for a choice: which of its requests run together, and where their keys stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.explain import Decision, Sink
from loongjax.scheduler.esp.newcomers import Newcomers
from loongjax.scheduler.esp.outlook import Outlook, step_s
from loongjax.scheduler.esp.sparing import Sparing
from loongjax.scheduler.esp.splitter import Splitter
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tipping import put_in_order
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.placement import Shelf, keys_on, place_keys
from loongjax.scheduler.request_view import WaitingView

MIN_STEPS = 3
"""Steps of a decode that must fit into a wait for it to go on: one may be in flight, and one submitted behind it."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What became of a choice."""

    places: list[int]
    """Requests whose prefill starts now, by their places in the window."""
    coming: set[int]
    """Those that start when more of its instances are idle, which were kept for them, or right after what starts."""


def launch(
    draft: Draft,
    outlook: Outlook,
    choice: Choice,
    window: Window,
    times: Times,
    *,
    newcomers: Newcomers,
    growth_tokens: int,
    splits: SplitMemory,
    explain: Sink | None,
) -> Launch:
    """Splits the choice into batches, starts those whose instances are idle, and holds the idle instances of others.

    Where memory is short, each paused decode group keeps to the requests that it was paused for: neighbours in order of
    length seldom fill the room of all groups, and equation 5 would put them on several groups together.

    Of a batch, the requests that weigh most start, which are the shortest, up to its tipping point; the others come
    next. The paper runs a batch as a whole, so a short prompt that meets a long one where one instance is free would
    take as long. Shortest first is what its own objective asks for then: it is least if requests follow each other in
    descending order of weight over time.

    Args:
        draft: takes what starts.
        outlook: when instances should be free.
        choice: requests and instances.
        window: where the requests are.
        times: predictions.
        newcomers: for whom an instance may be spared.
        growth_tokens: room to leave for each request.
        splits: the last one.
        explain: is given each batch that starts.
    """
    instances = sorted(choice.instances, key=lambda instance: (-draft.room(instance), instance))
    splitter = Splitter(draft, window, times, splits)
    is_apart = len(choice.parts) > 1 and _is_memory_short(draft, choice, window)
    batches = [
        batch
        for places, chosen in (choice.parts if is_apart else [(choice.places, instances)])
        for batch in splitter.split(places, sorted(chosen, key=instances.index))
    ]
    started: list[int] = []
    coming: set[int] = set()
    sparing = Sparing(draft, outlook, choice, window, times, newcomers=newcomers, explain=explain)
    taken = [instance for _, group in batches for instance in group]
    vacant = sparing.spareable(taken) if batches and not is_apart else []
    # What one prefill would take of a batch matters where it starts, and to those who compare.
    ordered = put_in_order(batches, choice, window, times, starting=set(choice.instances) if vacant else draft.idle)
    if vacant:
        decided = sparing.decide(ordered, vacant, splitter)
        if decided is None:
            draft.reserve(choice.instances)
            return Launch([], set(choice.places))
        ordered = decided
    for batch in ordered:
        group = batch.group
        if not draft.idle.issuperset(group):
            _hold(draft, outlook, choice, group, times)
            coming.update(batch.places)
            continue
        kept = batch.starting if choice.is_cut else _whole(draft, group, batch.starting, window)
        if not kept:
            continue
        start(draft, group, window.views(kept), growth_tokens)
        started += kept
        coming.update(batch.places[batch.num_starting :])
        if explain is not None:
            duration_s, weight = times.batch_of_s(len(group), *window.sums(kept)), window.weight(kept)
            explain(
                Decision(
                    now_s=draft.view.now_s,
                    step="batch",
                    is_taken=True,
                    gain=0.0,
                    cost=duration_s * weight,
                    instances=tuple(sorted(group)),
                    request_ids=tuple([request.request_id for request in window.views(kept)]),
                    terms=(
                        ("prefill_s", duration_s),
                        ("cost_weight", weight),
                        ("num_put_off", float(len(batch.places) - len(kept))),
                    ),
                )
            )
    return Launch(started, coming)


def _is_memory_short(draft: Draft, choice: Choice, window: Window) -> bool:
    """Whether some instance of the choice may not hold all its requests."""
    num_pages = sum([window.pages[place] for place in choice.places])
    return num_pages > min([draft.room(instance) for instance in choice.instances])


def _whole(draft: Draft, group: Sequence[InstanceId], places: list[int], window: Window) -> list[int]:
    """Those of the requests that are not cut, of all that some instance could ever hold whole.

    Keys on two instances tie these together until the request ends, so that all their decodes take each step, and stand
    still for each prefill, together. Room on one of them comes sooner.
    """
    if len(group) == 1:
        return places
    rooms = {instance: draft.room(instance) for instance in group}
    whole: set[int] = set()
    for place in sorted(places, key=window.lens.__getitem__, reverse=True):
        num_pages = window.pages[place]
        if num_pages > draft.shape.num_pages:
            return places
        roomiest = max(group, key=rooms.__getitem__)
        if num_pages <= rooms[roomiest]:
            rooms[roomiest] -= num_pages
            whole.add(place)
    return [place for place in places if place in whole]


def start(draft: Draft, group: Sequence[InstanceId], requests: Sequence[WaitingView], growth_tokens: int) -> None:
    """Puts one prefill into the draft. Its keys stay on the fewest instances that can hold them: scale-down."""
    if len(group) == 1:
        draft.prefill(Group(tuple(group)), keys_on(group[0], requests))
        assert draft.free[group[0]] >= 0, (group, requests)
        return
    page_size = draft.shape.page_size
    num_pages = [-(-request.num_tokens // page_size) for request in requests if request.keeps_kv]
    num_spare = len(num_pages) * draft.shape.num_pages_for(growth_tokens)
    has_room = sum([draft.room(instance) for instance in group]) >= sum(num_pages)
    shelves = [
        Shelf(
            instance,
            draft.room(instance) if has_room else draft.free[instance],
            max(0, draft.view.max_num_seqs - draft.num_newest[instance]),
        )
        for instance in group
    ]
    kept = place_keys(requests, shelves, page_size=page_size, num_spare_pages=num_spare)
    draft.prefill(Group.of(group), kept)


def _hold(draft: Draft, outlook: Outlook, choice: Choice, group: Sequence[InstanceId], times: Times) -> None:
    """Keeps what is idle of a group for it. Decodes that it has to pause go on while the wait for a prefill is long.

    For decodes it never waits longer than they need for a step or two, and then nobody goes on, or they might take
    turns for ever.
    """
    wait_s = max([outlook.until_free_s[instance] for instance in group if instance in draft.prefilling], default=0.0)
    going_on: set[InstanceId] = set()
    for site in choice.sites if wait_s else ():
        if site.requests and draft.idle.issuperset(site.instances) and MIN_STEPS * step_s(site, times) <= wait_s:
            going_on.update(site.instances)
    draft.reserve([instance for instance in group if instance not in going_on])
