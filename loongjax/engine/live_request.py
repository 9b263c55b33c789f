"""What the engine knows of a request between its acceptance and its end."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.core.cluster import InstanceId
from loongjax.core.request import Phase, Request, Timings
from loongjax.scheduler.request_view import RunningView, WaitingView


class LiveRequest:
    """A request that waits (in the `WaitingQueue`), or runs (it has an entry in the `KVCache`)."""

    def __init__(self, request: Request, order: int, accepted_s: float) -> None:
        """A request that has just been accepted, at that time on the engine's clock."""
        self.request = request
        self.request_id = request.request_id
        self.max_total_tokens = len(request.prompt_token_ids) + request.max_tokens
        """Prompt and longest possible output."""
        self.order = order
        """Its place in the order of arrival."""
        self.output_token_ids: list[int] = []
        self.num_in_flight = 0
        """Iterations in flight that will give it a token or move its keys, those whose result is void not counted."""
        self.has_ended = False
        self.wants_prompt_logprobs = request.sampling.prompt_logprobs is not None
        """Whether they are still to be computed; they are computed once, whatever is recomputed later."""
        self.has_been_prefilled = False
        self.num_failures = 0
        """Failed iterations that it took part in since its last token."""
        self.instances: tuple[InstanceId, ...] = ()
        """Its last decode group, or before the first decode the instances that the prefill kept keys on; and those that
        keys were moved to since."""
        self._history: list[Phase] = []
        self._num_more_tokens = 0
        """Tokens of the last phase beyond those that it was recorded with."""
        self._running_view: RunningView | None = None
        self._accepted_s = accepted_s
        self._prefill_s: float | None = None
        """When its first prefill was submitted."""
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens that the host knows."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs_whole_prefill(self) -> bool:
        """Whether its prompt cannot be computed in chunks: see `WaitingView.needs_whole_prefill`."""
        return self.wants_prompt_logprobs or self.request.max_tokens == 0

    def tokens_between(self, begin: int, end: int) -> np.ndarray:
        """int32 [end - begin]: those of prompt and output, in order, from one position to another."""
        prompt = self.request.prompt_token_ids
        output = self.output_token_ids[max(0, begin - len(prompt)) : max(0, end - len(prompt))]
        return np.array((*prompt[begin:end], *output), np.int32)

    @property
    def num_tokens_left(self) -> int:
        """Tokens that it may still be given, beside those in flight."""
        return self.request.max_tokens - len(self.output_token_ids) - self.num_in_flight

    @property
    def history(self) -> tuple[Phase, ...]:
        if not self._num_more_tokens:
            return tuple(self._history)
        *before, last = self._history
        return (*before, dataclasses.replace(last, num_tokens=last.num_tokens + self._num_more_tokens))

    def record(self, phase: Phase) -> None:
        """Adds to the elastic history, merging a decode or a chunk that continues the last phase."""
        if phase.kind in ("decode", "extend") and self._history:
            last = self._history[-1]
            if last.kind == phase.kind and last.instances == phase.instances and last.masters == phase.masters:
                self._num_more_tokens += phase.num_tokens
                return
        self._history = [*self.history, phase]
        self._num_more_tokens = 0

    def note_prefill(self, now_s: float) -> None:
        """A prefill of it, or of a first chunk of it, is submitted."""
        if self._prefill_s is None:
            self._prefill_s = now_s

    def note_token(self, now_s: float) -> None:
        """It got a token, or its prompt was computed and that was all it asked for."""
        if self._first_token_s is None:
            self._first_token_s = now_s
        self._last_token_s = now_s

    def timings(self, now_s: float) -> Timings:
        """As if it ended now."""
        if self._prefill_s is None:
            return Timings(queue_s=now_s - self._accepted_s)
        queue_s = self._prefill_s - self._accepted_s
        if self._first_token_s is None or self._last_token_s is None:
            return Timings(queue_s=queue_s, prefill_s=now_s - self._prefill_s)
        return Timings(
            queue_s=queue_s,
            prefill_s=self._first_token_s - self._prefill_s,
            decode_s=self._last_token_s - self._first_token_s,
        )

    def waiting_view(self) -> WaitingView:
        return WaitingView(
            request_id=self.request_id,
            order=self.order,
            num_tokens=self.num_tokens,
            max_total_tokens=self.max_total_tokens,
            keeps_kv=self.request.max_tokens > 0,
            is_suspect=self.num_failures > 0,
            needs_whole_prefill=self.needs_whole_prefill,
            num_output_tokens=len(self.output_token_ids),
            arrival_s=self._accepted_s,
            priority=self.request.priority,
            slo=self.request.slo,
        )

    def running_view(
        self, kv: tuple[tuple[InstanceId, int], ...], num_landed: int = 0, num_given: int = 0
    ) -> RunningView:
        """Made anew only if something changed, for a policy sees every running request whenever it is asked.

        Args:
            kv: where its keys are, as `KVCache.local_lens` gives it.
            num_landed: iterations with it in flight that count as if they were over.
            num_given: tokens that these give it.
        """
        view = self._running_view
        is_in_flight = self.num_in_flight > num_landed
        num_output_tokens = len(self.output_token_ids) + num_given
        is_suspect = self.num_failures > 0 and not num_given
        if (
            view is None
            or view.kv is not kv
            or view.is_in_flight != is_in_flight
            or view.num_output_tokens != num_output_tokens
            or view.is_suspect != is_suspect
            or view.first_token_s != self._first_token_s
        ):
            num_held = kv[0][1] if len(kv) == 1 else sum([num_held for _, num_held in kv])
            num_uncomputed = max(1, self.num_tokens - num_held)
            num_keyed_outputs = num_output_tokens if is_in_flight else num_output_tokens - num_uncomputed
            # By position, which takes half as long.
            view = self._running_view = RunningView(
                self.request_id,
                self.order,
                num_held,
                self.max_total_tokens,
                self.max_total_tokens - num_held + num_keyed_outputs,
                kv,
                is_in_flight,
                num_uncomputed,
                is_suspect,
                num_output_tokens,
                self._accepted_s,
                self._first_token_s,
                self.request.priority,
                self.request.slo,
            )
        return view
