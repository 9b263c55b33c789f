"""What comes of requests and iterations, and who is told: front ends by events, the policy by observations."""

from __future__ import annotations

from collections.abc import Callable

from loongjax.core.iteration import Completion, SampledToken
from loongjax.core.plan import Decode, Extend, Prefill
from loongjax.core.request import FinishReason, RequestEvent
from loongjax.costmodel.work import Strategy
from loongjax.engine.binding import Flight
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.state import EngineState
from loongjax.scheduler.observation import IterationEnded, Observation, RequestEnded


class Outcomes:
    """Gives requests their tokens and ends them, and keeps what is to be told of that until it is asked for."""

    def __init__(self, state: EngineState, clock: Callable[[], float]) -> None:
        """`clock`: the runtime's time, in seconds."""
        self._state = state
        self._clock = clock
        self._events: list[RequestEvent] = []
        self._observations: list[Observation] = []

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def take_events(self) -> list[RequestEvent]:
        """What front ends have not been told yet, in order."""
        events, self._events = self._events, []
        return events

    def take_observations(self) -> list[Observation]:
        """What the policy has not been told yet, in order."""
        observations, self._observations = self._observations, []
        return observations

    def note_steps(self, flight: Flight, completion: Completion) -> None:
        """An iteration succeeded, or steps of a decode did: the policy will be told of each step by itself."""
        plan = flight.plan
        if flight.work is None or not isinstance(plan, Prefill | Decode | Extend):
            return
        waited_s = flight.started_s - flight.submitted_s
        works = [flight.work] if completion.num_steps == 1 else flight.works(completion.num_steps)
        steps_s = completion.steps_s or (max(0.0, completion.elapsed_s - waited_s),)
        strategy = Strategy(flight.group.dop, self._state.shape.tp)
        for work, elapsed_s in zip(works, steps_s, strict=True):
            self._observations.append(IterationEnded(plan=plan, strategy=strategy, work=work, elapsed_s=elapsed_s))

    def give(self, live: LiveRequest, sampled: SampledToken, *, is_prefill: bool, num_steps: int) -> int:
        """Adds the token of each step to a request, and ends the request if this was its last.

        Returns:
            How many tokens it got: none if it asked for none.
        """
        now_s = self._clock()
        live.num_failures = 0
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
        return len(token_ids)

    def end(self, live: LiveRequest, reason: FinishReason, error: str | None = None) -> None:
        """Ends a request for a reason that is not its tokens."""
        self._forget(live, reason)
        self._events.append(
            RequestEvent(
                request_id=live.request_id,
                finish_reason=reason,
                error=error,
                history=live.history,
                timings=live.timings(self._clock()),
            )
        )

    def _forget(self, live: LiveRequest, reason: FinishReason) -> None:
        self._observations.append(
            RequestEnded(
                num_prompt_tokens=len(live.request.prompt_token_ids),
                num_output_tokens=len(live.output_token_ids),
                finish_reason=reason,
            )
        )
        self._state.forget(live)
