"""Runs scripted iterations on a runtime, with the accounting that the engine would do: one at a time, or one behind the
other where the test says that the first does not land yet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from loongjax.config import EngineConfig
from loongjax.core.cluster import Group
from loongjax.core.iteration import (
    Completion,
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
)
from loongjax.core.plan import TokenInterval
from loongjax.core.request import Request, TokenLogprobs
from loongjax.core.sampling import SamplingParams
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.build import build_runtime
from loongjax.runtime.local import LocalRuntime

GOLDEN = Path(__file__).parents[1] / "golden"
LOGPROB_TOLERANCE = 2e-3
CLOSE_MARGIN = 1e-3

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, logprobs=0, prompt_logprobs=0)


def small_runtime(checkpoint: Path, cache_dir: Path, **settings: Any) -> LocalRuntime:
    """A runtime on the virtual CPU devices, with buckets small enough to compile quickly."""
    defaults: dict[str, Any] = {
        "num_slots": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "page_size": 16,
        "warm_up": False,
    }
    config = EngineConfig(checkpoint=str(checkpoint), compilation_cache_dir=str(cache_dir), **(defaults | settings))
    return build_runtime(config)


class Driver:
    """A tiny engine without a scheduler: the test is the scheduler."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self.runtime = runtime
        self.kv = KVCache(runtime.shape)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, Sequence[TokenLogprobs]] = {}
        self._ids = itertools.count()
        self._in_flight: list[Iteration] = []
        self._completions: dict[int, Completion] = {}
        """Of iterations that the test has not landed yet."""
        self._last_decode: tuple[Group, dict[int, list[str]], dict[str, int]] | None = None

    def add(self, name: str, prompt: Sequence[int], sampling: SamplingParams = GREEDY, *, seed: int = 0) -> None:
        self.requests[name] = Request(
            request_id=name,
            prompt_token_ids=tuple(int(token) for token in prompt),
            sampling=sampling,
            max_tokens=1000 if sampling.max_tokens is None else sampling.max_tokens,
            seed=seed,
            stop_token_ids=frozenset(sampling.stop_token_ids),
        )
        self.tokens[name] = []
        self.logprobs[name] = []

    def prefill(
        self, instances: Sequence[int], kept: Mapping[str, Sequence[tuple[int, int, int]]], *, lands: bool = True
    ) -> None:
        """kept: by request, (instance, begin, end) in token order; an end of -1 is the number of tokens."""
        inputs = []
        for name, intervals in kept.items():
            request = self.requests[name]
            token_ids = np.array([*request.prompt_token_ids, *self.tokens[name]], np.int32)
            placed = tuple(TokenInterval(i, begin, len(token_ids) if end < 0 else end) for i, begin, end in intervals)
            wants = request.sampling.prompt_logprobs is not None and name not in self.prompt_logprobs
            inputs.append(PrefillInput(request, token_ids, self.kv.keep(name, placed), wants))
        self.submit(PrefillIteration(next(self._ids), Group.of(instances), tuple(inputs)))
        if lands:
            self.land()

    def decode(
        self,
        instances: Sequence[int],
        sub_batches: Mapping[int, Sequence[str]],
        *,
        steps: int = 1,
        lands: bool = True,
    ) -> None:
        group = Group.of(instances)
        for _ in range(steps):
            lengths = {name: len(self.tokens[name]) for names in sub_batches.values() for name in names}
            continues = self._last_decode is not None and self._goes_on(group, sub_batches, lengths, *self._last_decode)
            batches = tuple(
                DecodeSubBatch(master, tuple(self._decode_input(name, master, continues) for name in names))
                for master, names in sub_batches.items()
            )
            self.submit(DecodeIteration(next(self._ids), group, batches, continues))
            if lands:
                self.land()
            self._last_decode = group, {master: list(names) for master, names in sub_batches.items()}, lengths

    def extend(self, instance: int, chunks: Mapping[str, int], *, lands: bool = True) -> None:
        """chunks: by request, how many of its tokens without keys are computed; -1: all of them."""
        inputs = []
        for name, wanted in chunks.items():
            request = self.requests[name]
            is_awaited = self._is_awaited(name)
            tokens = np.array([*request.prompt_token_ids, *self.tokens[name], *[0] * is_awaited], np.int32)
            position = self.kv.num_tokens(name) if name in self.kv else 0
            end = len(tokens) if wanted < 0 else position + wanted
            slots = self.kv.extend(name, instance, end - position)
            (table,) = self.kv.tables(name)
            output = tuple(self.tokens[name])
            is_sampled = end == len(tokens)
            inputs.append(
                ExtendInput(request, tokens[position:end], position, slots, table, output, is_sampled, is_awaited)
            )
        self.submit(ExtendIteration(next(self._ids), Group((instance,)), tuple(inputs)))
        if lands:
            self.land()

    def migrate(self, name: str, source: int, target: int, num_tokens: int) -> None:
        slots = self.kv.migrate(name, source, target, num_tokens)
        self.run(MigrateIteration(next(self._ids), source, target, *slots))

    def preempt(self, name: str) -> None:
        self.kv.release(name)
        self._last_decode = None

    def finish(self, *names: str) -> None:
        """They leave; what decodes with them goes on."""
        for name in names:
            self.kv.release(name)
        self.kv.check_integrity()

    def run(self, iteration: Iteration) -> Completion:
        self.submit(iteration)
        return self.land()

    def submit(self, iteration: Iteration) -> None:
        if not isinstance(iteration, DecodeIteration):
            self._last_decode = None
        self._in_flight.append(iteration)
        self.runtime.submit(iteration)

    def land(self) -> Completion:
        """Takes in the first of what is in flight."""
        iteration = self._in_flight.pop(0)
        completion = self.wait_for(iteration.iteration_id)
        assert completion.error is None, completion.error
        for token in completion.tokens:
            if token.token_id >= 0:
                self.tokens[token.request_id].append(token.token_id)
            if token.logprobs is not None:
                self.logprobs[token.request_id].append(token.logprobs)
            if token.prompt_logprobs is not None:
                self.prompt_logprobs[token.request_id] = token.prompt_logprobs
        return completion

    def wait_for(self, iteration_id: int) -> Completion:
        while iteration_id not in self._completions:
            for completion in self.runtime.completions(None):
                self._completions[completion.iteration_id] = completion
        self.kv.check_integrity()
        return self._completions.pop(iteration_id)

    def _goes_on(
        self,
        group: Group,
        sub_batches: Mapping[int, Sequence[str]],
        lengths: Mapping[str, int],
        last_group: Group,
        last_batches: Mapping[int, Sequence[str]],
        last_lengths: Mapping[str, int],
    ) -> bool:
        """Whether it is the last decode a token later, without those who have left."""
        return group == last_group and all(
            list(names) == [name for name in last_batches.get(master, ()) if name in names]
            and all(lengths[name] == last_lengths[name] + 1 for name in names)
            for master, names in sub_batches.items()
        )

    def _decode_input(self, name: str, master: int, continues: bool) -> DecodeInput:
        request = self.requests[name]
        output = tuple(self.tokens[name])
        is_awaited = self._is_awaited(name)
        position = len(request.prompt_token_ids) + len(output) - 1 + is_awaited
        slot = self.kv.append(name, master)
        return DecodeInput(request, () if continues else output, position, slot, self.kv.tables(name), is_awaited)

    def _is_awaited(self, name: str) -> bool:
        """Whether something in flight samples its next token."""
        return any(name in _sampled_by(iteration) for iteration in self._in_flight)


