"""What an iteration has to do, in the numbers that its time depends on.

Totals are sums (or maxima) over the requests of a batch, so a search over many candidate batches gets them from prefix
sums and asks for all times in one call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from loongjax.errors import ConfigError

Numbers = int | float | Sequence[int] | Sequence[float] | np.number | np.ndarray
"""One number a batch, or the number of a single batch."""


def larger[Real: (float, np.ndarray)](left: Real, right: float | np.ndarray) -> Real:
    """The larger of two, element by element. One number goes without numpy, which takes ten times as long for it."""
    return np.maximum(left, right) if isinstance(left, np.ndarray) else max(left, float(right))


def ceil[Real: (float, np.ndarray)](numbers: Real) -> Real:
    """The least whole numbers that are no smaller, float64."""
    if isinstance(numbers, np.ndarray):
        return np.ceil(numbers)
    return float(math.ceil(numbers))


def per_batch(numbers: Numbers) -> np.ndarray:
    """As float64 of the same shape; a single number as [1]."""
    return np.array(numbers, np.float64, ndmin=1, copy=None)


_ZERO = np.zeros(1)
_ZERO.flags.writeable = False


@dataclasses.dataclass(frozen=True, order=True)
class Strategy:
    """How an iteration is parallelised: `sp` instances (the degree of parallelism) of `tp` devices each."""

    sp: int
    tp: int = 1

    def __post_init__(self) -> None:
        if self.sp < 1 or self.tp < 1:
            raise ConfigError(f"a strategy has at least one instance and one device, got sp={self.sp}, tp={self.tp}")

    def __str__(self) -> str:
        return f"sp{self.sp} tp{self.tp}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillTotals[Real: (float, np.ndarray)]:
    """What the time of a prefill depends on, for any number of batches: float64 arrays of one shape, or
    broadcastable; or for one batch, as numbers."""

    num_tokens: Real
    """Sum of the new tokens."""
    squared_lens: Real
    """Sum of the squares of the new tokens."""
    new_times_past: Real
    """Sum of new tokens x past ones, those before them whose keys are in the pool (chunks, decodes beside them)."""
    past_keys: Real
    """Sum of the past tokens: each request reads their keys once, however many new tokens it has.

    Few new tokens do so little with a key that reading it is what takes time, as in a decode step: on an H200, 120 ns
    for reading a key of a 7B without grouped heads, and 1 ns for computing with it.
    """
    is_extend: Real
    """1 for an extend, 0 for whole prompts."""

    @classmethod
    def of_sums(
        cls,
        num_tokens: Numbers,
        squared_lens: Numbers,
        new_times_past: Numbers = _ZERO,
        past_keys: Numbers = _ZERO,
        is_extend: Numbers = _ZERO,
    ) -> PrefillTotals[np.ndarray]:
        """Totals from sums in any numeric type; of scalars: arrays [1]."""
        return PrefillTotals(
            num_tokens=per_batch(num_tokens),
            squared_lens=per_batch(squared_lens),
            new_times_past=per_batch(new_times_past),
            past_keys=per_batch(past_keys),
            is_extend=per_batch(is_extend),
        )

    @classmethod
    def of_batch(cls, num_tokens: int, squared_lens: int) -> PrefillTotals[float]:
        """Totals of a single batch of whole prompts, as numbers."""
        return PrefillTotals(
            num_tokens=float(num_tokens),
            squared_lens=float(squared_lens),
            new_times_past=0.0,
            past_keys=0.0,
            is_extend=0.0,
        )

    @classmethod
    def of(cls, works: Sequence[PrefillWork]) -> PrefillTotals[np.ndarray]:
        """Totals of these batches: arrays [number of batches]."""
        return cls.of_sums(
            [work.num_tokens for work in works],
            [work.squared_lens for work in works],
            [work.new_times_past for work in works],
            [work.past_keys for work in works],
            [float(work.is_extend) for work in works],
        )

    @property
    def twice_num_pairs(self) -> Real:
        """Twice the query and key pairs of causal attention, the diagonal counted half.

        Without past tokens this is sum(len^2), the third term of the paper's equation 7.
        """
        return self.squared_lens + 2.0 * self.new_times_past


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillWork:
    """One prefill batch, or an extend: chunks, and decodes as requests of one new token."""

    new_lens: tuple[int, ...]
    """Tokens to compute, of each request."""
    past_lens: tuple[int, ...] = ()
    """Of an extend, tokens of each request whose keys are there already; empty: whole prompts."""

    def __post_init__(self) -> None:
        if not self.new_lens or min(self.new_lens) < 1:
            raise ConfigError(f"a prefill has at least one request, of at least one token, got {self.new_lens}")
        if self.past_lens and (len(self.past_lens) != len(self.new_lens) or min(self.past_lens) < 0):
            raise ConfigError(
                f"past lengths are one a request and not negative, got {self.past_lens} "
                f"for {len(self.new_lens)} requests"
            )

    @property
    def is_extend(self) -> bool:
        """Whether the new tokens attend to the pool too, even if nothing is there yet; else it is of whole prompts."""
        return bool(self.past_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.new_lens)

    @property
    def squared_lens(self) -> int:
        return sum(new * new for new in self.new_lens)

    @property
    def new_times_past(self) -> int:
        return sum(new * past for new, past in zip(self.new_lens, self.past_lens, strict=False))

    @property
    def past_keys(self) -> int:
        return sum(self.past_lens)

    @property
    def totals(self) -> PrefillTotals[np.ndarray]:
        """Totals of this batch alone: arrays [1]."""
        return PrefillTotals.of([self])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTotals[Real: (float, np.ndarray)]:
    """What the time of a decode step depends on, for any number of batches: float64 arrays, broadcastable; or for one
    step, as numbers.

    Layer by layer everybody waits for the slowest, hence the maxima.
    """

    num_rows: Real
    """Requests of the whole group."""
    num_masters: Real
    """Instances that own a sub-batch."""
    busiest_rows: Real
    """Requests of the largest sub-batch."""
    busiest_keys: Real
    """Keys on the instance that holds most of them."""

    @classmethod
    def even(
        cls, strategy: Strategy, num_rows: Numbers, num_keys: Numbers, num_masters: Numbers = 1
    ) -> DecodeTotals[np.ndarray]:
        """Rows as even as they can be over the masters, keys over the instances."""
        rows, masters = per_batch(num_rows), per_batch(num_masters)
        return DecodeTotals(
            num_rows=rows,
            num_masters=masters,
            busiest_rows=np.ceil(rows / masters),
            busiest_keys=np.ceil(per_batch(num_keys) / strategy.sp),
        )

    @classmethod
    def of_even_rows(cls, num_rows: int, busiest_keys: int, num_masters: int = 1) -> DecodeTotals[float]:
        """Totals of a single step, as numbers."""
        return DecodeTotals(
            num_rows=float(num_rows),
            num_masters=float(num_masters),
            busiest_rows=float(-(-num_rows // num_masters)),
            busiest_keys=float(busiest_keys),
        )

    @classmethod
    def of_step(cls, work: DecodeWork) -> DecodeTotals[float]:
        """Totals of a single step, as numbers."""
        return DecodeTotals(
            num_rows=float(sum(work.rows)),
            num_masters=float(work.num_masters),
            busiest_rows=float(max(work.rows)),
            busiest_keys=float(max(work.keys)),
        )

    @classmethod
    def of(cls, works: Sequence[DecodeWork]) -> DecodeTotals[np.ndarray]:
        """Totals of these batches: arrays [number of batches]."""
        return DecodeTotals(
            num_rows=np.asarray([sum(work.rows) for work in works], np.float64),
            num_masters=np.asarray([work.num_masters for work in works], np.float64),
            busiest_rows=np.asarray([max(work.rows) for work in works], np.float64),
            busiest_keys=np.asarray([max(work.keys) for work in works], np.float64),
        )

    def at(self, chosen: np.ndarray) -> DecodeTotals:
        """Those of the chosen batches: an index for arrays [number of batches]."""
        return DecodeTotals(**{field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeWork:
    """One decode step."""

    rows: tuple[int, ...]
    """Requests of each master."""
    keys: tuple[int, ...]
    """Keys on each instance of the group, this step's included."""

    def __post_init__(self) -> None:
        if not self.rows or min(self.rows) < 1:
            raise ConfigError(f"a decode has at least one master, each with at least one request, got {self.rows}")
        if len(self.rows) > len(self.keys) or min(self.keys) < 0 or sum(self.keys) < sum(self.rows):
            raise ConfigError(
                "keys are one number an instance, no fewer than masters, and at least one key a request, "
                f"got {self.keys} for {len(self.rows)} masters with {sum(self.rows)} requests"
            )

    @property
    def num_masters(self) -> int:
        return len(self.rows)
