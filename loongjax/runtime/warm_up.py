"""Builds every executable that the step loop may need, before it starts.

Each program is compiled once a bucket and group size, many at a time, into the persistent cache, and then loaded for
every set of instances by running it on padding.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from loongjax.core.cluster import Group
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.exchange import GroupExchange
from loongjax.runtime.kv_pool import DeviceKVPool
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import empty_decode, empty_prefill, sample_capacity
from loongjax.runtime.programs import (
    BY_RANK,
    LOGITS_SPEC,
    MIGRATION_BUCKET,
    decode_step,
    head_step,
    migrate_step,
    prefill_step,
    prompt_logprobs_step,
)
from loongjax.runtime.sampling import TIERS, SamplerInput, build_counts, build_rows, sample_step
from loongjax.runtime.sampling.counts import HISTORY_CAPACITIES, empty_history
from loongjax.runtime.sampling.program import count_step, zero_counts
from loongjax.runtime.sampling.rows import EDITS_PER_ROW

logger = logging.getLogger(__name__)

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A jitted program and its arguments, the pool standing for itself."""

MAX_COMPILE_THREADS = 16


class _Pool:
    """Where a program takes the group's view of the pool, and hands it back first."""


_POOL = _Pool()


class WarmUp:
    """Runs every program on nothing but padding."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        grid: DeviceGrid,
        weights: ReplicatedState,
        kv_pool: DeviceKVPool,
        exchange: GroupExchange,
        buckets: Buckets,
    ) -> None:
        self._spec = spec
        self._grid = grid
        self._weights = weights
        self._kv_pool = kv_pool
        self._exchange = exchange
        self._buckets = buckets
        self._lowering = threading.Lock()

    def run(self) -> int:
        """Warms up every group of instances. Returns how many calls that took."""
        started = time.monotonic()
        everyone = range(self._grid.num_instances)
        sizes = [Group.of(range(dop)) for dop in range(1, self._grid.num_instances + 1)]
        self._compile([(group, self._described(group, call)) for group in sizes for call in self._calls(group)])
        groups = [Group.of(chosen) for dop in everyone for chosen in itertools.combinations(everyone, dop + 1)]
        num_calls = 0
        for group in tqdm(groups, desc="Warming up", unit="group", disable=None):
            results = [self._execute(group, call) for call in self._calls(group)]
            jax.block_until_ready(results)
            num_calls += len(results)
        logger.info("warmed up %d groups, %d calls, in %.1f s", len(groups), num_calls, time.monotonic() - started)
        return num_calls

    def _compile(self, jobs: list[tuple[Group, Call]]) -> None:
        """Fills the persistent cache from many threads: XLA compiles outside of Python's lock."""
        num_threads = min(MAX_COMPILE_THREADS, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="loongjax-compile") as threads:
            compiled = [threads.submit(self._lower_and_compile, *job) for job in jobs]
            for future in tqdm(
                concurrent.futures.as_completed(compiled), total=len(compiled), desc="Compiling", disable=None
            ):
                future.result()

    def _described(self, group: Group, call: Call) -> Call:
        """The call with its arrays only described, so that those of all jobs need not exist at the same time."""

        def describe(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        program, arguments = call
        return program, jax.tree.map(describe, self._with_pool(group, arguments))

    def _lower_and_compile(self, group: Group, call: Call) -> None:
        program, arguments = call
        with jax.set_mesh(self._grid.mesh(group)):
            with self._lowering:  # holds Python's lock anyway, and Triton compiles its kernels in it
                lowered = program.lower(*arguments)  # type: ignore[attr-defined]
            lowered.compile()

    def _execute(self, group: Group, call: Call) -> Any:
        """Runs a call, and returns what shows that it is over."""
        program, arguments = call
        with jax.set_mesh(self._grid.mesh(group)):
            result = program(*self._with_pool(group, arguments))
        if _POOL not in arguments:
            return result
        pool, *rest = result
        self._kv_pool.replace(group, pool)
        return rest

    def _with_pool(self, group: Group, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self._kv_pool.view(group) if argument is _POOL else argument for argument in arguments)

    def _calls(self, group: Group) -> Iterator[Call]:
        spec, weights, n = self._spec, self._weights.view(group), group.dop
        hidden_size, dtype = spec.config.hidden_size, jnp.dtype(spec.dtype)
        num_rows = self._buckets.num_rows
        peers = self._exchange.peers(group)
        for num_tokens in self._buckets.num_tokens:
            batch = self._put(group, empty_prefill(n, num_tokens, self._buckets))
            yield prefill_step, (spec, weights, _POOL, batch, peers)
            hidden = self._zeros(group, (n, num_tokens, hidden_size), dtype)
            yield (
                prompt_logprobs_step,
                (spec, weights, hidden, self._put(group, np.full((n, num_tokens), -1, np.int32))),
            )
        picked = self._zeros(group, (n, sample_capacity(n, self._buckets), hidden_size), dtype)
        for rows in num_rows:
            if rows <= picked.shape[1]:
                yield head_step, (spec, weights, picked, rows)
            state = self._put(group, empty_decode(n, rows, self._buckets))
            token_ids = self._put(group, np.zeros((n, rows), np.int32))
            slots = self._put(group, np.full((n, rows), -1, np.int32))
            yield decode_step, (spec, weights, _POOL, state, token_ids, slots, peers)
            yield from self._sampler_calls(group, rows)
        if n == 2:
            source_slots = self._put(group, np.zeros((2, MIGRATION_BUCKET), np.int32))
            target_slots = self._put(group, np.full((2, MIGRATION_BUCKET), -1, np.int32))
            yield migrate_step, (_POOL, source_slots, target_slots)

    def _sampler_calls(self, group: Group, num_rows: int) -> Iterator[Call]:
        vocab_size = self._spec.config.padded_vocab_size(self._spec.tp)
        shape = (group.dop, num_rows, vocab_size)
        logits = self._zeros(group, shape, jnp.dtype(jnp.float32), LOGITS_SPEC)
        positions = self._put(group, np.zeros((group.dop, num_rows), np.int32))
        peers = self._exchange.peers(group)
        for tier in TIERS:
            for sub_batches in ([[]], [[_request_of_many_edits(num_rows)]]):
                if sub_batches != [[]] and not tier.has_edits:
                    continue
                padded = [*sub_batches, *([[]] * (group.dop - 1))]
                _, rows = build_rows(padded, num_rows, tier)
                counts = None
                if tier.has_penalties:
                    with jax.set_mesh(self._grid.mesh(group)):
                        counts = build_counts(padded, num_rows, vocab_size)
                yield sample_step, (tier, logits, positions, self._put(group, rows), counts, peers)
        for capacity in HISTORY_CAPACITIES:
            with jax.set_mesh(self._grid.mesh(group)):
                counts = zero_counts(num_rows, vocab_size)
            yield count_step, (counts, empty_history(group.dop, num_rows, capacity))

    def _put(self, group: Group, tree: Any) -> Any:
        return jax.device_put(tree, self._grid.sharding(group, BY_RANK))

    def _zeros(
        self, group: Group, shape: tuple[int, ...], dtype: jnp.dtype, cut: jax.sharding.PartitionSpec = BY_RANK
    ) -> jax.Array:
        return jnp.zeros(shape, dtype, device=self._grid.sharding(group, cut))


def _request_of_many_edits(num_rows: int) -> SamplerInput:
    """One whose logit edits need the larger capacity of a batch."""
    bias = dict.fromkeys(range(EDITS_PER_ROW[0] * num_rows + 1), 0.0)
    sampling = SamplingParams(logit_bias=bias)
    return SamplerInput(
        Request(request_id="warm-up", prompt_token_ids=(0,), sampling=sampling, max_tokens=1, seed=0), []
    )
