"""Device results as host values. Runs in the readback lanes, never where programs are dispatched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from loongjax.core.iteration import PrefillIteration, SampledToken
from loongjax.core.prompt_logprobs import PromptLogprobs
from loongjax.core.request import Request
from loongjax.parallel.striped import unstripe
from loongjax.runtime.packing import PackedPrefill
from loongjax.runtime.sampling import LogprobArrays
from loongjax.runtime.sampling.sample import SampleResult


class PendingTokens:
    """Sampled tokens on their way to the host.

    Args:
        requests: by rank, those that get one, by their rows.
        result: arrays [n, B, ...]; log-probabilities are read only if a request asks for them.
    """

    def __init__(self, requests: Sequence[Mapping[int, Request]], result: SampleResult) -> None:
        self._requests = requests
        self._token_ids = result.token_ids
        wants_logprobs = any(
            request.sampling.logprobs is not None for by_row in requests for request in by_row.values()
        )
        self._logprobs = result.logprobs if wants_logprobs else None
        for array in jax.tree.leaves((self._token_ids, self._logprobs)):
            array.copy_to_host_async()

    def read(self) -> tuple[SampledToken, ...]:
        """Waits for the devices."""
        token_ids, logprobs = jax.tree.map(np.asarray, (self._token_ids, self._logprobs))
        tokens = []
        for rank, by_row in enumerate(self._requests):
            for row, request in by_row.items():
                token_id, num_top = int(token_ids[rank, row]), request.sampling.logprobs
                scored = None if num_top is None else logprobs.at((rank, row), token_id, num_top)
                tokens.append(SampledToken(request.request_id, token_id, scored))
        return tuple(tokens)


class PendingPromptLogprobs:
    """A prefill's prompt log-probabilities on their way to the host.

    Args:
        iteration: the prefill.
        packed: its layout.
        result: arrays [n, T, ...].
    """

    def __init__(self, iteration: PrefillIteration, packed: PackedPrefill, result: LogprobArrays) -> None:
        self._iteration = iteration
        self._packed = packed
        self._result = result

    def read(self) -> dict[str, PromptLogprobs]:
        """Waits for the devices; by request id."""
        num_tokens = sum(len(item.token_ids) for item in self._iteration.inputs)
        scores = LogprobArrays(*(unstripe(np.asarray(array), num_tokens) for array in self._result))
        found = {}
        for item, start in zip(self._iteration.inputs, self._packed.starts, strict=True):
            num_top = item.request.sampling.prompt_logprobs
            if item.wants_prompt_logprobs and num_top is not None:
                following = item.token_ids[1 : len(item.request.prompt_token_ids)]
                found[item.request.request_id] = scores.from_row(start, following, num_top)
        return found
