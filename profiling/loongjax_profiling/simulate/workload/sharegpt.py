"""Conversations of people with a chat model: short prompts, medium outputs."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax_profiling.simulate.workload.lengths import Lengths, Quantiles

PROMPT = Quantiles(((0.0, 4), (0.1, 143), (0.5, 822), (0.9, 1826), (0.99, 2202), (1.0, 2238)))
OUTPUT = Quantiles(((0.0, 4), (0.5, 137), (0.9, 602), (1.0, 993)))


@dataclasses.dataclass(frozen=True)
class ShareGptLengths:
    """Like ShareGPT as LoongServe's evaluation used it.

    Matched to the percentiles of a sample of 1,000 that its authors published: prompts with 143, 822, 1,826 and 2,202
    tokens at 10, 50, 90 and 99 % and 2,238 at most; outputs with 137 and 602 at 50 and 90 % and 993 at most. Their
    means were 897 and 233; these have 864 and 221. Prompt and output are drawn independently.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        return Lengths(PROMPT.sample(count, random), OUTPUT.sample(count, random))
