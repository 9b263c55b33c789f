"""From what the engine says of one sample to what its client sees: text, stop strings, stop reasons."""

from __future__ import annotations

from loongjax.core.request import FinishReason, Request, RequestEvent, TokenLogprobs
from loongjax.engine.client import OutputDelta
from loongjax.engine.detokenizer import Decoder, Detokenizer
from loongjax.engine.stop_strings import StopStrings


class SampleOutput:
    """One sample of a client's request.

    When a stop string ends it (`is_stopped`), the caller aborts the request in the engine and goes on pushing its
    events: the final delta, which then says STOP, waits for the engine's last word, so that the slots are free when the
    client reads it and the elastic history is whole.
    """

    def __init__(self, index: int, request: Request, tokenizer: Decoder, eos_token_ids: frozenset[int]) -> None:
        """A sample that has no tokens yet.

        Args:
            index: which of the n samples.
            request: what the engine accepted for it.
            tokenizer: decodes ids.
            eos_token_ids: the model's.
        """
        sampling = request.sampling
        self.request = request
        self._index = index
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            prompt_token_ids=request.prompt_token_ids,
        )
        self._stops = StopStrings(sampling.stop, include_in_output=sampling.include_stop_str_in_output)
        self._num_output_tokens = 0
        self._found_stop: str | None = None
        self.is_finished = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._found_stop is not None

    def push(self, event: RequestEvent) -> OutputDelta | None:
        """What the client learns from an event; None if nothing."""
        assert event.request_id == self.request.request_id, event
        assert not self.is_finished, event
        text, token_ids, logprobs = self._take_tokens(event)
        if event.finish_reason is None:
            if not token_ids and event.prompt_logprobs is None:
                return None
            return OutputDelta(
                index=self._index,
                text=text,
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs=event.prompt_logprobs,
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_output_tokens=self._num_output_tokens,
                num_cached_tokens=event.num_cached_tokens,
            )
        self.is_finished = True
        finish_reason, stop_reason = self._reasons(event)
        if not self.is_stopped:
            text += self._rest(event.finish_reason)
            if self.is_stopped:
                finish_reason, stop_reason = FinishReason.STOP, self._found_stop
        return OutputDelta(
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=event.num_cached_tokens,
            history=event.history,
            timings=event.timings,
            error=event.error,
        )

    def _take_tokens(self, event: RequestEvent) -> tuple[str, tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """The event's tokens up to the one that completes a stop string, and their text."""
        sampling = self.request.sampling
        text = ""
        num_taken = 0
        for position, token_id in enumerate(event.token_ids):
            if self.is_stopped:
                break
            num_taken += 1
            self._num_output_tokens += 1
            is_last = position == len(event.token_ids) - 1
            if is_last and event.stop_token_id is not None and not sampling.include_stop_str_in_output:
                continue
            match = self._stops.push(
                self._detokenizer.push(token_id), may_stop=self._num_output_tokens >= sampling.min_tokens
            )
            text += match.text
            self._found_stop = match.stop
        return text, event.token_ids[:num_taken], event.logprobs[:num_taken]

    def _rest(self, finish_reason: FinishReason | None) -> str:
        """The text held back, now that no token follows."""
        match = self._stops.push(self._detokenizer.finish(), may_stop=finish_reason is not FinishReason.ERROR)
        self._found_stop = match.stop
        return match.text if match.stop is not None else match.text + self._stops.finish()

    def _reasons(self, event: RequestEvent) -> tuple[FinishReason | None, int | str | None]:
        if self._found_stop is not None:
            return FinishReason.STOP, self._found_stop
        if event.stop_token_id in self._eos_token_ids:
            return event.finish_reason, None
        return event.finish_reason, event.stop_token_id
