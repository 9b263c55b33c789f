"""Shape buckets: the few sizes to which batches are padded, so that the executables can be enumerated."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from loongjax.core.cluster import ClusterShape
from loongjax.runtime.protocol import RuntimeLimits

LEAST_NUM_TOKENS = 64
"""Fewer prefill tokens than this on a rank cost no less time."""
LEAST_HALF_STEP = 256
"""From here on there is a size between two powers of two: an 8B's time on an H200 follows the padded tokens from here
on. A size costs two executables a group size, and with extends one more for each number of requests."""
LEAST_QUARTER_STEP = 4096
"""From here on there are three: an executable is small beside what a twelfth of such a prefill takes, again and again.
"""


def powers(low: int, high: int, factor: int) -> tuple[int, ...]:
    """low, factor * low, factor ** 2 * low, ... and last of all `high` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= factor
    return (*sizes, high)


def token_sizes(most: int) -> tuple[int, ...]:
    """Powers of two from `LEAST_NUM_TOKENS` on, with a half step from `LEAST_HALF_STEP` on and quarter steps from
    `LEAST_QUARTER_STEP` on, and last `most`.
    """
    whole = powers(LEAST_NUM_TOKENS, most, 2)
    halves = (size * 3 // 2 for size in whole if size >= LEAST_HALF_STEP)
    quarters = (size * part // 4 for size in whole if size >= LEAST_QUARTER_STEP for part in (5, 7))
    return tuple(sorted({*whole, *(size for size in (*halves, *quarters) if size < most)}))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The padded sizes of everything that varies."""

    num_tokens: tuple[int, ...]
    """Prefill tokens on one rank."""
    num_rows: tuple[int, ...]
    """Requests of one sub-batch, or sampled rows of a prefill on one rank. Coarse: rows of padding have no keys to
    attend to, and a step of few rows costs what reading the weights costs."""
    num_table_entries: int
    """Entries of one instance's page table: one size, since work follows the entries used."""

    @classmethod
    def for_limits(cls, *, max_num_batched_tokens: int, max_num_seqs: int, num_pages: int) -> Buckets:
        return cls(
            num_tokens=token_sizes(max_num_batched_tokens),
            num_rows=powers(1, max_num_seqs, 4),
            num_table_entries=num_pages + max(4 * max_num_seqs, 256),
        )

    @classmethod
    def of(cls, shape: ClusterShape, limits: RuntimeLimits) -> Buckets:
        """Those of a runtime."""
        return cls.for_limits(
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            num_pages=shape.num_pages,
        )


def fit(size: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `size`."""
    index = bisect.bisect_left(sizes, size)
    assert index < len(sizes), f"{size} exceeds the largest bucket, {sizes[-1]}"
    return sizes[index]
