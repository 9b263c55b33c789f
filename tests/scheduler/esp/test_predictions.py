"""What a cost model was asked is remembered, and nothing else is answered than what it said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.scheduler.esp import predictions as module
from loongjax.scheduler.esp.predictions import MAX_REMEMBERED_AT_ONCE, Predictions
from tests.scheduler.esp.hand_model import HandModel

ONE, TWO = Strategy(1, 1), Strategy(2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingModel(HandModel):
    """Counts the batches that it is asked about."""

    asked: list[int] = dataclasses.field(default_factory=list)

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        self.asked.append(np.size(totals.num_tokens))
        return super().prefill_s(strategy, totals)

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        self.asked.append(np.size(totals.busiest_keys))
        return super().decode_s(strategy, totals)


def model() -> CountingModel:
    return CountingModel(constant_s=0.5, squared_token_s=1e-4, row_s=0.25, key_s=0.01, exchange_s=0.125)


def decode(*keys: int) -> DecodeWork:
    return DecodeWork(rows=(1,), keys=keys)


def test_an_equal_iteration_is_asked_about_once() -> None:
    counting = model()
    predictions = Predictions(counting)
    assert predictions.known_s(ONE, decode(10)) is None
    first = predictions.of_works(ONE, [decode(10)])
    assert predictions.of_works(ONE, [decode(10)]) == first == [2.0 + 0.25 + 0.01 * 10]
    assert predictions.known_s(ONE, decode(10)) == first[0]
    assert counting.asked == [1]


def test_strategies_and_kinds_of_equal_numbers_are_told_apart() -> None:
    predictions = Predictions(model())
    prefill = PrefillWork(new_lens=(1,), past_lens=(10,))
    seconds = {
        predictions.of_works(strategy, [work])[0] for strategy in (ONE, TWO) for work in (decode(10, 10), prefill)
    }
    assert len(seconds) == 4


@given(works=st.lists(st.tuples(st.integers(1, 5), st.integers(5, 50)), min_size=1, max_size=12))
def test_works_are_answered_as_the_model_answers_each_alone(works: list[tuple[int, int]]) -> None:
    remembering = Predictions(model())
    batch = [DecodeWork(rows=(rows,), keys=(keys,)) for rows, keys in works]
    expected = [model().decode_s(ONE, DecodeTotals.of([work])).item() for work in batch]
    assert remembering.of_works(ONE, batch) == expected
    assert [remembering.of_works(ONE, [work])[0] for work in batch] == expected


def test_the_steps_of_a_long_jump_are_not_kept() -> None:
    predictions = Predictions(model())
    predictions.of_works(ONE, [decode(keys) for keys in range(1, MAX_REMEMBERED_AT_ONCE + 2)])
    assert predictions.known_s(ONE, decode(1)) is None


def test_a_step_of_even_rows_is_asked_about_once() -> None:
    counting = model()
    predictions = Predictions(counting)
    for _ in range(2):
        assert predictions.step_s(TWO, 4, 50) == 2.0 + 0.25 * 4 + 0.01 * 50 + 0.125
    assert counting.asked == [1]


def test_an_equal_list_of_prefills_is_asked_about_once_for_each_strategy() -> None:
    counting = model()
    predictions = Predictions(counting)
    lens = np.array([3.0, 7.0])
    for strategy in (ONE, TWO, ONE, TWO):
        seconds = predictions.prefills_s(strategy, lens, lens**2)
        assert seconds.tolist() == model().prefill_s(strategy, PrefillTotals.of_sums(lens, lens**2)).tolist()
    predictions.prefills_s(ONE, lens, lens**2 + 1)
    assert counting.asked == [2, 2, 2]


@pytest.mark.parametrize(
    "ask",
    [
        lambda predictions, size: predictions.prefills_s(ONE, np.arange(1.0, size + 1.0), np.ones(size)).tolist(),
        lambda predictions, size: predictions.prefill_s(ONE, size, size * size),
        lambda predictions, size: [predictions.step_s(ONE, rows, size) for rows in (1, 2)],
        lambda predictions, size: predictions.migration_s(size, 1),
        lambda predictions, size: predictions.of_works(ONE, [decode(size), decode(size + 1)]),
    ],
)
def test_answers_stay_right_when_all_that_was_known_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Predictions, int], object]
) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 4)
    monkeypatch.setattr(module, "MAX_REMEMBERED_LISTS", 4)
    predictions = Predictions(model())
    for size in (1, 2, 3, 1, 4, 5, 6, 2, 1):
        assert ask(predictions, size) == ask(Predictions(model()), size)
