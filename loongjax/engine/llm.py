"""Offline generation: prompts in, outputs out, in the calling thread."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from loongjax.config import EngineConfig
from loongjax.core.request import NO_SLO, Request, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.engine.admission import admit
from loongjax.engine.client import EngineStats
from loongjax.engine.interrupts import deferred_interrupt
from loongjax.engine.outputs import RequestOutput, SampleCollector
from loongjax.engine.parts import EngineParts
from loongjax.engine.prompts import Prompt, as_prompts, one_each
from loongjax.engine.thread_switches import frequent_thread_switches
from loongjax.errors import EngineDeadError

_STEP_TIMEOUT_S = 10.0


class LLM:
    """A model to generate with, on this process's devices.

    >>> with LLM("path/to/checkpoint", tp=2) as llm:
    ...     [output] = llm.generate("Once upon a time", SamplingParams(max_tokens=32))
    ...     print(output.text, output.history)
    """

    def __init__(
        self, checkpoint: str | None = None, *, tp: int = 1, num_instances: int | None = None, **settings: Any
    ) -> None:
        """Loads a checkpoint.

        Args:
            checkpoint: folder of a checkpoint; None: the small model that ships with the project.
            tp: devices of one elastic instance.
            num_instances: elastic instances; None: as many as the devices make.
            settings: any other field of `EngineConfig`.

        Raises:
            ConfigError: a setting that cannot work.
            CheckpointError: the checkpoint cannot be read.
        """
        from loongjax.engine.build import build_engine  # here, because it imports jax and the model

        config = EngineConfig(checkpoint=checkpoint, tp=tp, num_instances=num_instances, **settings)
        self._set_up(build_engine(config), config.seed)

    @classmethod
    def from_parts(cls, parts: EngineParts, *, seed: int | None = None) -> LLM:
        """Over an engine that is built already; `close` closes it."""
        llm = cls.__new__(cls)
        llm._set_up(parts, seed)
        return llm

    def _set_up(self, parts: EngineParts, seed: int | None) -> None:
        self._core = parts.core
        self._tokenizer = parts.tokenizer
        self._seeds = random.Random(seed)
        self._numbers = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the devices back. A second time it does nothing; `generate` raises EngineDeadError from then on."""
        self._core.close()

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._core.stats()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Iterable[int] = 0,
        slo: ServiceLevel | Iterable[ServiceLevel] = NO_SLO,
    ) -> list[RequestOutput]:
        """Generates for every prompt; one output each, in the order of the prompts.

        Not every failure is raised: a sample whose own iterations fail again and again ends with FinishReason.ERROR,
        with what went wrong in `error` and the tokens that it had until then.

        Args:
            prompts: texts or lists of token ids, or only one of these; lists may be arrays of integers or generators.
            params: for all of them, or one for each; None: what the checkpoint's generation_config.json recommends.
            use_tqdm: show a progress bar.
            priority: for all of them, or one for each; lower goes first.
            slo: how soon tokens are wanted, for all of them, or one for each.

        Raises:
            RequestError: a prompt or its parameters cannot be served, ContextLengthError if they are too long. Raised
                before anything runs.
            EngineDeadError: the engine failed as a whole; the outputs are lost.
        """
        jobs = self._admit(prompts, params, priority, slo)
        by_request = {sample.request_id: (job, sample) for job in jobs for sample in job.samples}
        unsent = collections.deque(request for job in jobs for request in job.requests)
        num_left = len(jobs)
        with (
            tqdm(total=len(jobs), disable=not use_tqdm, desc="prompts", unit="prompt") as bar,
            frequent_thread_switches(),
            deferred_interrupt(self._core.wake) as release_interrupt,
        ):
            try:
                while num_left:
                    while unsent and self._core.has_queue_place:
                        self._core.add(unsent.popleft())
                    for event in self._core.step(_STEP_TIMEOUT_S):
                        job, sample = by_request[event.request_id]
                        if sample.push(event):
                            self._core.abort(event.request_id)
                        if sample.is_finished and job.is_finished:
                            num_left -= 1
                            bar.update()
                    if self._core.death is not None:
                        raise EngineDeadError(self._core.death)
                    release_interrupt()
            except BaseException:
                self._abort(by_request)
                raise
        return [job.output() for job in jobs]

    def _admit(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None,
        priority: int | Iterable[int],
        slo: ServiceLevel | Iterable[ServiceLevel],
    ) -> list[_Job]:
        listed = as_prompts(prompts)
        if params is None:
            params = dataclasses.replace(SamplingParams(), **dict(self._core.info.default_sampling))
        return [
            self._job(*job)
            for job in zip(
                listed,
                one_each(params, SamplingParams, len(listed), "params"),
                one_each(priority, int, len(listed), "priority"),
                one_each(slo, ServiceLevel, len(listed), "slo"),
                strict=True,
            )
        ]

    def _job(self, prompt: Prompt, sampling: SamplingParams, priority: int, slo: ServiceLevel) -> _Job:
        info = self._core.info
        requests = admit(
            self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
            sampling,
            request_id=f"prompt-{next(self._numbers)}",
            info=info,
            seeds=self._seeds,
            priority=priority,
            slo=slo,
        )
        samples = tuple(
            SampleCollector(index, request, self._tokenizer, frozenset(info.eos_token_ids))
            for index, request in enumerate(requests)
        )
        return _Job(prompt if isinstance(prompt, str) else None, requests, samples)

    def _abort(self, request_ids: Iterable[str]) -> None:
        """Leaves the engine without these requests, and as good as new if it lives."""
        for request_id in request_ids:
            self._core.abort(request_id)
        while self._core.death is None and not self._core.is_idle:
            self._core.step(_STEP_TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One prompt on its way."""

    prompt: str | None
    requests: tuple[Request, ...]
    samples: tuple[SampleCollector, ...]

    @property
    def is_finished(self) -> bool:
        return all(sample.is_finished for sample in self.samples)

    def output(self) -> RequestOutput:
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.requests[0].prompt_token_ids,
            prompt_logprobs=self.samples[0].prompt_logprobs,
            outputs=tuple(sample.result() for sample in self.samples),
        )
