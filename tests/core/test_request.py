"""What a request says of itself."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from loongjax.core.request import Request, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.errors import RequestError


def request(*prompt: int) -> Request:
    return Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(), max_tokens=1, seed=0)


def test_the_vocabulary_of_a_prompt_names_each_token_once() -> None:
    vocabulary = request(9, 2, 9, 131071, 2).prompt_vocabulary
    assert vocabulary.dtype == np.int32
    assert vocabulary.tolist() == [2, 9, 131071]


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-310, 9.9e-7, float("inf"), float("nan")])
def test_a_wish_is_a_time_in_which_a_token_can_come(name: str, value: float) -> None:
    assert ServiceLevel(**{name: 1e-6})
    with pytest.raises(RequestError, match=f"{name} must be a finite number of seconds, at least 1e-06, got") as raised:
        ServiceLevel(**{name: value})
    assert raised.value.param == name


def test_the_vocabulary_is_worked_out_once_and_changes_no_comparison() -> None:
    one, other = request(3, 1), request(3, 1)
    assert one.prompt_vocabulary is one.prompt_vocabulary
    assert one == other
    assert pickle.loads(pickle.dumps(one)) == other


@pytest.mark.parametrize("value", ["1", True, [0.5]])
def test_a_wish_is_a_number(users_types: None, value: object) -> None:
    with pytest.raises(RequestError, match="tpot_s must be a number, got") as caught:
        ServiceLevel(tpot_s=value)  # pyright: ignore[reportArgumentType]
    assert caught.value.param == "tpot_s"
    assert type(ServiceLevel(ttft_s=1).ttft_s) is float
