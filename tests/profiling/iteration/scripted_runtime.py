"""A runtime without devices: iterations take as long as a test says, on a virtual clock."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from loongjax.core.cluster import ClusterShape
from loongjax.core.iteration import Completion, Iteration
from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.protocol import RuntimeLimits

LIMITS = RuntimeLimits(max_model_len=10**6, max_num_batched_tokens=4096, max_num_seqs=64, vocab_size=100)
SHAPE = ClusterShape(num_instances=4, num_pages=64, page_size=16)


class ScriptedRuntime:
    """One iteration after the other, in order of submission.

    Args:
        seconds: an iteration's time, given it and how many were submitted before.
        error: why it fails; None: it does not.
        shape: of the cluster.
        limits: of one iteration.
    """

    def __init__(
        self,
        seconds: Callable[[Iteration, int], float] = lambda iteration, index: 1.0,
        error: Callable[[Iteration], str | None] = lambda iteration: None,
        *,
        shape: ClusterShape = SHAPE,
        limits: RuntimeLimits = LIMITS,
    ) -> None:
        self._seconds = seconds
        self._error = error
        self._shape = shape
        self._limits = limits
        self._now_s = 0.0
        self._busy_until_s = 0.0
        self._in_flight: collections.deque[tuple[float, Completion]] = collections.deque()
        self.submitted: list[Iteration] = []
        self.compiled: list[tuple[ProgramKey, ...]] = []
        self.compile_in_time: Callable[[Sequence[ProgramKey], float | None], set[ProgramKey]] = lambda keys, _: set(
            keys
        )
        """Which of these are compiled within so many seconds."""
        self.is_closed = False

    @property
    def shape(self) -> ClusterShape:
        return self._shape

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    @property
    def num_recompiles(self) -> int:
        return 0

    def compile(self, keys: Sequence[ProgramKey], *, timeout_s: float | None = None) -> set[ProgramKey]:
        self.compiled.append(tuple(keys))
        return self.compile_in_time(keys, timeout_s)

    def submit(self, iteration: Iteration) -> None:
        seconds = self._seconds(iteration, len(self.submitted))
        self.submitted.append(iteration)
        self._busy_until_s = max(self._now_s, self._busy_until_s) + seconds
        elapsed_s = self._busy_until_s - self._now_s
        completion = Completion(iteration.iteration_id, (), elapsed_s, self._error(iteration))
        self._in_flight.append((self._busy_until_s, completion))

    def completions(self, timeout_s: float | None) -> list[Completion]:
        if not self._in_flight or (timeout_s is not None and self._in_flight[0][0] > self._now_s + timeout_s):
            return []
        self._now_s, completion = self._in_flight.popleft()
        return [completion]

    def wake(self) -> None: ...

    def now_s(self) -> float:
        return self._now_s

    def close(self, *, waits: bool = True) -> None:
        self.is_closed = True
