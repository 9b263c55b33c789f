"""Times scaled to what was measured, beside factors worked out by hand."""

import numpy as np
import pytest

from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy
from loongjax_profiling.replay.scaled_model import ScaledModel
from tests.profiling.replay.iterations import traced_decode, traced_prefill, traced_recovery
from tests.profiling.simulate.systems import RoundModel

TOTALS = PrefillTotals.of_sums([100, 400], [0, 0])
STEP = DecodeTotals.even(Strategy(1), 3, 90)
ITERATIONS = [
    traced_prefill(100, 0.3),  # predicted: 0.1 s and 0.3 s
    traced_prefill(300, 0.5),
    traced_prefill(100, 0.2, dop=2),  # predicted: 0.05 s
    traced_decode(0.04, continues=True),  # predicted: 0.01 s each
    traced_decode(0.02, continues=True),
    traced_decode(9.0, continues=False),
    traced_recovery(1.0),
]


def seconds(values: np.ndarray) -> list[float]:
    return values.tolist()


def test_it_is_a_cost_model():
    assert isinstance(ScaledModel.of(ITERATIONS, RoundModel(), 1), CostModel)


def test_prefills_are_scaled_by_strategy_so_that_their_times_add_up_to_the_measured():
    model = ScaledModel.of(ITERATIONS, RoundModel(), 1)
    assert seconds(model.prefill_s(Strategy(1), TOTALS)) == pytest.approx([0.2, 0.8])
    assert seconds(model.prefill_s(Strategy(2), TOTALS)) == pytest.approx([0.2, 0.8])


def test_decodes_are_scaled_by_the_steps_that_went_on():
    model = ScaledModel.of(ITERATIONS, RoundModel(), 1)
    assert seconds(model.decode_s(Strategy(1), STEP)) == pytest.approx([0.03])


def test_strategies_that_never_ran_are_scaled_as_all_others_together():
    model = ScaledModel.of(ITERATIONS, RoundModel(), 1)
    measured, predicted = 0.3 + 0.5 + 0.2, 0.1 + 0.3 + 0.05
    assert model.prefill_factor == pytest.approx(measured / predicted)
    untried = seconds(RoundModel().prefill_s(Strategy(3), TOTALS))
    assert seconds(model.prefill_s(Strategy(3), TOTALS)) == pytest.approx([s * measured / predicted for s in untried])
    assert seconds(model.decode_s(Strategy(3), STEP)) == pytest.approx(
        [s * 3.0 for s in seconds(RoundModel().decode_s(Strategy(3), STEP))]
    )


def test_where_nothing_ran_all_stays_as_predicted():
    model = ScaledModel.of([], RoundModel(), 1)
    assert seconds(model.prefill_s(Strategy(3), TOTALS)) == seconds(RoundModel().prefill_s(Strategy(3), TOTALS))
    assert seconds(model.decode_s(Strategy(3), STEP)) == seconds(RoundModel().decode_s(Strategy(3), STEP))
    assert model.migration_s(7, 1) == RoundModel().migration_s(7, 1)
    assert model.source == RoundModel().source


def test_steps_that_took_no_time_at_all_are_not_taken_for_free_ones():
    model = ScaledModel.of([traced_decode(0.0, continues=True)], RoundModel(), 1)
    assert seconds(model.decode_s(Strategy(1), STEP)) == [0.01]
