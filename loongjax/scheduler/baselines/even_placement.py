"""Keys spread over a whole group: nobody scales down."""

from __future__ import annotations

from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
from loongjax.core.plan import PrefillRequest, TokenInterval
from loongjax.scheduler.request_view import WaitingView


def spread_keys(
    requests: Sequence[WaitingView], free_pages: dict[InstanceId, int], *, page_size: int
) -> tuple[PrefillRequest, ...]:
    """Places the keys of a batch so that what is left free is as even as can be.

    Args:
        requests: the batch; those that keep no keys get no place.
        free_pages: of each instance of the group, and together enough. The pages given are taken from them. A request's
            last tokens lie on the first of these instances that keeps any of it, so that one master can follow.
        page_size: tokens of a page; every cut is a multiple of it.
    """
    placed = []
    for request in requests:
        intervals: list[TokenInterval] = []
        if request.keeps_kv:
            shares = _even_shares(free_pages, -(-request.num_tokens // page_size))
            begin = 0
            for instance in reversed(free_pages):
                if shares[instance]:
                    free_pages[instance] -= shares[instance]
                    end = min(request.num_tokens, begin + shares[instance] * page_size)
                    intervals.append(TokenInterval(instance, begin, end))
                    begin = end
        placed.append(PrefillRequest(request.request_id, tuple(intervals)))
    return tuple(placed)


def _even_shares(free_pages: dict[InstanceId, int], num_pages: int) -> dict[InstanceId, int]:
    """How many pages each instance gives: the fullest may give none, all others are left with equally many, or one
    more."""
    emptiest = sorted(free_pages, key=lambda instance: -free_pages[instance])
    shares = dict.fromkeys(free_pages, 0)
    num_free = 0
    for count, instance in enumerate(emptiest, start=1):
        num_free += free_pages[instance]
        # The last `num_above` of these are left with one page more.
        level, num_above = divmod(num_free - num_pages, count)
        if level >= (free_pages[emptiest[count]] if count < len(emptiest) else 0):
            for place, giver in enumerate(emptiest[:count]):
                shares[giver] = free_pages[giver] - level - (place >= count - num_above)
            return shares
    raise AssertionError(f"{num_pages} pages of {free_pages}")
