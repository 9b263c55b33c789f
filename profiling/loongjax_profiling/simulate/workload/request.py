"""A request of a workload."""

from __future__ import annotations

import dataclasses
import math

from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """How long its prompt and its output are, and when it comes.

    Raises:
        ConfigError: a prompt or an output without tokens, or an arrival before time 0 or never.
    """

    arrival_s: float
    """In seconds since the workload began."""
    prompt_len: int
    """In tokens."""
    output_len: int
    """In tokens."""

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or self.output_len < 1 or not 0.0 <= self.arrival_s < math.inf:
            raise ConfigError(f"a request has a prompt, an output and a time to come, got {self}")
