"""The step loop, wherever it runs: takes messages in between two steps, and sends events and replies out."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import Protocol, assert_never, runtime_checkable

from loongjax.core.request import FinishReason
from loongjax.engine.core import EngineCore
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
    Stop,
    ToEngine,
)
from loongjax.errors import EngineDeadError, LoongjaxError

logger = logging.getLogger(__name__)

EngineFactory = Callable[[], EngineCore]
"""Builds the engine where it will run: in its thread, or in its process."""

MAX_WAIT_S = 10.0
"""Longest wait for news, in seconds: messages and completions end it, so this only bounds what a lost wake-up costs."""


@runtime_checkable
class EngineHost(Protocol):
    """Where a step loop runs."""

    def start(self, on_message: Callable[[FromEngine], None]) -> None:
        """Begins to build the engine and returns; `Ready` or `Died` follows.

        Args:
            on_message: takes everything the engine says, in order, in a thread of the host's. Must not block.
        """
        ...

    def send(self, message: ToEngine) -> None:
        """Hands over a message without waiting, from any thread. An engine that is dead drops it."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Ends the loop, and waits for that at most so long. `Died` has been said when it returns."""
        ...


class Inbox:
    """Messages to a step loop that may be waiting for the devices, or not built yet."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None

    def put(self, message: ToEngine) -> None:
        """Leaves a message and wakes the loop. From any thread."""
        self._messages.put(message)
        if self._wake is not None:
            self._wake()

    def attach(self, wake: Callable[[], None]) -> None:
        """From now on, `wake` is called after each message."""
        self._wake = wake

    def take(self) -> list[ToEngine]:
        """All messages that are there."""
        messages = []
        try:
            while True:
                messages.append(self._messages.get_nowait())
        except queue.Empty:
            return messages


def serve_engine(factory: EngineFactory, inbox: Inbox, send: Callable[[FromEngine], None]) -> None:
    """Builds an engine and runs its loop until it is told to stop or fails. The last thing sent is `Died`.

    Args:
        factory: builds the engine.
        inbox: messages to it.
        send: takes what it says; must not block.
    """
    try:
        core = factory()
    except LoongjaxError as error:
        send(Died(error))
        return
    except Exception as error:
        logger.exception("the engine could not be built")
        send(Died(EngineDeadError(f"the engine could not be built: {type(error).__name__}: {error}")))
        return
    try:
        inbox.attach(core.wake)
        send(Ready(core.info))
        _run(core, inbox, send)
        last_word = EngineDeadError("the engine was stopped")
    except EngineDeadError as error:
        logger.error("%s", error)
        last_word = error
    except Exception as error:
        logger.exception("the step loop failed")
        last_word = EngineDeadError(f"the engine failed: {type(error).__name__}: {error}")
    send(Died(last_word))
    core.close()


def _run(core: EngineCore, inbox: Inbox, send: Callable[[FromEngine], None]) -> None:
    while True:
        for message in inbox.take():
            if isinstance(message, Stop):
                return
            _handle(core, message, send)
        events = tuple(core.step(timeout_s=MAX_WAIT_S))
        if core.death is not None:
            # `Died` tells the rest of the requests.
            events = tuple(event for event in events if event.finish_reason is not FinishReason.ERROR)
        if events:
            send(Events(events))
        if core.death is not None:
            raise EngineDeadError(core.death)


def _handle(
    core: EngineCore, message: AddRequests | AbortRequests | GetStats | CheckHealth, send: Callable[[FromEngine], None]
) -> None:
    match message:
        case AddRequests(call_id, requests):
            send(Reply(call_id, error=_error_of(lambda: core.add(*requests))))
        case AbortRequests(request_ids):
            for request_id in request_ids:
                core.abort(request_id)
        case GetStats(call_id):
            send(Reply(call_id, stats=core.stats()))
        case CheckHealth(call_id):
            send(Reply(call_id, error=_error_of(core.check_health)))
        case _:
            assert_never(message)


def _error_of(call: Callable[[], None]) -> LoongjaxError | None:
    try:
        call()
    except LoongjaxError as error:
        return error
    return None
