"""When requests come: renewal processes at a given rate."""

from __future__ import annotations

import math

import numpy as np

from loongjax.errors import ConfigError

LONGEST_S = 1e10
"""Beyond it a clock of 64 bits counts no microseconds."""
LEAST_CV = 1e-9
"""Up to it gaps count as equal: gamma variates of so large a shape are, but for rounding, and cannot be summed."""


def arrival_times(rate: float, num_requests: int, random: np.random.Generator, *, cv: float = 1.0) -> np.ndarray:
    """Times of arrival with gamma-distributed gaps, in seconds: float64 [num_requests], ascending.

    They are rescaled so that the last one is at num_requests / rate, as the paper's client does: the same seed gives
    the same pattern at every rate.

    Args:
        rate: requests a second.
        num_requests: how many.
        random: where gaps are drawn from.
        cv: the gaps' coefficient of variation: 1 is a Poisson process, above is burstier, 0 is a metronome.

    Raises:
        ConfigError: a rate, number or variation that cannot be.
    """
    if not (0.0 < rate < math.inf) or num_requests < 1:
        raise ConfigError(f"arrivals need a rate above 0 and a request, got {rate} a second and {num_requests}")
    if not (0.0 <= cv < math.inf):
        raise ConfigError(f"the gaps' coefficient of variation is at least 0, got {cv}: 1 is a Poisson process")
    # A gamma variate of shape k has mean k and coefficient of variation 1 / sqrt(k).
    gaps = random.gamma(cv**-2.0, size=num_requests) if cv > LEAST_CV else np.ones(num_requests)
    times = np.cumsum(gaps)
    if not times[-1] > 0.0:
        raise ConfigError(f"gaps of a coefficient of variation of {cv} are all 0 here: give --cv of a few at most")
    if not num_requests / rate <= LONGEST_S:
        raise ConfigError(
            f"{num_requests} requests at {rate} a second come for more than {LONGEST_S:g} s: raise --rate"
        )
    return times * (num_requests / rate / times[-1])