def _sampled_by(iteration: Iteration) -> list[str]:
    match iteration:
        case PrefillIteration():
            return [item.request.request_id for item in iteration.inputs]
        case DecodeIteration():
            return [item.request.request_id for batch in iteration.sub_batches for item in batch.inputs]
        case ExtendIteration():
            return [item.request.request_id for item in iteration.inputs if item.is_sampled]
    return []


def poison_pool(runtime: LocalRuntime) -> None:
    """Fills the whole pool with NaN, so that a read of any slot that was never written shows."""
    group = Group(runtime.shape.all_instances)
    view = runtime._kv_pool.view(group)
    runtime._kv_pool.replace(group, jnp.full_like(view, jnp.nan, device=view.sharding))


class Golden:
    """transformers' answer for one variant of `tests.checkpoints`."""

    def __init__(self, variant: str) -> None:
        with np.load(GOLDEN / f"{variant}.npz") as file:
            self._arrays = dict(file)

    def prompt(self, i: int) -> list[int]:
        return self._arrays[f"prompt_{i}"].tolist()

    def check(self, driver: Driver, name: str, i: int) -> None:
        """Equal greedy tokens up to the first close margin, and log-probabilities within tolerance up to there.

        Those of the prompt as well if the request asks for them.
        """
        tokens = driver.tokens[name]
        greedy, margins = self._arrays[f"greedy_{i}"], self._arrays[f"margins_{i}"]
        count = min(len(tokens), len(greedy))
        close = np.flatnonzero(margins[:count] <= CLOSE_MARGIN)
        count = int(close[0]) if len(close) else count
        assert count > 0
        assert tokens[:count] == greedy[:count].tolist()
        found = [item.logprob for item in driver.logprobs[name][:count]]
        expected = self._arrays[f"greedy_logprobs_{i}"][:count]
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        if driver.requests[name].sampling.prompt_logprobs is None:
            return
        found = [item.logprob for item in driver.prompt_logprobs[name]]
        np.testing.assert_allclose(found, self._arrays[f"prompt_logprobs_{i}"], rtol=0, atol=LOGPROB_TOLERANCE)
