"""Equal parts of the three datasets."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax_profiling.simulate.workload.lengths import Lengths
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.lveval import LvEvalLengths
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths

LEAST_PROMPT_LEN = 16
LEAST_OUTPUT_LEN = 4


@dataclasses.dataclass(frozen=True)
class MixedLengths:
    """Like the mixed dataset of LoongServe's evaluation: as many requests of ShareGPT as of L-Eval and of LV-Eval, only
    those with at least 16 prompt and 4 output tokens, shuffled.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        share = -(-count // 3)
        parts = [_long_enough(part, share, random) for part in (ShareGptLengths(), LEvalLengths(), LvEvalLengths())]
        order = random.permutation(3 * share)[:count]
        return Lengths(
            np.concatenate([part.prompt for part in parts])[order],
            np.concatenate([part.output for part in parts])[order],
        )


def _long_enough(
    distribution: ShareGptLengths | LEvalLengths | LvEvalLengths, count: int, random: np.random.Generator
) -> Lengths:
    prompts: list[np.ndarray] = []
    outputs: list[np.ndarray] = []
    num_found = 0
    while num_found < count:
        drawn = distribution.sample(count, random)
        fits = (drawn.prompt >= LEAST_PROMPT_LEN) & (drawn.output >= LEAST_OUTPUT_LEN)
        prompts.append(drawn.prompt[fits])
        outputs.append(drawn.output[fits])
        num_found += int(fits.sum())
    return Lengths(np.concatenate(prompts)[:count], np.concatenate(outputs)[:count])
