"""How much work a request is, as a router can know it: before it has run."""

from __future__ import annotations

from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy

TYPICAL_ROWS = 16
"""Requests that a decode step is taken to serve: they share its cost."""
_FIRST_GUESS = 256.0
_WEIGHT = 0.02
"""Of the newest output in the running mean."""


class LoadPredictor:
    """Predicts instance-seconds: the prefill on one instance, and a share of as many decode steps as outputs have had
    tokens on average so far.
    """

    def __init__(self, cost_model: CostModel, tp: int) -> None:
        """Knows no outputs yet."""
        self._cost_model = cost_model
        self._strategy = Strategy(1, tp)
        self._mean_output_len = _FIRST_GUESS

    def seconds(self, prompt_len: int) -> float:
        """Of one request with so many prompt tokens."""
        prefill = PrefillTotals.of_sums(prompt_len, prompt_len**2)
        decode = DecodeTotals.even(self._strategy, TYPICAL_ROWS, TYPICAL_ROWS * prompt_len)
        prefill_s = self._cost_model.prefill_s(self._strategy, prefill).item()
        decode_s = self._cost_model.decode_s(self._strategy, decode).item()
        return prefill_s + decode_s / TYPICAL_ROWS * self._mean_output_len

    def observe(self, output_len: int) -> None:
        """Learns from a request that has ended."""
        self._mean_output_len += _WEIGHT * (output_len - self._mean_output_len)
