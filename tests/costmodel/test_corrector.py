import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from loongjax.costmodel.corrector import CorrectedModel, Corrector, CorrectorConfig
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy
from loongjax.errors import ConfigError
from tests.costmodel.shapes import LLAMA2_7B

ONE, TWO = Strategy(1), Strategy(2)


def test_nothing_is_corrected_before_anything_was_seen():
    assert Corrector().factor("prefill", ONE) == 1.0


def test_a_lasting_bias_is_learned():
    corrector = Corrector()
    for _ in range(100):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=1.3)
    assert corrector.factor("decode", ONE) == pytest.approx(1.3, rel=1e-3)
    assert corrector.predicted_over_actual("decode", ONE) == pytest.approx(1 / 1.3, rel=1e-3)


def test_one_observation_moves_the_factor_by_its_weight_in_logarithms():
    corrector = Corrector(CorrectorConfig(weight=0.25))
    corrector.observe("prefill", ONE, predicted_s=2.0, actual_s=3.0)
    assert corrector.factor("prefill", ONE) == pytest.approx(1.5**0.25)


def test_twice_as_long_and_half_as_long_cancel():
    corrector = Corrector(CorrectorConfig(weight=0.01))
    for actual_s in (2.0, 0.5) * 500:
        corrector.observe("prefill", ONE, predicted_s=1.0, actual_s=actual_s)
    assert corrector.factor("prefill", ONE) == pytest.approx(1.0, abs=0.01)


def test_strategies_and_kinds_are_corrected_apart():
    corrector = Corrector()
    corrector.observe("prefill", ONE, predicted_s=1.0, actual_s=1.5)
    assert corrector.factor("prefill", ONE) > 1.0
    assert corrector.factor("decode", ONE) == corrector.factor("prefill", TWO) == 1.0


@given(st.floats(1e-9, 1e9))
def test_one_outlier_hardly_shows(actual_s):
    corrector = Corrector()
    corrector.observe("decode", ONE, predicted_s=1.0, actual_s=actual_s)
    assert abs(math.log(corrector.factor("decode", ONE))) <= 0.1 * math.log(2.0) + 1e-12


def test_a_rare_stall_does_not_pull_the_factor_far_from_the_usual():
    corrector = Corrector()
    for index in range(1000):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=300.0 if index % 50 == 49 else 1.1)
    assert corrector.factor("decode", ONE) == pytest.approx(1.1, rel=0.08)


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), max_size=60))
def test_the_factor_stays_within_its_bounds(pairs):
    corrector = Corrector(CorrectorConfig(weight=1.0, max_factor=4.0))
    for predicted_s, actual_s in pairs:
        corrector.observe("decode", ONE, predicted_s=predicted_s, actual_s=actual_s)
        assert 0.25 * (1 - 1e-12) <= corrector.factor("decode", ONE) <= 4.0 * (1 + 1e-12)


def test_a_corrector_goes_on_from_what_another_has_learned():
    first = Corrector(CorrectorConfig(weight=0.5))
    first.observe("decode", ONE, predicted_s=1.0, actual_s=1.4)
    second = Corrector(CorrectorConfig(weight=0.5), factors=first.factors)
    assert second.factors == first.factors
    for corrector in (first, second):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=1.5)
    assert second.factor("decode", ONE) == pytest.approx(first.factor("decode", ONE), rel=1e-12)
    assert second.factor("prefill", ONE) == 1.0


def test_factors_to_go_on_from_are_held_within_the_bounds():
    corrector = Corrector(CorrectorConfig(max_factor=4.0), factors={("decode", ONE): 100.0, ("prefill", ONE): 0.001})
    assert corrector.factor("decode", ONE) == pytest.approx(4.0)
    assert corrector.factor("prefill", ONE) == pytest.approx(0.25)


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_says_nothing_is_passed_over(nothing):
    corrector = Corrector()
    corrector.observe("decode", ONE, predicted_s=1.0, actual_s=nothing)
    corrector.observe("decode", ONE, predicted_s=nothing, actual_s=1.0)
    assert corrector.factor("decode", ONE) == 1.0


def test_a_corrected_model_multiplies_iterations_and_leaves_migrations():
    base = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA2_7B)
    corrector = Corrector(CorrectorConfig(weight=1.0))
    model = CorrectedModel(base=base, corrector=corrector)
    corrector.observe("prefill", TWO, predicted_s=1.0, actual_s=1.5)
    corrector.observe("decode", TWO, predicted_s=1.0, actual_s=0.8)
    prompts = PrefillTotals.of_sums([10, 1000], [100, 10**6])
    steps = DecodeTotals.even(TWO, [1, 10], [100, 1000])
    np.testing.assert_allclose(model.prefill_s(TWO, prompts), 1.5 * base.prefill_s(TWO, prompts))
    np.testing.assert_allclose(model.decode_s(TWO, steps), 0.8 * base.decode_s(TWO, steps))
    np.testing.assert_array_equal(model.prefill_s(ONE, prompts), base.prefill_s(ONE, prompts))
    assert model.migration_s(100, 1) == base.migration_s(100, 1)
    assert model.tipping_tokens(TWO) == base.tipping_tokens(TWO)
    assert model.tipping_rows(TWO) == base.tipping_rows(TWO)
    assert model.source == "roofline"


@pytest.mark.parametrize("bad", [{"weight": 0.0}, {"weight": 1.5}, {"max_surprise": 1.0}, {"max_factor": math.inf}])
def test_settings_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CorrectorConfig(**bad)
