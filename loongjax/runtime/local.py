"""The runtime on this process's devices.

Every group's iterations go through a lane of two threads: one dispatches, one reads back. A program with loops, or with
more kernels than a device's launch queue holds, keeps the thread that dispatches it until it is nearly over: with one
dispatching thread groups would wait for each other. At any moment lanes work on disjoint devices, because the engine
submits an iteration only when its instances are free, or behind the one it continues, in the same lane. So no two
threads ever order programs differently on two devices, which collectives could not bear.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import queue
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, assert_never

import jax
import numpy as np

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.iteration import (
    Completion,
    DecodeIteration,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
    RecoverIteration,
    SampledToken,
)
from loongjax.core.request import Request
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.compilation import compile_calls, was_tried
from loongjax.runtime.exchange import GroupExchange
from loongjax.runtime.group_sampler import GroupSampler
from loongjax.runtime.kv_pool import DeviceKVPool
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import (
    DecodeRows,
    empty_decode,
    empty_prefill,
    pack_awaited,
    pack_decode,
    pack_decode_slots,
    pack_extend,
    pack_prefill,
    pack_prompt_targets,
)
from loongjax.runtime.program_calls import ProgramCalls, ProgramKey
from loongjax.runtime.programs import (
    BY_RANK,
    MIGRATION_BUCKET,
    DecodeState,
    decode_step,
    extend_step,
    head_step,
    migrate_step,
    prefill_step,
    prompt_logprobs_step,
)
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.runtime.readback import PendingPromptLogprobs, PendingTokens
from loongjax.runtime.recompiles import RecompileCounter
from loongjax.runtime.sampled_tokens import SampledTokens
from loongjax.runtime.sampling import SamplerInput

logger = logging.getLogger(__name__)

Readback = Callable[[], tuple[SampledToken, ...]]
"""Waits for an iteration's results and gives them as host values."""


@dataclasses.dataclass
class _DecodeCache:
    """What the devices hold of one group's decode."""

    rows: DecodeRows
    state: DecodeState
    token_ids: jax.Array
    """int32 [n, B]: the next step's input."""
    sampler: GroupSampler
    num_steps: int
    """Steps that the page tables still have room for."""


