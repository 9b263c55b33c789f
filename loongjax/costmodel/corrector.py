"""Learning, while serving, by how much a model's times are off."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from loongjax.costmodel.work import Strategy
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
    prior: float = 1.0
    """How much the belief that predictions are right weighs against what other strategies show: as much as so many of
    them, long observed. Above 0; inf: nothing is learned from others."""

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1.0:
            raise ConfigError(f"weight of a correction must be above 0 and at most 1, got {self.weight}: try 0.1")
        for name in ("max_surprise", "max_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 1.0):
                raise ConfigError(f"{name} of a correction must be a finite number above 1, got {value}: try 2")
        if not self.prior > 0.0:
            raise ConfigError(f"prior of a correction must be above 0, got {self.prior}: try 1")


@dataclasses.dataclass(frozen=True, slots=True)
class _Evidence:
    """What was observed, as exponential weights leave it: those of all observations there ever were sum to 1."""

    log_sum: float = 0.0
    """Weighted sum of the logarithms of actual over predicted times."""
    weight: float = 0.0
    """Sum of the weights: 0 of nothing, towards 1 of much."""


class Corrector:
    """A factor for each strategy and kind, from its own observations as far as they go, and else from those of others.

    Its own are the exponentially weighted geometric mean of actual over predicted times. In logarithms, so that twice
    as long and half as long cancel; one observation moves a factor by at most max_surprise ** weight: a stall or a
    compilation hardly shows, a lasting change is followed.

    What weight its observations leave is given to what other strategies of the kind show, and to 1 (partial pooling, as
    in hierarchical models: Gelman and Hill 2007, chapter 12). With sums L and weights W of the logarithms observed:

        log factor = L_own + (1 - W_own) L_others / (W_others + prior)

    So a strategy that was never tried is taken to be off like those that were, the less the fewer they are, and one
    that is tried often goes by itself.
    """

    def __init__(self, config: CorrectorConfig | None = None) -> None:
        self._config = config or CorrectorConfig()
        self._own: dict[tuple[Kind, Strategy], _Evidence] = {}
        self._of_kind: dict[Kind, _Evidence] = {}
        """Sums over the strategies."""
        self._factors: dict[Kind, dict[Strategy, float]] = {}
        """Those asked for since the last observation of the kind."""

    def copy(self) -> Corrector:
        """One that has learned the same, and goes on apart."""
        other = Corrector(self._config)
        other._own = dict(self._own)
        other._of_kind = dict(self._of_kind)
        other._factors = dict(self._factors)
        return other

    def factor(self, kind: Kind, strategy: Strategy) -> float:
        """What to multiply predictions by; 1 before anything of the kind was observed."""
        factors = self._factors.setdefault(kind, {})
        factor = factors.get(strategy)
        if factor is None:
            factor = factors[strategy] = math.exp(self._log_factor(kind, strategy))
        return factor

    def predicted_over_actual(self) -> dict[tuple[Kind, Strategy], float]:
        """How far the uncorrected predictions are off, by kind and strategy of those that were observed: above 1 they
        are too long.
        """
        return {(kind, strategy): 1.0 / self.factor(kind, strategy) for kind, strategy in self._own}

    def observe(self, kind: Kind, strategy: Strategy, *, predicted_s: float, actual_s: float) -> None:
        """Learns from an iteration: the model's own prediction, before correction, and what it took.

        A time that is not finite or not above 0 says nothing and is passed over.
        """
        self.observe_all(kind, strategy, [predicted_s], [actual_s])

    def observe_all(
        self, kind: Kind, strategy: Strategy, predicted_s: Sequence[float], actual_s: Sequence[float]
    ) -> None:
        """As `observe`, of one iteration after the other: quick, for a simulated decode may be thousands of steps."""
        config, inf = self._config, math.inf
        weight, most_surprise, most = config.weight, math.log(config.max_surprise), math.log(config.max_factor)
        own = self._own.get((kind, strategy), _NOTHING)
        log_sum, own_weight = own.log_sum, own.weight
        others = [evidence for key, evidence in self._own.items() if key[0] == kind and key[1] != strategy]
        log_sums, weights = [each.log_sum for each in others], [each.weight for each in others]
        whole = self._of_kind.get(kind, _NOTHING)
        whole_log_sum, whole_weight = whole.log_sum, whole.weight
        for predicted, actual in zip(predicted_s, actual_s, strict=True):
            if not (0.0 < predicted < inf and 0.0 < actual < inf):
                continue
            of_others = (whole_log_sum - log_sum) / (whole_weight - own_weight + config.prior)
            expected = log_sum + (1.0 - own_weight) * of_others
            surprise = math.log(actual) - math.log(predicted) - expected
            credible = expected + min(max(surprise, -most_surprise), most_surprise)
            log_sum = (1.0 - weight) * log_sum + weight * min(max(credible, -most), most)
            own_weight = (1.0 - weight) * own_weight + weight
            whole_log_sum, whole_weight = math.fsum((*log_sums, log_sum)), math.fsum((*weights, own_weight))
        if own_weight > 0.0:
            self._factors[kind] = {}
            self._own[kind, strategy] = _Evidence(log_sum, own_weight)
            self._of_kind[kind] = _Evidence(whole_log_sum, whole_weight)

    def _log_factor(self, kind: Kind, strategy: Strategy) -> float:
        own = self._own.get((kind, strategy), _NOTHING)
        whole = self._of_kind.get(kind, _NOTHING)
        others = (whole.log_sum - own.log_sum) / (whole.weight - own.weight + self._config.prior)
        return own.log_sum + (1.0 - own.weight) * others


_NOTHING = _Evidence()
