"""The time of a decode step on one strategy."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.costmodel.coefficients import check_buckets, check_coefficients, pad
from loongjax.costmodel.work import DecodeTotals, larger


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTime:
    """A sum over what the slowest instance does, one term each.

    Reading the weights and launching kernels (the constant), what every row of the largest sub-batch costs, padded as
    the engine pads them, what rows cost on top beyond the number at which computing the matrices takes as long as
    reading them, reading the keys of the fullest instance, exchanging every row of the group between its instances, and
    a message for each master beyond the first. One instance alone exchanges nothing, and the last two are 0.

    The matrices take the longer of reading W and computing c x rows, which is W + c max(0, rows - W / c): hence a term
    that starts at `compute_bound_rows`.
    """

    constant_s: float
    per_padded_row_s: float
    """In seconds a padded row of the largest sub-batch."""
    per_key_s: float
    """In seconds a key of the fullest instance."""
    per_exchanged_row_s: float
    """In seconds a row of the group."""
    per_extra_master_s: float
    """In seconds a master beyond the first."""
    sp: int
    """Instances of the group."""
    row_buckets: tuple[int, ...]
    """Sizes, ascending, that a sub-batch is padded to; beyond the largest nothing is padded. Empty: nowhere."""
    compute_bound_rows: float = 0.0
    """Padded rows from which the matrices are bound by computing."""
    per_compute_bound_row_s: float = 0.0
    """In seconds a padded row beyond those, on top of `per_padded_row_s`; 0: no step was bound by computing."""

    def __post_init__(self) -> None:
        check_coefficients(self)
        check_buckets("row_buckets", self.row_buckets)

    @staticmethod
    def features(
        totals: DecodeTotals[np.ndarray], padded_rows: np.ndarray, sp: int, compute_bound_rows: float
    ) -> np.ndarray:
        """What the coefficients multiply, float64 [..., 6]: the constant, padded rows, those beyond
        `compute_bound_rows`, keys, exchanged rows and extra masters.
        """
        exchanges = float(sp > 1)
        columns = (
            np.ones(()),
            padded_rows,
            np.maximum(padded_rows - compute_bound_rows, 0.0),
            totals.busiest_keys,
            exchanges * totals.num_rows,
            exchanges * (totals.num_masters - 1.0),
        )
        return np.stack(np.broadcast_arrays(*columns), axis=-1)

    def seconds[Real: (float, np.ndarray)](self, totals: DecodeTotals[Real]) -> Real:
        """float64, of the totals' broadcast shape; a number of numbers."""
        return self.padded_rows_s(totals, pad(totals.busiest_rows, self.row_buckets))

    def padded_rows_s[Real: (float, np.ndarray)](self, totals: DecodeTotals[Real], padded_rows: Real) -> Real:
        """As `seconds`, with so many padded rows of the largest sub-batch."""
        alone = (
            self.constant_s
            + self.per_padded_row_s * padded_rows
            + self.per_compute_bound_row_s * larger(padded_rows - self.compute_bound_rows, 0.0)
            + self.per_key_s * totals.busiest_keys
        )
        if self.sp == 1:
            return alone
        return alone + self.per_exchanged_row_s * totals.num_rows + self.per_extra_master_s * (totals.num_masters - 1.0)
