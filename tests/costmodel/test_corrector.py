import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from loongjax.costmodel.corrector import Corrector, CorrectorConfig
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError

ONE, TWO, FOUR = Strategy(1), Strategy(2), Strategy(4)


def test_nothing_is_corrected_before_anything_was_seen():
    assert Corrector().factor("prefill", ONE) == 1.0


def test_a_lasting_bias_is_learned():
    corrector = Corrector()
    for _ in range(100):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=1.3)
    assert corrector.factor("decode", ONE) == pytest.approx(1.3, rel=1e-3)
    assert corrector.predicted_over_actual() == {("decode", ONE): pytest.approx(1 / 1.3, rel=1e-3)}


def test_one_observation_moves_the_factor_by_its_weight_in_logarithms():
    corrector = Corrector(CorrectorConfig(weight=0.25))
    corrector.observe("prefill", ONE, predicted_s=2.0, actual_s=3.0)
    assert corrector.factor("prefill", ONE) == pytest.approx(1.5**0.25)


def test_twice_as_long_and_half_as_long_cancel():
    corrector = Corrector(CorrectorConfig(weight=0.01))
    for actual_s in (2.0, 0.5) * 500:
        corrector.observe("prefill", ONE, predicted_s=1.0, actual_s=actual_s)
    assert corrector.factor("prefill", ONE) == pytest.approx(1.0, abs=0.01)


def test_kinds_are_corrected_apart():
    corrector = Corrector()
    corrector.observe("prefill", ONE, predicted_s=1.0, actual_s=1.5)
    assert corrector.factor("prefill", ONE) > 1.0
    assert corrector.factor("decode", ONE) == corrector.factor("decode", TWO) == 1.0
    corrector.observe("decode", TWO, predicted_s=1.0, actual_s=1.2)
    # The sum over the weight 0.1 and the prior's 1.
    assert corrector.factor("decode", ONE) == pytest.approx(1.2 ** (0.1 / 1.1))


def test_strategies_learn_from_each_other_as_far_as_they_know_little_of_themselves():
    corrector = Corrector(CorrectorConfig(weight=0.5, max_surprise=8.0, max_factor=16.0, prior=1.0))
    corrector.observe("decode", ONE, predicted_s=1.0, actual_s=4.0)
    # In logarithms to base 2: half of 2, and half of what others show, nothing.
    assert corrector.factor("decode", ONE) == pytest.approx(2.0)
    # The sum 1 over the weight 0.5 and the prior's 1.
    assert corrector.factor("decode", TWO) == pytest.approx(2.0 ** (2 / 3))
    corrector.observe("decode", TWO, predicted_s=3.0, actual_s=12.0)
    # Both: half of 2, and half of the other's sum of 1 over its weight 0.5 and the prior's 1.
    assert corrector.factor("decode", ONE) == pytest.approx(2.0 ** (1 + 1 / 3))
    assert corrector.factor("decode", TWO) == pytest.approx(2.0 ** (1 + 1 / 3))
    # The sums 1 + 1 over the weights 0.5 + 0.5 and the prior's 1.
    assert corrector.factor("decode", FOUR) == pytest.approx(2.0)


@pytest.mark.parametrize("prior", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_tried", [1, 2, 7])
def test_an_untried_strategy_converges_to_the_common_bias_as_strategies_are_tried(num_tried, prior):
    corrector = Corrector(CorrectorConfig(prior=prior))
    for _ in range(200):
        for sp in range(1, num_tried + 1):
            corrector.observe("prefill", Strategy(sp), predicted_s=1.0, actual_s=1.6)
    expected = 1.6 ** (num_tried / (num_tried + prior))
    assert corrector.factor("prefill", Strategy(8)) == pytest.approx(expected, rel=1e-6)


def test_what_an_observation_may_move_counts_from_what_was_expected_by_own_and_others():
    corrector = Corrector(CorrectorConfig(weight=0.5, max_surprise=2.0, max_factor=16.0, prior=1.0))
    # In logarithms to base 2: 2 counts as 1, half of which is kept.
    corrector.observe("decode", ONE, predicted_s=3.0, actual_s=12.0)
    # 0.5 / (0.5 + 1) = 1 / 3 is expected, so 3 counts as 4 / 3, half of which is kept.
    corrector.observe("decode", TWO, predicted_s=3.0, actual_s=24.0)
    # 2 / 3 + 0.5 / 3 = 5 / 6 is expected, so -4 counts as -1 / 6, and (2 / 3 - 1 / 6) / 2 = 1 / 4 is kept.
    corrector.observe("decode", TWO, predicted_s=16.0, actual_s=1.0)
    assert corrector.factor("decode", ONE) == pytest.approx(2.0 ** (1 / 2 + 1 / 2 * (1 / 4) / (3 / 4 + 1)))
    assert corrector.factor("decode", TWO) == pytest.approx(2.0 ** (1 / 4 + 1 / 4 * (1 / 2) / (1 / 2 + 1)))
    assert corrector.factor("decode", FOUR) == pytest.approx(2.0 ** ((1 / 2 + 1 / 4) / (1 / 2 + 3 / 4 + 1)))


def test_unless_said_otherwise_one_strategy_that_was_long_observed_is_believed_by_half():
    corrector = Corrector()
    for _ in range(300):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=1.6)
    assert corrector.factor("decode", TWO) == pytest.approx(1.6**0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.3, 3.0), min_size=2, max_size=6))
