"""Which waiting requests a fixed group prefills next: the first in line, as memory allows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from loongjax.core.cluster import ClusterShape, Group
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView


def next_batch(
    view: ClusterView,
    group: Group,
    waiting: Sequence[WaitingView],
    running: Sequence[RunningView],
    config: BatchingConfig,
) -> list[WaitingView]:
    """The first waiting requests, as many as fit into one prefill and into memory; nobody is overtaken.

    Args:
        view: the cluster, in which the group is idle.
        group: has room for any one of the waiting requests while nothing runs.
        waiting: in the order in which they are served.
        running: requests that hold pages of the group; while there are none, the first waiting one is always let in.
        config: the rule for memory, and whether the last prompt may fit in part.
    """
    num_tokens_left = group.dop * view.max_num_batched_tokens
    num_pages = group.dop * view.shape.num_pages
    num_free = sum(view.instances[instance].num_free_pages for instance in group.instances)
    num_growing = len(running)
    batch: list[WaitingView] = []
    for request in waiting:
        least_tokens = 1 if config.cuts_prompts else request.num_tokens
        is_suspicious = bool(batch) and (request.is_suspect or batch[0].is_suspect)
        if num_tokens_left < least_tokens or len(batch) == view.max_num_seqs or is_suspicious:
            break
        num_tokens_left -= request.num_tokens
        if request.keeps_kv:
            num_free -= view.shape.num_pages_for(request.num_tokens)
            num_growing += 1
            if num_free < (config.watermark * num_pages if num_growing > 1 else 0) or num_growing > view.max_num_seqs:
                break
        batch.append(request)
    return _that_can_grow(view.shape, group.dop, batch, running) if config.reserves_max_tokens else batch


def _that_can_grow(
    shape: ClusterShape, dop: int, batch: list[WaitingView], running: Sequence[RunningView]
) -> list[WaitingView]:
    """The longest beginning of the batch with which everybody can grow to its limit; never less than a first one that
    nobody runs beside."""

    def overflows(count: int) -> bool:
        growing = [*running, *(request for request in batch[:count] if request.keeps_kv)]
        if len(growing) < 2 and not running:
            return False
        return peak_pages([_growth(shape, request) for request in growing], dop, shape) > dop * shape.num_pages

    # More requests never take less.
    return batch[: bisect.bisect_left(range(1, len(batch) + 1), True, key=overflows)]


def _growth(shape: ClusterShape, request: WaitingView | RunningView) -> tuple[int, int]:
    """Pages that a request's keys take once it is prefilled, and keys that it may add to them."""
    return shape.num_pages_for(request.num_tokens), max(0, request.max_total_tokens - 1 - request.num_tokens)


def peak_pages(growth: Sequence[tuple[int, int]], dop: int, shape: ClusterShape) -> int:
    """Most pages that requests take at once if each grows to its limit, all by a token a step.

    The peak comes just before some request ends: with the requests in the order of what they have left, longest first,
    it is the most, over k, of what the first k hold and k times what the k-th has left. A request may have a page that
    is not full on each instance of its group.

    Args:
        growth: pages held and tokens still to come, of each request.
        dop: instances that a request's keys may be spread over.
        shape: the cluster's.
    """
    longest_first = sorted(growth, key=lambda request: -request[1])
    held = np.cumsum([pages + dop - 1 for pages, _ in longest_first])
    more = np.array([shape.num_pages_for(tokens) for _, tokens in longest_first])
    return int(np.max(held + np.arange(1, len(more) + 1) * more))
