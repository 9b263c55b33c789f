"""What a front end (the HTTP server, `LLM`) sees of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from loongjax.core.request import NO_SLO, FinishReason, Phase, ServiceLevel, Timings, TokenLogprobs
from loongjax.core.sampling import SamplingParams
from loongjax.costmodel.corrector import Kind
from loongjax.costmodel.work import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputDelta:
    """What is new of one sample since its last delta. The last one of a sample has a finish reason."""

    index: int = 0
    """Which of the n samples."""
    text: str = ""
    """Text that can no longer change: never half a character, never the beginning of a possible stop string."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """Generated so far."""
    num_cached_tokens: int = 0
    history: tuple[Phase, ...] = ()
    """The elastic history, on the last delta."""
    timings: Timings | None = None
    """On the last delta."""
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a front end must know of the model behind the engine."""

    checkpoint: str
    """Path, or name of the model that ships."""
    max_model_len: int
    max_whole_prompt_len: int | None = None
    """Tokens of the longest prompt that can be computed in one piece, as it has to be if its log-probabilities are
    wanted or `max_tokens` is 0; None: any prompt can."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float | int]
    """temperature, top_p, top_k, min_p, repetition_penalty of generation_config.json, as far as it names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine. Counters only grow."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_slots_used: tuple[int, ...] = ()
    """Tokens of capacity in use, by instance (whole pages)."""
    kv_slots: tuple[int, ...] = ()
    page_size: int = 1
    num_pages: int = 0
    """By instance."""
    prefill_dop: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Prefill iterations, by degree of parallelism."""
    decode_dop: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Decode steps, likewise."""
    num_scale_ups: int = 0
    """Times a decode group gained an instance; not by who was prefilled on instances of two groups, or whose keys were
    moved."""
    num_scale_downs: int = 0
    """Times a prefill kept its keys on fewer instances than computed them, or a decode group lost one."""
    kv_migrated_bytes: int = 0
    num_recompiles: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_iterations: int = 0
    iteration_tokens: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Prefill and decode iterations by the tokens of each (computed of prompts, and generated), rounded up to a power
    of two."""
    num_iteration_tokens: int = 0
    """Sum of those tokens, not rounded: what was recomputed counts again."""
    predicted_over_actual: Mapping[tuple[Kind, Strategy], float] = dataclasses.field(default_factory=dict)
    """How far predicted times of iterations are off, by kind and strategy: above 1 they are too long. The scheduler
    divides predictions by it. Empty without a cost model, and before anything was observed."""


@runtime_checkable
class EngineClient(Protocol):
    """An engine as its front ends use it, from one asyncio loop."""

    @property
    def info(self) -> ModelInfo: ...

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        slo: ServiceLevel = NO_SLO,
    ) -> AsyncIterator[OutputDelta]:
        """Runs one request of `sampling.n` samples; deltas of different samples interleave. Lower priorities go first.

        Closing the iterator, or cancelling the task that reads it, aborts the request and frees its slots.

        Raises (at the first `__anext__`, before anything is accepted):
            ContextLengthError: the prompt, or prompt and `max_tokens`, exceed `max_model_len`, or the prompt exceeds
                `max_whole_prompt_len` and cannot be cut.
            RequestError: token ids outside the vocabulary, an empty prompt.
            QueueFullError: too many requests wait.
            EngineDeadError: the engine is dead or draining. Also raised in mid-stream if the engine dies.
        """
        ...

    async def stats(self) -> EngineStats:
        """Asks the step loop for a snapshot. Raises EngineDeadError."""
        ...

    async def check_health(self, timeout_s: float = 10.0) -> None:
        """Makes sure that the step loop answers, and that no iteration is overdue (`EngineConfig.iteration_timeout_s`).

        Raises EngineDeadError if it is dead or wedged, or if devices have not answered for too long; the message then
        names their instances and the time. Devices may come back, and other groups go on meanwhile, so nothing ends by
        itself: an orchestrator should send no new requests here, and start the process anew if this goes on failing.
        """
        ...

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing more, and waits until all requests have ended; aborts those left when time is over."""
        ...

    async def close(self) -> None:
        """Stops the engine. Live requests end with EngineDeadError."""
        ...
