"""Plays a workload to an engine in real time."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from loongjax.core.request import Request, RequestEvent, ServiceLevel
from loongjax.engine.client import EngineStats
from loongjax.engine.core import EngineCore
from loongjax.engine.interrupts import deferred_interrupt
from loongjax.engine.thread_switches import frequent_thread_switches
from loongjax.errors import EngineDeadError, QueueFullError, RequestError
from loongjax_profiling.random_requests import random_request
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from loongjax_profiling.simulate.workload.request import WorkloadRequest

LONGEST_WAIT_S = 10.0
"""At most so long a step waits for news, in seconds."""


def make_requests(
    workload: Sequence[WorkloadRequest], *, vocab_size: int, slo: ServiceLevel, seed: int
) -> list[Request]:
    """A request of random token ids for each of the workload, named as a simulation names it."""
    random = np.random.default_rng(seed)
    return [
        random_request(
            random,
            f"request-{index}",
            prompt_len=request.prompt_len,
            output_len=request.output_len,
            vocab_size=vocab_size,
            arrival_s=request.arrival_s,
            slo=slo,
        )
        for index, request in enumerate(workload)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Playback:
    """What came of playing."""

    records: tuple[RequestRecord, ...]
    """Of the requests that have ended, in order of arrival."""
    num_sent: int
    begin_s: float
    """When it began, on the clock that it was given."""
    mean_intake_s: float
    """How long requests waited until the step loop had them."""
    mean_telling_s: float
    """From results with a request's first or last token until that token was there."""
    is_interrupted: bool
    """Whether Ctrl-C ended it."""
    stats: EngineStats
    """What the engine counted."""


class Player:
    """Sends requests when they are due, runs the step loop in between, and notes when tokens come."""

    def __init__(
        self, core: EngineCore, runtime: TracedRuntime, *, on_end: Callable[[], object] = lambda: None
    ) -> None:
        """Over an engine without requests.

        Args:
            core: takes the requests.
            runtime: the engine's, by whose clock they are sent.
            on_end: is called whenever one has ended.
        """
        self._core = core
        self._runtime = runtime
        self._on_end = on_end
        self._begin_s = 0.0
        self._progress: dict[str, _Progress] = {}
        self._records: list[RequestRecord] = []
        self._intakes_s: list[float] = []
        self._tellings_s: list[float] = []

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """Of the requests that have ended so far, in order of arrival."""
        return tuple(sorted(self._records, key=lambda record: int(record.request_id.removeprefix("request-"))))

    def play(self, requests: Sequence[Request], *, limit_s: float | None = None) -> Playback:
        """Plays them until all have ended, the time is over, or Ctrl-C; requests that have not ended are aborted then.

        Args:
            requests: by `arrival_s`, in seconds from now.
            limit_s: how long.

        Raises:
            EngineDeadError: the engine failed; `records` are still there.
        """
        unsent = collections.deque(requests)
        is_interrupted = False
        self._begin_s = self._runtime.now_s()
        end_s = math.inf if limit_s is None else limit_s
        with frequent_thread_switches(), deferred_interrupt(self._core.wake) as release_interrupt:
            try:
                while (unsent or self._progress) and self._elapsed_s() < end_s:
                    while unsent and unsent[0].arrival_s <= self._elapsed_s():
                        self._send(unsent.popleft())
                    next_s = min(end_s, unsent[0].arrival_s if unsent else math.inf)
                    self._step(min(max(0.0, next_s - self._elapsed_s()), LONGEST_WAIT_S))
                    release_interrupt()
            except KeyboardInterrupt:
                is_interrupted = True
        self._abort()
        return Playback(
            records=self.records,
            num_sent=len(requests) - len(unsent),
            begin_s=self._begin_s,
            mean_intake_s=_mean(self._intakes_s),
            mean_telling_s=_mean(self._tellings_s),
            is_interrupted=is_interrupted,
            stats=self._core.stats(),
        )

    def _elapsed_s(self) -> float:
        return self._runtime.now_s() - self._begin_s

    def _send(self, request: Request) -> None:
        progress = _Progress(request)
        self._intakes_s.append(self._elapsed_s() - request.arrival_s)
        try:
            self._core.add(request)
        except (QueueFullError, RequestError) as error:
            self._keep(progress.record(self._elapsed_s(), str(error)))
        else:
            self._progress[request.request_id] = progress

    def _step(self, timeout_s: float) -> None:
        events = self._core.step(timeout_s)
        elapsed_s = self._elapsed_s()
        result_s = self._runtime.news_s
        for event in events:
            progress = self._progress[event.request_id]
            if result_s is not None and (progress.first_token_s is None or event.finish_reason is not None):
                self._tellings_s.append(self._begin_s + elapsed_s - result_s)
            progress.note(event, elapsed_s)
            if event.finish_reason is not None:
                del self._progress[event.request_id]
                self._keep(progress.record(elapsed_s, event.error))
        if self._core.death is not None:
            raise EngineDeadError(self._core.death)

    def _keep(self, record: RequestRecord) -> None:
        self._records.append(record)
        self._on_end()

    def _abort(self) -> None:
        """Leaves the engine without requests; those that had not ended leave no record."""
        for request_id in self._progress:
            self._core.abort(request_id)
        self._progress.clear()
        while self._core.death is None and not self._core.is_idle:
            self._core.step(LONGEST_WAIT_S)


@dataclasses.dataclass
class _Progress:
    request: Request
    num_tokens: int = 0
    first_token_s: float | None = None

    def note(self, event: RequestEvent, elapsed_s: float) -> None:
        if event.token_ids and self.first_token_s is None:
            self.first_token_s = elapsed_s
        self.num_tokens += len(event.token_ids)

    def record(self, elapsed_s: float, error: str | None) -> RequestRecord:
        return RequestRecord(
            request_id=self.request.request_id,
            prompt_len=len(self.request.prompt_token_ids),
            output_len=self.num_tokens,
            issue_s=self.request.arrival_s,
            first_token_s=self.first_token_s,
            complete_s=elapsed_s,
            ttft_slo_s=self.request.slo.ttft_s,
            tpot_slo_s=self.request.slo.tpot_s,
            error=error,
        )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
