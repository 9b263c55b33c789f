"""Times one case on a runtime: iterations of the runtime's own programs, built without engine or policy."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from loongjax.core.cluster import Group
from loongjax.core.iteration import (
    Completion,
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
    RecoverIteration,
)
from loongjax.core.plan import TokenInterval
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.errors import LoongjaxError
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import WARM_UP_ROUNDS, Runtime
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.placement import masters_of, packed, spread

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
FIRST_STEPS = 3
"""Decode steps before those that count: what the devices hold of a decode is built, and its pipeline filled."""
IN_FLIGHT = 2
"""Iterations in flight, as the engine has them: one on the devices, the next one submitted behind it."""


class IterationFailedError(Exception):
    """An iteration ended with an error, and its group has recovered: other cases may still work."""


class DevicesLostError(LoongjaxError):
    """An iteration did not come back, or a group did not recover from its failure: nothing more can be measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeterConfig:
    """How often a case is run."""

    rounds: int = 3
    """Of a prefill, extend or migration, after those that do not count."""
    num_steps: int = 8
    """Of a decode, after those that do not count."""
    enough_s: float = 3.0
    """Once its rounds have taken so long in all, or the first one has, a case is not repeated again."""
    timeout_s: float = 600.0
    """An iteration that takes longer will not come back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """A case's time."""

    seconds: float
    """Median over rounds: the time between results, each iteration being submitted behind the one before it, so that
    the devices do not wait for the host. Of a migration, which follows nothing, and of a prefill of more than half the
    tokens that one may have, from submission to the result on the host."""
    stddev_s: float | None
    """Over the same rounds, or over visits; None of one."""
    num_rounds: int
    keys: tuple[int, ...] = ()
    """Of a decode: on each instance, in the middle step."""

    @classmethod
    def of(cls, seconds: Sequence[float], keys: tuple[int, ...] = ()) -> Timing:
        return cls(
            seconds=statistics.median(seconds),
            stddev_s=statistics.stdev(seconds) if len(seconds) > 1 else None,
            num_rounds=len(seconds),
            keys=keys,
        )

    @classmethod
    def of_visits(cls, visits: Sequence[Timing]) -> Timing:
        """Of a case that was measured several times: the median visit's, and how visits differ."""
        if len(visits) == 1:
            return visits[0]
        return dataclasses.replace(
            cls.of([visit.seconds for visit in visits], visits[0].keys),
            num_rounds=sum(visit.num_rounds for visit in visits),
        )


