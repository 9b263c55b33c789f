"""What is measured: one iteration of requests of equal length, on one strategy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy

Kind = Literal["prefill", "decode", "migration"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An iteration to measure; a value that identifies its time on given devices with a given model."""

    kind: Kind
    strategy: Strategy
    """A migration is between two instances: sp 2."""
    batch_size: int = 1
    """Requests."""
    input_len: int
    """Tokens of each request: of its prompt; or whose keys are there before the first decode step; or that migrate."""
    num_masters: int = 0
    """Instances that own a sub-batch of a decode; 0 in other kinds."""
    scales_down: bool = False
    """Whether a prefill leaves its keys on the fewest instances that hold them, instead of evenly on all."""

    def __post_init__(self) -> None:
        assert min(self.batch_size, self.input_len) >= 1, self
        assert (self.num_masters > 0) == (self.kind == "decode"), self
        assert self.num_masters <= min(self.strategy.sp, self.batch_size), self
        assert self.kind == "prefill" or not self.scales_down, self
        assert self.kind != "migration" or self.strategy.sp == 2, self

    def __str__(self) -> str:
        match self.kind:
            case "migration":
                return f"migration of {self.input_len} tokens, tp{self.strategy.tp}"
            case "prefill":
                suffix = ", scaled down" if self.scales_down else ""
            case "decode":
                suffix = f", {self.num_masters} masters"
        return f"{self.kind} of {self.batch_size} x {self.input_len} on {self.strategy}{suffix}"

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.input_len

    @property
    def prefill_totals(self) -> PrefillTotals:
        return PrefillTotals.of_sums(self.num_tokens, self.batch_size * self.input_len**2)

    @property
    def decode_totals(self) -> DecodeTotals:
        """With keys as even as they can be."""
        return DecodeTotals.even(self.strategy, self.batch_size, self.num_tokens + self.batch_size, self.num_masters)
