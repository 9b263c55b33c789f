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
from loongjax.scheduler.baselines.line import Line
from loongjax.scheduler.baselines.router import Router
from loongjax.scheduler.observation import IterationEnded, Observation
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView

CHUNKED = BatchingConfig(reserves_max_tokens=False, watermark=0.01, cuts_prompts=True)
"""Prompts are let in as `prefill-first` does, however long they are."""


class ChunkedPolicy:
    """Iterations of few tokens: the next one of every request that decodes, and pieces of prompts in what is left.

    Each instance is a replica that knows nothing of the others, and a request has to fit one's pool. Requests are let
    in by priority and then by age, and who is first in line is not overtaken. Prompts that are let in are cut in the
    order of arrival. While no prompt is there to be cut, iterations are decodes like any other. What needs a prefill in
    one piece gets it, and a suspect's prompt is cut with nobody beside it. Both wait until no other prompt is in part,
    let nobody in meanwhile, and take turns with the decodes.

    If the tokens of decodes or the oldest prompt find no page, the newest request is preempted. Why every request ends:
    the oldest that runs is never preempted, and goes on as soon as those decodes end which leave it no room; if none
    runs, the first in line is let in, which the oldest becomes after a while (`Line`).

    Args:
        shape: the cluster's.
        chunk_tokens: tokens of an iteration; those of decodes are never left out, be they more.
        config: which prompts are let in.
    """

    def __init__(self, shape: ClusterShape, chunk_tokens: int, config: BatchingConfig = CHUNKED) -> None:
        self._chunk_tokens = chunk_tokens
        self._config = config
        self._router = Router(shape.all_instances)
        self._lines = [Line() for _ in shape.all_instances]
        self._went_alone: frozenset[InstanceId] = frozenset()
        """Instances whose last iteration computed a prompt, or a chunk of one, with nobody beside it."""

    def copy(self) -> ChunkedPolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._router = self._router.copy()
        other._lines = [line.copy() for line in self._lines]
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """See `Policy.observe`."""
        for observation in observations:
            if isinstance(observation, IterationEnded):
                plan = observation.plan
                instances = frozenset(plan.group.instances)
                is_alone = isinstance(plan, Prefill) or (isinstance(plan, Extend) and len(plan.chunks) == 1)
                self._went_alone = self._went_alone - instances | (instances if is_alone else frozenset())

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """See `Policy.plan`."""
        waiting = self._router.route(view)
        plans: list[Plan] = []
        for instance in view.instances:
            if not instance.is_busy:
                residents = view.residents.local[instance.instance].requests
                plans += self._plan_replica(view, instance.instance, waiting[instance.instance], residents)
        return tuple(plans)

    def _plan_replica(
        self, view: ClusterView, instance: InstanceId, waiting: Sequence[WaitingView], running: Sequence[RunningView]
    ) -> tuple[Plan, ...]:
        group = Group((instance,))
        budget = min(self._chunk_tokens, view.max_num_batched_tokens)
        num_free = view.instances[instance].num_free_pages
        may_go_alone = instance not in self._went_alone
        oldest_first = sorted(running, key=lambda request: request.order)
        preempted: list[str] = []
        while (chunks := _next_chunks(view.shape, oldest_first, budget, num_free, may_go_alone)) is None:
            newest = oldest_first.pop()
            preempted.append(newest.request_id)
            num_free += view.shape.num_pages_for(newest.num_tokens)
        if preempted:
            return (Preempt(tuple(preempted)), _iteration(group, chunks, oldest_first))
        if any(request.is_suspect for request in running):
            return (_iteration(group, chunks, oldest_first),)
        admitted = self._admit(view, group, waiting, oldest_first)
        if admitted and _goes_alone(admitted[0]):
            has_prompts = not all(_is_decoding(request) for request in running)
            if not has_prompts and (may_go_alone or not running):
                first = admitted[0]
                self._lines[instance].note_let_in(waiting, [first])
                if first.needs_whole_prefill:
                    kept = spread_keys([first], {instance: num_free}, page_size=view.shape.page_size)
                    return (Prefill(group, kept),)
                return (Extend(group, (Chunk(first.request_id, min(budget, first.num_tokens)),)),)
        num_left = budget - sum(chunk.num_tokens for chunk in chunks)
        let_in: list[WaitingView] = []
        for request in admitted:
            if _goes_alone(request) or num_left <= 0:
                break
            let_in.append(request)
            chunks.append(Chunk(request.request_id, min(num_left, request.num_tokens)))
            num_left -= chunks[-1].num_tokens
        if let_in:
            self._lines[instance].note_let_in(waiting, let_in)
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
        return next_batch(later, group, self._lines[instance].in_order(waiting), running, self._config)


def _next_chunks(
    shape: ClusterShape, oldest_first: Sequence[RunningView], budget: int, num_free: int, may_go_alone: bool
) -> list[Chunk] | None:
    """A token of each request that decodes, and of the other prompts what `budget` tokens and the free pages leave.

    Where there is a suspect, it is the only prompt, and either it goes on or the decodes do.

    None: the decodes lack pages, or nothing can go on.
    """
    decoding = [request for request in oldest_first if _is_decoding(request)]
    prompts = [request for request in oldest_first if not _is_decoding(request)]
    if prompts and prompts[0].is_suspect:
        if may_go_alone or not decoding:
            chunks = _cut(shape, prompts, budget, num_free)
            if chunks:
                return chunks
        prompts = []
    num_free -= sum(_num_pages_to_grow(shape, request, 1) for request in decoding)
    if num_free < 0:
        return None
    chunks = [Chunk(request.request_id, 1) for request in decoding]
    chunks += _cut(shape, prompts, budget - len(chunks), num_free)
    return chunks if chunks or not oldest_first else None


def _cut(shape: ClusterShape, prompts: Sequence[RunningView], num_left: int, num_free: int) -> list[Chunk]:
    """The next chunks of these prompts, in this order, of so many tokens and pages together."""
    chunks: list[Chunk] = []
    for request in prompts:
        num_slots = num_free * shape.page_size + -request.num_tokens % shape.page_size
        num_tokens = min(num_left, num_slots, request.num_uncomputed_tokens)
        if num_tokens <= 0:
            break
        num_left -= num_tokens
        num_free -= _num_pages_to_grow(shape, request, num_tokens)
        chunks.append(Chunk(request.request_id, num_tokens))
    return chunks


def _iteration(group: Group, chunks: Sequence[Chunk], running: Sequence[RunningView]) -> Decode | Extend:
    """A decode, which the engine can run ahead of, where no prompt is among the chunks."""
    decoding = {request.request_id for request in running if _is_decoding(request)}
    if all(chunk.request_id in decoding for chunk in chunks):
        (instance,) = group.instances
        return Decode(group, (SubBatch(instance, tuple(chunk.request_id for chunk in chunks)),))
    return Extend(group, tuple(chunks))


def _num_pages_to_grow(shape: ClusterShape, request: RunningView, num_tokens: int) -> int:
    return shape.num_pages_for(request.num_tokens + num_tokens) - shape.num_pages_for(request.num_tokens)


def _is_decoding(request: RunningView) -> bool:
    """Whether it needs its next token and no more. A suspect's last chunk, be it of one token, is a prompt's."""
    return request.num_uncomputed_tokens == 1 and not request.is_suspect


def _goes_alone(request: WaitingView) -> bool:
    """Whether nobody is computed beside a request's prompt."""
    return request.needs_whole_prefill or request.is_suspect
