"""From deltas to one response, whole or in chunks: what both generation APIs share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from loongjax.core.request import FinishReason
from loongjax.engine.client import OutputDelta
from loongjax_server.generation import Generation
from loongjax_server.json_pieces import JsonArray
from loongjax_server.schemas import StreamOptions


@runtime_checkable
class ChoiceWriter(Protocol):
    """Writes one choice in the API's own form."""

    def gather(self, delta: OutputDelta) -> None:
        """Writes a delta's log-probabilities for `whole`. Called for every token step, in order."""
        ...

    def whole(self, output: WholeOutput) -> dict[str, Any]:
        """The choice of a whole response, of which all log-probabilities have been gathered."""
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
        """The whole response, whose long arrays are `JsonArray`s: they are written as their tokens come."""
        outputs = [WholeOutput() for _ in self._writers]
        async with contextlib.aclosing(self._generation.deltas()) as deltas:
            async for choice_idx, delta in deltas:
                gather = functools.partial(self._writers[choice_idx].gather, delta)
                # Only the first one of a choice may echo the prompt, log-probabilities and all.
                if outputs[choice_idx].is_begun:
                    gather()
                else:
                    await self._generation.write(gather)
                outputs[choice_idx].add(delta)

        def write() -> list[dict[str, Any]]:
            return [writer.whole(output) for writer, output in zip(self._writers, outputs, strict=True)]

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


class WholeOutput:
    """All deltas of one choice, but for the log-probabilities."""

    def __init__(self) -> None:
        self.token_ids = JsonArray()
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.is_begun = False
        """Whether there was any delta."""
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, delta: OutputDelta) -> None:
        self.is_begun = True
        self._texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
