"""The engine as a server sees it: asyncio streams over a step loop that runs elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence

from loongjax.core.request import NO_SLO, RequestEvent, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.engine.admission import admit
from loongjax.engine.client import EngineStats, ModelInfo, OutputDelta
from loongjax.engine.detokenizer import Decoder
from loongjax.engine.loop import EngineHost
from loongjax.engine.messages import (
    AbortRequests,
    AddRequests,
    CheckHealth,
    Died,
    Events,
    FromEngine,
    GetStats,
    Ready,
    Reply,
)
from loongjax.engine.sample_output import SampleOutput
from loongjax.errors import EngineDeadError, LoongjaxError

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
"""How long the step loop may take to stop before it is ended by force."""

ABORT_GRACE_S = 5.0
"""How long the streams of requests aborted by `drain` have to reach their ends."""


class AsyncEngine:
    """Implements `loongjax.engine.client.EngineClient`. Belongs to the asyncio loop that called `start`."""

    def __init__(self, host: EngineHost, tokenizer: Decoder, *, seed: int | None = None) -> None:
        """An engine that is not started.

        Args:
            host: runs the step loop.
            tokenizer: turns ids into text, here and not where the steps run.
            seed: makes the seeds of requests that name none reproducible.
        """
        self._host = host
        self._tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._numbers = itertools.count()
        self._info: ModelInfo | None = None
        self._death: LoongjaxError | None = None
        self._is_draining = False
        self._calls: dict[int, asyncio.Future[EngineStats | None]] = {}
        self._streams: dict[str, asyncio.Queue[RequestEvent | None]] = {}
        """By the engine's request id; None in a queue: the engine is dead."""
        self._is_quiet = asyncio.Event()
        """Whether no stream is open."""
        self._is_quiet.set()

    @property
    def info(self) -> ModelInfo:
        assert self._info is not None, "the engine is not started"
        return self._info

    async def start(self) -> None:
        """Builds the engine and waits until it takes requests.

        Raises:
            ConfigError: a setting does not fit the checkpoint or the devices.
            CheckpointError: the checkpoint cannot be read.
            EngineDeadError: it failed otherwise.
        """
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[ModelInfo] = loop.create_future()

        def on_message(message: FromEngine) -> None:
            # The asyncio loop may be closed already: then nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._take, message, ready)

        self._host.start(on_message)
        self._info = await ready

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        slo: ServiceLevel = NO_SLO,
    ) -> AsyncIterator[OutputDelta]:
        """See `EngineClient.generate`."""
        self._require_alive()
        if self._is_draining:
            raise EngineDeadError("the engine is draining and accepts no more requests")
        requests = admit(
            prompt_token_ids,
            sampling,
            # Clients may use an id twice, the engine may not.
            request_id=f"{request_id}#{next(self._numbers)}",
            info=self.info,
            seeds=self._seeds,
            priority=priority,
            slo=slo,
        )
        eos_token_ids = frozenset(self.info.eos_token_ids)
        samples = {
            request.request_id: SampleOutput(index, request, self._tokenizer, eos_token_ids)
            for index, request in enumerate(requests)
        }
        events: asyncio.Queue[RequestEvent | None] = asyncio.Queue()
        self._streams.update(dict.fromkeys(samples, events))
        self._is_quiet.clear()
        try:
            await self._call(lambda call_id: AddRequests(call_id, requests))
            while any(not sample.is_finished for sample in samples.values()):
                event = await events.get()
                if event is None:
                    self._require_alive()
                    continue
                sample = samples[event.request_id]
                was_stopped = sample.is_stopped
                delta = sample.push(event)
                if sample.is_stopped and not was_stopped and not sample.is_finished:
                    self._host.send(AbortRequests((event.request_id,)))
                if delta is not None:
                    yield delta
        finally:
            unfinished = tuple(request_id for request_id, sample in samples.items() if not sample.is_finished)
            if unfinished and self._death is None:
                self._host.send(AbortRequests(unfinished))
            for name in samples:
                del self._streams[name]
            if not self._streams:
                self._is_quiet.set()

    async def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""
        stats = await self._call(GetStats)
        assert stats is not None
        return stats

    async def check_health(self, timeout_s: float = 10.0) -> None:
        """See `EngineClient.check_health`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call(CheckHealth)
        except TimeoutError as error:
            raise EngineDeadError(f"the step loop did not answer within {timeout_s:g} s") from error

    async def drain(self, timeout_s: float) -> None:
        """See `EngineClient.drain`."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_quiet.wait()
        except TimeoutError:
            left = tuple(self._streams)
            logger.warning("%d samples were not done after %g s and are aborted", len(left), timeout_s)
            self._host.send(AbortRequests(left))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_GRACE_S):
                    await self._is_quiet.wait()

    async def close(self) -> None:
        """See `EngineClient.close`."""
        self._is_draining = True
        await asyncio.to_thread(self._host.stop, STOP_TIMEOUT_S)
        self._die(EngineDeadError("the engine was closed"))

    async def _call(self, message: Callable[[int], AddRequests | GetStats | CheckHealth]) -> EngineStats | None:
        """Sends a message and waits for its `Reply`."""
        self._require_alive()
        call_id = next(self._numbers)
        reply = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self._host.send(message(call_id))
        try:
            return await reply
        finally:
            del self._calls[call_id]

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))

    def _take(self, message: FromEngine, ready: asyncio.Future[ModelInfo]) -> None:
        match message:
            case Ready(info):
                if not ready.done():
                    ready.set_result(info)
            case Reply(call_id, stats, error):
                call = self._calls.get(call_id)
                if call is None or call.done():
                    return
                if error is None:
                    call.set_result(stats)
                else:
                    call.set_exception(error)
            case Events(events):
                for event in events:
                    # A stream that was closed has no more use for events.
                    if event.request_id in self._streams:
                        self._streams[event.request_id].put_nowait(event)
            case Died(error):
                if not ready.done():
                    ready.set_exception(error)
                self._die(error)

    def _die(self, error: LoongjaxError) -> None:
        if self._death is not None:
            return
        self._death = error
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineDeadError(str(error)))
        for events in self._streams.values():
            events.put_nowait(None)
