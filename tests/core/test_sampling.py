"""Sampling parameters are checked when they are made, and the error names the field."""

import pickle

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
