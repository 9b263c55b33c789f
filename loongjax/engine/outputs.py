"""What `LLM.generate` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loongjax.core.request import FinishReason, Phase, Request, RequestEvent, TokenLogprobs
from loongjax.engine.client import OutputDelta
from loongjax.engine.detokenizer import Decoder
from loongjax.engine.sample_output import SampleOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """The stop token included, if one ended it."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """One for each token, if they were asked for."""
    finish_reason: FinishReason
    """ERROR if its iterations failed again and again."""
    stop_reason: int | str | None
    """The stop token id or stop string that ended it; None for EOS."""
    history: tuple[Phase, ...]
    """The elastic history: group, masters and tokens of each phase."""
    error: str | None = None
    """What went wrong, with FinishReason.ERROR."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """All that came of one prompt. The fields of its first sample, mostly the only one, are here as well."""

    prompt: str | None
    """The text, if the prompt was given as text."""
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: Sequence[TokenLogprobs] | None
    """One for every prompt token but the first, if they were asked for."""
    outputs: tuple[SampleResult, ...]
    """By sample index."""

    @property
    def index(self) -> int:
        return self.outputs[0].index

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def history(self) -> tuple[Phase, ...]:
        return self.outputs[0].history

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


class SampleCollector:
    """One sample on its way: puts its deltas together."""

    def __init__(self, index: int, request: Request, tokenizer: Decoder, eos_token_ids: frozenset[int]) -> None:
        """A sample that has no tokens yet; see `SampleOutput`."""
        self._index = index
        self._request = request
        self._sample = SampleOutput(index, request, tokenizer, eos_token_ids)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._last: OutputDelta | None = None
        self.prompt_logprobs: Sequence[TokenLogprobs] | None = None

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def is_finished(self) -> bool:
        return self._sample.is_finished

    def push(self, event: RequestEvent) -> bool:
        """Takes in an event; whether the request must now be aborted, because a stop string ended it."""
        was_stopped = self._sample.is_stopped
        delta = self._sample.push(event)
        if delta is not None:
            self._texts.append(delta.text)
            self._token_ids.extend(delta.token_ids)
            self._logprobs.extend(delta.logprobs)
            self._last = delta
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs = delta.prompt_logprobs
        return self._sample.is_stopped and not was_stopped and not self.is_finished

    def result(self) -> SampleResult:
        """The whole sample, once it is finished."""
        last = self._last
        assert last is not None, self.request_id
        assert last.finish_reason is not None, self.request_id
        return SampleResult(
            index=self._index,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs) if self._request.sampling.logprobs is not None else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            history=last.history,
            error=last.error,
        )
