"""Token counts of one HTTP request."""

from __future__ import annotations

from typing import Any

from loongjax.engine.client import OutputDelta


class Usage:
    """Counts tokens as deltas arrive: each prompt once, every sample's output."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}

    def add(self, prompt_idx: int, choice_idx: int, delta: OutputDelta) -> None:
        """Takes in the counts of one delta."""
        self._num_output_tokens[choice_idx] = delta.num_output_tokens
        cached = max(self._num_cached_tokens.get(prompt_idx, 0), delta.num_cached_tokens)
        self._num_cached_tokens[prompt_idx] = cached

    def to_json(self) -> dict[str, Any]:
        """The `usage` object, as of now."""
        num_output_tokens = sum(self._num_output_tokens.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self._num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }
