"""Prompts in chunks beside the decodes, as in SplitFuse (DeepSpeed-FastGen, arXiv:2401.08671)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.plan import Chunk, Decode, Extend, Plan, Preempt, Prefill, SubBatch
from loongjax.scheduler.baselines.admission import next_batch
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.even_placement import spread_keys
from loongjax.scheduler.baselines.router import Router
from loongjax.scheduler.observation import IterationEnded, Observation
from loongjax.scheduler.view import ClusterView, RunningView, WaitingView

CHUNKED = BatchingConfig(reserves_max_tokens=False, watermark=0.01)
"""Prompts are let in as `prefill-first` does."""


class ChunkedPolicy:
    """Iterations of few tokens: the next one of every request that decodes, and pieces of prompts in what is left.

    Each instance is a replica that knows nothing of the others, and a request has to fit one. Prompts are cut in the
    order of arrival, and nobody is overtaken. While no prompt is there to be cut, iterations are decodes like any
    other. What needs a prefill in one piece gets it, and then those that run get a token before the next.

    If the tokens of decodes or the oldest prompt find no page, the newest request is preempted. Why every request ends:
    the oldest that runs is never preempted, and goes on as soon as those decodes end which leave it no room; if none
    runs, the oldest that waits is let in.

    Args:
        shape: the cluster's.
        chunk_tokens: tokens of an iteration; those of decodes are never left out, be they more.
        config: which prompts are let in.
    """

    def __init__(self, shape: ClusterShape, chunk_tokens: int, config: BatchingConfig = CHUNKED) -> None:
        self._chunk_tokens = chunk_tokens
        self._config = config
        self._router = Router(shape.all_instances)
        self._has_prefilled: frozenset[InstanceId] = frozenset()
        """Instances whose last iteration was a prefill in one piece."""

    def copy(self) -> ChunkedPolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._router = self._router.copy()
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """See `Policy.observe`."""
        for observation in observations:
            if isinstance(observation, IterationEnded):
                instances = frozenset(observation.plan.group.instances)
                is_prefill = isinstance(observation.plan, Prefill)
                self._has_prefilled = self._has_prefilled - instances | (instances if is_prefill else frozenset())

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """See `Policy.plan`."""
        waiting = self._router.route(view)
        plans: list[Plan] = []
        for instance in view.instances:
            if not instance.is_busy:
                residents = [
                    request for request in view.running if request.kv and request.kv[0][0] == instance.instance
                ]
                plans += self._plan_replica(view, instance.instance, waiting[instance.instance], residents)
        return tuple(plans)

    def _plan_replica(
        self, view: ClusterView, instance: InstanceId, waiting: Sequence[WaitingView], running: Sequence[RunningView]
    ) -> tuple[Plan, ...]:
        group = Group((instance,))
        budget = min(self._chunk_tokens, view.max_num_batched_tokens)
        num_free = view.instances[instance].num_free_pages
        oldest_first = sorted(running, key=lambda request: request.order)
        preempted: list[str] = []
        while (chunks := _next_chunks(view.shape, oldest_first, budget, num_free)) is None:
            newest = oldest_first.pop()
            preempted.append(newest.request_id)
            num_free += view.shape.num_pages_for(newest.num_tokens)
        if preempted:
            return (Preempt(tuple(preempted)), _iteration(group, chunks, oldest_first))
        admitted = self._admit(view, group, waiting, oldest_first)
        if admitted and _is_whole(admitted[0]):
            has_prompts = any(request.num_uncomputed_tokens > 1 for request in running)
            if not has_prompts and not (running and instance in self._has_prefilled):
                return (
                    Prefill(group, spread_keys(admitted[:1], {instance: num_free}, page_size=view.shape.page_size)),
                )
        num_left = budget - sum(chunk.num_tokens for chunk in chunks)
        for request in admitted:
            if _is_whole(request) or num_left <= 0:
                break
            chunks.append(Chunk(request.request_id, min(num_left, request.num_tokens)))
            num_left -= chunks[-1].num_tokens
        return (_iteration(group, chunks, oldest_first),) if chunks else ()

    def _admit(
        self, view: ClusterView, group: Group, waiting: Sequence[WaitingView], running: Sequence[RunningView]
    ) -> list[WaitingView]:
        """The first waiting requests whose whole prompts have room beside all that the others have yet to compute."""
        (instance,) = group.instances
        num_reserved = sum(
            _num_pages_to_grow(view.shape, request, request.num_uncomputed_tokens) for request in running
        )
        instances = list(view.instances)
        before = instances[instance]
        instances[instance] = dataclasses.replace(before, num_free_pages=before.num_free_pages - num_reserved)
        later = dataclasses.replace(view, instances=tuple(instances))
        oldest_first = sorted(waiting, key=lambda request: request.order)
        return next_batch(later, group, oldest_first, running, self._config)


def _next_chunks(
    shape: ClusterShape, oldest_first: Sequence[RunningView], budget: int, num_free: int
) -> list[Chunk] | None:
    """A token of each request that decodes, and of the other prompts what `budget` tokens and the free pages leave.

    None: the decodes lack pages, or nothing can go on.
    """
    chunks: list[Chunk] = []
    for request in oldest_first:
        if request.num_uncomputed_tokens == 1:
            num_free -= _num_pages_to_grow(shape, request, 1)
            chunks.append(Chunk(request.request_id, 1))
    if num_free < 0:
        return None
    num_left = budget - len(chunks)
    for request in oldest_first:
        if request.num_uncomputed_tokens > 1:
            num_slots = num_free * shape.page_size + -request.num_tokens % shape.page_size
            num_tokens = min(num_left, num_slots, request.num_uncomputed_tokens)
            if num_tokens <= 0:
                break
            num_left -= num_tokens
            num_free -= _num_pages_to_grow(shape, request, num_tokens)
            chunks.append(Chunk(request.request_id, num_tokens))
    return chunks if chunks or not oldest_first else None


def _iteration(group: Group, chunks: Sequence[Chunk], running: Sequence[RunningView]) -> Decode | Extend:
    """A decode, which the engine can run ahead of, where no prompt is among the chunks."""
    decoding = {request.request_id for request in running if request.num_uncomputed_tokens == 1}
    if all(chunk.request_id in decoding for chunk in chunks):
        (instance,) = group.instances
        return Decode(group, (SubBatch(instance, tuple(chunk.request_id for chunk in chunks)),))
    return Extend(group, tuple(chunks))


def _num_pages_to_grow(shape: ClusterShape, request: RunningView, num_tokens: int) -> int:
    return shape.num_pages_for(request.num_tokens + num_tokens) - shape.num_pages_for(request.num_tokens)


def _is_whole(request: WaitingView) -> bool:
    """Whether a request's tokens have to be computed in one piece, or apart from others."""
    return request.needs_whole_prefill or request.is_suspect
