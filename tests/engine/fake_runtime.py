"""A runtime without devices, on a virtual clock, that checks every iteration against a model of the devices' memory.

The next token is a hash of the request's whole token sequence (and of its seed), so whatever the engine gets wrong in
its bookkeeping changes the tokens from there on; `expected_tokens` says what they should be.

Memory is a dictionary by instance: slot -> (request, token position). Iterations that share an instance run in order
of submission, so their effect on memory takes place at submission; their results arrive when the virtual clock reaches
their end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable

import numpy as np

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.iteration import (
    Completion,
    DecodeInput,
    DecodeIteration,
    ExtendInput,
    ExtendIteration,
    InstanceTable,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
    RecoverIteration,
    SampledToken,
)
from loongjax.core.request import Request, TokenLogprobs
from loongjax.runtime.protocol import RuntimeLimits

VOCAB_SIZE = 64
EOS = 0

Slots = dict[int, tuple[str, int]]
"""slot -> (request id, token position)"""


def next_token(request: Request, tokens: tuple[int, ...]) -> int:
    """The token after these, prompt included; stop tokens are masked until `min_tokens`, as a sampler does."""
    num_outputs = len(tokens) - len(request.prompt_token_ids)
    for salt in range(1000):
        digest = hashlib.blake2b(repr((request.seed, tokens, salt)).encode(), digest_size=4).digest()
        token = int.from_bytes(digest, "big") % VOCAB_SIZE
        if num_outputs >= request.sampling.min_tokens or token not in request.stop_token_ids:
            return token
    raise AssertionError("every token is masked")


def expected_tokens(request: Request) -> tuple[int, ...]:
    """What the request generates when it is alone and nothing goes wrong."""
    tokens = request.prompt_token_ids
    outputs: list[int] = []
    while len(outputs) < request.max_tokens:
        outputs.append(next_token(request, tokens))
        tokens = (*tokens, outputs[-1])
        if outputs[-1] in request.stop_token_ids:
            break
    return tuple(outputs)


def fake_logprobs(token_id: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.01 * token_id - 0.0001 * position, 1)


@dataclasses.dataclass(frozen=True)
class _Result:
    end_s: float
    completion: Completion


class FakeRuntime:
    """Implements `loongjax.runtime.protocol.Runtime`.

    Args:
        shape: the cluster.
        limits: of iterations.
        duration_s: an iteration's virtual duration, in seconds; inf for one that never ends.
        fails: whether an iteration fails.
        step_s: real seconds that pass before a completion is handed out, to slow real threads down.
    """

    def __init__(
        self,
        shape: ClusterShape,
        limits: RuntimeLimits,
        *,
        duration_s: Callable[[Iteration], float] = lambda iteration: 1.0,
        fails: Callable[[Iteration], bool] = lambda iteration: False,
        step_s: float = 0.0,
    ) -> None:
        self._shape = shape
        self._limits = limits
        self.duration_s = duration_s
        self.fails = fails
        self.step_s = step_s
        self.submitted: list[Iteration] = []
        self.is_closed = False
        self.waits_at_close = False
        self.max_in_flight = 0
        self._clock_s = 0.0
        self._memory: dict[InstanceId, Slots] = {instance: {} for instance in shape.all_instances}
        self._busy_until_s: dict[InstanceId, float] = dict.fromkeys(shape.all_instances, 0.0)
        self._failures: dict[InstanceId, int] = {}
        """Instances that lost their memory and have not recovered -> the iteration that failed."""
        self._reported: set[int] = set()
        """Failed iterations that the engine has been told of."""
        self._decodes: dict[Group, tuple[DecodeIteration, dict[str, tuple[int, ...]]]] = {}
        """The last decode of each group, and each request's tokens after it, the sampled one included."""
        self._last: dict[InstanceId, Iteration] = {}
        """The last iteration of each instance."""
        self._after: dict[int, dict[str, tuple[int, ...]]] = {}
        """By iteration, the tokens of each request for which it sampled one, that one included."""
        self._results: list[_Result] = []
        self._condition = threading.Condition()
        self._is_woken = False

    @property
    def shape(self) -> ClusterShape:
        return self._shape

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    @property
    def num_recompiles(self) -> int:
        return 0

    def now_s(self) -> float:
        return self._clock_s

    def wake(self) -> None:
        with self._condition:
            self._is_woken = True
            self._condition.notify_all()

    def close(self, *, waits: bool = True) -> None:
        self.is_closed = True
        self.waits_at_close = waits

    def submit(self, iteration: Iteration) -> None:
        assert not self.is_closed
        self.submitted.append(iteration)
        instances = iteration.group.instances
        begin_s = max([self._clock_s, *(self._busy_until_s[instance] for instance in instances)])
        end_s = begin_s + self.duration_s(iteration)
        for instance in instances:
            self._busy_until_s[instance] = end_s
        self._results.append(_Result(end_s, self._outcome(iteration, end_s - self._clock_s)))
        self.max_in_flight = max(self.max_in_flight, len(self._results))

    def _outcome(self, iteration: Iteration, elapsed_s: float) -> Completion:
        instances = iteration.group.instances
        failed_ids = {self._failures[instance] for instance in instances if instance in self._failures}
        if isinstance(iteration, RecoverIteration):
            assert failed_ids <= self._reported
            assert failed_ids, "nothing is to be recovered from"
        elif failed_ids:
            assert failed_ids.isdisjoint(self._reported), "the devices have not recovered"
            return Completion(iteration.iteration_id, elapsed_s=elapsed_s, error="its input was lost")
        if self.fails(iteration):
            for instance in instances:
                self._memory[instance].clear()
                self._failures[instance] = iteration.iteration_id
            self._decodes.pop(iteration.group, None)
            return Completion(iteration.iteration_id, elapsed_s=elapsed_s, error="injected failure")
        tokens = self._execute(iteration)
        self._last.update(dict.fromkeys(instances, iteration))
        return Completion(iteration.iteration_id, tokens, elapsed_s)

    def completions(self, timeout_s: float | None) -> list[Completion]:
        with self._condition:
            if not self._results and not self._is_woken and timeout_s != 0:
                self._condition.wait_for(lambda: self._is_woken, timeout_s)
            woken, self._is_woken = self._is_woken, False
            if self._results and timeout_s != 0 and not woken:
                if self.step_s:
                    self._condition.wait_for(lambda: self._is_woken, self.step_s)
                wait_until_s = math.inf if timeout_s is None else self._clock_s + timeout_s
                end_s = min(result.end_s for result in self._results)
                self._clock_s = max(self._clock_s, min(end_s, wait_until_s))
        done = sorted((result for result in self._results if result.end_s <= self._clock_s), key=lambda r: r.end_s)
        self._results = [result for result in self._results if result.end_s > self._clock_s]
        for result in done:
            if result.completion.error is not None:
                self._reported.add(result.completion.iteration_id)
        return [result.completion for result in done]

    def _execute(self, iteration: Iteration) -> tuple[SampledToken, ...]:
        match iteration:
            case PrefillIteration():
                assert len(iteration.inputs) <= self._limits.max_num_seqs
                num_tokens = sum(len(item.token_ids) for item in iteration.inputs)
                assert num_tokens <= self._limits.max_num_batched_tokens * iteration.group.dop
                sampled = tuple(self._prefill(item, iteration.group) for item in iteration.inputs)
                self._after[iteration.iteration_id] = {
                    item.request.request_id: (*item.token_ids.tolist(), token.token_id)
                    for item, token in zip(iteration.inputs, sampled, strict=True)
                }
                return sampled
            case DecodeIteration():
                return self._decode(iteration)
            case ExtendIteration():
                return self._extend(iteration)
            case MigrateIteration():
                return self._migrate(iteration)
            case RecoverIteration():
                for instance in iteration.group.instances:
                    del self._failures[instance]
                return ()

    def _prefill(self, item: PrefillInput, group: Group) -> SampledToken:
        request = item.request
        tokens = tuple(int(token) for token in item.token_ids)
        assert item.token_ids.dtype == np.int32
        assert tokens[: len(request.prompt_token_ids)] == request.prompt_token_ids
        assert len(tokens) <= self._limits.max_model_len
        position = 0
        for kept in item.kept:
            assert kept.instance in group
            assert kept.begin == position
            position = kept.end
            for token_position, slot in zip(range(kept.begin, kept.end), kept.slots.tolist(), strict=True):
                self._write(kept.instance, slot, request.request_id, token_position)
        assert position == (len(tokens) if request.max_tokens else 0)
        prompt_logprobs = None
        if item.wants_prompt_logprobs:
            prompt_logprobs = tuple(fake_logprobs(token, i) for i, token in enumerate(request.prompt_token_ids) if i)
        if request.max_tokens == 0:
            return SampledToken(request.request_id, -1, None, prompt_logprobs)
        return self._sample(request, tokens, prompt_logprobs)

    def _decode(self, iteration: DecodeIteration) -> tuple[SampledToken, ...]:
        inputs = [item for sub_batch in iteration.sub_batches for item in sub_batch.inputs]
        masters = [sub_batch.master for sub_batch in iteration.sub_batches]
        assert len({item.request.request_id for item in inputs}) == len(inputs)
        assert len(set(masters)) == len(masters)
        assert set(masters) <= set(iteration.group.instances)
        on_device: dict[str, tuple[int, ...]] = {}
        if iteration.continues:
            previous, on_device = self._decodes[iteration.group]
            before, now = _members(previous), _members(iteration)
            assert now.keys() <= before.keys()
            for master, names in now.items():
                assert names == [name for name in before[master] if name in names], "who is left is in the same order"
        results = []
        after: dict[str, tuple[int, ...]] = {}
        for sub_batch in iteration.sub_batches:
            assert len(sub_batch.inputs) <= self._limits.max_num_seqs
            for item in sub_batch.inputs:
                request = item.request
                tokens = (*request.prompt_token_ids, *item.output_token_ids)
                if iteration.continues:
                    assert item.output_token_ids == (), "the devices hold these"
                    tokens = on_device[request.request_id]
                if item.is_awaited:
                    assert not iteration.continues
                    tokens = self._awaited(iteration.group, item)
                assert item.position == len(tokens) - 1
                self._write(sub_batch.master, item.slot, request.request_id, item.position)
                self._check_tables(item, iteration.group, sub_batch.master)
                sampled = self._sample(request, tokens)
                after[request.request_id] = (*tokens, sampled.token_id)
                results.append(sampled)
        for group in [group for group in self._decodes if not group.isdisjoint(iteration.group)]:
            del self._decodes[group]
        self._decodes[iteration.group] = iteration, after
        self._after[iteration.iteration_id] = after
        return tuple(results)

    def _awaited(self, group: Group, item: DecodeInput | ExtendInput) -> tuple[int, ...]:
        """The tokens of a request whose last one only the devices have."""
        (before,) = {id(last): last for last in map(self._last.get, group.instances)}.values()
        assert before is not None
        assert before.group == group
        tokens = self._after[before.iteration_id][item.request.request_id]
        assert tokens[:-1] == (*item.request.prompt_token_ids, *item.output_token_ids)
        return tokens

    def _extend(self, iteration: ExtendIteration) -> tuple[SampledToken, ...]:
        assert len({item.request.request_id for item in iteration.inputs}) == len(iteration.inputs)
        assert 0 < len(iteration.inputs) <= self._limits.max_num_seqs
        assert sum(len(item.token_ids) for item in iteration.inputs) <= self._limits.max_num_batched_tokens
        after = self._after[iteration.iteration_id] = {}
        results = [self._extend_one(item, iteration.group, after) for item in iteration.inputs]
        return tuple(token for token in results if token is not None)

    def _extend_one(self, item: ExtendInput, group: Group, after: dict[str, tuple[int, ...]]) -> SampledToken | None:
        (instance,) = group.instances
        request = item.request
        tokens = (*request.prompt_token_ids, *item.output_token_ids)
        chunk = tuple(item.token_ids.tolist())
        if item.is_awaited:
            tokens = self._awaited(group, item)
            assert chunk[-1] == 0, "nobody on the host knows it"
            chunk = (*chunk[:-1], tokens[-1])
        end = item.position + len(chunk)
        assert item.token_ids.dtype == item.slots.dtype == np.int32
        assert chunk == tokens[item.position : end] != ()
        assert request.sampling.prompt_logprobs is None or item.output_token_ids
        for position, slot in zip(range(item.position, end), item.slots.tolist(), strict=True):
            self._write(instance, slot, request.request_id, position)
        assert item.table.instance == instance
        assert self._positions_in(item.table, request.request_id) == list(range(end))
        assert item.is_sampled == (end == len(tokens))
        if not item.is_sampled:
            return None
        sampled = self._sample(request, tokens)
        after[request.request_id] = (*tokens, sampled.token_id)
        return sampled

    def _migrate(self, iteration: MigrateIteration) -> tuple[SampledToken, ...]:
        source = self._memory[iteration.source]
        for from_slot, to_slot in zip(iteration.source_slots.tolist(), iteration.target_slots.tolist(), strict=True):
            request_id, position = source.pop(from_slot)
            self._write(iteration.target, to_slot, request_id, position)
        return ()

    def _write(self, instance: InstanceId, slot: int, request_id: str, position: int) -> None:
        assert 0 <= slot < self._shape.num_slots
        self._memory[instance][slot] = (request_id, position)

    def _check_tables(self, item: DecodeInput, group: Group, master: InstanceId) -> None:
        """Every key of tokens [0, position] is named exactly once, and holds what was written for this request."""
        positions: list[int] = []
        for table in item.tables:
            assert table.instance in group
            positions += self._positions_in(table, item.request.request_id)
            if table.instance == master:
                assert self._slots_of(table)[-1] == item.slot
        assert sorted(positions) == list(range(item.position + 1))
        assert master in [table.instance for table in item.tables]

    def _positions_in(self, table: InstanceTable, request_id: str) -> list[int]:
        """Of the tokens whose keys it names, all of which were written for this request."""
        positions = []
        for slot in self._slots_of(table):
            owner, position = self._memory[table.instance][slot]
            assert owner == request_id, f"slot {slot} of {table.instance} holds another request's keys"
            positions.append(position)
        return positions

    def _slots_of(self, table: InstanceTable) -> list[int]:
        page_size = self._shape.page_size
        assert len(table.page_indices) == -(-table.num_tokens // page_size)
        slots = [int(page) * page_size + offset for page in table.page_indices for offset in range(page_size)]
        return slots[: table.num_tokens]

    def _sample(
        self, request: Request, tokens: tuple[int, ...], prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    ) -> SampledToken:
        token = next_token(request, tokens)
        wants_logprobs = request.sampling.logprobs is not None
        logprobs = fake_logprobs(token, len(tokens)) if wants_logprobs else None
        return SampledToken(request.request_id, token, logprobs, prompt_logprobs)


def _members(iteration: DecodeIteration) -> dict[InstanceId, list[str]]:
    return {
        sub_batch.master: [item.request.request_id for item in sub_batch.inputs] for sub_batch in iteration.sub_batches
    }
