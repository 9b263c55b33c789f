"""Proactive scale-down: on which instances of its group a prefill leaves its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
from loongjax.core.plan import PrefillRequest, TokenInterval
from loongjax.scheduler.request_view import WaitingView


@dataclasses.dataclass
class Shelf:
    """An instance that may keep keys."""

    instance: InstanceId
    num_pages: int
    """Pages that it may give."""
    num_seats: int
    """Requests that it may still take as a master."""


def place_keys(
    requests: Sequence[WaitingView], shelves: Sequence[Shelf], *, page_size: int, num_spare_pages: int = 0
) -> tuple[PrefillRequest, ...]:
    """Places the keys of a batch on the fewest instances that can hold them, the emptiest ones.

    A request is cut only if no chosen instance can hold all of it; its last piece then lies where most room is left.

    Args:
        requests: the batch; those that keep no keys get no place.
        shelves: the instances of the group, which together have room for the batch.
        page_size: tokens of a page; every cut is a multiple of it.
        num_spare_pages: pages that should be left on the chosen instances, if it can be done, for growth.
    """
    keepers = [request for request in requests if request.keeps_kv]
    num_needed = sum([-(-request.num_tokens // page_size) for request in keepers])
    chosen = _fewest(shelves, num_needed, num_spare_pages, len(keepers)) if keepers else []
    if len(chosen) == 1:
        return keys_on(chosen[0].instance, requests)
    kept: dict[str, tuple[TokenInterval, ...]] = {}
    for request in sorted(keepers, key=lambda request: -request.num_tokens):
        kept[request.request_id] = _place_one(request.num_tokens, chosen, page_size)
    return tuple([PrefillRequest(request.request_id, kept.get(request.request_id, ())) for request in requests])


def keys_on(instance: InstanceId, requests: Sequence[WaitingView]) -> tuple[PrefillRequest, ...]:
    """All keys of a batch on one instance."""
    return tuple(
        [
            PrefillRequest(
                request.request_id, (TokenInterval(instance, 0, request.num_tokens),) if request.keeps_kv else ()
            )
            for request in requests
        ]
    )


def _fewest(shelves: Sequence[Shelf], num_needed: int, num_spare: int, num_requests: int) -> list[Shelf]:
    assert sum([shelf.num_pages for shelf in shelves]) >= num_needed, (shelves, num_needed)
    if len(shelves) == 1:
        return list(shelves)
    emptiest = sorted(shelves, key=lambda shelf: (-shelf.num_pages, -shelf.num_seats, shelf.instance))
    num_pages = num_seats = 0
    for count, shelf in enumerate(emptiest, start=1):
        num_pages += shelf.num_pages
        num_seats += shelf.num_seats
        if num_pages >= num_needed + num_spare and num_seats >= num_requests:
            return emptiest[:count]
    return emptiest


def _place_one(num_tokens: int, shelves: Sequence[Shelf], page_size: int) -> tuple[TokenInterval, ...]:
    num_pages = -(-num_tokens // page_size)
    fitting = [shelf for shelf in shelves if shelf.num_pages >= num_pages]
    if fitting:
        whole = fitting[0]
        if len(fitting) > 1:
            whole = min(fitting, key=lambda shelf: (shelf.num_seats <= 0, -shelf.num_pages, shelf.instance))
        whole.num_pages -= num_pages
        whole.num_seats -= 1
        return (TokenInterval(whole.instance, 0, num_tokens),)
    intervals: list[TokenInterval] = []
    begin = 0
    for shelf in sorted(shelves, key=lambda shelf: (-shelf.num_pages, shelf.instance)):
        end = min(num_tokens, begin + shelf.num_pages * page_size)
        if end > begin:
            shelf.num_pages -= -(-(end - begin) // page_size)
            intervals.append(TokenInterval(shelf.instance, begin, end))
            begin = end
        if begin == num_tokens:
            shelf.num_seats -= 1
            break
    assert begin == num_tokens, (num_tokens, shelves)
    return tuple(intervals)