class Meter:
    """Measures cases on a runtime that nobody else uses, one iteration or decode at a time."""

    def __init__(self, runtime: Runtime, config: MeterConfig | None = None) -> None:
        self._runtime = runtime
        self._config = config or MeterConfig()
        self._kv_cache = KVCache(runtime.shape)
        self._ids = itertools.count()
        self._names = map(str, itertools.count())
        self._ended: collections.deque[Completion] = collections.deque()
        self._resident: collections.deque[str] = collections.deque()
        """Requests whose keys are left in the pool, oldest first: new ones take other pages as long as there are any,
        so prefills go round the pool, and decodes find keys that were computed."""

    def measure(self, case: Case) -> Timing:
        """Runs a case that fits (`why_not`), several times.

        Raises:
            IterationFailedError: it failed.
            DevicesLostError: nothing more can be measured with this runtime.
        """
        match case.kind:
            case "prefill":
                return self._repeat(self._prefills(case), self._num_in_flight(case))
            case "extend":
                return self._repeat(self._extends(case), self._num_in_flight(case))
            case "migration":
                return self._repeat(self._migrations(case), in_flight=1)
            case "decode":
                return self._decode(case)

    def check_integrity(self) -> None:
        """Asserts that pages and requests add up."""
        self._kv_cache.check_integrity()
        assert set(self._resident) == set(self._kv_cache.request_ids)

    def _num_in_flight(self, case: Case) -> int:
        """One where two might need more workspace than there is; it takes so long that the host does not matter."""
        capacity = case.strategy.sp * self._runtime.limits.max_num_batched_tokens
        return IN_FLIGHT if IN_FLIGHT * sum(case.prefill_work.new_lens) <= capacity else 1

    def _repeat(self, iterations: Iterator[Iteration], in_flight: int) -> Timing:
        """The first rounds only warm up."""
        rounds = itertools.islice(iterations, WARM_UP_ROUNDS + self._config.rounds)
        seconds = self._in_a_row(rounds, in_flight, self._config.enough_s)
        return Timing.of(seconds[min(WARM_UP_ROUNDS, len(seconds) - 1) :])

    def _in_a_row(
        self, iterations: Iterable[Iteration], in_flight: int = IN_FLIGHT, enough_s: float = math.inf
    ) -> list[float]:
        """How long each takes, from its submission or from the end of the one before it, if that comes later.

        Args:
            iterations: on one group.
            in_flight: of them at a time.
            enough_s: once the first has taken so long, or all others have, no more is submitted than a second one.
        """
        submitted: collections.deque[tuple[Iteration, float]] = collections.deque()
        seconds: list[float] = []
        end_s = -math.inf

        def land() -> None:
            nonlocal end_s
            iteration, submitted_s = submitted.popleft()
            completion = self._wait_for(iteration.iteration_id, iteration.group, len(submitted))
            before_s, end_s = max(submitted_s, end_s), submitted_s + completion.elapsed_s
            seconds.append(end_s - before_s)

        for iteration in iterations:
            submitted.append((iteration, self._runtime.now_s()))
            self._runtime.submit(iteration)
            if len(submitted) == in_flight:
                land()
            has_enough = seconds and max(seconds[0], sum(seconds[1:])) >= enough_s
            if has_enough and len(seconds) + len(submitted) > 1:
                break
        while submitted:
            land()
        return seconds

    def _prefills(self, case: Case) -> Iterator[Iteration]:
        group = Group.of(range(case.strategy.sp))
        shape = self._runtime.shape
        while True:
            placements = packed(case, shape) if case.scales_down else spread(case, shape.page_size)
            if case.scales_down:
                self._release_all()
            iteration_id = next(self._ids)
            rng = np.random.default_rng(iteration_id)
            inputs = []
            for intervals in placements:
                token_ids = rng.integers(0, self._runtime.limits.vocab_size, case.input_len, np.int32)
                request = self._request(tuple(token_ids.tolist()))
                self._make_room(intervals)
                kept = self._kv_cache.keep(request.request_id, intervals)
                self._resident.append(request.request_id)
                inputs.append(PrefillInput(request, token_ids, kept, False))
            yield PrefillIteration(iteration_id, group, tuple(inputs))

    def _extends(self, case: Case) -> Iterator[Iteration]:
        new_lens = case.prefill_work.new_lens
        while True:
            self._release_all()
            iteration_id = next(self._ids)
            rng = np.random.default_rng(iteration_id)
            inputs = []
            for new_len in new_lens:
                request = self._request((0,))
                self._kv_cache.keep(request.request_id, (TokenInterval(0, 0, case.past_len),))
                self._resident.append(request.request_id)
                slots = self._kv_cache.extend(request.request_id, 0, new_len)
                [table] = self._kv_cache.tables(request.request_id)
                token_ids = rng.integers(0, self._runtime.limits.vocab_size, new_len, np.int32)
                inputs.append(ExtendInput(request, token_ids, case.past_len, slots, table, (0,), is_sampled=True))
            yield ExtendIteration(iteration_id, Group((0,)), tuple(inputs))

    def _migrations(self, case: Case) -> Iterator[Iteration]:
        self._release_all()
        name = next(self._names)
        self._kv_cache.keep(name, (TokenInterval(0, 0, case.input_len),))
        self._resident.append(name)
        for source, target in itertools.cycle([(0, 1), (1, 0)]):
            slots = self._kv_cache.migrate(name, source, target, case.input_len)
            yield MigrateIteration(next(self._ids), source, target, *slots)

    def _decode(self, case: Case) -> Timing:
        self._release_all()
        requests = [self._request((0,)) for _ in range(case.batch_size)]
        for request, intervals in zip(requests, spread(case, self._runtime.shape.page_size), strict=True):
            self._kv_cache.keep(request.request_id, intervals)
            self._resident.append(request.request_id)
        num_steps = FIRST_STEPS + self._config.num_steps
        keys: tuple[int, ...] = ()

        def steps() -> Iterator[Iteration]:
            nonlocal keys
            for step in range(num_steps):
                iteration = self._decode_step(case, requests, step)
                if step == num_steps // 2:
                    keys = self._keys_of(case.strategy.sp)
                yield iteration

        seconds = self._in_a_row(steps())
        return Timing.of(seconds[FIRST_STEPS:], keys)

    def _decode_step(self, case: Case, requests: Sequence[Request], step: int) -> DecodeIteration:
        inputs: list[list[DecodeInput]] = [[] for _ in range(case.num_masters)]
        for request, master in zip(requests, masters_of(case), strict=True):
            slot = self._kv_cache.append(request.request_id, master)
            tables = self._kv_cache.tables(request.request_id)
            # The runtime needs the tokens that came before only to start with.
            output = (0,) if step == 0 else ()
            inputs[master].append(DecodeInput(request, output, case.input_len + step, slot, tables))
        batches = tuple(DecodeSubBatch(master, tuple(items)) for master, items in enumerate(inputs))
        group = Group.of(range(case.strategy.sp))
        return DecodeIteration(next(self._ids), group, batches, continues=step > 0)

    def _keys_of(self, sp: int) -> tuple[int, ...]:
        """Keys of all requests on each of the first `sp` instances."""
        keys = [0] * sp
        for request_id in self._kv_cache.request_ids:
            for instance, num_tokens in self._kv_cache.local_lens(request_id):
                keys[instance] += num_tokens
        return tuple(keys)

    def _request(self, prompt_token_ids: tuple[int, ...]) -> Request:
        return Request(
            request_id=next(self._names),
            prompt_token_ids=prompt_token_ids,
            sampling=GREEDY,
            max_tokens=1_000_000,
            seed=0,
        )

    def _wait_for(self, iteration_id: int, group: Group, num_behind: int) -> Completion:
        """The completion of the oldest iteration in flight, with so many submitted behind it."""
        completion = self._next_completion()
        assert completion.iteration_id == iteration_id, (completion.iteration_id, iteration_id)
        if completion.error is not None:
            for _ in range(num_behind):
                self._next_completion()
            self._recover(group)
            raise IterationFailedError(completion.error)
        return completion

    def _next_completion(self) -> Completion:
        if not self._ended:
            self._ended.extend(self._runtime.completions(self._config.timeout_s))
        if not self._ended:
            raise DevicesLostError(f"an iteration did not end within {self._config.timeout_s:.0f} s")
        return self._ended.popleft()

    def _recover(self, group: Group) -> None:
        self._release_all()
        self._runtime.submit(RecoverIteration(next(self._ids), group))
        error = self._next_completion().error
        if error is not None:
            raise DevicesLostError(f"the devices did not recover from a failed iteration: {error}")

    def _make_room(self, intervals: Sequence[TokenInterval]) -> None:
        while not self._kv_cache.can_keep(intervals):
            self._kv_cache.release(self._resident.popleft())

    def _release_all(self) -> None:
        while self._resident:
            self._kv_cache.release(self._resident.popleft())
