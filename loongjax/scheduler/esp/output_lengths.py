"""How long outputs have turned out to be, and so how long those under way may become."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

WINDOW = 512
"""Outputs that are remembered."""
QUANTILE = 0.9
MAX_LOOKED_UP = 4096
"""Tokens up to which what is expected beyond so many is kept for each number of them."""

MANY = 64
"""Requests from which on arrays are faster than lists."""

LookUp = memoryview
"""Numbers that are looked up one by one. Lists are faster, but not by what it takes to make one, and whenever an output
ends there are others."""


class OutputLengths:
    """The lengths of the last outputs that ended by themselves or at their limit.

    What is expected of a request follows from those outputs only that were longer than its own is already. Quantiles
    count the request itself among them: of m lengths the ceil(0.9 (m + 1))-th in order bounds the next one with
    probability 0.9, and where m is too small for that the request's own limit does. A value object in effect: learning
    replaces the arrays, so that a copy costs nothing.
    """

    def __init__(self) -> None:
        self._sample = _Sample(np.empty(0, np.int64))

    def copy(self) -> OutputLengths:
        other = object.__new__(OutputLengths)
        other._sample = self._sample
        return other

    def knows_the_same(self, other: OutputLengths) -> bool:
        """Whether neither has learned anything since one was copied from the other."""
        return self._sample is other._sample

    def __len__(self) -> int:
        return len(self._sample.recent)

    def add(self, num_output_tokens: int) -> None:
        """Learns from an output that ended."""
        self._sample = _Sample(np.append(self._sample.recent[1 - WINDOW :], num_output_tokens))

    def bounds(
        self, num_output_tokens: Int[np.ndarray, " requests"], max_tokens: Int[np.ndarray, " requests"]
    ) -> Int[np.ndarray, " requests"]:
        """The 0.9-quantile of each request's final output length, given what it has generated; at most its limit."""
        sample = self._sample
        return np.minimum(sample.quantiles_from.take(sample.first_beyond(num_output_tokens)), max_tokens)

    def expected_left(self, num_output_tokens: Sequence[int], max_tokens: Sequence[int]) -> list[float]:
        """Tokens that each request is still expected to generate: the mean of the longer outputs, less its own.

        Where none was longer, it is taken to be half way. Asked about few requests at a time, where lists are faster
        than arrays.
        """
        means, longest = self._sample.means_beyond, self._sample.longest
        result: list[float] = []
        for generated, limit in zip(num_output_tokens, max_tokens, strict=True):
            if generated < len(means):
                guess = means[generated] - generated
            elif generated < longest:
                guess = self._sample.mean_beyond(generated) - generated
            else:
                guess = float(generated or 1)
            result.append(min(guess, float(limit - generated)))
        return result

    def expected_reciprocals(self, num_output_tokens: Sequence[int], max_tokens: Sequence[int]) -> list[float]:
        """The mean of 1 / final output length of each request: over the longer outputs, each cut at its own limit.

        Where none was longer, it is taken to be half way.
        """
        sample = self._sample
        longest = sample.longest
        if longest <= MAX_LOOKED_UP and min(max_tokens, default=0) > longest:  # mostly no limit matters
            means = sample.mean_reciprocals_beyond
            if max(num_output_tokens) < longest:
                return list(map(means.__getitem__, num_output_tokens))
            return [
                means[generated] if generated < longest else 1.0 / min(2 * generated or 1, max(most, generated + 1))
                for generated, most in zip(num_output_tokens, max_tokens, strict=True)
            ]
        if longest <= MAX_LOOKED_UP and len(num_output_tokens) < MANY:
            numbers, sums = sample.numbers_beyond, sample.reciprocals_beyond
            result: list[float] = []
            for generated, most in zip(num_output_tokens, max_tokens, strict=True):
                limit = most if most > generated else generated + 1
                if generated < longest:
                    last = limit - 1 if limit <= longest else longest
                    result.append((sums[generated] - sums[last] + numbers[last] / limit) / numbers[generated])
                else:
                    result.append(1.0 / min(2 * generated or 1, limit))
            return result
        return self._expected_reciprocals(
            np.array(num_output_tokens, np.int64), np.array(max_tokens, np.int64)
        ).tolist()

    def _expected_reciprocals(
        self, generated: Int[np.ndarray, " requests"], most: Int[np.ndarray, " requests"]
    ) -> Float[np.ndarray, " requests"]:
        sample, num_known = self._sample, len(self)
        first = sample.first_beyond(generated)
        num_longer = num_known - first
        limit = np.maximum(most, generated + 1)
        at_limit = sample.first_beyond(limit - 1)
        sums_from = sample.reciprocals_from
        longer = sums_from.take(first) - sums_from.take(at_limit) + (num_known - at_limit) / limit
        half_way = 1.0 / np.minimum(np.maximum(2 * generated, 1), limit)
        return np.where(num_longer, longer / np.maximum(num_longer, 1), half_way)


