"""The analytical model: times of iterations, from coefficients that were fitted to measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from loongjax.costmodel.decode_time import DecodeTime
from loongjax.costmodel.measurement import Provenance
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.prefill_time import PaperPrefillTime, RefinedPrefillTime
from loongjax.costmodel.relative_error import FitErrors
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy
from loongjax.errors import ConfigError

Source = Literal["fitted", "roofline"]


@runtime_checkable
class CostModel(Protocol):
    """Predicted times, in seconds; many candidate batches in one call, or one without numpy."""

    @property
    def source(self) -> Source:
        """Whether the times come from measurements or are an estimate."""
        ...

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        """Times of prefills and extends: float64, of the totals' broadcast shape; a number of numbers."""
        ...

    def prefills_s(self, tp: int, totals: PrefillTotals[np.ndarray], out: Float[np.ndarray, "dops batches"]) -> None:
        """Writes `prefill_s` of the same batches on 1, 2, ... instances of `tp` devices."""
        for sp, row in enumerate(out, start=1):
            row[:] = self.prefill_s(Strategy(sp, tp), totals)

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        """Times of decode steps: float64, of the totals' broadcast shape; a number of numbers."""
        ...

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        """Time of moving so many tokens' keys between instances of `tp` devices."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyTimes:
    """Everything known of one strategy, with the errors of each fit (None: coefficients that were not fitted here)."""

    paper_prefill: PaperPrefillTime
    decode: DecodeTime
    refined_prefill: RefinedPrefillTime | None = None
    """What predictions use; None: the paper's form."""
    paper_prefill_errors: FitErrors | None = None
    refined_prefill_errors: FitErrors | None = None
    """Of whole prompts, the refined form's as well."""
    extend_errors: FitErrors | None = None
    """Of the refined form."""
    decode_errors: FitErrors | None = None

    @property
    def prefill(self) -> PaperPrefillTime | RefinedPrefillTime:
        return self.refined_prefill or self.paper_prefill

    def prefill_s[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real]) -> Real:
        """As `CostModel.prefill_s`. The paper's form knows of no keys to read, which take what they take in a decode
        step, as even over the instances as they can be.
        """
        if self.refined_prefill is not None:
            return self.refined_prefill.seconds(totals)
        return self.paper_prefill.seconds(totals) + self.decode.per_key_s / self.decode.sp * totals.past_keys

    def padded_to(self, token_sizes: tuple[int, ...], row_sizes: tuple[int, ...]) -> StrategyTimes:
        """As `FittedModel.padded_to`."""
        prefill, decode = self.refined_prefill, self.decode
        if prefill is not None and prefill.token_buckets:
            prefill = dataclasses.replace(prefill, token_buckets=token_sizes)
        if decode.row_buckets:
            decode = dataclasses.replace(decode, row_buckets=row_sizes)
        return dataclasses.replace(self, refined_prefill=prefill, decode=decode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedModel(CostModel):
    """A `CostModel` of measured coefficients.

    Every method raises ConfigError for what was not measured.
    """

    provenance: Provenance
    strategies: Mapping[Strategy, StrategyTimes]
    migration: MigrationTime | None = None
    """None: no migration was measured."""
    migration_errors: FitErrors | None = None

    @property
    def source(self) -> Source:
        return "fitted"

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        return self.times(strategy).prefill_s(totals)

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        return self.times(strategy).decode.seconds(totals)

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        if self.migration is None:
            raise ConfigError("the cost model has no migration time: measure migrations, and fit again")
        return self.migration.seconds(num_tokens, self.provenance.model, tp)

    def padded_to(self, token_sizes: tuple[int, ...], row_sizes: tuple[int, ...]) -> FittedModel:
        """The same coefficients, for an engine that pads to these sizes: a form that pads counts what is computed,
        whatever the sizes were where it was measured. Forms without padding stay as they are.
        """
        padded = {strategy: times.padded_to(token_sizes, row_sizes) for strategy, times in self.strategies.items()}
        return dataclasses.replace(self, strategies=padded)

    def times(self, strategy: Strategy) -> StrategyTimes:
        """What is known of this strategy."""
        if strategy not in self.strategies:
            self.require([strategy])
        return self.strategies[strategy]

    def require(self, strategies: Iterable[Strategy]) -> None:
        """Raises ConfigError unless all of these were measured."""
        missing = [str(strategy) for strategy in strategies if strategy not in self.strategies]
        if missing:
            known = ", ".join(map(str, sorted(self.strategies))) or "none"
            raise ConfigError(
                f"the cost model knows nothing of {', '.join(missing)}, only of {known}: "
                "measure those too, and fit again"
            )
