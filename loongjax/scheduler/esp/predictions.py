"""A cost model's times of single batches, each asked for once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy

MAX_REMEMBERED = 1 << 14
"""Times of a kind that are kept; then all are forgotten."""
MAX_REMEMBERED_AT_ONCE = 64
"""Works of one question that are kept: the steps of a long jump, in a simulation, are never met again."""
MAX_REMEMBERED_LISTS = 64
"""Questions about many prefills that are kept; then all are forgotten."""


class Predictions:
    """Times in seconds, before any correction, by the immutable values that they follow from.

    A policy meets the same batch often: a flight whenever it is asked before that is over, and once more when it is.
    """

    def __init__(self, model: CostModel) -> None:
        self._model = model
        # By plain numbers: hashing a dataclass takes longer than all the rest of looking up.
        self._works: dict[tuple[object, ...], float] = {}
        self._prefills: dict[tuple[int, int, int, int], float] = {}
        self._many_prefills: dict[tuple[int, int, bytes, bytes], np.ndarray] = {}
        self._steps: dict[tuple[int, int, int, int, int], float] = {}
        self._migrations: dict[tuple[int | float, int], float] = {}

    def known_s(self, strategy: Strategy, work: PrefillWork | DecodeWork) -> float | None:
        """Of this iteration, if it was asked for lately."""
        return self._works.get(_key(strategy, work))

    def of_works(self, strategy: Strategy, works: Sequence[PrefillWork | DecodeWork]) -> list[float]:
        """Of each of these iterations, which are all prefills or all decodes."""
        if len(works) == 1:
            known_s = self.known_s(strategy, works[0])
            if known_s is not None:
                return [known_s]
        prefills = [work for work in works if isinstance(work, PrefillWork)]
        decodes = [work for work in works if isinstance(work, DecodeWork)]
        assert not (prefills and decodes), "either prefills or decodes"
        if len(decodes) == 1:
            seconds = [float(self._model.decode_s(strategy, DecodeTotals.of_step(decodes[0])))]
        elif prefills:
            seconds = self._model.prefill_s(strategy, PrefillTotals.of(prefills)).tolist()
        else:
            seconds = self._model.decode_s(strategy, DecodeTotals.of(decodes)).tolist()
        if len(works) <= MAX_REMEMBERED_AT_ONCE:
            if len(self._works) >= MAX_REMEMBERED:
                self._works.clear()
            self._works.update(zip([_key(strategy, work) for work in works], seconds, strict=True))
        return seconds

    def prefill_s(self, strategy: Strategy, num_tokens: int, squared_lens: int) -> float:
        """Of a prefill, by the sums over its requests."""
        key = strategy.sp, strategy.tp, num_tokens, squared_lens
        seconds = self._prefills.get(key)
        if seconds is None:
            if len(self._prefills) >= MAX_REMEMBERED:
                self._prefills.clear()
            totals = PrefillTotals.of_batch(num_tokens, squared_lens)
            seconds = self._prefills[key] = float(self._model.prefill_s(strategy, totals))
        return seconds

    def prefills_s(
        self, strategy: Strategy, num_tokens: Float[np.ndarray, " batches"], squared_lens: Float[np.ndarray, " batches"]
    ) -> Float[np.ndarray, " batches"]:
        """Of prefills, likewise. Shared: not to be written to."""
        key = strategy.sp, strategy.tp, num_tokens.tobytes(), squared_lens.tobytes()
        seconds = self._many_prefills.get(key)
        if seconds is None:
            if len(self._many_prefills) >= MAX_REMEMBERED_LISTS:
                self._many_prefills.clear()
            totals = PrefillTotals.of_sums(num_tokens, squared_lens)
            seconds = self._many_prefills[key] = self._model.prefill_s(strategy, totals)
        return seconds

    def step_s(self, strategy: Strategy, num_rows: int, busiest_keys: int, num_masters: int = 1) -> float:
        """Of a decode step whose rows are as even over the masters as they can be, by the keys of the fullest."""
        key = strategy.sp, strategy.tp, num_rows, busiest_keys, num_masters
        seconds = self._steps.get(key)
        if seconds is None:
            if len(self._steps) >= MAX_REMEMBERED:
                self._steps.clear()
            totals = DecodeTotals.of_even_rows(num_rows, busiest_keys, num_masters)
            seconds = self._steps[key] = float(self._model.decode_s(strategy, totals))
        return seconds

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        """Of moving so many tokens' keys between instances of `tp` devices."""
        key = num_tokens, tp
        seconds = self._migrations.get(key)
        if seconds is None:
            if len(self._migrations) >= MAX_REMEMBERED:
                self._migrations.clear()
            seconds = self._migrations[key] = self._model.migration_s(num_tokens, tp)
        return seconds


def _key(strategy: Strategy, work: PrefillWork | DecodeWork) -> tuple[object, ...]:
    if isinstance(work, PrefillWork):
        return strategy.sp, strategy.tp, "prefill", work.new_lens, work.past_lens
    return strategy.sp, strategy.tp, "decode", work.rows, work.keys
