"""Least squares on relative error for a time that has a floor."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from loongjax.costmodel.nonnegative import RELATIVE_TIE, fit_nonnegative

MAX_STARTS = 32
"""Numbers of points on the floor that a fit starts from."""


def fit_with_floor(
    features: Float[np.ndarray, "points terms"], measured_s: Float[np.ndarray, " points"]
) -> tuple[float, Float[np.ndarray, " terms"]]:
    """A floor and coefficients c >= 0 for max(floor, features @ c), on relative error.

    Which points lie on the floor is not known: starting from the shortest 0, 1, 2, ... of them, floor and coefficients
    are fitted to their own points and the points assigned anew, until nothing changes; the best on all points wins.

    Args:
        features: what each coefficient multiplies; not negative.
        measured_s: above 0.
    """
    order = np.argsort(measured_s, kind="stable")
    most = len(measured_s) - features.shape[1]
    starts = np.unique(np.linspace(1, most, min(most, MAX_STARTS)).astype(int)) if most > 0 else []
    best_floor, best = 0.0, fit_nonnegative(features, measured_s)
    num_points = len(measured_s)
    # A floor is one more coefficient: it has to pay for itself (Akaike's criterion), and not by rounding.
    least = _squares(features @ best, measured_s) * math.exp(-2.0 / num_points) - num_points * RELATIVE_TIE**2
    for num_below in starts:
        below = np.zeros(len(measured_s), bool)
        below[order[:num_below]] = True
        for _ in range(8):
            floor = _relative_mean(measured_s[below])
            coefficients = fit_nonnegative(features[~below], measured_s[~below])
            linear = features @ coefficients
            squares = _squares(np.maximum(linear, floor), measured_s)
            if squares < least:
                best_floor, best, least = floor, coefficients, squares
            again = linear < floor
            if np.array_equal(again, below) or not again.any() or (~again).sum() < features.shape[1]:
                break
            below = again
    return best_floor, best


def _relative_mean(measured_s: np.ndarray) -> float:
    """The one time with the least squared relative errors from these."""
    return float(np.sum(1.0 / measured_s) / np.sum(1.0 / measured_s**2))


def _squares(predicted_s: np.ndarray, measured_s: np.ndarray) -> float:
    return float(np.sum((predicted_s / measured_s - 1.0) ** 2))