class LocalRuntime:
    """Implements `loongjax.runtime.protocol.Runtime` on a grid of local devices."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        grid: DeviceGrid,
        weights: ReplicatedState,
        kv_pool: DeviceKVPool,
        exchange: GroupExchange,
        shape: ClusterShape,
        limits: RuntimeLimits,
        buckets: Buckets,
    ) -> None:
        self._spec = spec
        self._grid = grid
        self._weights = weights
        self._kv_pool = kv_pool
        self._exchange = exchange
        self._shape = shape
        self._limits = limits
        self._buckets = buckets
        self._decodes: dict[Group, _DecodeCache] = {}
        self._sampled_tokens = SampledTokens(grid)
        self._broken: set[InstanceId] = set()
        """Instances on which a dispatch has failed: until they recover nothing more is tried there."""
        self._recompiles = RecompileCounter()
        self._ended: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        self._dispatch_lanes = _one_thread_each("loongjax-dispatch", shape.num_instances)
        self._readback_lanes = _one_thread_each("loongjax-readback", shape.num_instances)

    @property
    def spec(self) -> ModelSpec:
        """The model that it runs."""
        return self._spec

    @property
    def shape(self) -> ClusterShape:
        return self._shape

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    @property
    def num_recompiles(self) -> int:
        return self._recompiles.count

    @property
    def num_kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self._spec.num_kv_bytes_per_token

    def compile(self, keys: Sequence[ProgramKey], *, timeout_s: float | None = None) -> set[ProgramKey]:
        """Compiles these in their order, many at a time, while nothing is in flight.

        Args:
            keys: what will be needed.
            timeout_s: after so many seconds nothing more is begun; None: never.

        Returns:
            Those whose turn came. One that cannot be compiled fails again, and says why, when an iteration needs it.
        """
        calls = ProgramCalls(
            spec=self._spec,
            grid=self._grid,
            weights=self._weights,
            kv_pool=self._kv_pool,
            exchange=self._exchange,
            buckets=self._buckets,
        )
        futures = compile_calls(calls, [calls.described(calls.of(key)) for key in keys], timeout_s=timeout_s)
        return {key for key, future in zip(keys, futures, strict=True) if was_tried(future)}

    def now_s(self) -> float:
        return time.monotonic()

    def wake(self) -> None:
        self._ended.put(None)

    def submit(self, iteration: Iteration) -> None:
        self._dispatch_lane(iteration.group).submit(self._dispatch_in_lane, iteration, self.now_s())

    def completions(self, timeout_s: float | None) -> list[Completion]:
        ended: list[Completion] = []
        try:
            item = self._ended.get(timeout=timeout_s) if timeout_s != 0 else self._ended.get_nowait()
            while True:
                if item is not None:
                    ended.append(item)
                item = self._ended.get_nowait()
        except queue.Empty:
            return ended

    def close(self, *, waits: bool = True) -> None:
        for lane in (*self._dispatch_lanes, *self._readback_lanes):
            lane.shutdown(wait=waits, cancel_futures=not waits)
        self._recompiles.close()
        self._decodes.clear()
        self._sampled_tokens.clear()

    def _dispatch_lane(self, group: Group) -> concurrent.futures.Executor:
        """A group's lane is that of its first instance."""
        return self._dispatch_lanes[group.instances[0]]

    def _dispatch_in_lane(self, iteration: Iteration, started_s: float) -> None:
        group = iteration.group
        try:
            if isinstance(iteration, RecoverIteration):
                self._broken.difference_update(group.instances)
            elif not self._broken.isdisjoint(group.instances):
                raise jax.errors.JaxRuntimeError("an iteration before it failed on the same instances")
            with jax.set_mesh(self._grid.mesh(group)):
                readback = self._dispatch(iteration)
        except Exception as error:
            self._broken.update(group.instances)
            _let_go_of_arrays(error)
            readback = _failed(error)
        self._readback_lanes[group.instances[0]].submit(self._collect, iteration, readback, started_s)

    def _dispatch(self, iteration: Iteration) -> Readback:
        match iteration:
            case PrefillIteration():
                return self._prefill(iteration)
            case DecodeIteration():
                return self._decode(iteration)
            case ExtendIteration():
                return self._extend(iteration)
            case MigrateIteration():
                return self._migrate(iteration)
            case RecoverIteration():
                return self._recover(iteration)
            case _:
                assert_never(iteration)

    def _prefill(self, iteration: PrefillIteration) -> Readback:
        group = iteration.group
        packed = pack_prefill(iteration, self._buckets)
        weights = self._weights.view(group)
        peers = self._exchange.peers(group)
        pool, hidden, picked, statuses = prefill_step(
            self._spec, weights, self._kv_pool.view(group), self._put(group, packed.batch), peers
        )
        self._kv_pool.replace(group, pool)

        prompts = None
        if any(item.wants_prompt_logprobs for item in iteration.inputs):
            targets = self._put(group, pack_prompt_targets(iteration, packed))
            scores = prompt_logprobs_step(self._spec, weights, hidden, targets)
            prompts = PendingPromptLogprobs(iteration, packed, scores)
        tokens = None
        if any(packed.sampled):
            num_rows = packed.positions.shape[1]
            logits = head_step(self._spec, weights, picked, num_rows)
            rows = [[_sampler_input(iteration.inputs[i]) for i in indices] for indices in packed.sampled]
            sampler = self._sampler(group, rows, num_rows)
            sampled = sampler.sample(logits, self._put(group, packed.positions))
            tokens, statuses = PendingTokens(_by_row(rows), sampled), sampled.exchange_status
            self._sampled_tokens.keep(group, _by_row(rows), sampled.token_ids)
        check_exchanges = self._exchange.watch(statuses)

        def readback() -> tuple[SampledToken, ...]:
            jax.block_until_ready(hidden)
            check_exchanges()
            by_request = {token.request_id: token for token in tokens.read()} if tokens else {}
            logprobs = prompts.read() if prompts else {}
            return tuple(
                dataclasses.replace(
                    by_request.get(item.request.request_id, SampledToken(item.request.request_id, -1)),
                    prompt_logprobs=logprobs.get(item.request.request_id),
                )
                for item in iteration.inputs
            )

        return readback

    def _decode(self, iteration: DecodeIteration) -> Readback:
        group = iteration.group
        cache = self._decode_cache(iteration)
        slots = self._put(group, pack_decode_slots(iteration, cache.rows))
        pool, state, logits = decode_step(
            self._spec,
            self._weights.view(group),
            self._kv_pool.view(group),
            cache.state,
            cache.token_ids,
            slots,
            self._exchange.peers(group),
        )
        self._kv_pool.replace(group, pool)
        sampled = cache.sampler.sample(logits, state.positions)
        cache.state, cache.token_ids = state, sampled.token_ids
        cache.num_steps -= 1
        self._sampled_tokens.keep(group, cache.rows.by_rank, sampled.token_ids)
        tokens = PendingTokens(cache.rows.by_rank, sampled)
        check_exchanges = self._exchange.watch(sampled.exchange_status)

        def readback() -> tuple[SampledToken, ...]:
            check_exchanges()
            return tokens.read()

        return readback

    def _decode_cache(self, iteration: DecodeIteration) -> _DecodeCache:
        group = iteration.group
        if not iteration.continues:
            return self._begin_decode(iteration)
        cache = self._decodes[group]
        rows = cache.rows.left_in(iteration)
        if rows is not cache.rows or not cache.num_steps:
            # Somebody has left, or the tables are full. The newest tokens and the sampler's counts are the devices'.
            packed = pack_decode(iteration, rows, self._buckets, self._shape.page_size)
            cache.rows, cache.state, cache.num_steps = rows, self._put(group, packed.state), packed.num_steps
        return cache

    def _begin_decode(self, iteration: DecodeIteration) -> _DecodeCache:
        group = iteration.group
        self._forget_decodes(group)  # first: what is put on the devices now may lie where the last one's was
        rows = DecodeRows.of(iteration, self._buckets)
        packed = pack_decode(iteration, rows, self._buckets, self._shape.page_size)
        inputs: list[list[SamplerInput]] = [[] for _ in range(group.dop)]
        for batch in iteration.sub_batches:
            rank = group.rank_of(batch.master)
            inputs[rank] = [SamplerInput(item.request, item.output_token_ids) for item in batch.inputs]
        state, token_ids = self._put(group, (packed.state, packed.token_ids))
        awaited = pack_awaited(iteration, rows)
        if awaited:
            token_ids = self._sampled_tokens.fill_in(group, token_ids, awaited)
        cache = _DecodeCache(
            rows=rows,
            state=state,
            token_ids=token_ids,
            sampler=self._sampler(group, inputs, rows.num_rows),
            num_steps=packed.num_steps,
        )
        self._decodes[group] = cache
        return cache

    def _extend(self, iteration: ExtendIteration) -> Readback:
        group = iteration.group
        packed = pack_extend(iteration, self._buckets)
        batch = self._put(group, packed.batch)
        if packed.awaited:
            token_ids = self._sampled_tokens.fill_in(group, batch.token_ids, packed.awaited)
            batch = batch._replace(token_ids=token_ids)
        weights = self._weights.view(group)
        pool, picked, statuses = extend_step(
            self._spec, weights, self._kv_pool.view(group), batch, self._exchange.peers(group)
        )
        self._kv_pool.replace(group, pool)
        tokens = None
        if packed.sampled:
            num_rows = packed.positions.shape[1]
            logits = head_step(self._spec, weights, picked, num_rows)
            inputs = [iteration.inputs[row] for row in packed.sampled]
            rows = [[SamplerInput(item.request, item.output_token_ids) for item in inputs]]
            sampled = self._sampler(group, rows, num_rows).sample(logits, self._put(group, packed.positions))
            tokens, statuses = PendingTokens(_by_row(rows), sampled), sampled.exchange_status
            self._sampled_tokens.keep(group, _by_row(rows), sampled.token_ids)
        check_exchanges = self._exchange.watch(statuses)

        def readback() -> tuple[SampledToken, ...]:
            jax.block_until_ready(picked)
            check_exchanges()
            return tokens.read() if tokens else ()

        return readback

    def _migrate(self, iteration: MigrateIteration) -> Readback:
        group = iteration.group
        source, target = group.rank_of(iteration.source), group.rank_of(iteration.target)
        moved = None
        for begin in range(0, len(iteration.source_slots), MIGRATION_BUCKET):
            chunk = slice(begin, begin + MIGRATION_BUCKET)
            source_slots = np.zeros((2, MIGRATION_BUCKET), np.int32)
            target_slots = np.full((2, MIGRATION_BUCKET), -1, np.int32)
            num_tokens = len(iteration.source_slots[chunk])
            source_slots[source, :num_tokens] = iteration.source_slots[chunk]
            target_slots[target, :num_tokens] = iteration.target_slots[chunk]
            pool, moved = migrate_step(self._kv_pool.view(group), *self._put(group, (source_slots, target_slots)))
            self._kv_pool.replace(group, pool)

        def readback() -> tuple[SampledToken, ...]:
            jax.block_until_ready(moved)
            return ()

        return readback

    def _recover(self, iteration: RecoverIteration) -> Readback:
        """A decode and a prefill of nothing but padding take every part that others take: weights, pool, collectives,
        exchanges, kernels."""
        group = iteration.group
        self._check_devices(group)
        self._forget_decodes(group)
        self._exchange.reset(group)
        self._kv_pool.renew(group)
        weights, peers, n = self._weights.view(group), self._exchange.peers(group), group.dop
        num_rows = self._buckets.num_rows[0]
        rows = np.zeros((n, num_rows), np.int32), np.full((n, num_rows), -1, np.int32)
        decode = self._put(group, (empty_decode(n, num_rows, self._buckets), *rows))
        pool, _, _ = decode_step(self._spec, weights, self._kv_pool.view(group), *decode, peers)
        self._kv_pool.replace(group, pool)
        batch = self._put(group, empty_prefill(n, self._buckets.num_tokens[0], self._buckets))
        pool, hidden, _, statuses = prefill_step(self._spec, weights, self._kv_pool.view(group), batch, peers)
        self._kv_pool.replace(group, pool)
        check_exchanges = self._exchange.watch(statuses)

        def readback() -> tuple[SampledToken, ...]:
            jax.block_until_ready(hidden)
            check_exchanges()
            return ()

        return readback

    def _check_devices(self, group: Group) -> None:
        """Makes each device take something by itself, so that one that fails is named."""
        for instance in group.instances:
            for device in self._grid.instances[instance]:
                try:
                    touch(device)
                except jax.errors.JaxRuntimeError as error:
                    raise jax.errors.JaxRuntimeError(f"{device} of instance {instance} fails: {error}") from error

    def _sampler(self, group: Group, sub_batches: list[list[SamplerInput]], num_rows: int) -> GroupSampler:
        return GroupSampler(
            sub_batches,
            num_rows=num_rows,
            vocab_size=self._spec.config.padded_vocab_size(self._spec.tp),
            put=lambda tree: self._put(group, tree),
            peers=self._exchange.peers(group),
        )

    def _put(self, group: Group, tree: Any) -> Any:
        """Host arrays [n, ...] on the group's devices."""
        return jax.device_put(tree, self._grid.sharding(group, BY_RANK))

    def _collect(self, iteration: Iteration, readback: Readback, started_s: float) -> None:
        """Runs in a readback lane: waits for the devices."""
        try:
            tokens, failure = readback(), None
        except Exception as error:
            tokens, failure = (), error
        elapsed_s = self.now_s() - started_s
        if failure is None:
            self._ended.put(Completion(iteration.iteration_id, tokens, elapsed_s))
            return
        is_device_error = isinstance(failure, jax.errors.JaxRuntimeError)
        reason = f"{failure}" if is_device_error else f"{type(failure).__name__}: {failure}"
        logger.error(
            "iteration %d on %s failed: %s",
            iteration.iteration_id,
            iteration.group,
            reason,
            exc_info=None if is_device_error else failure,
        )
        self._ended.put(Completion(iteration.iteration_id, (), elapsed_s, reason))

    def _forget_decodes(self, group: Group) -> None:
        """Lets go of what devices hold of decodes that this group's instances took part in."""
        for other in list(self._decodes):
            if not other.isdisjoint(group):
                self._decodes.pop(other, None)


def touch(device: jax.Device) -> None:
    """Has a device take something, and waits for it. Nothing is compiled."""
    jax.block_until_ready(jax.device_put(np.zeros(1, np.int32), device))


def _one_thread_each(name: str, num_lanes: int) -> list[concurrent.futures.ThreadPoolExecutor]:
    return [concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"{name}-{i}") for i in range(num_lanes)]


def _sampler_input(item: PrefillInput) -> SamplerInput:
    """A prefill's request, with what it had generated before it was preempted."""
    return SamplerInput(item.request, item.token_ids[len(item.request.prompt_token_ids) :].tolist())


def _by_row(rows: Sequence[Sequence[SamplerInput]]) -> list[dict[int, Request]]:
    return [dict(enumerate([item.request for item in inputs])) for inputs in rows]


def _let_go_of_arrays(error: BaseException | None) -> None:
    """Empties the frames of an error's traceback: they may hold the pool, and a recovery has no room for a second."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _failed(error: Exception) -> Readback:
    def readback() -> tuple[SampledToken, ...]:
        raise error

    return readback
