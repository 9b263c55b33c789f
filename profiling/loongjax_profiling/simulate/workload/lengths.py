"""How long prompts and outputs are: what every distribution of lengths offers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Prompt and output lengths of some requests, in tokens: int64 [requests] each, all at least 1."""

    prompt: np.ndarray
    output: np.ndarray

    def __post_init__(self) -> None:
        assert self.prompt.shape == self.output.shape, (self.prompt.shape, self.output.shape)

    def __len__(self) -> int:
        return len(self.prompt)


@runtime_checkable
class LengthDistribution(Protocol):
    """A joint distribution of prompt and output lengths."""

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """Independent draws."""
        ...


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """A distribution through known percentiles: between two of them, the logarithm of the length is uniform."""

    points: tuple[tuple[float, int], ...]
    """(probability, length), both ascending, from probability 0 to 1."""

    def __post_init__(self) -> None:
        probabilities, lengths = zip(*self.points, strict=True)
        assert probabilities[0] == 0.0, self.points
        assert probabilities[-1] == 1.0, self.points
        assert all(a < b for a, b in itertools.pairwise(probabilities)), self.points
        assert all(a <= b for a, b in itertools.pairwise(lengths)), self.points

    def sample(self, count: int, random: np.random.Generator) -> np.ndarray:
        """int64 [count]."""
        probabilities, lengths = np.asarray(self.points, np.float64).T
        return np.rint(np.exp(np.interp(random.random(count), probabilities, np.log(lengths)))).astype(np.int64)
