"""A cost model brought to what an engine really took: in a calibration, or in hindsight."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax_profiling.replay.traced_runtime import TracedIteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledModel(CostModel):
    """A `CostModel` whose times are scaled, kind by kind and strategy by strategy, to what an engine took in all."""

    base: CostModel
    prefill_factors: Mapping[Strategy, float]
    """Measured over predicted time. Extends count as prefills."""
    decode_factors: Mapping[Strategy, float]
    prefill_factor: float = 1.0
    """Of strategies that are missing above: that of all prefills together."""
    decode_factor: float = 1.0

    @classmethod
    def of(cls, iterations: Sequence[TracedIteration], base: CostModel, tp: int) -> ScaledModel:
        """From iterations that succeeded: of decodes those that went on, of prefills those that were submitted behind
        something, so that they did not wait for the host; where none of a strategy was, all of them.
        """
        prefills: dict[Strategy, list[TracedIteration]] = collections.defaultdict(list)
        decodes: dict[Strategy, list[TracedIteration]] = collections.defaultdict(list)
        for each in iterations:
            strategy = Strategy(each.group.dop, tp)
            match each.work:
                case PrefillWork():
                    prefills[strategy].append(each)
                case DecodeWork() if each.continues:
                    decodes[strategy].append(each)
        for strategy, some in prefills.items():
            prefills[strategy] = [each for each in some if each.is_behind] or some
        return cls(
            base=base,
            prefill_factors={strategy: _factor(some, base, tp) for strategy, some in prefills.items()},
            decode_factors={strategy: _factor(some, base, tp) for strategy, some in decodes.items()},
            prefill_factor=_factor(list(itertools.chain.from_iterable(prefills.values())), base, tp),
            decode_factor=_factor(list(itertools.chain.from_iterable(decodes.values())), base, tp),
        )

    @property
    def source(self) -> Source:
        return self.base.source

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        return self.prefill_factors.get(strategy, self.prefill_factor) * self.base.prefill_s(strategy, totals)

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        return self.decode_factors.get(strategy, self.decode_factor) * self.base.decode_s(strategy, totals)

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        return self.base.migration_s(num_tokens, tp)


def _factor(iterations: Sequence[TracedIteration], base: CostModel, tp: int) -> float:
    """Measured over predicted time; 1 if either is nothing."""
    measured_s = sum(each.elapsed_s for each in iterations)
    predicted_s = sum(each.predicted_s(base, tp) or 0.0 for each in iterations)
    return measured_s / predicted_s if measured_s > 0.0 and predicted_s > 0.0 else 1.0
