"""The solvers against brute force and against data whose coefficients are known."""

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings

from loongjax.costmodel.floor import fit_with_floor
from loongjax.costmodel.nonnegative import fit_nonnegative
from loongjax.costmodel.relative_error import RelativeErrors

LENS = np.asarray([10.0, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000, 500_000])
FEATURES = np.column_stack([np.ones_like(LENS), LENS, LENS**2])


@given(
    st.floats(1e-4, 1.0), st.floats(1e-8, 1e-3), st.floats(1e-12, 1e-8)
)  # fmt: skip
def test_coefficients_are_recovered_from_points_without_noise(constant, per_token, per_square):
    truth = np.asarray([constant, per_token, per_square])
    fitted = fit_nonnegative(FEATURES, FEATURES @ truth)
    np.testing.assert_allclose(FEATURES @ fitted, FEATURES @ truth, rtol=1e-8)
    np.testing.assert_allclose(fitted, truth, rtol=1e-3)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_solution_is_that_of_lawson_and_hanson(seed, num_terms):
    random = np.random.default_rng(seed)
    features, measured = random.random((12, num_terms)), random.random(12) + 0.1
    relative = features / measured[:, None]
    _, least = scipy.optimize.nnls(relative, np.ones(12))
    fitted = fit_nonnegative(features, measured)
    assert np.all(fitted >= 0.0)
    assert np.linalg.norm(relative @ fitted - 1.0) == pytest.approx(least, rel=1e-9)


def test_what_is_known_of_a_time_is_no_longer_to_be_explained():
    known, truth = 0.1 + 1e-5 * LENS, [0.0, 3e-6, 1e-11]
    fitted = fit_nonnegative(FEATURES, known + FEATURES @ truth, known)
    np.testing.assert_allclose(fitted, truth, rtol=1e-6, atol=1e-9)
    assert fit_nonnegative(FEATURES, 0.5 * known, known).tolist() == [0.0, 0.0, 0.0]


def test_a_coefficient_that_would_be_negative_is_zero():
    measured = 1.0 - 1e-7 * LENS
    assert fit_nonnegative(FEATURES, measured)[1:].tolist() == [0.0, 0.0]


def test_columns_that_say_the_same_leave_one_of_them():
    doubled = np.column_stack([LENS, 2.0 * LENS])
    fitted = fit_nonnegative(doubled, 3.0 * LENS)
    assert np.count_nonzero(fitted) == 1
    np.testing.assert_allclose(doubled @ fitted, 3.0 * LENS)


def test_a_column_of_zeros_gets_no_coefficient():
    fitted = fit_nonnegative(np.column_stack([LENS, np.zeros_like(LENS)]), 2.0 * LENS)
    np.testing.assert_allclose(fitted, [2.0, 0.0])


def test_short_points_count_as_much_as_long_ones():
    # One constant for times 1 and 2: the minimum of (c - 1)^2 + (c/2 - 1)^2 is at c = 1.2, not at their mean.
    np.testing.assert_allclose(fit_nonnegative(np.ones((2, 1)), np.asarray([1.0, 2.0])), [1.2])


@pytest.mark.parametrize("num_on_floor", [1, 2, 4])
def test_a_floor_is_recovered_from_points_without_noise(num_on_floor):
    truth = np.asarray([1e-3, 1e-4, 1e-9])
    linear = FEATURES @ truth
    floor = float((linear[num_on_floor - 1] + linear[num_on_floor]) / 2)
    found, coefficients = fit_with_floor(FEATURES, np.maximum(linear, floor))
    np.testing.assert_allclose(np.maximum(FEATURES @ coefficients, found), np.maximum(linear, floor), rtol=1e-7)


def test_times_without_a_floor_get_none():
    truth = np.asarray([1e-3, 1e-4, 1e-9])
    found, coefficients = fit_with_floor(FEATURES, FEATURES @ truth)
    assert found == 0.0
    np.testing.assert_allclose(coefficients, truth, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_floor_never_fits_worse_than_none(seed):
    noise = np.exp(np.random.default_rng(seed).normal(0.0, 0.05, LENS.size))
    measured = np.maximum(FEATURES @ [1e-3, 1e-4, 1e-9], 0.02) * noise
    floor, coefficients = fit_with_floor(FEATURES, measured)
    with_floor = np.maximum(FEATURES @ coefficients, floor) / measured - 1.0
    without = FEATURES @ fit_nonnegative(FEATURES, measured) / measured - 1.0
    assert np.sum(with_floor**2) <= np.sum(without**2) * (1 + 1e-12)


def test_means_of_the_relative_error_are_those_worked_by_hand():
    errors = RelativeErrors.of(np.asarray([1.01, 1.92]), np.asarray([1.0, 2.0]))
    assert errors is not None
    assert (errors.num_points, errors.largest) == (2, pytest.approx(0.04))
    assert errors.arithmetic_mean == pytest.approx(0.025)
    assert errors.geometric_mean == pytest.approx(0.02)
    assert str(errors) == "2.50% arithmetic and 2.00% geometric mean, 4.00% at most, over 2 points"


def test_a_point_met_exactly_makes_the_geometric_mean_zero():
    errors = RelativeErrors.of(np.asarray([1.0, 3.0]), np.asarray([1.0, 2.0]))
    assert errors is not None
    assert (errors.geometric_mean, errors.arithmetic_mean) == (0.0, 0.25)


def test_no_points_have_no_errors():
    assert RelativeErrors.of(np.zeros(0), np.zeros(0)) is None
