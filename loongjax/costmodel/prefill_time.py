"""The time of a prefill on one strategy, in the paper's form and in one closer to what the engine runs."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.costmodel.coefficients import check_buckets, check_coefficients, pad
from loongjax.costmodel.work import PrefillTotals, ceil, larger


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperPrefillTime:
    """Equation 7 of the paper: A + B sum(len) + C sum(len^2).

    A chunk has no place in it; its len^2 is taken to be twice its query and key pairs, the same where nothing is past.
    """

    constant_s: float
    """A, in seconds."""
    per_token_s: float
    """B, in seconds a token of the batch."""
    per_squared_token_s: float
    """C, in seconds a token squared."""

    def __post_init__(self) -> None:
        check_coefficients(self)

    @staticmethod
    def features(totals: PrefillTotals[np.ndarray]) -> np.ndarray:
        """What A, B and C multiply: float64 [..., 3]."""
        return _stack(np.ones(()), totals.num_tokens, totals.twice_num_pairs)

    def seconds[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real]) -> Real:
        """float64, of the totals' broadcast shape; a number of numbers."""
        return (
            self.constant_s + self.per_token_s * totals.num_tokens + self.per_squared_token_s * totals.twice_num_pairs
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedPrefillTime:
    """The longer of a floor and constant + B padded + C sum(new^2), and of an extend its constant + D sum(new x past)
    + E sum(past) / sp on top.

    `padded` are the tokens of one rank, in the bucket that holds them: the engine computes that many. The floor is what
    a prefill takes however small it is, for reading the weights and launching kernels. Attention to past tokens is
    added to it, as in a decode step: their keys are read when the weights were, once a request however many new tokens
    it has, and computed with once a pair.
    """

    floor_s: float
    constant_s: float
    per_padded_token_s: float
    """In seconds a padded token on each rank."""
    per_squared_token_s: float
    """In seconds a new token squared."""
    extend_constant_s: float
    """In seconds an extend, which attends to the pool and among its new tokens apart, and merges the two."""
    per_new_times_past_s: float
    """In seconds a new token and past token."""
    per_past_key_s: float
    """In seconds a key that an instance reads: past tokens are spread over all of them."""
    sp: int
    """Ranks that the tokens are spread over."""
    token_buckets: tuple[int, ...]
    """Sizes, ascending, that a rank's tokens are padded to; beyond the largest nothing is padded. Empty: nowhere."""

    def __post_init__(self) -> None:
        check_coefficients(self)
        check_buckets("token_buckets", self.token_buckets)

    @staticmethod
    def features(totals: PrefillTotals[np.ndarray], padded_tokens: np.ndarray) -> np.ndarray:
        """What the constant, B and C multiply, with so many padded tokens on a rank: float64 [..., 3]."""
        return _stack(np.ones(()), padded_tokens, totals.squared_lens)

    @staticmethod
    def past_features(totals: PrefillTotals[np.ndarray], sp: int) -> np.ndarray:
        """What the extend's constant, D and E multiply: float64 [..., 3]."""
        return _stack(totals.is_extend, totals.new_times_past, totals.past_keys / sp)

    def seconds[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real]) -> Real:
        """float64, of the totals' broadcast shape; a number of numbers."""
        past = (
            self.extend_constant_s * totals.is_extend
            + self.per_new_times_past_s * totals.new_times_past
            + self.per_past_key_s / self.sp * totals.past_keys
        )
        return self.new_tokens_s(totals) + past

    def new_tokens_s[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real]) -> Real:
        """As `seconds`, without the past: what the new tokens would take as whole prompts."""
        return self.padded_tokens_s(totals, pad(ceil(totals.num_tokens / self.sp), self.token_buckets))

    def padded_tokens_s[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real], padded_tokens: Real) -> Real:
        """As `new_tokens_s`, with so many padded tokens on a rank."""
        linear = (
            self.constant_s + self.per_padded_token_s * padded_tokens + self.per_squared_token_s * totals.squared_lens
        )
        return larger(linear, self.floor_s)


def _stack(*columns: np.ndarray) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*columns), axis=-1)
