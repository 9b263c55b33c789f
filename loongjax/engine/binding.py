"""Plans to iterations: who works with whom becomes pages, slots and token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from loongjax.core.cluster import Group
from loongjax.core.iteration import (
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
)
from loongjax.core.plan import Decode, Extend, Migrate, Prefill
from loongjax.costmodel.iteration_work import work_of, works_of_steps
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.engine.live_request import LiveRequest
from loongjax.kvcache.kv_cache import KVCache
from loongjax.scheduler.view import FlightView


@dataclasses.dataclass(eq=False)
class Flight:
    """An iteration that was submitted and has not completed."""

    iteration: Iteration
    plan: Prefill | Decode | Extend | Migrate | None
    """None for a recovery, which no policy plans."""
    requests: tuple[LiveRequest, ...]
    """In the iteration's order, without those that started again meanwhile."""
    is_void: bool = False
    """Its result no longer counts: an iteration before it, on the same instances, failed."""
    submitted_s: float = 0.0
    """On the engine's clock, in seconds."""
    started_s: float = 0.0
    """When it was submitted, or when the iteration before it on the same group ended if that came later."""
    _view: FlightView | None = None

    @property
    def group(self) -> Group:
        return self.iteration.group

    @functools.cached_property
    def work(self) -> PrefillWork | DecodeWork | None:
        """What it has to do, in the cost model's terms."""
        return work_of(self.iteration)

    @functools.cached_property
    def partial_ids(self) -> frozenset[str]:
        """Those of its requests that get no token by it, since more of their prompts is to be computed."""
        if not isinstance(self.iteration, ExtendIteration):
            return frozenset()
        return frozenset([item.request.request_id for item in self.iteration.inputs if not item.is_sampled])

    def works(self, num_steps: int) -> list[DecodeWork]:
        """What a decode of several steps has to do in the one that it is in, and in those after it."""
        assert isinstance(self.iteration, DecodeIteration), self.iteration
        assert isinstance(self.work, DecodeWork), self.work
        return works_of_steps(self.iteration, self.work, num_steps)

    def pass_steps(self, num_steps: int, ended_s: float) -> None:
        """Notes that a decode has done so many of its steps by that time, and is in the next one."""
        self.started_s = ended_s
        self.work = self.works(num_steps + 1)[-1]

    def view(self) -> FlightView:
        """The same until something about it changes: a policy sees every flight whenever it is asked."""
        view = self._view
        if view is None or view.started_s != self.started_s or view.work is not self.work:
            view = FlightView(plan=self.plan, group=self.group, work=self.work, started_s=self.started_s)
            self._view = view
        return view


def bind(
    plan: Prefill | Decode | Extend | Migrate,
    *,
    iteration_id: int,
    live: Mapping[str, LiveRequest],
    kv_cache: KVCache,
    continues: bool,
) -> Flight:
    """Takes the pages that the plan needs, and names everything that a runtime needs to execute it.

    Args:
        plan: keeps the contract of `Policy.plan`, so that the pages are there.
        iteration_id: the iteration's.
        live: every live request, by id.
        kv_cache: accounts for the pages.
        continues: see `DecodeIteration.continues`.
    """
    match plan:
        case Prefill():
            requests = tuple(live[planned.request_id] for planned in plan.requests)
            iteration = _bind_prefill(plan, iteration_id, requests, kv_cache)
        case Decode():
            requests = tuple(live[request_id] for request_id in plan.request_ids)
            iteration = _bind_decode(plan, iteration_id, live, kv_cache, continues)
        case Extend():
            requests = tuple(live[request_id] for request_id in plan.request_ids)
            iteration = _bind_extend(plan, iteration_id, requests, kv_cache)
        case Migrate():
            requests = (live[plan.request_id],)
            source_slots, target_slots = kv_cache.migrate(plan.request_id, plan.source, plan.target, plan.num_tokens)
            iteration = MigrateIteration(iteration_id, plan.source, plan.target, source_slots, target_slots)
    return Flight(iteration, plan, requests)


def _bind_prefill(
    plan: Prefill, iteration_id: int, requests: tuple[LiveRequest, ...], kv_cache: KVCache
) -> PrefillIteration:
    return PrefillIteration(
        iteration_id,
        plan.group,
        tuple(
            PrefillInput(
                live.request,
                np.array((*live.request.prompt_token_ids, *live.output_token_ids), np.int32),
                kv_cache.keep(live.request_id, planned.kept),
                live.wants_prompt_logprobs,
            )
            for live, planned in zip(requests, plan.requests, strict=True)
        ),
    )


def _bind_decode(
    plan: Decode, iteration_id: int, live: Mapping[str, LiveRequest], kv_cache: KVCache, continues: bool
) -> DecodeIteration:
    sub_batches = []
    for sub_batch in plan.sub_batches:
        inputs = []
        for request_id in sub_batch.request_ids:
            position = kv_cache.num_tokens(request_id)
            slot = kv_cache.append(request_id, sub_batch.master)
            inputs.append(
                DecodeInput(
                    live[request_id].request,
                    () if continues else tuple(live[request_id].output_token_ids),
                    position,
                    slot,
                    kv_cache.tables(request_id),
                    is_awaited=not continues and position == live[request_id].num_tokens,
                )
            )
        sub_batches.append(DecodeSubBatch(sub_batch.master, tuple(inputs)))
    return DecodeIteration(iteration_id, plan.group, tuple(sub_batches), continues)


def _bind_extend(
    plan: Extend, iteration_id: int, requests: tuple[LiveRequest, ...], kv_cache: KVCache
) -> ExtendIteration:
    (instance,) = plan.group.instances
    inputs = []
    for live, chunk in zip(requests, plan.chunks, strict=True):
        assert not live.needs_whole_prefill, live.request_id
        position = kv_cache.num_tokens(live.request_id) if live.request_id in kv_cache else 0
        slots = kv_cache.extend(live.request_id, instance, chunk.num_tokens)
        (table,) = kv_cache.tables(live.request_id)
        end = position + chunk.num_tokens
        token_ids = np.zeros(chunk.num_tokens, np.int32)
        token_ids[: live.num_tokens - position] = live.tokens_between(position, end)
        inputs.append(
            ExtendInput(
                live.request,
                token_ids,
                position,
                slots,
                table,
                tuple(live.output_token_ids),
                is_sampled=end >= live.num_tokens,
                is_awaited=end > live.num_tokens,
            )
        )
    return ExtendIteration(iteration_id, plan.group, tuple(inputs))
