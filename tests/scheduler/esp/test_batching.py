import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loongjax.costmodel.work import PrefillTotals
from loongjax.scheduler.esp import run_times
from loongjax.scheduler.esp.batching import Batch, Question, SplitMemory, Splits
from loongjax.scheduler.esp.run_times import Workspace
from tests.scheduler.esp.partitions import Problem, set_partitions

LINEAR = ((0.0, 1.0, 0.0), (0.0, 0.5, 0.0), (0.0, 1 / 3, 0.0), (0.0, 0.25, 0.0))
"""A second a token, perfectly parallel."""


def loads_of(lengths: Sequence[int], weights: Sequence[float], kept_tokens: Sequence[int] | None = None) -> np.ndarray:
    kept = lengths if kept_tokens is None else kept_tokens
    return np.array((lengths, [length**2 for length in lengths], weights, kept), np.float64)


def question_of(problem: Problem) -> Question:
    return Question(
        loads=loads_of(problem.lengths, problem.weights, problem.kept_tokens),
        free_tokens=problem.free_tokens,
        seconds=problem.seconds,
        max_tokens_per_instance=problem.max_tokens_per_instance,
        max_requests=problem.max_requests,
    )


def splits_of(problem: Problem, workspace: Workspace | None = None) -> Splits:
    return Splits(question_of(problem), workspace)


def solve(problem: Problem, workspace: Workspace | None = None) -> tuple[Batch, ...] | None:
    return splits_of(problem, workspace).on_first(len(problem.free_tokens))


