"""A request, and the events and records of its life."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence

import numpy as np

from loongjax.core.cluster import InstanceId
from loongjax.core.field_values import as_number
from loongjax.core.sampling import SamplingParams
from loongjax.errors import RequestError

LEAST_WISH_S = 1e-6
"""No token comes sooner. A request weighs as much as its wish is short, and weights are squared and summed."""


class FinishReason(enum.StrEnum):
    """How a request ended. Every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServiceLevel:
    """How soon a client wants its tokens. A wish that the scheduler weighs, not a limit at which a request ends.

    Raises:
        RequestError: a time that is no number, not finite, or below `LEAST_WISH_S`; `param` names the field.
    """

    ttft_s: float | None = None
    """From arrival to the first token, in seconds; None: no wish."""
    tpot_s: float | None = None
    """Between tokens after the first, on average, in seconds; None: no wish."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, as_number(name, value))
            if not LEAST_WISH_S <= value < math.inf:
                raise RequestError(
                    f"{name} must be a finite number of seconds, at least {LEAST_WISH_S:g}, got {value}", name
                )


NO_SLO = ServiceLevel()
"""No wishes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample of one prompt, as the engine accepts it. A client's request with n > 1 becomes n of these."""

    request_id: str
    """Unique among live requests."""
    prompt_token_ids: tuple[int, ...]
    """At least one."""
    sampling: SamplingParams
    max_tokens: int
    """The output limit in tokens, resolved: `sampling.max_tokens` and the context length, whichever is less."""
    seed: int
    """The sampler's seed, resolved."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the request: `sampling.stop_token_ids`, and the model's EOS ids unless `ignore_eos`."""
    arrival_s: float = 0.0
    """When it was accepted, on the engine's clock, in seconds."""
    priority: int = 0
    """Lower goes first; how much it weighs is for the policy."""
    slo: ServiceLevel = NO_SLO

    @functools.cached_property
    def prompt_vocabulary(self) -> np.ndarray:
        """The prompt's distinct token ids, int32, ascending."""
        return np.unique(np.array(self.prompt_token_ids, np.int32))


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token, and of the most probable ones at its position.

    They are of the model's own distribution: before temperature, penalties, bias and filters.
    """

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most probable first; as many as were asked for."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of a request's life in one group: the elastic history is a tuple of these."""

    kind: str
    """"prefill", "decode", "extend" (chunks of the prompt) or "migrate"."""
    instances: tuple[InstanceId, ...]
    """The group, in canonical order; its length is the degree of parallelism."""
    masters: tuple[InstanceId, ...]
    """The group's masters (decode), or the instances that kept keys (prefill, extend)."""
    num_tokens: int
    """Tokens computed in it: prompt tokens of a prefill or extend, generated tokens of a decode."""

    @property
    def dop(self) -> int:
        return len(self.instances)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a request went, on the engine's clock, in seconds. Preemptions count as what they interrupt."""

    queue_s: float
    """From its acceptance to the submission of its first prefill, or to its end if that came first."""
    prefill_s: float = 0.0
    """From there to its first token."""
    decode_s: float = 0.0
    """From its first token to its last."""

    @property
    def inference_s(self) -> float:
        return self.prefill_s + self.decode_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestEvent:
    """What happened to one request since its last event. `finish_reason` is set on the last one, and only there."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    """Newly generated tokens, the stop token included."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids` if the request asked for them."""
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    """One for every prompt token but the first, on the first event of a request that asked for them."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop token that ended the request."""
    error: str | None = None
    """What went wrong, with FinishReason.ERROR."""
    history: tuple[Phase, ...] = ()
    """The request's elastic history, on the last event."""
    timings: Timings | None = None
    """On the last event."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed because their keys were in the pool."""
