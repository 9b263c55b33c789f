"""Jumps: in a simulation, a decode in flight may stand for many steps, while nobody could interfere.

Nobody could as long as no request waits, the decode's own requests go on and have pages to grow into, and there is
nobody that might join them or whom they might join: no instance has become idle, and no other request that runs has
been left out of what is in flight. What the policy would say between two steps is not assumed but rehearsed, at the end
of the first step and before the last: a copy is asked, on the cluster as it will be then. An answer that is the same at
both ends is taken to be the same everywhere. In between keys only grow, but how many steps are expected does not only
shrink: it rises where an output becomes longer than most that have ended. So a policy that would move keys in between,
and no more at the end, is not noticed.

Whenever one of these conditions fails, all jumps end with the step that they are in.

Of a jump's tokens only the time of the last is told. So nobody's first token is among them: a decode gives it to a
request whose prompt was computed in chunks up to its last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from loongjax.core.cluster import InstanceId
from loongjax.core.iteration import Completion
from loongjax.core.plan import Decode
from loongjax.engine.binding import Flight
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import JumpingRuntime
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.view import ClusterView

MAX_STEPS = 4096
"""A jump's length, so that nothing is computed far ahead in vain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Whom a decode in flight might want, or who might want it, once a step is over."""

    idle: frozenset[InstanceId]
    """Instances that do nothing."""
    left: frozenset[str]
    """Requests that run but are not in flight."""

    def are_quieter_than(self, before: Surroundings) -> bool:
        """Whether nothing here could change a plan that was made there: nobody more, and those left as they were, since
        any of them may have stood in the way of another.
        """
        return self.idle <= before.idle and (not self.left or self.left == before.left)


class Jumps:
    """The decodes in flight that stand for many steps, and what must not change meanwhile."""

    def __init__(self, runtime: JumpingRuntime) -> None:
        self._runtime = runtime
        self._iteration_ids: set[int] = set()
        self._surroundings = Surroundings(idle=frozenset(), left=frozenset())
        """What was there whenever a jump was decided."""

    def __contains__(self, flight: Flight) -> bool:
        return flight.iteration.iteration_id in self._iteration_ids

    def hold(self, surroundings: Surroundings) -> bool:
        """Whether jumps go on among these, if no request waits."""
        return not self._iteration_ids or surroundings.are_quieter_than(self._surroundings)

    def start(self, flight: Flight, num_steps: int, surroundings: Surroundings) -> None:
        """Lets a decode stand for so many steps, the one it is in included, while there is nothing else around it."""
        if num_steps > 1:
            self._surroundings = surroundings
            self._iteration_ids.add(flight.iteration.iteration_id)
            self._runtime.prolong(flight.iteration.iteration_id, num_steps)

    def end(self, flight: Flight) -> None:
        """Notes that a decode is over."""
        self._iteration_ids.discard(flight.iteration.iteration_id)

    def catch_up(self, *, stop: bool) -> list[Completion]:
        """What they have done by now; with `stop`, each ends with the step that it is in."""
        if not self._iteration_ids:
            return []
        if stop:
            self._iteration_ids.clear()
        return self._runtime.catch_up(stop=stop)


def longest_jump(flight: Flight, kv_cache: KVCache, would_repeat: Callable[[int], bool]) -> int:
    """Steps that a decode may stand for, the one it is in included: 1 if it may not jump.

    Args:
        flight: the decode, of which no step but the one it is in has slots.
        kv_cache: accounts for the pages.
        would_repeat: whether the policy would plan the same decode again, and nothing else, after so many steps.
    """
    if any(live.has_ended or not live.output_token_ids for live in flight.requests):
        return 1
    num_steps = min(MAX_STEPS, 1 + min(live.num_tokens_left for live in flight.requests))
    if num_steps < 2 or not would_repeat(1):
        return 1
    while num_steps > 2 and not (_has_pages(flight, kv_cache, num_steps) and would_repeat(num_steps - 1)):
        num_steps //= 2
    return num_steps if _has_pages(flight, kv_cache, num_steps) else 1


def foresee(view: ClusterView, decode: Decode, num_tokens: int) -> ClusterView:
    """A view in which every request of the decode has generated so many tokens more, all on its master."""
    names = set(decode.request_ids)
    num_pages = dict.fromkeys(decode.group.instances, 0)
    news: dict[str, RunningView | None] = {}
    for instance in decode.group.instances:
        for request in view.residents.local[instance].newest:
            if request.request_id in names:
                *others, (master, num_held) = request.kv
                grown = num_held + num_tokens
                num_pages[master] += view.shape.num_pages_for(grown) - view.shape.num_pages_for(num_held)
                news[request.request_id] = request._replace(
                    num_tokens=request.num_tokens + num_tokens,
                    num_output_tokens=request.num_output_tokens + num_tokens,
                    kv=(*others, (master, grown)),
                )
    instances = list(view.instances)
    for instance in decode.group.instances:
        before = instances[instance]
        num_free = before.num_free_pages - num_pages[instance]
        instances[instance] = dataclasses.replace(before, num_free_pages=num_free)
    residents = view.residents.after(news, decode.group.instances)
    return dataclasses.replace(view, residents=residents, instances=tuple(instances))


def _has_pages(flight: Flight, kv_cache: KVCache, num_steps: int) -> bool:
    """Whether the masters have pages for all steps; those of the first are taken."""
    assert isinstance(flight.plan, Decode), flight.plan
    shape = kv_cache.shape
    for batch in flight.plan.sub_batches:
        num_pages = 0
        for request_id in batch.request_ids:
            num_held = dict(kv_cache.local_lens(request_id))[batch.master]
            num_pages += shape.num_pages_for(num_held + num_steps - 1) - shape.num_pages_for(num_held)
        if num_pages > kv_cache.free_pages(batch.master):
            return False
    return True
