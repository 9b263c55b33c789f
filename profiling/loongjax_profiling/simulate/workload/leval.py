"""Questions about long documents: medium to long prompts, short outputs."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax_profiling.simulate.workload.lengths import Lengths, Quantiles

SHORTEST, LONGEST = 2_700, 210_500
TOKENS_PER_WORD = 1.5
SPREAD = 0.5
"""Standard deviation of the logarithm of lengths within a task: an assumption, no percentiles are published."""


@dataclasses.dataclass(frozen=True)
class _Task:
    words: int
    """Mean words of a document."""
    num_requests: int
    is_exam: bool = False
    """Whether the answer is a letter, a number or a name."""


_TASKS = (
    _Task(6950, 172, is_exam=True),  # coursera
    _Task(3335, 100, is_exam=True),  # gsm100
    _Task(4161, 202, is_exam=True),  # quality
    _Task(8843, 150, is_exam=True),  # topic retrieval
    _Task(2986, 269, is_exam=True),  # tpo
    _Task(4000, 52),  # financial
    _Task(4420, 13),  # government reports
    _Task(18115, 130),  # legal
    _Task(11441, 156),  # meetings
    _Task(2802, 136),  # several documents
    _Task(32805, 182),  # narrative
    _Task(13245, 104),  # natural questions
    _Task(4658, 11),  # news
    _Task(6145, 60),  # papers
    _Task(4025, 13),  # patents
    _Task(14789, 120),  # reviews
    _Task(3238, 160),  # scientific
    _Task(5834, 13),  # television
)
_EXAM_ANSWER = Quantiles(((0.0, 1), (1.0, 3)))
_GENERATED_ANSWER = Quantiles(((0.0, 10), (0.5, 110), (0.9, 300), (1.0, 600)))


@dataclasses.dataclass(frozen=True)
class LEvalLengths:
    """Like L-Eval as LoongServe's evaluation used it: one request for each instruction.

    Each task has its published mean of words, at 1.5 tokens a word, and its published number of instructions, within
    the published 2.7K to 210.5K tokens. The spread within a task is an assumption. Exams have answers of 1 to 3 tokens;
    the others' references have 95 words on average, here 139 tokens.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        weights = np.asarray([task.num_requests for task in _TASKS], np.float64)
        task = random.choice(len(_TASKS), size=count, p=weights / weights.sum())
        means = TOKENS_PER_WORD * np.asarray([task.words for task in _TASKS], np.float64)[task]
        # So that the mean stays what it is.
        spread = np.exp(SPREAD * random.standard_normal(count) - SPREAD**2 / 2)
        prompt = np.rint(np.clip(means * spread, SHORTEST, LONGEST)).astype(np.int64)
        is_exam = np.asarray([task.is_exam for task in _TASKS])[task]
        output = np.where(is_exam, _EXAM_ANSWER.sample(count, random), _GENERATED_ANSWER.sample(count, random))
        return Lengths(prompt, output)
