"""The time of a decode step on one strategy."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.costmodel.coefficients import check_buckets, check_coefficients, pad
from loongjax.costmodel.work import DecodeTotals


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTime:
    """A sum over what the slowest instance does, one term each.

    Reading the weights and launching kernels (the constant), the matrices' work for the rows of the largest sub-batch,
    padded as the engine pads them, reading the keys of the fullest instance, exchanging every row of the group between
    its instances, and a message for each master beyond the first. One instance alone exchanges nothing, and the last
    two are 0.
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

    def __post_init__(self) -> None:
        check_coefficients(self)
        check_buckets("row_buckets", self.row_buckets)

    @staticmethod
    def features(totals: DecodeTotals, sp: int, row_buckets: tuple[int, ...]) -> np.ndarray:
        """What the coefficients multiply, in order: float64 [..., 5]."""
        exchanges = float(sp > 1)
        columns = (
            np.ones(()),
            pad(totals.busiest_rows, row_buckets),
            totals.busiest_keys,
            exchanges * totals.num_rows,
            exchanges * (totals.num_masters - 1.0),
        )
        return np.stack(np.broadcast_arrays(*columns), axis=-1)

    def seconds(self, totals: DecodeTotals) -> np.ndarray:
        """float64, of the totals' broadcast shape."""
        alone = (
            self.constant_s
            + self.per_padded_row_s * pad(totals.busiest_rows, self.row_buckets)
            + self.per_key_s * totals.busiest_keys
        )
        if self.sp == 1:
            return alone
        return alone + self.per_exchanged_row_s * totals.num_rows + self.per_extra_master_s * (totals.num_masters - 1.0)
