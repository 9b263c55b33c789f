"""The order of the waiting queue."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from loongjax.scheduler.queue import priority_classes
from tests.scheduler.views import waiting


@given(priorities=st.lists(st.integers(-2, 2), max_size=30))
def test_the_classes_of_a_queue_are_its_runs_of_one_priority(priorities: list[int]) -> None:
    queue = [waiting(f"w{i}", i, 1, priority=priority) for i, priority in enumerate(sorted(priorities))]
    lengths = [len(list(run)) for _, run in itertools.groupby(queue, key=lambda request: request.priority)]
    ends = list(itertools.accumulate(lengths))
    assert priority_classes(queue) == list(zip([0, *ends], ends, strict=False))
