"""Measured times, and where they come from."""

from __future__ import annotations

import dataclasses
import math

from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a time holds for."""

    hardware: str
    """Devices, as people name them: "4 x NVIDIA H200"."""
    model: ModelShape
    commit: str | None = None
    """Of this project, marked if files differed from it; None: unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padding:
    """The sizes to which the measured engine pads; empty: it does not."""

    token_buckets: tuple[int, ...] = ()
    """Prefill tokens on one rank."""
    row_buckets: tuple[int, ...] = ()
    """Requests of one sub-batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPoint:
    """A measured prefill or extend."""

    strategy: Strategy
    work: PrefillWork
    measured_s: float
    padding: Padding = Padding()

    def __post_init__(self) -> None:
        _check_time(self.measured_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePoint:
    """A measured decode step."""

    strategy: Strategy
    work: DecodeWork
    measured_s: float
    padding: Padding = Padding()

    def __post_init__(self) -> None:
        _check_time(self.measured_s)
        if len(self.work.keys) != self.strategy.sp:
            raise ConfigError(f"a decode on {self.strategy} has keys on {self.strategy.sp} instances: {self.work.keys}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrationPoint:
    """A measured migration of one request's keys between two instances of `tp` devices."""

    tp: int
    num_tokens: int
    measured_s: float

    def __post_init__(self) -> None:
        _check_time(self.measured_s)
        if self.tp < 1 or self.num_tokens < 1:
            raise ConfigError(f"a migration has devices and tokens, got tp={self.tp}, num_tokens={self.num_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything measured of one model on one kind of hardware."""

    provenance: Provenance
    prefills: tuple[PrefillPoint, ...] = ()
    decodes: tuple[DecodePoint, ...] = ()
    migrations: tuple[MigrationPoint, ...] = ()


def _check_time(measured_s: float) -> None:
    if not (math.isfinite(measured_s) and measured_s > 0.0):
        raise ConfigError(f"a measured time is finite and above 0 seconds, got {measured_s}: leave failed points out")
