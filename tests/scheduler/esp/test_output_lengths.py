"""How long outputs are taken to become: quantiles and means, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.scheduler.esp import output_lengths
from loongjax.scheduler.esp.output_lengths import WINDOW, OutputLengths

LENGTHS = st.lists(st.integers(0, 50), max_size=40)


def learned(lengths: list[int]) -> OutputLengths:
    result = OutputLengths()
    for length in lengths:
        result.add(length)
    return result


def bound(lengths: OutputLengths, num_output_tokens: int, max_tokens: int) -> int:
    return int(lengths.bounds(np.array([num_output_tokens]), np.array([max_tokens]))[0])


@given(lengths=LENGTHS, num_output_tokens=st.integers(0, 60), max_tokens=st.integers(0, 80))
def test_a_bound_is_the_quantile_of_longer_outputs_within_the_limit(
    lengths: list[int], num_output_tokens: int, max_tokens: int
):
    longer = sorted(length for length in lengths if length > num_output_tokens)
    rank = math.ceil(0.9 * (len(longer) + 1))
    expected = min(longer[rank - 1], max_tokens) if rank <= len(longer) else max_tokens
    assert bound(learned(lengths), num_output_tokens, max_tokens) == expected


@given(lengths=LENGTHS, num_output_tokens=st.integers(0, 60), num_more=st.integers(0, 80))
def test_what_is_left_is_the_mean_of_longer_outputs_within_the_limit(
    lengths: list[int], num_output_tokens: int, num_more: int
):
    longer = [length for length in lengths if length > num_output_tokens]
    guess = sum(longer) / len(longer) - num_output_tokens if longer else max(1, num_output_tokens)
    left = learned(lengths).expected_left([num_output_tokens], [num_output_tokens + num_more])
    assert np.allclose(left, min(guess, num_more))


@settings(max_examples=50, deadline=None)
@given(outputs=LENGTHS, requests=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), max_size=6))
def test_what_is_looked_up_is_what_is_found_otherwise(outputs: list[int], requests: list[tuple[int, int]]) -> None:
    generated = [count for count, _ in requests]
    limits = [count + room for count, room in requests]
    answers = []
    for most, many in ((1, 64), (20, 64), (output_lengths.MAX_LOOKED_UP, 64), (output_lengths.MAX_LOOKED_UP, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_lengths, "MAX_LOOKED_UP", most)
            patch.setattr(output_lengths, "MANY", many)
            lengths = learned(outputs)
            answers.append((lengths.expected_left(generated, limits), lengths.expected_reciprocals(generated, limits)))
    assert all(answer == answers[0] for answer in answers)


def test_without_enough_outputs_a_request_is_taken_to_reach_its_limit():
    few = 8  # of nine the ceil(0.9 x 10)-th is the last; fewer bound nothing
    assert bound(learned([5] * few), 0, 1000) == 1000
    assert bound(learned([5] * (few + 1)), 0, 1000) == 5


def test_old_outputs_are_forgotten():
    lengths = learned([1000] * WINDOW + [10] * WINDOW)
    assert len(lengths) == WINDOW
    assert bound(lengths, 0, 5000) == 10


def test_a_copy_learns_by_itself():
    lengths = learned([10] * 20)
    other = lengths.copy()
    for _ in range(100):
        other.add(500)
    assert (bound(lengths, 0, 1000), bound(other, 0, 1000)) == (10, 500)


def test_nine_of_ten_outputs_stay_within_their_bound():
    random = np.random.default_rng(0)
    lengths = OutputLengths()
    within = []
    for length in random.lognormal(5.0, 1.0, 3000).astype(int).tolist():
        within.append(length <= bound(lengths, 0, 10**6))
        lengths.add(length)
    assert 0.88 < np.mean(within[500:]) < 0.92


@settings(max_examples=50, deadline=None)
@given(
    outputs=st.lists(st.integers(1, 40), max_size=30),
    generated=st.integers(0, 40),
    room=st.integers(1, 40),
    most=st.sampled_from([1, 20, output_lengths.MAX_LOOKED_UP]),
)
def test_expected_reciprocals_are_means_over_the_longer_outputs(
    outputs: list[int], generated: int, room: int, most: int
) -> None:
    lengths = OutputLengths()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_lengths, "MAX_LOOKED_UP", most)
        for output in outputs:
            lengths.add(output)
    limit = generated + room
    longer = [min(output, limit) for output in outputs if output > generated]
    expected = sum(1 / output for output in longer) / len(longer) if longer else 1 / min(max(2 * generated, 1), limit)
    (actual,) = lengths.expected_reciprocals([generated], [limit])
    assert actual == pytest.approx(expected)


@given(outputs=LENGTHS, requests=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), max_size=6))
def test_what_is_expected_of_a_request_does_not_depend_on_who_is_asked_about_with_it(
    outputs: list[int], requests: list[tuple[int, int]]
) -> None:
    lengths = learned(outputs)
    together = lengths.expected_reciprocals(
        [generated for generated, _ in requests], [generated + room for generated, room in requests]
    )
    assert together == [
        lengths.expected_reciprocals([generated], [generated + room])[0] for generated, room in requests
    ]
