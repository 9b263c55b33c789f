"""Shape buckets: the few sizes to which batches are padded, so that the executables can be enumerated."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """low, 2 low, 4 low, ... and last of all `high` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= 2
    return (*sizes, high)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The padded sizes of everything that varies."""

    num_tokens: tuple[int, ...]
    """Prefill tokens on one rank."""
    num_rows: tuple[int, ...]
    """Requests of one sub-batch, or sampled rows of a prefill on one rank."""
    num_table_entries: int
    """Entries of one instance's page table: one size, since work follows the entries used."""

    @classmethod
    def for_limits(cls, *, max_num_batched_tokens: int, max_num_seqs: int, num_pages: int) -> Buckets:
        return cls(
            num_tokens=powers_of_two(min(16, max_num_batched_tokens), max_num_batched_tokens),
            num_rows=powers_of_two(1, max_num_seqs),
            num_table_entries=num_pages + max(4 * max_num_seqs, 256),
        )


def fit(size: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `size`."""
    index = bisect.bisect_left(sizes, size)
    assert index < len(sizes), f"{size} exceeds the largest bucket, {sizes[-1]}"
    return sizes[index]
