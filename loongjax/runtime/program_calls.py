"""The device programs of a group, called with nothing but padding: what can be compiled before it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.core.cluster import Group
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.exchange import GroupExchange
from loongjax.runtime.kv_pool import DeviceKVPool
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import empty_decode, empty_extend, empty_prefill, sample_capacity
from loongjax.runtime.programs import (
    BY_RANK,
    LOGITS_SPEC,
    MIGRATION_BUCKET,
    await_step,
    decode_step,
    extend_step,
    head_step,
    migrate_step,
    prefill_step,
    prompt_logprobs_step,
)
from loongjax.runtime.sampling import TIERS, SamplerInput, SamplerVariant, build_counts, build_rows, sample_step
from loongjax.runtime.sampling.counts import HISTORY_CAPACITIES, empty_history
from loongjax.runtime.sampling.program import count_step, zero_counts
from loongjax.runtime.sampling.rows import EDITS_PER_ROW


class _Pool:
    """Where a program takes the group's view of the pool, and hands it back first."""


_POOL = _Pool()


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted program, and what it is called with on a group."""

    group: Group
    program: Callable[..., Any]
    arguments: tuple[Any, ...]
    """The pool is stood for."""


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """A program of greedy requests, on the group of the first `dop` instances."""

    name: Literal["prefill", "head", "sample", "decode", "await", "extend", "migrate"]
    dop: int
    size: int = 0
    """Bucket: tokens on a rank of a prefill or extend, rows on a rank of others; 0 of a migration."""
    num_requests: int = 0
    """Bucket of an extend's requests, or of the rows on a rank of which an await takes tokens; 0 of others."""


