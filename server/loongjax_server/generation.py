"""One HTTP request's work on the engine: its prompts, its samples, its counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence

from loongjax.core.request import NO_SLO, FinishReason, ServiceLevel, TokenLogprobs
from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import OutputDelta
from loongjax.errors import EngineDeadError, EngineError, QueueFullError, RequestError
from loongjax_server.context import ServerContext
from loongjax_server.metrics import RequestRecorder
from loongjax_server.prompts import Prompt
from loongjax_server.usage import Usage

MIN_BACKOFF_S = 0.02
"""How long a prompt that met a full queue waits before it tries again, in seconds; then twice as long, and so on."""
MAX_BACKOFF_S = 0.5
"""The longest such wait, in seconds."""

_INLINE_LOGPROBS = 1024
"""Up to so many prompt tokens' log-probabilities are written on the event loop: it takes some microseconds each."""


class Generation:
    """Runs prompts with the same sampling parameters. Choices are numbered prompt by prompt: prompt * n + sample."""

    def __init__(
        self,
        context: ServerContext,
        response_id: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        arrival_s: float,
        priority: int = 0,
        slo: ServiceLevel = NO_SLO,
    ) -> None:
        num_choices = len(prompts) * sampling.n
        if num_choices > context.config.max_num_choices:
            raise RequestError(
                f"{len(prompts)} prompts times n = {sampling.n} are {num_choices} choices; "
                f"at most {context.config.max_num_choices} are allowed in one request",
                "n",
            )
        self.response_id = response_id
        self.prompts = prompts
        self.sampling = sampling
        self.usage = Usage(sum(len(prompt.token_ids) for prompt in prompts))
        self._context = context
        self._arrival_s = arrival_s
        self._priority = priority
        self._slo = slo
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.sampling.n

    def prompt_of(self, choice_idx: int) -> Prompt:
        """The prompt that a choice continues."""
        return self.prompts[choice_idx // self.sampling.n]

    def prompt_logprobs_of(self, choice_idx: int) -> Sequence[TokenLogprobs]:
        """Of every token but the first of the prompt that a choice continues, as far as they have come."""
        return self._prompt_logprobs.get(choice_idx // self.sampling.n, ())

    async def write[Result](self, work: Callable[[], Result]) -> Result:
        """Runs what writes the response, in a thread if long prompts' log-probabilities are part of it."""
        num_logprobs = self.sampling.n * sum(map(len, self._prompt_logprobs.values()))
        return work() if num_logprobs <= _INLINE_LOGPROBS else await self._context.off_loop(work)

    async def deltas(self) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        """Choice index and delta, as they come. Closing it aborts everything that still runs.

        The first prompt stands for the request: once the engine has taken it, the others wait for their places in its
        queue, however long that is.

        Raises:
            QueueFullError: the engine has no place for the first prompt now.
            LoongjaxError: whatever else the engine raises, and EngineError for a sample that failed or was aborted.
        """
        streams = [self._run(prompt_idx) for prompt_idx in range(len(self.prompts))]
        max_num_open = max(1, self._context.config.max_num_concurrent_choices // self.sampling.n)
        merged = streams[0] if len(streams) == 1 else _merge(streams, max_num_open)
        async with contextlib.aclosing(merged) as deltas:
            async for item in deltas:
                yield item

    async def _run(self, prompt_idx: int) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        for backoff_s in _backoffs_s():
            try:
                async with contextlib.aclosing(self._submit(prompt_idx)) as deltas:
                    async for item in deltas:
                        yield item
                return
            except QueueFullError:
                if prompt_idx == 0:
                    raise
            await asyncio.sleep(backoff_s)

    async def _submit(self, prompt_idx: int) -> AsyncGenerator[tuple[int, OutputDelta], None]:
        token_ids = self.prompts[prompt_idx].token_ids
        recorder = RequestRecorder(self._context.metrics, len(token_ids), self.sampling, self._arrival_s)
        stream = self._context.engine.generate(
            token_ids,
            self.sampling,
            request_id=self._context.engine_request_id(self.response_id),
            priority=self._priority,
            slo=self._slo,
        )
        async with _closing(stream), recorder:
            async for delta in stream:
                recorder.observe(delta)
                _check_outcome(delta)
                choice_idx = prompt_idx * self.sampling.n + delta.index
                if delta.prompt_logprobs is not None:
                    self._prompt_logprobs[prompt_idx] = delta.prompt_logprobs
                self.usage.add(prompt_idx, choice_idx, delta)
                yield choice_idx, delta
            if recorder.num_finished < self.sampling.n:
                raise EngineError("the engine ended a request before all of its samples")


def _backoffs_s() -> Iterator[float]:
    backoff_s = MIN_BACKOFF_S
    while True:
        yield backoff_s
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)


def _check_outcome(delta: OutputDelta) -> None:
    if delta.finish_reason is FinishReason.ERROR:
        raise EngineError(delta.error or "the engine failed while it served this request")
    if delta.finish_reason is FinishReason.ABORT:
        raise EngineDeadError(delta.error or "the request was aborted: the server is shutting down")


async def _merge[Item](streams: Sequence[AsyncGenerator[Item, None]], max_num_open: int) -> AsyncGenerator[Item, None]:
    """Items of many streams as they come, with at most `max_num_open` streams open. The first error ends them all."""
    arrived: asyncio.Queue[Item | _End] = asyncio.Queue()
    slots = asyncio.Semaphore(max_num_open)

    async def pump(stream: AsyncGenerator[Item, None]) -> None:
        error: Exception | None = None
        try:
            async with slots, contextlib.aclosing(stream):
                async for item in stream:
                    arrived.put_nowait(item)
        except Exception as raised:
            error = raised
        arrived.put_nowait(_End(error))

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    num_open = len(tasks)
    try:
        while num_open:
            item = await arrived.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _End:
    """A stream is over; an error reaches the reader of the merged stream by it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


@contextlib.asynccontextmanager
async def _closing(stream: AsyncIterator[OutputDelta]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        # The protocol promises an iterator that can be closed; its type can only say iterator.
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
