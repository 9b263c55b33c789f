"""A step loop in a thread of this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from loongjax.engine.loop import EngineFactory, Inbox, serve_engine
from loongjax.engine.messages import FromEngine, Stop, ToEngine

logger = logging.getLogger(__name__)


class EngineThread:
    """Implements `loongjax.engine.loop.EngineHost`: simple, but Python work of the front end slows the steps."""

    def __init__(self, factory: EngineFactory) -> None:
        self._factory = factory
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None

    def start(self, on_message: Callable[[FromEngine], None]) -> None:
        assert self._thread is None, "an engine is started once"
        self._thread = threading.Thread(target=self._main, args=(on_message,), name="loongjax-engine", daemon=True)
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def stop(self, timeout_s: float) -> None:
        if self._thread is None:
            return
        self.send(Stop())
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine's thread did not end within %.1f s and is left behind", timeout_s)

    def _main(self, on_message: Callable[[FromEngine], None]) -> None:
        serve_engine(self._factory, self._inbox, on_message)
