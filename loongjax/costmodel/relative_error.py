"""How far predictions are from measurements."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeErrors:
    """Means of |predicted - measured| / measured over points."""

    num_points: int
    arithmetic_mean: float
    geometric_mean: float
    """0 if any point is met exactly."""
    largest: float

    @classmethod
    def of(cls, predicted_s: np.ndarray, measured_s: np.ndarray) -> RelativeErrors | None:
        """The errors of these points (float64 [points] both, measured times above 0); None of no points."""
        if not measured_s.size:
            return None
        errors = np.abs(predicted_s - measured_s) / measured_s
        positive = bool(np.all(errors > 0.0))
        return cls(
            num_points=errors.size,
            arithmetic_mean=float(np.mean(errors)),
            geometric_mean=float(np.exp(np.mean(np.log(errors)))) if positive else 0.0,
            largest=float(np.max(errors)),
        )

    def __str__(self) -> str:
        return (
            f"{self.arithmetic_mean:.2%} arithmetic and {self.geometric_mean:.2%} geometric mean, "
            f"{self.largest:.2%} at most, over {self.num_points} points"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitErrors:
    """Errors on the points that a fit has seen, and on those it has not."""

    training: RelativeErrors
    held_out: RelativeErrors | None
    """None: too few points to hold any out."""

    def __str__(self) -> str:
        return f"training {self.training}; held out {self.held_out or 'none'}"
