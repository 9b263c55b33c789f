"""The loop between scheduler and runtime. One thread, all state on the host.

    add, abort ─► WaitingQueue ─► Policy.plan(view) ─► bind to pages ─► Runtime.submit
                       ▲                                                     │
                       └── preempted, lost ◄── Completion ◄── completions ◄──┘ ─► RequestEvents

A request is either in the waiting queue or in the KV cache. Groups never wait for each other: an instance is busy while
an iteration of its group is in flight, and the policy is asked again as soon as one completes.

Running ahead: while a decode is in flight, the policy is also asked what it would do once that is over. If the answer
is the same decode again and nothing else, its next iteration is submitted behind it at once, before any token was read;
the devices hold the input tokens. A request that turns out to have ended ignores its token of that iteration.

Pages are freed the moment a request ends, even if an iteration that names them is still in flight. That is safe: what
uses them next runs on the same instance, and iterations that share an instance run in the order of their submission.
"""

from __future__ import annotations

import dataclasses
import logging
import math

from loongjax.core.cluster import Group
from loongjax.core.iteration import Completion, ExtendIteration, PrefillIteration, RecoverIteration, SampledToken
from loongjax.core.plan import Decode, Extend, Migrate, Plan, Preempt, Prefill
from loongjax.core.request import FinishReason, Request, RequestEvent
from loongjax.costmodel.work import Strategy
from loongjax.engine.admission import check_capacity
from loongjax.engine.binding import Flight, bind
from loongjax.engine.client import EngineStats, ModelInfo
from loongjax.engine.counters import Counters
from loongjax.engine.failures import MAX_FAILURES, RECOVERY_TIMEOUT_S, blame, recovery_failed, recovery_overdue
from loongjax.engine.flights import Flights
from loongjax.engine.integrity import check_state, lost_when_idle
from loongjax.engine.jumps import Jumps, Surroundings, foresee, longest_jump
from loongjax.engine.live_request import LiveRequest, WaitingQueue
from loongjax.engine.snapshot import take_snapshot
from loongjax.engine.watch import Watch
from loongjax.errors import ContextLengthError, EngineDeadError, EngineError, QueueFullError, RequestError
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import JumpingRuntime, Runtime
from loongjax.scheduler.observation import IterationEnded, Observation, RequestEnded
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.validate import check_plan

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
            run_ahead: submit a decode's next iteration before the tokens of the last one are read.
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
        self._policy = policy
        self._max_queue_len = max_queue_len
        self._run_ahead = run_ahead and not jump
        self._jumps: Jumps | None = None
        if jump:
            assert isinstance(runtime, JumpingRuntime), "only a simulation jumps"
            self._jumps = Jumps(runtime)
        self._checks = checks
        check_capacity(info, runtime.shape, runtime.limits)
        self._kv_cache = KVCache(runtime.shape)
        self._counters = Counters(kv_bytes_per_token=kv_bytes_per_token)
        self._live: dict[str, LiveRequest] = {}
        self._waiting = WaitingQueue()
        self._flights = Flights()
        self._watch = Watch(self._flights, iteration_timeout_s)
        self._events: list[RequestEvent] = []
        self._observations: list[Observation] = []
        """What the policy has not been told yet."""
        self._must_plan = False
        self._num_accepted = 0
        self._num_submitted = 0

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._live)

    @property
    def has_queue_place(self) -> bool:
        """Whether one more request may be added now."""
        return len(self._waiting) < self._max_queue_len

    @property
    def is_idle(self) -> bool:
        """Whether no request lives, nothing is in flight, and every event was taken."""
        return not (self._live or self._flights or self._events)

    @property
    def is_settled(self) -> bool:
        """Whether the next step finds nothing to do before an iteration completes."""
        return not (self._must_plan or self._events)

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
        if len(self._waiting) + len(requests) > self._max_queue_len:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already, and the queue holds {self._max_queue_len}", RETRY_AFTER_S
            )
        for request in requests:
            if request.request_id in self._live:
                raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
            num_tokens = len(request.prompt_token_ids) + request.max_tokens
            if num_tokens > self.info.max_model_len:
                raise ContextLengthError(
                    f"the maximum context length is {self.info.max_model_len} tokens, got {num_tokens}", "max_tokens"
                )
        now_s = self._runtime.now_s()
        for request in requests:
            live = LiveRequest(request, self._num_accepted, now_s)
            self._num_accepted += 1
            self._live[request.request_id] = live
            self._waiting.add(live)
        self._must_plan = True

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; its pages are free at once. One that is not live is passed over."""
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, FinishReason.ABORT)
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

    def _step(self, timeout_s: float | None) -> list[RequestEvent]:
        for completion in self._runtime.completions(0.0 if self._must_plan or self._events else timeout_s):
            self._complete(completion)
            if self.death is not None:
                break
            self._must_plan = True
        self._look_for_overdue()
        if self._must_plan and self.death is None:
            self._must_plan = False
            self._plan()
            if self._checks:
                self.check_integrity()
            elif not (self._live or self._flights):
                self._check_idle()
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """Ends a wait in `step`, or the next one, from another thread."""
        self._runtime.wake()

    def stats(self) -> EngineStats:
        shape = self._runtime.shape
        return dataclasses.replace(
            self._counters.stats(),
            num_requests_running=len(self._live) - len(self._waiting),
            num_requests_waiting=len(self._waiting),
            kv_slots_used=tuple(self._kv_cache.used_pages(i) * shape.page_size for i in shape.all_instances),
            kv_slots=(shape.num_slots,) * shape.num_instances,
            page_size=shape.page_size,
            num_pages=shape.num_pages,
            num_recompiles=self._runtime.num_recompiles,
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
        """Gives the devices back, after what is in flight unless they answer nothing. Nothing may follow."""
        if self.death is None:
            self.death = "the engine was closed"
        self._runtime.close(waits=not self._overdue_recoveries())

    def check_integrity(self) -> None:
        """Asserts every invariant of the state between steps."""
        check_state(kv_cache=self._kv_cache, waiting=self._waiting, live=self._live, flights=self._flights)

    def _check_idle(self) -> None:
        """Tells what is lost and does not raise: those who were served keep their answers, and what is left works."""
        lost = lost_when_idle(self._runtime.shape, self._kv_cache, self._waiting)
        if lost is not None:
            logger.error("%s", lost)

    def _require_alive(self) -> None:
        if self.death is not None:
            raise EngineDeadError(self.death)

    def _plan(self) -> None:
        if len(self._waiting):
            self._catch_up(stop=False)
        if self._observations:
            self._policy.observe(self._observations)
            self._observations = []
        has_idle = len(self._flights.by_instance()) < self._runtime.shape.num_instances
        if has_idle and any(live.num_in_flight == 0 for live in self._live.values()):
            for plan in self._ask(self._policy):
                self._apply(plan)
        if self._run_ahead:
            for flight in self._flights.lone():
                self._continue(flight)
        if self._jumps is not None:
            self._jump(self._jumps)
        if self._live and not (self._flights or self._must_plan):
            raise EngineError(
                f"the policy plans nothing, though nothing is in flight and {len(self._live)} requests live"
            )

    def _ask(self, policy: Policy, as_if_over: Flight | None = None, num_more_steps: int = 0) -> tuple[Plan, ...]:
        """What a policy answers now; with `as_if_over`, once that decode is over, and as many steps more."""
        view = take_snapshot(
            shape=self._runtime.shape,
            limits=self._runtime.limits,
            kv_cache=self._kv_cache,
            waiting=self._waiting,
            live=self._live,
            flights=self._flights,
            now_s=self._runtime.now_s(),
            as_if_over=as_if_over,
        )
        if num_more_steps and as_if_over is not None and isinstance(as_if_over.plan, Decode):
            view = foresee(view, as_if_over.plan, num_more_steps)
        plans = policy.plan(view)
        if self._checks:
            check_plan(view, plans)
        return plans

    def _apply(self, plan: Plan) -> None:
        if not isinstance(plan, Preempt):
            self._submit(plan)
            return
        logger.debug("%s", plan)
        for request_id in plan.request_ids:
            self._counters.num_preemptions += 1
            self._requeue(self._live[request_id])

    def _submit(self, plan: Prefill | Decode | Extend | Migrate) -> None:
        flight = bind(
            plan,
            iteration_id=self._num_submitted,
            live=self._live,
            kv_cache=self._kv_cache,
            continues=isinstance(plan, Decode) and self._flights.continues(plan),
        )
        self._num_submitted += 1
        for live in flight.requests:
            live.num_in_flight += 1
            if isinstance(plan, Prefill | Extend) and live in self._waiting:
                self._waiting.remove(live)
                live.note_prefill(self._runtime.now_s())
        self._flights.depart(flight, self._runtime.now_s())
        logger.debug("iteration %d: %s", flight.iteration.iteration_id, plan)
        self._runtime.submit(flight.iteration)

    def _continue(self, flight: Flight) -> None:
        """Submits a decode's next iteration behind it, if that is what the policy would decide once it is over."""
        if not isinstance(flight.plan, Decode) or flight.is_void:
            return
        if any(live.has_ended or live.num_tokens_left <= 0 for live in flight.requests):
            return
        # What a policy remembers of an answer that nobody follows would be wrong: a copy is asked.
        rehearsing = self._policy.copy()
        if self._ask(rehearsing, as_if_over=flight) == (flight.plan,):
            self._policy = rehearsing
            self._submit(flight.plan)

    def _jump(self, jumps: Jumps) -> None:
        """Lets decodes stand for as many steps as nobody could interfere with. See `loongjax.engine.jumps`."""
        surroundings = Surroundings(
            idle=frozenset(self._runtime.shape.all_instances).difference(self._flights.by_instance()),
            left=frozenset([live.request_id for live in self._live.values() if live.num_in_flight == 0]),
        )
        if (len(self._waiting) or not jumps.hold(surroundings)) and self._catch_up(stop=True):
            return
        if len(self._waiting):
            return
        for flight in self._flights:
            plan = flight.plan
            if isinstance(plan, Decode) and not flight.is_void and flight not in jumps:

                def would_repeat(num_steps: int, flight: Flight = flight, plan: Decode = plan) -> bool:
                    return self._ask(self._policy.copy(), flight, num_steps - 1) == (plan,)

                jumps.start(flight, longest_jump(flight, self._kv_cache, would_repeat), surroundings)

    def _catch_up(self, *, stop: bool) -> bool:
        """Takes in what decodes of many steps have done; whether one is over by that, and its instances are idle."""
        completions = self._jumps.catch_up(stop=stop) if self._jumps is not None else []
        for completion in completions:
            self._complete(completion)
        is_any_over = any(completion.is_over for completion in completions)
        self._must_plan |= is_any_over
        return is_any_over

    def _complete(self, completion: Completion) -> None:
        if not completion.is_over:
            self._pass_steps(self._flights.find(completion.iteration_id), completion)
            return
        flight = self._flights.land(completion.iteration_id, completion.elapsed_s)
        self._watch.note_landing(flight, self._runtime.now_s())
        if self._jumps is not None:
            self._jumps.end(flight)
        if isinstance(flight.iteration, RecoverIteration):
            if completion.error is not None:
                self._die(recovery_failed(flight.group, completion.error))
            return
        if flight.is_void:
            return
        for live in flight.requests:
            live.num_in_flight -= not live.has_ended
        if completion.error is not None:
            self._fail(flight, completion.error)
            return
        if completion.num_steps > 1:
            self._grow(flight, completion.num_steps - 1)
        self._counters.record(flight, completion.num_steps)
        self._note_end(flight, completion)
        if not isinstance(flight.plan, Migrate):
            self._hand_out(flight, completion)

    def _pass_steps(self, flight: Flight, completion: Completion) -> None:
        """Takes in steps of a decode that is in the next one now."""
        self._grow(flight, completion.num_steps)
        self._counters.record(flight, completion.num_steps)
        self._note_end(flight, completion)
        flight.pass_steps(completion.num_steps, flight.submitted_s + completion.elapsed_s)
        self._hand_out(flight, completion)

    def _grow(self, flight: Flight, num_tokens: int) -> None:
        """Gives the requests of a decode the slots of steps for which none were taken."""
        for live in flight.requests:
            if not live.has_ended:
                self._kv_cache.append_more(live.request_id, num_tokens)

    def _hand_out(self, flight: Flight, completion: Completion) -> None:
        by_request = {token.request_id: token for token in completion.tokens}
        is_prefill = isinstance(flight.iteration, PrefillIteration)
        for live in flight.requests:
            if live.has_ended or (live.request_id not in by_request and isinstance(flight.iteration, ExtendIteration)):
                continue
            self._take(live, by_request[live.request_id], is_prefill, completion.num_steps)

    def _note_end(self, flight: Flight, completion: Completion) -> None:
        """Notes what the policy will be told: each step by itself."""
        plan = flight.plan
        if flight.work is None or not isinstance(plan, Prefill | Decode | Extend):
            return
        waited_s = flight.started_s - flight.submitted_s
        works = [flight.work] if completion.num_steps == 1 else flight.works(completion.num_steps)
        steps_s = completion.steps_s or (max(0.0, completion.elapsed_s - waited_s),)
        strategy = Strategy(flight.group.dop, self._runtime.shape.tp)
        for work, elapsed_s in zip(works, steps_s, strict=True):
            self._observations.append(IterationEnded(plan=plan, strategy=strategy, work=work, elapsed_s=elapsed_s))

    def _take(self, live: LiveRequest, sampled: SampledToken, is_prefill: bool, num_steps: int) -> None:
        """Adds the token of each step to a request, says so, and ends the request if this was its last."""
        live.num_failures = 0
        now_s = self._runtime.now_s()
        live.note_token(now_s)
        request = live.request
        prompt_logprobs = None
        if is_prefill and live.wants_prompt_logprobs:
            prompt_logprobs, live.wants_prompt_logprobs = sampled.prompt_logprobs, False
        token_ids: tuple[int, ...] = ()
        logprobs = ()
        if request.max_tokens > 0:
            token_ids = (sampled.token_id,) * num_steps
            live.output_token_ids.extend(token_ids)
            self._counters.num_generation_tokens += num_steps
            if sampled.logprobs is not None and request.sampling.logprobs is not None:
                logprobs = (sampled.logprobs,)
        is_stop = bool(token_ids) and sampled.token_id in request.stop_token_ids
        finish_reason = None
        if is_stop:
            finish_reason = FinishReason.STOP
        elif len(live.output_token_ids) == request.max_tokens:
            finish_reason = FinishReason.LENGTH
        if finish_reason is not None:
            self._forget(live, finish_reason)
        self._events.append(
            RequestEvent(
                request_id=request.request_id,
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                finish_reason=finish_reason,
                stop_token_id=sampled.token_id if is_stop else None,
                history=live.history if finish_reason is not None else (),
                timings=live.timings(now_s) if finish_reason is not None else None,
            )
        )

    def _fail(self, flight: Flight, error: str) -> None:
        """The keys on the group's instances are gone: everything that had some there starts again.

        A request that has failed too often ends alone, and devices that do not recover end the engine.
        """
        group = flight.group
        logger.warning("iteration %d on instances %s failed: %s", flight.iteration.iteration_id, group.instances, error)
        self._flights.void(group)
        participants = [live for live in flight.requests if not live.has_ended]
        for live in blame(participants):
            self._end(live, FinishReason.ERROR, f"{MAX_FAILURES} iterations in a row with it failed: {error}")
        for request_id in self._kv_cache.request_ids:
            live = self._live[request_id]
            if live in participants or any(i in group for i in self._kv_cache.holders(request_id)):
                self._requeue(live)
        self._recover(group)

    def _recover(self, group: Group) -> None:
        iteration = RecoverIteration(self._num_submitted, group)
        self._num_submitted += 1
        self._flights.depart(Flight(iteration, None, ()), self._runtime.now_s())
        self._runtime.submit(iteration)

    def _look_for_overdue(self) -> None:
        self._watch.look(self._runtime.now_s())
        overdue = self._overdue_recoveries()
        if overdue and self.death is None:
            self._die(recovery_overdue(overdue[0].group))

    def _overdue_recoveries(self) -> list[Flight]:
        overdue = self._flights.overdue(self._runtime.now_s(), RECOVERY_TIMEOUT_S)
        return [flight for flight in overdue if isinstance(flight.iteration, RecoverIteration)]

    def _die(self, reason: str) -> None:
        logger.error("%s", reason)
        self.death = reason
        for live in list(self._live.values()):
            self._end(live, FinishReason.ERROR, reason)

    def _requeue(self, live: LiveRequest) -> None:
        """Gives up a request's keys; it is recomputed with the tokens it has, before all that arrived after it."""
        self._kv_cache.release(live.request_id)
        self._flights.leave_out(live)
        live.num_in_flight = 0
        self._waiting.add(live)

    def _end(self, live: LiveRequest, reason: FinishReason, error: str | None = None) -> None:
        self._forget(live, reason)
        self._events.append(
            RequestEvent(
                request_id=live.request_id,
                finish_reason=reason,
                error=error,
                history=live.history,
                timings=live.timings(self._runtime.now_s()),
            )
        )

    def _forget(self, live: LiveRequest, reason: FinishReason) -> None:
        live.has_ended = True
        self._observations.append(
            RequestEnded(
                num_prompt_tokens=len(live.request.prompt_token_ids),
                num_output_tokens=len(live.output_token_ids),
                finish_reason=reason,
            )
        )
        del self._live[live.request_id]
        if live.request_id in self._kv_cache:
            self._kv_cache.release(live.request_id)
        else:
            self._waiting.remove(live)