def test_strategies_that_are_observed_for_long_go_by_themselves(biases):
    corrector = Corrector()
    for _ in range(300):
        for sp, bias in enumerate(biases, start=1):
            corrector.observe("decode", Strategy(sp), predicted_s=1.0, actual_s=bias)
    for sp, bias in enumerate(biases, start=1):
        assert corrector.factor("decode", Strategy(sp)) == pytest.approx(bias, rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.floats(0.3, 3.0)), max_size=40))
def test_an_untried_strategy_lies_between_no_correction_and_the_largest_of_those_tried(observations):
    corrector = Corrector()
    for sp, actual_s in observations:
        corrector.observe("decode", Strategy(sp), predicted_s=1.0, actual_s=actual_s)
    untried = corrector.factor("decode", Strategy(3))
    factors = [1.0, *[actual_s for _, actual_s in observations]]
    assert min(factors) - 1e-12 <= untried <= max(factors) + 1e-12


def test_what_pulls_one_strategy_far_pulls_those_that_know_themselves_hardly():
    corrector = Corrector()
    for _ in range(100):
        corrector.observe("decode", ONE, predicted_s=1.0, actual_s=1.1)
    for _ in range(100):
        corrector.observe("decode", TWO, predicted_s=1.0, actual_s=5.0)
    assert corrector.factor("decode", TWO) == pytest.approx(5.0, rel=1e-3)
    assert corrector.factor("decode", ONE) == pytest.approx(1.1, rel=1e-3)


def test_with_an_infinite_prior_strategies_are_corrected_apart():
    corrector = Corrector(CorrectorConfig(prior=math.inf))
    corrector.observe("prefill", ONE, predicted_s=1.0, actual_s=1.5)
    assert corrector.factor("prefill", ONE) == pytest.approx(1.5**0.1)
    assert corrector.factor("prefill", TWO) == 1.0


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


@settings(deadline=None)
@given(
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)), max_size=60),
)
def test_factors_stay_within_their_bounds(weight, observations):
    corrector = Corrector(CorrectorConfig(weight=weight, max_factor=4.0))
    for sp, predicted_s, actual_s in observations:
        corrector.observe("decode", Strategy(sp), predicted_s=predicted_s, actual_s=actual_s)
        for strategy in (ONE, TWO, FOUR, Strategy(8)):
            assert 0.25 * (1 - 1e-12) <= corrector.factor("decode", strategy) <= 4.0 * (1 + 1e-12)


@pytest.mark.parametrize(("actual_s", "factor"), [(8.0, 2.0), (0.125, 0.5)])
def test_a_single_observation_that_counts_for_everything_moves_a_factor_to_its_bound(actual_s, factor):
    corrector = Corrector(CorrectorConfig(weight=1.0, max_surprise=100.0, max_factor=2.0))
    corrector.observe("decode", ONE, predicted_s=1.0, actual_s=actual_s)
    assert corrector.factor("decode", ONE) == pytest.approx(factor)


def test_a_corrector_goes_on_from_what_another_has_learned():
    first = Corrector(CorrectorConfig(weight=0.5))
    first.observe("decode", ONE, predicted_s=1.0, actual_s=1.4)
    second = first.copy()
    assert second.factor("decode", TWO) == pytest.approx(1.4 ** (0.5 / 1.5))
    before = first.predicted_over_actual()
    second.observe("decode", ONE, predicted_s=1.0, actual_s=1.5)
    assert first.predicted_over_actual() == before != second.predicted_over_actual()
    first.observe("decode", ONE, predicted_s=1.0, actual_s=1.5)
    assert first.predicted_over_actual() == second.predicted_over_actual()
    assert first.factor("decode", TWO) == second.factor("decode", TWO)


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_says_nothing_is_passed_over(nothing):
    corrector = Corrector()
    corrector.observe("decode", ONE, predicted_s=1.0, actual_s=nothing)
    corrector.observe("decode", ONE, predicted_s=nothing, actual_s=1.0)
    assert corrector.factor("decode", ONE) == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": 0.0},
        {"weight": 1.5},
        {"max_surprise": 1.0},
        {"max_factor": math.inf},
        {"prior": 0.0},
        {"prior": math.nan},
    ],
)
def test_settings_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CorrectorConfig(**bad)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["prefill", "decode"]),
            st.sampled_from([ONE, TWO]),
            st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 10.0)), max_size=5),
        ),
        max_size=8,
    )
)
def test_many_iterations_at_once_teach_what_one_after_the_other_does(runs) -> None:
    at_once, one_by_one = Corrector(), Corrector()
    for kind, strategy, times in runs:
        at_once.observe_all(kind, strategy, [p for p, _ in times], [a for _, a in times])
        for predicted_s, actual_s in times:
            one_by_one.observe(kind, strategy, predicted_s=predicted_s, actual_s=actual_s)
    assert at_once.predicted_over_actual() == one_by_one.predicted_over_actual()
    for kind in ("prefill", "decode"):
        assert at_once.factor(kind, Strategy(3)) == one_by_one.factor(kind, Strategy(3))