class ProgramCalls:
    """Makes calls, and runs them."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        grid: DeviceGrid,
        weights: ReplicatedState,
        kv_pool: DeviceKVPool,
        exchange: GroupExchange,
        buckets: Buckets,
        max_extend_tokens: int | None = None,
    ) -> None:
        """Calls of everything there is, and of extends up to so many tokens; None: of no extends."""
        self._spec = spec
        self._grid = grid
        self._weights = weights
        self._kv_pool = kv_pool
        self._exchange = exchange
        self._buckets = buckets
        self._max_extend_tokens = max_extend_tokens

    def all_of(self, group: Group) -> Iterator[Call]:
        """Whatever requests may ask for."""
        for num_tokens in self._buckets.num_tokens:
            yield self._prefill(group, num_tokens)
            yield self._prompt_logprobs(group, num_tokens)
        for rows in self._buckets.num_rows:
            if rows <= sample_capacity(group.dop, self._buckets):
                yield self._head(group, rows)
            yield self._decode(group, rows)
            yield from self._awaits(group, rows)
            for tier in TIERS:
                yield from self._samples(group, rows, tier)
            yield from self._counts(group, rows)
        if group.dop == 1 and self._max_extend_tokens is not None:
            yield from self._extends(group, self._max_extend_tokens)
        if group.dop == 2:
            yield self._migrate(group)

    def of(self, key: ProgramKey) -> Call:
        """One of them."""
        group = Group.of(range(key.dop))
        match key.name:
            case "prefill":
                return self._prefill(group, key.size)
            case "head":
                return self._head(group, key.size)
            case "sample":
                [call] = self._samples(group, key.size, TIERS[0])
                return call
            case "decode":
                return self._decode(group, key.size)
            case "await":
                return self._await(group, key.size, key.num_requests)
            case "extend":
                return self._extend(group, key.size, key.num_requests)
            case "migrate":
                return self._migrate(group)

    def described(self, call: Call) -> Call:
        """The call with its arrays only described, so that those of many need not exist at the same time."""

        def describe(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        return dataclasses.replace(call, arguments=jax.tree.map(describe, self._with_pool(call)))

    def mesh(self, call: Call) -> jax.sharding.Mesh:
        """In whose context a call is lowered and compiled.

        Compiled outside, its results have shardings of another type, and what takes them is compiled again.
        """
        return self._grid.mesh(call.group)

    def run(self, call: Call) -> Any:
        """Runs a call that is not described, and returns what shows that it is over."""
        with jax.set_mesh(self._grid.mesh(call.group)):
            result = call.program(*self._with_pool(call))
        if _POOL not in call.arguments:
            return result
        pool, *rest = result
        self._kv_pool.replace(call.group, pool)
        return rest

    def _with_pool(self, call: Call) -> tuple[Any, ...]:
        return tuple(self._kv_pool.view(call.group) if argument is _POOL else argument for argument in call.arguments)

    def _prefill(self, group: Group, num_tokens: int) -> Call:
        batch = self._put(group, empty_prefill(group.dop, num_tokens, self._buckets))
        peers = self._exchange.peers(group)
        return Call(group, prefill_step, (self._spec, self._weights.view(group), _POOL, batch, peers))

    def _prompt_logprobs(self, group: Group, num_tokens: int) -> Call:
        hidden = self._hidden(group, num_tokens)
        targets = self._put(group, np.full((group.dop, num_tokens), -1, np.int32))
        return Call(group, prompt_logprobs_step, (self._spec, self._weights.view(group), hidden, targets))

    def _head(self, group: Group, num_rows: int) -> Call:
        picked = self._hidden(group, sample_capacity(group.dop, self._buckets))
        return Call(group, head_step, (self._spec, self._weights.view(group), picked, num_rows))

    def _decode(self, group: Group, num_rows: int) -> Call:
        n = group.dop
        state = self._put(group, empty_decode(n, num_rows, self._buckets))
        token_ids = self._put(group, np.zeros((n, num_rows), np.int32))
        slots = self._put(group, np.full((n, num_rows), -1, np.int32))
        peers = self._exchange.peers(group)
        weights = self._weights.view(group)
        return Call(group, decode_step, (self._spec, weights, _POOL, state, token_ids, slots, peers))

    def _awaits(self, group: Group, num_rows: int) -> Iterator[Call]:
        for num_sampled in self._buckets.num_rows:
            if num_sampled <= sample_capacity(group.dop, self._buckets):
                yield self._await(group, num_rows, num_sampled)

    def _await(self, group: Group, num_rows: int, num_sampled: int) -> Call:
        rows = np.zeros((group.dop, num_rows), np.int32)
        sampled = np.zeros((group.dop, num_sampled), np.int32)
        return Call(group, await_step, self._put(group, (rows, np.full_like(rows, -1), sampled)))

    def _extends(self, group: Group, max_extend_tokens: int) -> Iterator[Call]:
        """What follows an extend is what follows a prefill."""
        sizes = self._buckets.num_tokens
        largest = fit(min(max_extend_tokens, sizes[-1]), sizes)
        for num_tokens in sizes[: sizes.index(largest) + 1]:
            for num_rows in self._buckets.num_rows:
                yield self._extend(group, num_tokens, num_rows)
                yield self._await(group, num_tokens, num_rows)

    def _extend(self, group: Group, num_tokens: int, num_rows: int) -> Call:
        batch = self._put(group, empty_extend(num_tokens, num_rows, self._buckets))
        peers = self._exchange.peers(group)
        return Call(group, extend_step, (self._spec, self._weights.view(group), _POOL, batch, peers))

    def _migrate(self, group: Group) -> Call:
        source_slots = self._put(group, np.zeros((2, MIGRATION_BUCKET), np.int32))
        target_slots = self._put(group, np.full((2, MIGRATION_BUCKET), -1, np.int32))
        return Call(group, migrate_step, (_POOL, source_slots, target_slots))

    def _samples(self, group: Group, num_rows: int, tier: SamplerVariant) -> Iterator[Call]:
        """One call, or two for a tier with logit edits, which have two capacities."""
        vocab_size = self._spec.config.padded_vocab_size(self._spec.tp)
        logits = self._zeros(group, (group.dop, num_rows, vocab_size), jnp.dtype(jnp.float32), LOGITS_SPEC)
        positions = self._put(group, np.zeros((group.dop, num_rows), np.int32))
        peers = self._exchange.peers(group)
        for sub_batches in ([[]], [[_request_of_many_edits(num_rows)]]):
            if sub_batches != [[]] and not tier.has_edits:
                continue
            padded = [*sub_batches, *([[]] * (group.dop - 1))]
            _, rows = build_rows(padded, num_rows, tier)
            counts = None
            if tier.has_penalties:
                with jax.set_mesh(self._grid.mesh(group)):
                    counts = build_counts(padded, num_rows, vocab_size)
            yield Call(group, sample_step, (tier, logits, positions, self._put(group, rows), counts, peers))

    def _counts(self, group: Group, num_rows: int) -> Iterator[Call]:
        vocab_size = self._spec.config.padded_vocab_size(self._spec.tp)
        for capacity in HISTORY_CAPACITIES:
            with jax.set_mesh(self._grid.mesh(group)):
                counts = zero_counts(num_rows, vocab_size)
            yield Call(group, count_step, (counts, empty_history(group.dop, num_rows, capacity)))

    def _hidden(self, group: Group, num_rows: int) -> jax.Array:
        shape = (group.dop, num_rows, self._spec.config.hidden_size)
        return self._zeros(group, shape, jnp.dtype(self._spec.dtype))

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
