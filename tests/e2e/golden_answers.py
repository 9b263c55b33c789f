"""transformers' answers for the prompts that these tests send."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
LOGPROB_TOLERANCE = 2e-3
CLOSE_MARGIN = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenAnswer:
    """One prompt, and what transformers makes of it in float32."""

    prompt: list[int]
    greedy: list[int]
    """The most probable continuation, EOS ignored."""
    greedy_logprobs: np.ndarray
    prompt_logprobs: np.ndarray
    """Of the prompt's tokens but the first."""

    def check_greedy(self, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """The tokens are a beginning or a continuation of the golden ones, and so are their log-probabilities."""
        count = min(len(token_ids), len(self.greedy))
        assert count > 0
        assert list(token_ids[:count]) == self.greedy[:count]
        if logprobs is not None:
            np.testing.assert_allclose(logprobs[:count], self.greedy_logprobs[:count], rtol=0, atol=LOGPROB_TOLERANCE)

    def check_prompt(self, logprobs: Sequence[float | None]) -> None:
        """These are the log-probabilities of the prompt's tokens; the first one has none."""
        first, *others = logprobs
        assert first is None
        np.testing.assert_allclose(np.array(others, float), self.prompt_logprobs, rtol=0, atol=LOGPROB_TOLERANCE)


def load_golden(variant: str) -> list[GoldenAnswer]:
    """All prompts of a variant of `tests.checkpoints`, cut before the first token of which nobody can be sure."""
    with np.load(GOLDEN / f"{variant}.npz") as arrays:
        num_prompts = sum(name.startswith("prompt_logprobs_") for name in arrays.files)
        answers = []
        for i in range(num_prompts):
            close = np.flatnonzero(arrays[f"margins_{i}"] <= CLOSE_MARGIN)
            count = int(close[0]) if len(close) else len(arrays[f"greedy_{i}"])
            answers.append(
                GoldenAnswer(
                    prompt=arrays[f"prompt_{i}"].tolist(),
                    greedy=arrays[f"greedy_{i}"][:count].tolist(),
                    greedy_logprobs=arrays[f"greedy_logprobs_{i}"][:count],
                    prompt_logprobs=arrays[f"prompt_logprobs_{i}"],
                )
            )
    return answers
