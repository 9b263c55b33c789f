"""Ctrl-C at a moment of our choosing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt(wake: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Holds SIGINT back within the block, so that it cannot cut a state change in half.

    A second SIGINT does not wait. Outside the main thread, which gets no signals, nothing is changed.

    Args:
        wake: called when one arrives, to end a wait.

    Yields:
        A function that raises the KeyboardInterrupt that was held back, if there is one.
    """
    has_arrived = False

    def hold(signum: int, frame: FrameType | None) -> None:
        nonlocal has_arrived
        if has_arrived:
            raise KeyboardInterrupt
        has_arrived = True
        wake()

    def release() -> None:
        if has_arrived:
            raise KeyboardInterrupt

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, hold)
    try:
        yield release
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
