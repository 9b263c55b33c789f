"""How a request's tokens are chosen, and what comes back with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loongjax.core.field_values import as_biases, as_flag, as_integer, as_integers, as_number, as_strings
from loongjax.errors import RequestError

MAX_LOGPROBS = 20
"""The most alternatives a request may ask for at each position."""

MAX_SEED = 2**63 - 1

_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_MAY_BE_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a client asks of the sampler. Every field is per request, and no field depends on batch mates.

    Numbers of other kinds, such as NumPy's, are stored as Python's own.

    Raises:
        RequestError: a value of the wrong type or out of its range; `param` names the field.
    """

    max_tokens: int | None = 16
    """Tokens to generate at most; None: as many as the context holds; 0: only the prompt's log-probabilities."""
    min_tokens: int = 0
    """Tokens to generate before EOS or a stop token id may be sampled, or a stop string may end the request."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of most probable tokens whose probabilities reach this sum, in (0, 1]."""
    top_k: int = 0
    """Only the k most probable tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as probable as the most probable one, in [0, 1]."""
    seed: int | None = None
    """Equal seeds give equal samples, whatever the batch and the group; None: a fresh one each time."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time the token was generated, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output; above 0."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids, each in [-100, 100]."""
    stop: str | Sequence[str] = ()
    """Strings that end the request, or one; the text is cut before the first, unless `include_stop_str_in_output`.
    Stored as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the request beside the model's EOS ids; they stay active under `ignore_eos`."""
    ignore_eos: bool = False
    """Go on past the model's EOS ids."""
    include_stop_str_in_output: bool = False
    """Leave the stop string or stop token in the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    n: int = 1
    """Independent samples of the same prompt."""
    logprobs: int | None = None
    """Log-probabilities of each generated token, and of this many most probable ones (0: of the token alone)."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            self._convert(name, as_integer)
        for name in _NUMBERS:
            self._convert(name, as_number)
        for name in _FLAGS:
            self._convert(name, as_flag)
        self._convert("logit_bias", as_biases)
        self._convert("stop", as_strings)
        self._convert("stop_token_ids", as_integers)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, low, high in (
            ("max_tokens", 0, None),
            ("min_tokens", 0, None),
            ("temperature", 0.0, None),
            ("top_k", 0, None),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("seed", -MAX_SEED - 1, MAX_SEED),
            ("n", 1, None),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            _check_range(name, getattr(self, name), low, high)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must be above 0 and at most 1, got {self.top_p}", "top_p")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}", "repetition_penalty"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias maps token ids to values from -100 to 100, got {token_id}: {bias}", "logit_bias"
                )
        if any(not text for text in self.stop):
            raise RequestError("stop strings must not be empty", "stop")
        if any(token_id < 0 for token_id in self.stop_token_ids):
            raise RequestError("stop_token_ids must not be negative", "stop_token_ids")

    def _convert(self, name: str, converted: Callable[[str, Any], Any]) -> None:
        value = getattr(self, name)
        if value is not None or name not in _MAY_BE_NONE:
            object.__setattr__(self, name, converted(name, value))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def _check_range(name: str, value: int | float | None, low: int | float, high: int | float | None) -> None:
    if value is None:
        return
    too_low = not value >= low
    too_high = high is not None and not value <= high
    if too_low or too_high or (isinstance(value, float) and not math.isfinite(value)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} must be {bounds}, got {value}", name)
