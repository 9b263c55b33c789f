"""One row of the table: an op, the work it is given, what it should reach, and how to run it again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Repeat = Callable[[int], Callable[[], Any]]
"""Given a number, makes a call of so many dependent repetitions, which is compiled and has not run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Work for one variant of an op, or for a rival of it."""

    op: str
    work: str
    """In words; rows of the same op and work are compared."""
    variant: str
    amount: float
    """Bytes to be moved, or floating-point operations of visible pairs, of one repetition."""
    unit: str
    """"B", compared with a copy where there is no rival, or "FLOP"."""
    build: Callable[[], Repeat]
    """Makes the data; this, or the program that comes of it, raises where the case cannot run."""
    num_devices: int = 1
    """That work together."""
    is_rival: bool = False
    baseline: tuple[str, str] | None = None
    """Work and variant of the same op whose rate this one's is compared with, where there is no rival for it."""
    least_share: float | None = None
    """The target: of the rate it is compared with."""
    most_seconds: float | None = None
    """The target of work that is too short for a rate."""

    @property
    def is_exchange(self) -> bool:
        """Whether its bytes go from device to device, a few at a time: what it takes is no matter of memory."""
        return self.unit == "B" and self.num_devices > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A case measured, or why it could not be."""

    case: Case
    seconds: float | None = None
    """Of one repetition; None if it failed, or was over too soon to be told from nothing."""
    method: str | None = None
    """"slope" between one call and three of a program of repetitions; "trace": from a repetition's first kernel to the
    next one's, on the slowest device."""
    kernels: Mapping[str, float] | None = None
    """Of a traced repetition, the seconds of each kernel that runs in all of them, by name; those of exchanges wait for
    each other meanwhile."""
    error: str | None = None

    @property
    def rate(self) -> float | None:
        """Of the case's unit a second."""
        return None if self.seconds is None else self.case.amount / self.seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row's rate as a share of another."""

    share: float
    beside: str
    """In words."""


def as_record(row: Row, comparison: Comparison | None) -> dict[str, Any]:
    """For a JSON file, without what is not known."""
    case = row.case
    target = case.least_share if case.most_seconds is None else case.most_seconds
    record: dict[str, Any] = {
        "op": case.op,
        "work": case.work,
        "variant": case.variant,
        "devices": case.num_devices if case.num_devices > 1 else None,
        "unit": case.unit,
        "seconds": row.seconds,
        "method": row.method,
        "kernels": None if row.kernels is None else dict(row.kernels),
        "rate": row.rate,
        "error": row.error,
        "target": target,
    }
    if comparison is not None:
        record |= {"share": round(comparison.share, 4), "beside": comparison.beside}
    return {name: value for name, value in record.items() if value is not None}
