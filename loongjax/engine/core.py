"""The loop between scheduler and runtime. One thread, all state on the host.

    add, abort ─► WaitingQueue ─► Policy.plan(view) ─► bind to pages ─► Runtime.submit
                       ▲                                                     │
                       └── preempted, lost ◄── Completion ◄── completions ◄──┘ ─► RequestEvents

A request is either in the waiting queue or in the KV cache. Groups never wait for each other: an instance is busy while
an iteration of its group is in flight, and the policy is asked again as soon as one completes.

Pages are freed the moment a request ends, even if an iteration that names them is still in flight. That is safe: what
uses them next runs on the same instance, and iterations that share an instance run in the order of their submission.
"""

from __future__ import annotations

import dataclasses
import logging
import math

from loongjax.core.request import FinishReason, Request, RequestEvent
from loongjax.engine.admission import check_capacity
from loongjax.engine.advice import Advice
from loongjax.engine.client import EngineStats, ModelInfo
from loongjax.engine.counters import Counters
from loongjax.engine.departure import Departure
from loongjax.engine.failures import overdue_recoveries, recovery_overdue
from loongjax.engine.integrity import check_state, lost_when_idle
from loongjax.engine.jumps import Jumps
from loongjax.engine.landing import Landing
from loongjax.engine.outcomes import Outcomes
from loongjax.engine.planning import Planning
from loongjax.engine.state import EngineState
from loongjax.engine.watch import Watch
from loongjax.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError
from loongjax.runtime.protocol import JumpingRuntime, Runtime
from loongjax.scheduler.policy import Policy

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
"""When a client that met a full queue may try again, in seconds."""


