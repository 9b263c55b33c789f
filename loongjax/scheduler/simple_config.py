"""The settings of the simple policy."""

from __future__ import annotations

import dataclasses

from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimplePolicyConfig:
    """Thresholds of the simple policy. All are in tokens or requests, so that they need no cost model.

    Raises:
        ConfigError: a value below its least one.
    """

    prefill_tokens_per_instance: int = 2048
    """A prefill gets one instance for so many tokens, rounded up; batches are filled up to it."""
    max_requests_per_master: int = 32
    """Requests that one master decodes before others join. Below `max_num_seqs`, or they never do."""
    growth_tokens: int = 64
    """Tokens of room that admission leaves for every running request, so that it is not preempted at once."""
    max_prefills_before_decode: int = 4
    """Prefills that a running request lets pass before its next token comes first."""
    max_overtakes: int = 16
    """Times that later requests may be prefilled before the first one that is left waiting."""
    max_lookahead: int = 32
    """Requests that are tried behind those which do not fit now."""
    max_migrated_tokens: int = 512
    """Keys that may be moved to take an instance out of a decode group, in tokens; 0: never move any."""
    min_tokens_between_migrations: int = 64
    """Tokens that a request generates before its keys may be moved again."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in _AT_LEAST_ONE else 0
            if value < least:
                raise ConfigError(f"{field.name} must be at least {least}, got {value}; the default is {field.default}")


_AT_LEAST_ONE = frozenset(
    {
        "prefill_tokens_per_instance",
        "max_requests_per_master",
        "max_prefills_before_decode",
        "min_tokens_between_migrations",
    }
)