class _Sample:
    """Lengths, and what they say of one that is longer than so many tokens, worked out when somebody asks.

    Args:
        recent: those, in order of their end.
    """

    def __init__(self, recent: Int[np.ndarray, " lengths"]) -> None:
        self.recent = recent
        self.ascending = np.sort(recent)

    @functools.cached_property
    def longest(self) -> int:
        """0 if there are none."""
        return int(self.ascending[-1]) if len(self.ascending) else 0

    def mean_beyond(self, num_tokens: int) -> float:
        """The mean of those longer than so many tokens, of which there are some."""
        return float(self._means_from[self.ascending.searchsorted(num_tokens, side="right")])

    @functools.cached_property
    def means_beyond(self) -> LookUp:
        """[n]: the mean of those longer than n, as far as there are any, up to `MAX_LOOKED_UP`."""
        return self._beyond(self._means_from)

    @functools.cached_property
    def _means_from(self) -> Float[np.ndarray, " lengths"]:
        """[i]: the mean of the ascending lengths from the i-th on."""
        return _sums_from(self.ascending)[:-1] / self._numbers_from[:-1]

    @functools.cached_property
    def reciprocals_from(self) -> Float[np.ndarray, " lengths_1"]:
        """[i]: the sum of 1 / length from the i-th on."""
        return _sums_from(1.0 / np.maximum(self.ascending, 1))

    @functools.cached_property
    def quantiles_from(self) -> Int[np.ndarray, " lengths_1"]:
        """[i]: what bounds one length more with probability 0.9, by those from the i-th on; no bound if they are too
        few."""
        num_longer = np.arange(len(self.ascending), -1, -1)
        rank = np.ceil(QUANTILE * (num_longer + 1)).astype(np.int64)
        index = np.where(rank <= num_longer, rank - 1 - num_longer, 0) - 1
        return np.append(self.ascending, np.iinfo(np.int64).max)[index]

    @functools.cached_property
    def mean_reciprocals_beyond(self) -> LookUp:
        """[n]: the mean of 1 / length of those longer than n, as far as there are any, up to `MAX_LOOKED_UP`."""
        return self._beyond(self.reciprocals_from[:-1] / self._numbers_from[:-1])

    @functools.cached_property
    def reciprocals_beyond(self) -> LookUp:
        """[n]: the sum of 1 / length of those longer than n, up to `MAX_LOOKED_UP`; the last one is 0."""
        return self._beyond(self.reciprocals_from, is_end_known=True)

    @functools.cached_property
    def numbers_beyond(self) -> LookUp:
        """[n]: how many are longer than n, up to `MAX_LOOKED_UP`; the last one is 0."""
        return self._beyond(self._numbers_from, is_end_known=True)

    @functools.cached_property
    def _numbers_from(self) -> Float[np.ndarray, " lengths_1"]:
        """[i]: how many there are from the i-th on."""
        return np.arange(len(self.ascending), -1.0, -1.0)

    def first_beyond(self, num_tokens: Int[np.ndarray, " requests"]) -> Int[np.ndarray, " requests"]:
        """The first length longer than so many tokens, at least 0; it may be behind all."""
        if self.longest <= MAX_LOOKED_UP:
            return self._first_beyond.take(num_tokens, mode="clip")
        return self.ascending.searchsorted(num_tokens, side="right")

    @functools.cached_property
    def _first_beyond(self) -> Int[np.ndarray, " tokens"]:
        """[n]: the first length longer than n, up to `MAX_LOOKED_UP`; the last one may be behind all."""
        return self.ascending.searchsorted(np.arange(min(self.longest, MAX_LOOKED_UP) + 1), side="right")

    def _beyond(self, from_each: Float[np.ndarray, " _"], *, is_end_known: bool = False) -> LookUp:
        """[n]: what is known from the first length on that is longer than n; with the end, if that is known too."""
        first = self._first_beyond
        return memoryview(from_each.take(first if is_end_known else first[:-1]))


def _sums_from(numbers: np.ndarray) -> Float[np.ndarray, " numbers_1"]:
    """[i]: the sum of the numbers from the i-th on; 0 behind the last."""
    sums = np.zeros(len(numbers) + 1)
    np.cumsum(numbers[::-1], out=sums[-2::-1])
    return sums
