"""Arrays that read like the tuple of values they stand for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from loongjax.core.prompt_logprobs import PromptLogprobs
from loongjax.core.request import TokenLogprobs

VALUES = (
    TokenLogprobs(7, -0.5, 1, ((7, -0.5), (3, -1.25))),
    TokenLogprobs(0, -2.0, 4, ((9, -0.25), (1, -1.5))),
    TokenLogprobs(5, -0.75, 2, ((2, -0.125),)),
)


def arrays(values: tuple[TokenLogprobs, ...] = VALUES, num_top: int = 2) -> PromptLogprobs:
    padded = [[*value.top, *[(-1, -np.inf)] * num_top][:num_top] for value in values]
    return PromptLogprobs(
        token_ids=np.array([value.token_id for value in values], np.int32),
        logprobs=np.array([value.logprob for value in values], np.float32),
        ranks=np.array([value.rank for value in values], np.int32),
        top_ids=np.array([[i for i, _ in top] for top in padded], np.int32).reshape(len(values), num_top),
        top_logprobs=np.array([[p for _, p in top] for top in padded], np.float32).reshape(len(values), num_top),
    )


def test_they_read_as_the_values_one_after_the_other() -> None:
    assert tuple(arrays()) == VALUES
    assert tuple(reversed(arrays())) == VALUES[::-1]


def test_every_value_is_of_pythons_own_types() -> None:
    for value in arrays():
        assert (type(value.token_id), type(value.logprob), type(value.rank)) == (int, float, int)
        for token_id, logprob in value.top:
            assert (type(token_id), type(logprob)) == (int, float)


@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_one_is_found_by_its_index(index: int) -> None:
    assert arrays()[index] == VALUES[index]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_beyond_them_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        arrays()[index]


@pytest.mark.parametrize("part", [slice(1, None), slice(None, 2), slice(None, None, -1), slice(5, 9)])
def test_a_slice_is_as_a_tuples(part: slice) -> None:
    assert tuple(arrays()[part]) == VALUES[part]


def test_without_alternatives_there_are_none() -> None:
    assert [value.top for value in arrays(num_top=0)] == [(), (), ()]


def test_a_prompt_of_one_token_has_none() -> None:
    assert len(arrays(())) == 0
    assert not arrays(())
    assert list(arrays(())) == []


def test_they_cross_to_another_process() -> None:
    assert tuple(pickle.loads(pickle.dumps(arrays()))) == VALUES


def test_columns_of_different_lengths_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        PromptLogprobs(
            token_ids=np.zeros(2, np.int32),
            logprobs=np.zeros(1, np.float32),
            ranks=np.zeros(2, np.int32),
            top_ids=np.zeros((2, 0), np.int32),
            top_logprobs=np.zeros((2, 0), np.float32),
        )
