"""Questions about very long documents, at five levels of length: the longest prompts, short outputs."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax_profiling.simulate.workload.lengths import Lengths, Quantiles

WORD_LEVELS = (16_000, 32_000, 64_000, 128_000, 256_000)
SHORTEST, LONGEST = 15_100, 497_300
ANSWER = Quantiles(((0.0, 2), (0.5, 8), (0.9, 40), (1.0, 120)))
"""An assumption: only that answers are short is published."""


@dataclasses.dataclass(frozen=True)
class LvEvalLengths:
    """Like the English part of LV-Eval as LoongServe's evaluation used it.

    Contexts are spread evenly over the five levels of words. From the published shortest and longest request, 15.1K
    tokens at 16K words and 497.3K at 256K, a word has 0.94 to 1.94 tokens; in between the logarithm is uniform.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        words = np.asarray(WORD_LEVELS, np.float64)[random.integers(len(WORD_LEVELS), size=count)]
        least, most = np.log(SHORTEST / WORD_LEVELS[0]), np.log(LONGEST / WORD_LEVELS[-1])
        prompt = np.rint(words * np.exp(random.uniform(least, most, count))).astype(np.int64)
        return Lengths(prompt, ANSWER.sample(count, random))
