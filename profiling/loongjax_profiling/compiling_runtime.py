"""What profiling asks of a runtime beside iterations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.protocol import Runtime


class CompilingRuntime(Runtime, Protocol):
    """A runtime that can be told ahead what it will need; see `loongjax.runtime.local.LocalRuntime.compile`."""

    def compile(self, keys: Sequence[ProgramKey], *, timeout_s: float | None = None) -> set[ProgramKey]:
        """Programs among these that were compiled in time."""
        ...
