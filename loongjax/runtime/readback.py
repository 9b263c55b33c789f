"""Device results as host values. Runs in the readback lanes, never in the dispatching thread."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from loongjax.core.iteration import PrefillIteration, SampledToken
from loongjax.core.request import Request, TokenLogprobs
from loongjax.parallel.striped import unstripe
from loongjax.runtime.packing import PackedPrefill
from loongjax.runtime.sampling.sample import SampleResult


class PendingTokens:
    """Sampled tokens on their way to the host.

    Args:
        requests: by rank, the requests of its rows.
        result: arrays [n, B, ...]; log-probabilities are read only if a request asks for them.
    """

    def __init__(self, requests: Sequence[Sequence[Request]], result: SampleResult) -> None:
        self._requests = requests
        self._result = result
        self._wants_logprobs = any(r.sampling.logprobs is not None for rank in requests for r in rank)
        for array in self._arrays():
            array.copy_to_host_async()

    def read(self) -> tuple[SampledToken, ...]:
        """Waits for the devices."""
        token_ids, *rest = (np.asarray(array) for array in self._arrays())
        return tuple(
            SampledToken(
                request.request_id,
                int(token_ids[rank, row]),
                _token_logprobs(int(token_ids[rank, row]), request.sampling.logprobs, [a[rank, row] for a in rest])
                if request.sampling.logprobs is not None
                else None,
            )
            for rank, requests in enumerate(self._requests)
            for row, request in enumerate(requests)
        )

    def _arrays(self) -> list[jax.Array]:
        result = self._result
        if not self._wants_logprobs:
            return [result.token_ids]
        return [result.token_ids, result.logprobs, result.ranks, result.top_ids, result.top_logprobs]


class PendingPromptLogprobs:
    """A prefill's prompt log-probabilities on their way to the host.

    Args:
        iteration: the prefill.
        packed: its layout.
        result: log-probability, rank, top ids and top log-probabilities, each [n, T, ...].
    """

    def __init__(self, iteration: PrefillIteration, packed: PackedPrefill, result: Sequence[jax.Array]) -> None:
        self._iteration = iteration
        self._starts = packed.starts
        self._result = result

    def read(self) -> dict[str, tuple[TokenLogprobs, ...]]:
        """Waits for the devices; by request id, one for each prompt token but the first."""
        arrays = [unstripe(np.asarray(array)) for array in self._result]
        found = {}
        for item, start in zip(self._iteration.inputs, self._starts, strict=True):
            if item.wants_prompt_logprobs:
                prompt = item.request.prompt_token_ids
                found[item.request.request_id] = tuple(
                    _token_logprobs(
                        token_id, item.request.sampling.prompt_logprobs, [array[start + i] for array in arrays]
                    )
                    for i, token_id in enumerate(prompt[1:])
                )
        return found


def _token_logprobs(token_id: int, num_top: int | None, values: Sequence[np.ndarray]) -> TokenLogprobs:
    logprob, rank, top_ids, top_logprobs = values
    num_top = min(num_top or 0, len(top_ids))
    top = tuple(zip(top_ids[:num_top].tolist(), top_logprobs[:num_top].tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprob), int(rank), top)