def cost(problem: Problem, batches: tuple[Batch, ...] | None) -> float:
    if batches is None:
        return math.inf
    return sum(problem.cost(batch.requests, batch.instances) for batch in batches)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 6 requests and 4 instances, with memory from far too little to ample, and tight limits half of the time."""
    lengths = sorted(draw(st.lists(st.integers(1, 60), min_size=1, max_size=6)), reverse=True)
    num_instances = draw(st.integers(1, 4))
    most_free = draw(st.sampled_from([10, 40, 80, 1000]))
    coefficient = st.floats(0.0, 10.0)
    kept = [draw(st.integers(0, length + 5)) for length in lengths] if draw(st.booleans()) else None
    has_limits = draw(st.booleans())
    return Problem(
        lengths=tuple(lengths),
        weights=tuple(draw(st.floats(0.1, 4.0)) / length for length in lengths),
        free_tokens=tuple(draw(st.integers(0, most_free)) for _ in range(num_instances)),
        coefficients=tuple(
            (draw(coefficient), draw(coefficient) / dop, draw(coefficient) / 30 / dop)
            for dop in range(1, num_instances + 1)
        ),
        max_tokens_per_instance=draw(st.integers(20, 120)) if has_limits else 10**9,
        max_requests=draw(st.integers(1, 3)) if has_limits else 10**9,
        kept_tokens=None if kept is None else tuple(kept),
    )


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_the_split_costs_what_the_best_of_all_splits_of_neighbours_costs(problem: Problem):
    batches = solve(problem)
    assert cost(problem, batches) == pytest.approx(problem.least_of_neighbours(), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_batches_take_all_requests_in_order_and_the_first_instances(problem: Problem):
    batches = solve(problem)
    if batches is None:
        return
    assert [request for batch in batches for request in batch.requests] == list(range(len(problem.lengths)))
    instances = [instance for batch in batches for instance in batch.instances]
    assert instances == list(range(len(instances)))
    assert all(batch.requests and batch.instances for batch in batches)


@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_a_split_on_the_first_instances_is_as_if_there_were_no_others(problem: Problem):
    splits = splits_of(problem)
    for count in range(len(problem.free_tokens), 0, -1):
        alone = dataclasses.replace(problem, free_tokens=problem.free_tokens[:count])
        assert splits.on_first(count) == solve(alone)
    assert splits.on_first(0) is None


@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data())
def test_where_memory_is_ample_any_instances_are_as_good_as_the_first(problem: Problem, data: st.DataObject):
    splits = splits_of(problem)
    if not splits.is_memory_short:
        chosen = data.draw(
            st.lists(st.sampled_from(problem.free_tokens), min_size=1, max_size=len(problem.free_tokens))
        )
        assert splits.on_first(len(chosen)) == solve(dataclasses.replace(problem, free_tokens=tuple(chosen)))


def test_a_hand_worked_split():
    # One batch of both on both instances: (8 + 4 + 1) / 2 * (1/8 + 1/4) = 2.4 with a second of its own.
    # Each on an instance: (1 + 8) / 8 + (1 + 4) / 4 = 2.4; 8 tokens on one, 4 on the other, no smaller.
    coefficients = ((1.0, 1.0, 0.0), (0.5, 0.5, 0.0))
    problem = Problem(lengths=(8, 4), weights=(1 / 8, 1 / 4), free_tokens=(100, 100), coefficients=coefficients)
    assert cost(problem, (Batch(range(2), range(2)),)) == pytest.approx(2.4375)
    assert cost(problem, (Batch(range(1), range(1)), Batch(range(1, 2), range(1, 2)))) == pytest.approx(2.375)
    assert solve(problem) == (Batch(range(1), range(1)), Batch(range(1, 2), range(1, 2)))


def test_a_long_prompt_and_short_ones_are_not_one_batch():
    """The reference never forms a second batch: its bound on equation 6 points the wrong way."""
    lengths = (50_000, 100, 90, 80)
    problem = Problem(
        lengths=lengths,
        weights=tuple(1 / length for length in lengths),
        free_tokens=(100_000,) * 4,
        coefficients=tuple((0.02, 1e-4 / dop, 4e-9 / dop) for dop in range(1, 5)),
    )
    batches = solve(problem)
    assert batches is not None
    assert len(batches) > 1
    assert batches[0].requests == range(1)
    together = min(problem.cost(range(4), range(k)) for k in range(1, 5))
    assert cost(problem, batches) < together / 10


def test_equal_short_prompts_spread_over_the_instances():
    problem = Problem(
        lengths=(100,) * 4, weights=(0.01,) * 4, free_tokens=(1000,) * 4, coefficients=((1.0, 1.0, 0.0),) * 4
    )
    assert solve(problem) == tuple(Batch(range(i, i + 1), range(i, i + 1)) for i in range(4))


def test_instances_that_bring_nothing_are_left_out():
    problem = Problem(
        lengths=(100,), weights=(0.01,), free_tokens=(1000,) * 3, coefficients=tuple((d, 1.0, 0.0) for d in (1, 2, 3))
    )
    assert solve(problem) == (Batch(range(1), range(1)),)


def test_memory_widens_a_batch():
    problem = Problem(
        lengths=(100,), weights=(0.01,), free_tokens=(40,) * 3, coefficients=tuple((d, 1.0, 0.0) for d in (1, 2, 3))
    )
    assert solve(problem) == (Batch(range(1), range(3)),)


def test_memory_is_that_of_the_instances_a_batch_takes_not_of_the_first_ones():
    problem = Problem(lengths=(90, 10), weights=(1.0, 1.0), free_tokens=(90, 10), coefficients=LINEAR)
    assert solve(problem) == (Batch(range(1), range(1)), Batch(range(1, 2), range(1, 2)))


def test_keys_that_are_not_kept_need_no_memory():
    problem = Problem(
        lengths=(100,), weights=(1.0,), free_tokens=(0,), coefficients=LINEAR, kept_tokens=(0,), max_requests=1
    )
    assert solve(problem) == (Batch(range(1), range(1)),)


@pytest.mark.parametrize(
    "limit",
    [
        {"free_tokens": (99,)},
        {"free_tokens": (100,), "max_tokens_per_instance": 99},
        {"free_tokens": (100,), "max_requests": 1},
        {"free_tokens": (100,), "kept_tokens": (60, 41)},
    ],
)
def test_no_split_is_none(limit: dict[str, Any]):
    problem = Problem(lengths=(60, 40), weights=(1.0, 1.0), free_tokens=(100,), coefficients=LINEAR[:1])
    assert solve(problem) is not None
    assert solve(dataclasses.replace(problem, **limit)) is None


def test_no_requests_are_no_batches():
    assert solve(Problem(lengths=(), weights=(), free_tokens=(10,), coefficients=LINEAR)) == ()


def test_no_instances_hold_no_requests():
    assert solve(Problem(lengths=(100,), weights=(1.0,), free_tokens=(), coefficients=())) is None


def seconds_of_tokens(totals: PrefillTotals[np.ndarray], out: np.ndarray) -> None:
    """A second a token, perfectly parallel."""
    out[:] = totals.num_tokens / np.arange(1, len(out) + 1)[:, None]


def test_the_cost_model_is_asked_once_about_few_requests():
    asked: list[tuple[int, ...]] = []

    def seconds(totals: PrefillTotals[np.ndarray], out: np.ndarray) -> None:
        asked.append(out.shape)
        seconds_of_tokens(totals, out)

    loads = loads_of(range(20, 0, -1), [1.0] * 20)
    splits = Splits(Question(loads, [1000] * 4, seconds, max_tokens_per_instance=1000, max_requests=64))
    assert splits.on_first(4)
    assert splits.on_first(3)
    assert asked == [(4, 210)]


def test_the_cost_model_is_asked_about_true_batches_only():
    lengths = [9, 5, 5, 2]
    true = {
        (sum(part), sum(x * x for x in part)) for b in range(4) for e in range(b, 4) if (part := lengths[b : e + 1])
    }

    def seconds(totals: PrefillTotals[np.ndarray], out: np.ndarray) -> None:
        assert set(zip(totals.num_tokens.tolist(), totals.squared_lens.tolist(), strict=True)) == true
        assert not totals.new_times_past.any()
        seconds_of_tokens(totals, out)

    loads = loads_of(lengths, [1.0 / length for length in lengths])
    splits = Splits(Question(loads, [99] * 2, seconds, max_tokens_per_instance=99, max_requests=4))
    assert splits.on_first(2)


@settings(max_examples=100, deadline=None)
@given(asked=st.lists(problems(), min_size=1, max_size=3), order=st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_what_was_found_last_is_never_taken_for_another_answer(asked: list[Problem], order: list[int]):
    memory = SplitMemory()
    for problem in [asked[index % len(asked)] for index in order]:
        num_instances = len(problem.free_tokens)
        splits = memory.splits(question_of(problem))
        answers = {number: splits.on_first(number) for number in range(1, num_instances + 1)}
        assert answers == {number: splits_of(problem).on_first(number) for number in range(1, num_instances + 1)}


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
    changes=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=4),
)
def test_requests_that_come_to_weigh_more_or_to_have_other_instances_are_split_as_if_they_were_new(
    problem: Problem, changes: list[tuple[int, float]]
):
    """What their batches take is asked once while they have as many instances."""
    asked: list[tuple[int, ...]] = []

    def seconds(totals: PrefillTotals[np.ndarray], out: np.ndarray) -> None:
        asked.append(out.shape)
        problem.seconds(totals, out)

    memory, numbers = SplitMemory(), []
    for number, factor in changes:
        changed = dataclasses.replace(
            problem,
            free_tokens=problem.free_tokens[:number],
            weights=tuple(weight * factor**place for place, weight in enumerate(problem.weights)),
        )
        splits = memory.splits(question_of(changed)._replace(seconds=seconds))
        numbers.append(len(changed.free_tokens))
        assert splits.on_first(len(changed.free_tokens)) == solve(changed)
    assert len(asked) <= len(list(itertools.groupby(numbers)))
    assert {shape[0] for shape in asked} <= set(numbers)


@pytest.mark.parametrize(
    ("changes", "is_the_same"),
    [
        ({}, True),
        ({"free_tokens": [30, 21, 40]}, True),
        ({"free_tokens": [30, 20, 40]}, False),
        ({"free_tokens": [30, 30]}, False),
        ({"loads": loads_of([12, 5, 4], [0.1, 0.2, 0.3])}, False),
        ({"loads": loads_of([12, 5, 4], [0.1, 0.2, 0.25], [9, 5, 5])}, False),
        ({"max_requests": 2}, False),
        ({"max_tokens_per_instance": 98}, False),
        ({"seconds": lambda totals, out: seconds_of_tokens(totals, out)}, False),
    ],
)
def test_where_memory_is_ample_it_may_change_and_nothing_else(changes: dict[str, Any], is_the_same: bool):
    question: dict[str, Any] = {
        "loads": loads_of([12, 5, 4], [0.1, 0.2, 0.25]),
        "free_tokens": [30, 30, 30],
        "seconds": seconds_of_tokens,
        "max_requests": 3,
        "max_tokens_per_instance": 99,
    }
    memory = SplitMemory()
    first = memory.splits(Question(**question))
    assert (memory.splits(Question(**question | changes)) is first) == is_the_same


def test_equal_questions_get_equal_answers():
    problem = Problem(lengths=(5,) * 6, weights=(0.2,) * 6, free_tokens=(50,) * 4, coefficients=LINEAR)
    assert solve(problem) == solve(problem)


def test_set_partitions_are_counted_by_the_bell_numbers():
    assert [sum(1 for _ in set_partitions(range(n))) for n in range(7)] == [1, 1, 2, 5, 15, 52, 203]


LIMITED = Problem(lengths=(1,) * 6, weights=(1.0,) * 6, free_tokens=(4, 1, 1), coefficients=LINEAR[:3], max_requests=1)
"""Later blocks have no run that begins with the first request."""


@settings(max_examples=100, deadline=None)
@example(problem=LIMITED, most=2)
@given(problem=problems(), most=st.integers(1, 8))
def test_blocks_of_any_size_and_memory_of_other_searches_change_nothing(problem: Problem, most: int):
    expected = solve(problem)
    workspace = Workspace()
    workspace.array("costs", 9, 99).fill(-1.0)
    workspace.array("before", 9, 99).fill(-1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_times, "MAX_RUNS_OF_BLOCK", most)
        run_times.runs_of.cache_clear()
        assert solve(problem, workspace) == expected
    run_times.runs_of.cache_clear()