class EngineCore:
    """Carries every accepted request to exactly one last event, and frees all it held by then."""

    def __init__(
        self,
        runtime: Runtime,
        policy: Policy,
        *,
        info: ModelInfo,
        max_queue_len: int = 1024,
        kv_bytes_per_token: int = 0,
        run_ahead: bool = True,
        jump: bool = False,
        iteration_timeout_s: float = math.inf,
        checks: bool = False,
    ) -> None:
        """An engine without requests.

        Args:
            runtime: executes iterations; closed by `close`.
            policy: decides.
            info: what front ends are told of the model.
            max_queue_len: requests that may wait.
            kv_bytes_per_token: keys and values of one token in all layers, for the statistics.
            run_ahead: submit an iteration behind another before the tokens of that one are read (`engine/planning.py`).
            jump: let decodes stand for many steps while nobody could interfere, instead of running ahead. Only for a
                `JumpingRuntime`: a simulation.
            iteration_timeout_s: how long an iteration may be in flight before `check_health` complains, in seconds.
            checks: check every plan, and the integrity of all state after every step. For tests.

        Raises:
            ConfigError: the pool, or the largest prefill, cannot hold a request of `info.max_model_len` tokens.
        """
        self.info = info
        self.death: str | None = None
        """Why the engine is dead, if it is."""
        self._runtime = runtime
        self._max_queue_len = max_queue_len
        self._checks = checks
        check_capacity(info, runtime.shape, runtime.limits)
        jumps = None
        if jump:
            assert isinstance(runtime, JumpingRuntime), "only a simulation jumps"
            jumps = Jumps(runtime)
        self._state = EngineState(runtime.shape, runtime.limits)
        self._counters = Counters(kv_bytes_per_token=kv_bytes_per_token)
        self._watch = Watch(self._state.flights, iteration_timeout_s)
        self._outcomes = Outcomes(self._state, runtime.now_s)
        departure = Departure(runtime, self._state, self._counters)
        self._landing = Landing(
            runtime,
            self._state,
            outcomes=self._outcomes,
            counters=self._counters,
            watch=self._watch,
            departure=departure,
            jumps=jumps,
        )
        self._advice = Advice(policy, runtime, self._state, checks=checks)
        self._planning = Planning(
            self._state,
            self._advice,
            outcomes=self._outcomes,
            departure=departure,
            landing=self._landing,
            run_ahead=run_ahead,
            jumps=jumps,
        )
        self._must_plan = False

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._state.live)

    @property
    def has_queue_place(self) -> bool:
        """Whether one more request may be added now."""
        return len(self._state.waiting) < self._max_queue_len

    @property
    def is_idle(self) -> bool:
        """Whether no request lives, nothing is in flight, and every event was taken."""
        return not (self._state.live or self._state.flights or self._outcomes.has_events)

    @property
    def is_settled(self) -> bool:
        """Whether the next step finds nothing to do before an iteration completes."""
        return not (self._must_plan or self._outcomes.has_events)

    def add(self, *requests: Request) -> None:
        """Accepts all of these requests, as `loongjax.engine.admission.admit` makes them, or none.

        Raises:
            QueueFullError: they do not fit into the queue now.
            RequestError: more of them than the queue ever holds, or an id that is in use.
            ContextLengthError: a request longer than the runtime's limit.
            EngineDeadError: the engine is dead.
        """
        self._require_alive()
        if len(requests) > self._max_queue_len:
            raise RequestError(f"n must be at most {self._max_queue_len}, the length of the queue", "n")
        num_waiting = len(self._state.waiting)
        if num_waiting + len(requests) > self._max_queue_len:
            raise QueueFullError(
                f"{num_waiting} requests wait already, and the queue holds {self._max_queue_len}", RETRY_AFTER_S
            )
        for request in requests:
            if request.request_id in self._state.live:
                raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
            num_tokens = len(request.prompt_token_ids) + request.max_tokens
            if num_tokens > self.info.max_model_len:
                raise ContextLengthError(
                    f"the maximum context length is {self.info.max_model_len} tokens, got {num_tokens}", "max_tokens"
                )
        now_s = self._runtime.now_s()
        for request in requests:
            self._state.accept(request, now_s)
        self._must_plan = True

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; its pages are free at once. One that is not live is passed over."""
        live = self._state.live.get(request_id)
        if live is not None:
            self._outcomes.end(live, FinishReason.ABORT)
            self._must_plan = True

    def step(self, timeout_s: float | None) -> list[RequestEvent]:
        """Takes in what has completed, plans, and submits.

        Args:
            timeout_s: how long to wait for a completion or a `wake` if there is nothing else to do, in seconds.

        Returns:
            What happened to requests, in order. If the engine died of it, `death` is set, and every live request's
            last event is among these.

        Raises:
            EngineDeadError: it was dead before.
        """
        self._require_alive()
        try:
            return self._step(timeout_s)
        except Exception as error:
            self.death = f"the step loop failed: {type(error).__name__}: {error}"
            raise

    def wake(self) -> None:
        """Ends a wait in `step`, or the next one, from another thread."""
        self._runtime.wake()

    def stats(self) -> EngineStats:
        state, shape = self._state, self._state.shape
        return dataclasses.replace(
            self._counters.stats(),
            num_requests_running=len(state.live) - len(state.waiting),
            num_requests_waiting=len(state.waiting),
            kv_slots_used=tuple(state.kv_cache.used_pages(i) * shape.page_size for i in shape.all_instances),
            kv_slots=(shape.num_slots,) * shape.num_instances,
            page_size=shape.page_size,
            num_pages=shape.num_pages,
            num_recompiles=self._runtime.num_recompiles,
            predicted_over_actual=self._advice.predicted_over_actual(),
        )

    def check_health(self) -> None:
        """Raises EngineDeadError if it is dead, or an iteration is in flight for longer than `iteration_timeout_s`.

        The latter does not end the engine: the iteration may be slow, and other groups go on. But a collective that
        hangs never comes back by itself.
        """
        self._require_alive()
        complaint = self._watch.look(self._runtime.now_s())
        if complaint is not None:
            raise EngineDeadError(complaint)

    def close(self) -> None:
        """Gives the devices back, after what is in flight unless they answer nothing. Only `close` may follow."""
        if self.death is None:
            self.death = "the engine was closed"
        self._runtime.close(waits=not overdue_recoveries(self._state.flights, self._runtime.now_s()))

    def check_integrity(self) -> None:
        """Asserts every invariant of the state between steps."""
        check_state(self._state)

    def _require_alive(self) -> None:
        if self.death is not None:
            raise EngineDeadError(self.death)

    def _step(self, timeout_s: float | None) -> list[RequestEvent]:
        try:
            has_news = self._must_plan or self._outcomes.has_events
            for completion in self._runtime.completions(0.0 if has_news else timeout_s):
                self._landing.take(completion)
                self._must_plan = True
            self._look_for_overdue()
            if self._must_plan:
                self._must_plan = self._planning.plan()
                self._check()
        except EngineDeadError as error:
            self._die(str(error))
        return self._outcomes.take_events()

    def _look_for_overdue(self) -> None:
        """Tells what is overdue. Raises EngineDeadError if a recovery is."""
        now_s = self._runtime.now_s()
        self._watch.look(now_s)
        overdue = overdue_recoveries(self._state.flights, now_s)
        if overdue:
            raise EngineDeadError(recovery_overdue(overdue[0].group))

    def _check(self) -> None:
        """After a step. In service it tells what is lost and does not raise: those who were served keep their answers,
        and what is left works.
        """
        if self._checks:
            self.check_integrity()
        elif not (self._state.live or self._state.flights):
            lost = lost_when_idle(self._state)
            if lost is not None:
                logger.error("%s", lost)

    def _die(self, reason: str) -> None:
        logger.error("%s", reason)
        self.death = reason
        for live in list(self._state.live.values()):
            self._outcomes.end(live, FinishReason.ERROR, reason)
