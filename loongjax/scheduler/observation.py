"""What the engine tells a policy of what has happened, so that it can learn: values that a plan never sees."""

from __future__ import annotations

import dataclasses

from loongjax.core.plan import Decode, Extend, Prefill
from loongjax.core.request import FinishReason
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IterationEnded:
    """A prefill, an extend or a decode step that succeeded, and the time that it took."""

    plan: Prefill | Decode | Extend
    strategy: Strategy
    work: PrefillWork | DecodeWork
    elapsed_s: float
    """From its submission, or from the end of the iteration before it on the same group if that came later."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestEnded:
    """A request's last event."""

    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason


Observation = IterationEnded | RequestEnded
