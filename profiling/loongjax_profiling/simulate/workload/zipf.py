"""Prompt lengths by Zipf's law: the larger the exponent, the rarer are long ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.errors import ConfigError
from loongjax_profiling.simulate.workload.lengths import Lengths
from loongjax_profiling.simulate.workload.leval import SHORTEST as SHORTEST_DOCUMENT
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.lveval import SHORTEST as SHORTEST_LONG_DOCUMENT
from loongjax_profiling.simulate.workload.lveval import LvEvalLengths
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths

SHORTEST, LONGEST = 10, 199_999
LARGEST_ALPHA = 100.0
"""With which all prompts are of the shortest length; far beyond it probabilities are 0 in 64 bits."""


@dataclasses.dataclass(frozen=True)
class ZipfLengths:
    """A prompt of x tokens, 10 to 199,999, has a probability proportional to x ** -alpha.

    LoongServe's evaluation then takes a request of about that length from its three datasets, and its output. Here the
    output is drawn from a dataset that has prompts of that length: ShareGPT's below 2.7K tokens, L-Eval's below 15.1K,
    and beyond that L-Eval's or LV-Eval's with even odds.

    Raises:
        ConfigError: an exponent below 0, or so large that no probability is left.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= LARGEST_ALPHA:
            raise ConfigError(
                f"Zipf's exponent must be 0 to {LARGEST_ALPHA:g}, got {self.alpha}: the paper's are 1.0, 1.2 and 1.4"
            )

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        lengths = np.arange(SHORTEST, LONGEST + 1)
        cumulative = np.cumsum(lengths.astype(np.float64) ** -self.alpha)
        prompt = lengths[np.searchsorted(cumulative, random.random(count) * cumulative[-1], side="right")]
        is_from_lveval = (prompt >= SHORTEST_LONG_DOCUMENT) & (random.random(count) < 0.5)
        outputs = [part.sample(count, random).output for part in (ShareGptLengths(), LEvalLengths(), LvEvalLengths())]
        output = np.select([prompt < SHORTEST_DOCUMENT, is_from_lveval], [outputs[0], outputs[2]], outputs[1])
        return Lengths(prompt.astype(np.int64), output)
