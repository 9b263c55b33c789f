"""The settings of the ESP policy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from loongjax.errors import ConfigError

Admission = Literal["quantile", "worst-case"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EspConfig:
    """What the cost model cannot say: how careful to be with memory, and how long anybody may be made to wait.

    Raises:
        ConfigError: a value below its least one.
    """

    admission: Admission = "quantile"
    """How long outputs are taken to be when memory is promised: "quantile" of those that ended lately, at most each
    request's own limit; "worst-case" that limit."""
    scale_up: bool = True
    """Whether decode groups take in more instances; only a request that fits nowhere else still does without it."""
    implied_ttft_s: float = 4.0
    """Time to the first token that a prompt of up to 640 tokens is taken to wish for if it brings no wish, and a longer
    one in proportion; inf: such prompts weigh 1 / input length, as in the paper."""
    implied_tpot_s: float = 0.32
    """Time per output token that a request is taken to wish for if it brings no wish: the shorter, the rarer decodes
    are paused for prompts. 0.32 is what the paper's evaluation allows."""
    max_picked: int = 64
    """Requests that one answer may prefill together."""
    max_lookahead: int = 8
    """Requests that do not fit now and are passed over in search of some that do."""
    max_overtakes: int = 16
    """Times that later requests may be prefilled before the first one that is left waiting, each counted by what they
    take of the time that it would take itself, within 1/16 and 1."""
    max_prefills_before_decode: int = 4
    """Prefills that a running request lets pass before its next token comes first."""
    growth_tokens: int = 64
    """Tokens of room that a prefill leaves for every running request where its newest token lies."""
    min_tokens_between_migrations: int = 64
    """Tokens that a request generates before its keys may be moved again."""

    def __post_init__(self) -> None:
        for name in ("implied_ttft_s", "implied_tpot_s"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, least in (
            ("max_picked", 1),
            ("max_lookahead", 0),
            ("max_overtakes", 0),
            ("max_prefills_before_decode", 1),
            ("growth_tokens", 0),
            ("min_tokens_between_migrations", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
