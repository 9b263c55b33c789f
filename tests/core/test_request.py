"""What a request says of itself."""

from __future__ import annotations

import pickle

import numpy as np

from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams


def request(*prompt: int) -> Request:
    return Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(), max_tokens=1, seed=0)


def test_the_vocabulary_of_a_prompt_names_each_token_once() -> None:
    vocabulary = request(9, 2, 9, 131071, 2).prompt_vocabulary
    assert vocabulary.dtype == np.int32
    assert vocabulary.tolist() == [2, 9, 131071]


def test_the_vocabulary_is_worked_out_once_and_changes_no_comparison() -> None:
    one, other = request(3, 1), request(3, 1)
    assert one.prompt_vocabulary is one.prompt_vocabulary
    assert one == other
    assert pickle.loads(pickle.dumps(one)) == other
