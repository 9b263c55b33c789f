"""How often the threads of an engine's process take turns."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

SWITCH_INTERVAL_S = 0.0005
"""Python's own 5 ms are a whole decode step: so long the threads that dispatch iterations and read results back would
wait for a step loop that decides, and it for them."""


@contextlib.contextmanager
def frequent_thread_switches() -> Iterator[None]:
    """Within the block, threads that want to run wait for another one no longer than `SWITCH_INTERVAL_S`."""
    before_s = sys.getswitchinterval()
    if before_s <= SWITCH_INTERVAL_S:
        yield
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
