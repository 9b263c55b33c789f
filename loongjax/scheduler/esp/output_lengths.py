"""How long outputs have turned out to be, and so how long those under way may become."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

WINDOW = 512
"""Outputs that are remembered."""
QUANTILE = 0.9
MAX_LOOKED_UP = 4096
"""Tokens up to which what is expected beyond so many is kept for each number of them."""


class OutputLengths:
    """The lengths of the last outputs that ended by themselves or at their limit.

    What is expected of a request follows from those outputs only that were longer than its own is already. Quantiles
    count the request itself among them: of m lengths the ceil(0.9 (m + 1))-th in order bounds the next one with
    probability 0.9, and where m is too small for that the request's own limit does. A value object in effect: learning
    replaces the arrays, so that a copy costs nothing.
    """

    def __init__(self) -> None:
        self._recent = np.empty(0, np.int64)
        """In order of their end."""
        self._ascending = self._recent
        self._ascending_list: list[int] = []
        """The same, for looking up one at a time."""
        self._sums_from = [0.0]
        """[i]: the sum of the ascending lengths from the i-th on."""
        self._reciprocals_from = np.zeros(1)
        """[i]: the sum of 1 / length from the i-th on."""
        self._means_beyond: list[float] = []
        """[n]: the mean of 1 / length of those longer than n, as far as there are any, up to `MAX_LOOKED_UP`."""

    def copy(self) -> OutputLengths:
        other = object.__new__(OutputLengths)
        other.__dict__.update(self.__dict__)
        return other

    def knows_the_same(self, other: OutputLengths) -> bool:
        """Whether neither has learned anything since one was copied from the other."""
        return self._recent is other._recent

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, num_output_tokens: int) -> None:
        """Learns from an output that ended."""
        self._recent = np.append(self._recent[1 - WINDOW :], num_output_tokens)
        self._ascending = np.sort(self._recent)
        self._ascending_list = self._ascending.tolist()
        self._sums_from = _sums_from(self._ascending).tolist()
        self._reciprocals_from = _sums_from(1.0 / np.maximum(self._ascending, 1))
        means = self._reciprocals_from[:-1] / np.arange(len(self._ascending), 0, -1)
        self._means_beyond = means.repeat(np.diff(self._ascending.clip(max=MAX_LOOKED_UP), prepend=0)).tolist()

    def bounds(
        self, num_output_tokens: Int[np.ndarray, " requests"], max_tokens: Int[np.ndarray, " requests"]
    ) -> Int[np.ndarray, " requests"]:
        """The 0.9-quantile of each request's final output length, given what it has generated; at most its limit."""
        ascending = self._ascending
        first = np.searchsorted(ascending, num_output_tokens, side="right")
        num_longer = len(ascending) - first
        rank = np.ceil(QUANTILE * (num_longer + 1)).astype(np.int64)
        padded = np.append(ascending, np.iinfo(np.int64).max)
        index = np.where(rank <= num_longer, first + rank - 1, len(ascending))
        return np.minimum(padded[index], max_tokens)

    def expected_left(self, num_output_tokens: Sequence[int], max_tokens: Sequence[int]) -> list[float]:
        """Tokens that each request is still expected to generate: the mean of the longer outputs, less its own.

        Where none was longer, it is taken to be half way. Asked about few requests at a time, where lists are faster
        than arrays.
        """
        ascending, sums_from, num_known = self._ascending_list, self._sums_from, len(self._ascending_list)
        result: list[float] = []
        for generated, limit in zip(num_output_tokens, max_tokens, strict=True):
            first = bisect.bisect_right(ascending, generated)
            num_longer = num_known - first
            guess = sums_from[first] / num_longer - generated if num_longer else float(generated or 1)
            result.append(min(guess, float(limit - generated)))
        return result

    def expected_reciprocals(self, num_output_tokens: Sequence[int], max_tokens: Sequence[int]) -> list[float]:
        """The mean of 1 / final output length of each request: over the longer outputs, each cut at its own limit.

        Where none was longer, it is taken to be half way.
        """
        beyond, longest = self._means_beyond, self._ascending_list[-1] if self._ascending_list else 0
        num_known = len(beyond)
        if max(num_output_tokens, default=0) < num_known and min(max_tokens, default=0) > longest:
            return list(map(beyond.__getitem__, num_output_tokens))  # mostly no limit matters
        return self._expected_reciprocals(
            np.array(num_output_tokens, np.int64), np.array(max_tokens, np.int64)
        ).tolist()

    def _expected_reciprocals(
        self, generated: Int[np.ndarray, " requests"], most: Int[np.ndarray, " requests"]
    ) -> Float[np.ndarray, " requests"]:
        ascending, sums_from = self._ascending, self._reciprocals_from
        first = ascending.searchsorted(generated, side="right")
        num_longer = len(ascending) - first
        limit = np.maximum(most, generated + 1)
        at_limit = ascending.searchsorted(limit)
        longer = sums_from[first] - sums_from[at_limit] + (len(ascending) - at_limit) / limit
        half_way = 1.0 / np.minimum(np.maximum(2 * generated, 1), limit)
        return np.where(num_longer, longer / np.maximum(num_longer, 1), half_way)


def _sums_from(numbers: np.ndarray) -> Float[np.ndarray, " numbers_1"]:
    """[i]: the sum of the numbers from the i-th on; 0 behind the last."""
    return np.append(np.cumsum(numbers[::-1])[::-1], 0.0)


def least_sample() -> int:
    """Outputs that must have ended before a quantile is known for a request that has generated nothing."""
    return math.ceil(QUANTILE / (1.0 - QUANTILE) - 1e-9)
