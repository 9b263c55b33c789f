"""Least squares on relative error with nonnegative coefficients.

Why relative: iteration times span four orders of magnitude, and a plain fit would give all its attention to the few
longest, leaving the short iterations, which are the most frequent, wrong by their own length. Dividing each row by its
measured time makes ten percent count the same everywhere.

Why nonnegative: no kind of work takes negative time. A small negative coefficient fits noise inside the grid and
predicts, outside it, that more work is faster; a scheduler finds exactly those corners.
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float

RELATIVE_TIE = 1e-9
"""Relative errors so small are rounding: more coefficients do not pay for them."""


def fit_nonnegative(
    features: Float[np.ndarray, "points terms"],
    measured_s: Float[np.ndarray, " points"],
    known_s: Float[np.ndarray, " points"] | float = 0.0,
) -> Float[np.ndarray, " terms"]:
    """The coefficients c >= 0 that minimise sum(((known + features @ c - measured) / measured)^2).

    Exact: at the optimum the positive coefficients solve the unconstrained problem over their own columns, so the best
    of all 2^terms supports whose solution is nonnegative is the answer (terms are few). A support whose columns are
    linearly dependent on these points is passed over, since a smaller one does as well; on ties the smaller support
    wins.

    Args:
        features: what each coefficient multiplies; not negative.
        measured_s: above 0.
        known_s: what is part of each measured time already.
    """
    num_points, num_terms = features.shape
    relative = features / measured_s[:, None]
    scale = np.linalg.norm(relative, axis=0)
    usable = scale > 0.0
    scaled = np.divide(relative, scale, out=np.zeros_like(relative), where=usable)
    # The triangle of a QR decomposition has the same residuals as all the points.
    triangle = np.linalg.qr(np.column_stack([scaled, 1.0 - known_s / measured_s]), mode="r")
    columns, target = triangle[:, :num_terms], triangle[:, num_terms]
    best, least = np.zeros(num_terms), float(target @ target)
    tie = num_points * RELATIVE_TIE**2
    for size in range(1, num_terms + 1):
        for support in itertools.combinations(np.flatnonzero(usable).tolist(), size):
            chosen = columns[:, support]
            solution, _, rank, _ = np.linalg.lstsq(chosen, target, rcond=1e-10)
            if rank < size or np.any(solution < 0.0):
                continue
            residual = chosen @ solution - target
            squares = float(residual @ residual)
            if squares < least - tie:
                best, least = np.zeros(num_terms), squares
                best[list(support)] = solution / scale[list(support)]
    return best
