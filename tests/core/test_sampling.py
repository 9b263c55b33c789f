"""Sampling parameters are checked when they are made, and the error names the field."""

import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loongjax.core.sampling import MAX_LOGPROBS, SamplingParams
from loongjax.errors import RequestError

NAN, INF = float("nan"), float("inf")

REFUSED = [
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", NAN),
    ("temperature", INF),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", NAN),
    ("top_k", -2),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", INF),
    ("repetition_penalty", NAN),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("n", 0),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("prompt_logprobs", MAX_LOGPROBS + 1),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: NAN}),
    ("logit_bias", {-1: 0.0}),
    ("stop", ("",)),
    ("stop", ""),
    ("stop_token_ids", (-1,)),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_value_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("max_tokens", 1.5, "an integer, got 1.5 (float)"),
        ("max_tokens", True, "an integer, got True (bool)"),
        ("max_tokens", "16", "an integer, got '16' (str)"),
        ("min_tokens", None, "an integer, got None (NoneType)"),
        ("top_k", 2.0, "an integer, got 2.0 (float)"),
        ("n", 1.5, "an integer, got 1.5 (float)"),
        ("n", None, "an integer, got None (NoneType)"),
        ("seed", "a", "an integer, got 'a' (str)"),
        ("logprobs", True, "an integer, got True (bool)"),
        ("prompt_logprobs", 0.5, "an integer, got 0.5 (float)"),
        ("temperature", None, "a number, got None (NoneType)"),
        ("temperature", 1j, "a number, got 1j (complex)"),
        ("top_p", "0.5", "a number, got '0.5' (str)"),
        ("min_p", False, "a number, got False (bool)"),
        ("presence_penalty", [0.1], "a number, got [0.1] (list)"),
        ("frequency_penalty", None, "a number, got None (NoneType)"),
        ("repetition_penalty", "1", "a number, got '1' (str)"),
        ("logit_bias", [(1, 2.0)], "a mapping from token ids to numbers, got [(1, 2.0)] (list)"),
        ("logit_bias", {"1": 2.0}, "a mapping from token ids to numbers, got {'1': 2.0} (dict)"),
        ("logit_bias", {1: 2.0, 3: None}, "a mapping from token ids to numbers, got {3: None} (dict)"),
        ("stop", None, "a string or a list of strings, got None (NoneType)"),
        ("stop", [5], "a string or a list of strings, got one that holds 5 (int)"),
        ("stop", b"end", "a string or a list of strings, got b'end' (bytes)"),
        ("stop_token_ids", 5, "a list of integers, got 5 (int)"),
        ("stop_token_ids", "5", "a list of integers, got '5' (str)"),
        ("stop_token_ids", [5, 6.0], "a list of integers, got one that holds 6.0 (float)"),
        ("ignore_eos", "no", "True or False, got 'no' (str)"),
        ("stop_token_ids", "x" * 1000, f"a list of integers, got '{'x' * 99}... (str)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(users_types, name, value, got):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == f"{name} must be {got}"
    assert caught.value.param == name


def test_numbers_of_other_kinds_become_pythons_own(users_types):
    given: dict[str, Any] = {
        "max_tokens": np.int64(5),
        "seed": np.uint8(7),
        "temperature": np.float32(0.5),
        "top_p": 1,
        "min_p": Fraction(1, 4),
        "logit_bias": {np.int32(3): 2},
        "stop_token_ids": np.array([4, 5]),
    }
    params = SamplingParams(**given)
    assert params == SamplingParams(
        max_tokens=5, seed=7, temperature=0.5, min_p=0.25, logit_bias={3: 2.0}, stop_token_ids=(4, 5)
    )
    stored = (params.max_tokens, params.seed, params.temperature, params.top_p, params.min_p, *params.stop_token_ids)
    assert [type(value) for value in stored] == [int, int, float, float, float, int, int]
    assert [(type(key), type(bias)) for key, bias in params.logit_bias.items()] == [(int, float)]


def test_a_number_beyond_all_floats_is_out_of_range_like_any_other(users_types):
    with pytest.raises(RequestError, match=r"temperature must be at least 0\.0, got inf"):
        SamplingParams(temperature=10**400)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", None),
        ("max_tokens", 0),
        ("temperature", 0.0),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("presence_penalty", -2.0),
        ("repetition_penalty", 0.01),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("logprobs", MAX_LOGPROBS),
        ("logit_bias", {5: -100.0}),
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_min_tokens_must_not_exceed_max_tokens():
    with pytest.raises(RequestError, match=r"min_tokens \(5\) must not exceed max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_is_one_stop_string():
    assert SamplingParams(stop="abc").stop == ("abc",)
    assert SamplingParams(stop=["abc", "d"]).stop == ("abc", "d")


def test_a_top_k_of_minus_one_means_all_like_zero():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_later_changes_of_the_callers_collections_do_not_matter():
    bias, stop = {1: 2.0}, ["x"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2], stop[0] = 1.0, "y"
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("x",)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_penalties_are_those_that_do_something(params, expected):
    assert SamplingParams(**params).has_penalties is expected


def test_errors_keep_their_fields_through_a_pipe():
    error = pickle.loads(pickle.dumps(RequestError("n must be at least 1", "n")))
    assert (error.message, error.param) == ("n must be at least 1", "n")
