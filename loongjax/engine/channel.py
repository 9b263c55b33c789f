"""Messages over a pipe to another process, without ever waiting for it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

logger = logging.getLogger(__name__)


class Channel:
    """One end of a pipe: a thread reads it, another writes it.

    A pipe holds some tens of kilobytes: the writer keeps whoever sends from waiting for a peer that reads slowly.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        peer_sentinel: int,
        on_message: Callable[[Any], None],
        on_end: Callable[[], None],
    ) -> None:
        """Begins to read.

        Args:
            connection: this end; the channel closes it when the peer is gone.
            peer_sentinel: ready when the peer's process is gone, even if somebody else still holds its end.
            on_message: takes every message, in the reader thread.
            on_end: called once, in the reader thread, when the peer is gone and all it said has been taken.
        """
        self._connection = connection
        self._peer_sentinel = peer_sentinel
        self._on_message = on_message
        self._on_end = on_end
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="loongjax-channel-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="loongjax-channel-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, message: Any) -> None:
        """Hands a message to the writer, from any thread. Dropped if the peer is gone."""
        assert message is not None
        self._outbox.put(message)

    def flush(self, timeout_s: float) -> None:
        """Waits until everything sent so far is in the pipe; nothing may be sent afterwards."""
        self._outbox.put(None)
        self._writer.join(timeout_s)

    def join(self, timeout_s: float | None) -> bool:
        """Waits for `on_end` to have returned; whether it has."""
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def _read(self) -> None:
        try:
            # A peer that is gone leaves what it said in the pipe: it is read before its sentinel counts.
            while self._connection in wait([self._connection, self._peer_sentinel]):
                self._on_message(self._connection.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a message from the other process cannot be read")
        self._outbox.put(None)
        self._on_end()

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
        except OSError:
            logger.debug("the other process is gone; what was still to be sent is dropped")
