"""From deltas to one response, whole or in chunks: what both generation APIs share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from loongjax.core.request import FinishReason, TokenLogprobs
from loongjax.engine.client import OutputDelta
from loongjax_server.generation import Generation
from loongjax_server.schemas import StreamOptions


@runtime_checkable
class ChoiceWriter(Protocol):
    """Writes one choice in the API's own form."""

    def whole(self, delta: OutputDelta) -> dict[str, Any]:
        """The choice of a whole response; `delta` holds all of its output."""
        ...

    def chunk(self, delta: OutputDelta) -> dict[str, Any]:
        """The choice of one chunk. Called for every token step, in order."""
        ...


class Assembly:
    """One response of one generation.

    Args:
        header: id, object, created and model, as in the whole response.
        chunk_object: `object` of a chunk.
        writers: one for every choice.
    """

    def __init__(
        self, generation: Generation, header: Mapping[str, Any], chunk_object: str, writers: Sequence[ChoiceWriter]
    ) -> None:
        self._generation = generation
        self._header = header
        self._chunk_header = {**header, "object": chunk_object}
        self._writers = writers

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        outputs = [_GatheredOutput() for _ in self._writers]
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for choice_idx, delta in deltas:
                outputs[choice_idx].add(delta)

        def write() -> list[dict[str, Any]]:
            return [writer.whole(output.to_delta()) for writer, output in zip(self._writers, outputs, strict=True)]

        choices = await self._generation.write(write)
        return {**self._header, "choices": choices, "usage": self._generation.usage.to_json()}

    async def chunks(self, options: StreamOptions | None) -> AsyncGenerator[dict[str, Any], None]:
        """One chunk for every token step of every choice, the last of a choice with its finish reason.

        If usage was asked for, one more chunk without choices has it, and those before have null or, with continuous
        statistics, the counts so far.
        """
        include_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        begun: set[int] = set()
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for choice_idx, delta in deltas:
                if not (delta.token_ids or delta.text or delta.finish_reason is not None):
                    continue
                write = functools.partial(self._writers[choice_idx].chunk, delta)
                # Only the first one of a choice may echo the prompt, log-probabilities and all.
                choice = write() if choice_idx in begun else await self._generation.write(write)
                begun.add(choice_idx)
                chunk = {**self._chunk_header, "choices": [choice]}
                if is_continuous:
                    chunk["usage"] = self._generation.usage.to_json()
                elif include_usage:
                    chunk["usage"] = None
                yield chunk
        if include_usage:
            yield {**self._chunk_header, "choices": [], "usage": self._generation.usage.to_json()}


class _GatheredOutput:
    """All deltas of one choice."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    def add(self, delta: OutputDelta) -> None:
        self._texts.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            self._stop_reason = delta.stop_reason

    def to_delta(self) -> OutputDelta:
        return OutputDelta(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self._finish_reason,
            stop_reason=self._stop_reason,
        )
