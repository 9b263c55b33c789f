"""One row of the table: an op, the work it is given, and how to run that again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

Repeat = Callable[[int], Callable[[], jax.Array]]
"""Given a number, makes a jitted call of so many dependent repetitions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Work for one variant of an op, or for a rival of it."""

    op: str
    work: str
    """In words; rows of the same op and work are compared."""
    variant: str
    amount: float
    """Bytes to be read, or floating-point operations of visible pairs, of one repetition."""
    unit: str
    """"B" or "FLOP"."""
    build: Callable[[], Repeat]
    """Makes the data and the program; a case that cannot run here raises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A case measured, or why it could not be."""

    op: str
    work: str
    variant: str
    unit: str
    seconds: float | None = None
    """Of one repetition; None if it failed, or was over too soon to be told from nothing."""
    rate: float | None = None
    """Of `unit` a second."""
    error: str | None = None
