"""What all the forms of time hold to: coefficients that are not negative, and sizes padded to buckets."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from loongjax.errors import ConfigError


def check_coefficients(form: Any) -> None:
    """Raises ConfigError unless every number of this dataclass instance is finite and at least 0."""
    for field in dataclasses.fields(form):
        value = getattr(form, field.name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0.0):
            raise ConfigError(
                f"{field.name} of {type(form).__name__} must be a finite number, not negative, got {value}: fit again"
            )


def check_buckets(name: str, buckets: tuple[int, ...]) -> None:
    """Raises ConfigError unless the buckets are at least 1 and ascending."""
    if any(a >= b for a, b in zip((0, *buckets), buckets, strict=False)):
        raise ConfigError(f"{name} must be at least 1 and ascending, got {list(buckets)}")


def pad[Real: (float, np.ndarray)](sizes: Real, buckets: tuple[int, ...]) -> Real:
    """Each size, rounded up to the smallest bucket that holds it, or as it is beyond the largest: float64."""
    if not buckets:
        return sizes
    if not isinstance(sizes, np.ndarray):
        index = bisect.bisect_left(buckets, sizes)
        return sizes if index == len(buckets) else float(buckets[index])
    ascending, padded = _table(buckets)
    return np.maximum(padded[ascending.searchsorted(sizes)], sizes)


@functools.lru_cache(maxsize=64)
def _table(buckets: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The buckets, and the same with what stands beyond the largest: nothing. Shared: not to be written to."""
    padded = np.array([*buckets, -math.inf])
    padded.flags.writeable = False
    return padded[:-1], padded
