"""The sampler of one batch on one group: its rows, and the token counts that its penalties need, on the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float, UInt32

from loongjax.runtime.sampling import SamplerInput, build_counts, build_rows, sample_step
from loongjax.runtime.sampling.sample import SampleResult


class GroupSampler:
    """Samples for the same rows step after step, and reads nothing back. Used under the group's mesh.

    Requests may leave: what their rows get is nobody's.

    Args:
        sub_batches: the requests of each rank, in rank order.
        num_rows: the bucket of each rank's rows.
        vocab_size: with padding.
        put: places host arrays [n, ...] on the group's devices.
        peers: of the group's mesh, or None.
    """

    def __init__(
        self,
        sub_batches: Sequence[Sequence[SamplerInput]],
        *,
        num_rows: int,
        vocab_size: int,
        put: Callable[[Any], Any],
        peers: UInt32[Array, "n tp 3"] | None = None,
    ) -> None:
        self._variant, rows = build_rows(sub_batches, num_rows)
        self._rows = put(rows)
        self._peers = peers
        self._counts = build_counts(sub_batches, num_rows, vocab_size) if self._variant.has_penalties else None

    def sample(self, logits: Float[Array, "n B V"], positions: Any) -> SampleResult:
        """One token a row; `positions`, int32 [n, B], are those of the tokens to be sampled."""
        result = sample_step(self._variant, logits, positions, self._rows, self._counts, self._peers)
        self._counts = result.counts
        return result
