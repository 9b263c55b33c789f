"""How a group whose instances never change batches continuously."""

from __future__ import annotations

import dataclasses

from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """When requests are let in, and how prefills and decodes take turns.

    Raises:
        ConfigError: a value out of its range.
    """

    reserves_max_tokens: bool
    """Let a request in only if everybody could grow to its limit without a preemption; or else if its prompt fits."""
    watermark: float = 0.0
    """Part of the group's pages that must stay free when a request is let in while others run."""
    cuts_prompts: bool = False
    """Prompts are computed in chunks: the last one let in may be longer than what the others leave of a prefill."""
    min_decodes: int = 0
    """Decode steps between a prefill and the next, while requests run."""
    max_prefills: int = 64
    """Prefills in a row after which running requests get a token: an endless stream of requests of one token each would
    starve them."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError(f"watermark must be at least 0 and below 1, got {self.watermark}: 0.01 is usual")
        for name, least in (("min_decodes", 0), ("max_prefills", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
