"""Counts the executables that XLA builds or loads, by listening to JAX's own events."""

from __future__ import annotations

import threading
from typing import Any

import jax

_BUILD_EVENT = "/jax/core/compile/backend_compile_duration"


class RecompileCounter:
    """Executables built or loaded from the cache by the creating thread since the last `reset`."""

    def __init__(self) -> None:
        self.count = 0
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def reset(self) -> None:
        """Starts again from 0, for the calling thread."""
        self.count = 0
        self._thread = threading.get_ident()

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _BUILD_EVENT and threading.get_ident() == self._thread:
            self.count += 1
