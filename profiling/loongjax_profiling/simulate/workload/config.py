"""Which requests come, and when: what all commands that play a workload are told of it."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import ClassVar, Literal

from loongjax.core.request import LEAST_WISH_S
from loongjax.errors import ConfigError

WorkloadName = Literal["sharegpt", "leval", "lv-eval", "mixed", "zipf", "mooncake"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """A distribution of lengths and a process of arrivals, or a trace.

    Raises:
        ConfigError: settings that cannot work.
    """

    USUAL_NUM_REQUESTS: ClassVar[int] = 1000
    """How many come where neither a number nor a trace is named."""

    workload: WorkloadName = "sharegpt"
    """Distribution of prompt and output lengths."""
    zipf_alpha: float = 1.2
    """Exponent of the workload zipf."""
    rate: float = 1.0
    """Requests a second."""
    num_requests: int | None = None
    """How many requests come, of a trace the first so many; None: 1000, of a trace all."""
    cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals; 1: Poisson, above: burstier."""
    trace: pathlib.Path | None = None
    """A file in Mooncake's format to play instead, JSON lines with timestamp (milliseconds since the trace began; where
    the earliest is beyond a day they are counted from that one), input_length and output_length (tokens)."""
    trace_speed: float = 1.0
    """How many times faster than recorded the trace is played."""
    ttft_slo_s: float | None = None
    """Time to the first token that every request wishes for, in seconds."""
    tpot_slo_s: float | None = None
    """Time per output token that every request wishes for, in seconds."""
    seed: int = 0
    """Of lengths and arrivals."""

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"--num-requests must be at least 1, got {self.num_requests}")
        if self.seed < 0:
            raise ConfigError(f"--seed must be at least 0, got {self.seed}")
        for name in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(self, name)
            if value is not None and not LEAST_WISH_S <= value < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be a finite number of seconds, at least {LEAST_WISH_S:g}, got "
                    f"{value}: leave it out for no wish"
                )
