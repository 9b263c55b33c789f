"""Counts the executables that XLA builds or loads, by listening to JAX's own events."""

from __future__ import annotations

import threading
from typing import Any

import jax

_BUILD_EVENT = "/jax/core/compile/backend_compile_duration"


class RecompileCounter:
    """Executables that this process has built, or loaded from the persistent cache, since the counter was made."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._is_closed = False
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        """Counts no more. A second time it does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _BUILD_EVENT:
            with self._lock:
                self.count += 1
