"""Learning, while serving, by how much a model's times are off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.work import DecodeTotals, Numbers, PrefillTotals, Strategy
from loongjax.errors import ConfigError

Kind = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectorConfig:
    """How fast and how far predictions are corrected.

    Raises:
        ConfigError: a value out of its range.
    """

    weight: float = 0.1
    """Of the newest observation, above 0 and at most 1."""
    max_surprise: float = 2.0
    """An observation that is off by more than this factor, after correction, counts as if by this much; above 1."""
    max_factor: float = 8.0
    """Corrections stay between its inverse and this; above 1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1.0:
            raise ConfigError(f"weight of a correction must be above 0 and at most 1, got {self.weight}: try 0.1")
        for name in ("max_surprise", "max_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 1.0):
                raise ConfigError(f"{name} of a correction must be a finite number above 1, got {value}: try 2")


class Corrector:
    """A factor for each strategy and kind: the exponentially weighted geometric mean of actual over predicted times.

    In logarithms, so that twice as long and half as long cancel. One observation moves a factor by at most
    max_surprise ** weight: a stall or a compilation hardly shows, a lasting change is followed.
    """

    def __init__(
        self, config: CorrectorConfig | None = None, *, factors: Mapping[tuple[Kind, Strategy], float] | None = None
    ) -> None:
        """`factors`: to go on from, as another corrector's `factors` gave them."""
        self._config = config or CorrectorConfig()
        self._log_factors = {key: self._bounded(math.log(factor)) for key, factor in (factors or {}).items()}

    @property
    def factors(self) -> dict[tuple[Kind, Strategy], float]:
        """What was learned: a factor for each kind and strategy that was observed."""
        return {key: math.exp(log_factor) for key, log_factor in self._log_factors.items()}

    def factor(self, kind: Kind, strategy: Strategy) -> float:
        """What to multiply predictions by; 1 before anything was observed."""
        return math.exp(self._log_factors.get((kind, strategy), 0.0))

    def predicted_over_actual(self, kind: Kind, strategy: Strategy) -> float:
        """How far the uncorrected predictions are off: above 1 they are too long."""
        return 1.0 / self.factor(kind, strategy)

    def observe(self, kind: Kind, strategy: Strategy, *, predicted_s: float, actual_s: float) -> None:
        """Learns from an iteration: the model's own prediction, before correction, and what it took.

        A time that is not finite or not above 0 says nothing and is passed over.
        """
        if not (0.0 < predicted_s < math.inf and 0.0 < actual_s < math.inf):
            return
        old = self._log_factors.get((kind, strategy), 0.0)
        most = math.log(self._config.max_surprise)
        surprise = math.log(actual_s) - math.log(predicted_s) - old
        new = old + self._config.weight * min(max(surprise, -most), most)
        self._log_factors[kind, strategy] = self._bounded(new)

    def _bounded(self, log_factor: float) -> float:
        bound = math.log(self._config.max_factor)
        return min(max(log_factor, -bound), bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectedModel:
    """A `CostModel` whose iteration times are multiplied by what a corrector has learned."""

    base: CostModel
    corrector: Corrector

    @property
    def source(self) -> Source:
        return self.base.source

    def prefill_s(self, strategy: Strategy, totals: PrefillTotals) -> np.ndarray:
        return self.corrector.factor("prefill", strategy) * self.base.prefill_s(strategy, totals)

    def decode_s(self, strategy: Strategy, totals: DecodeTotals) -> np.ndarray:
        return self.corrector.factor("decode", strategy) * self.base.decode_s(strategy, totals)

    def migration_s(self, num_tokens: Numbers, tp: int) -> np.ndarray:
        return self.base.migration_s(num_tokens, tp)

    def tipping_tokens(self, strategy: Strategy) -> float:
        return self.base.tipping_tokens(strategy)

    def tipping_rows(self, strategy: Strategy) -> float:
        return self.base.tipping_rows(strategy)
