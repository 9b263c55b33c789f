"""Who is let in, by brute force where there is a formula."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape, Group
from loongjax.scheduler.baselines.admission import next_batch, peak_pages
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.request_view import RunningView, WaitingView
from tests.scheduler.views import cluster, running, waiting

RESERVING = BatchingConfig(reserves_max_tokens=True)
TRUSTING = BatchingConfig(reserves_max_tokens=False)


def admitted(
    waits: list[WaitingView],
    runs: list[RunningView] | None = None,
    config: BatchingConfig = TRUSTING,
    num_instances: int = 1,
    **limits: Any,
) -> list[str]:
    view = cluster(num_instances, waits=waits, runs=runs or [], **limits)
    batch = next_batch(view, Group(view.shape.all_instances), waits, runs or [], config)
    return [request.request_id for request in batch]


@given(
    growth=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=8),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_the_peak_is_that_of_a_step_by_step_growth(growth: list[tuple[int, int]], page_size: int):
    shape = ClusterShape(num_instances=1, num_pages=1000, page_size=page_size)
    held = [(shape.num_pages_for(num_tokens), left) for num_tokens, left in growth]
    true_peak = max(
        sum(shape.num_pages_for(num_tokens + step) for num_tokens, left in growth if left >= step)
        for step in range(max(left for _, left in growth) + 1)
    )
    peak = peak_pages(held, 1, shape)
    assert peak == true_peak if page_size == 1 else true_peak <= peak <= true_peak + len(growth)


def test_requests_that_end_before_others_grow_are_not_counted_twice():
    shape = ClusterShape(num_instances=1, num_pages=100, page_size=1)
    assert peak_pages([(10, 90), (90, 0)], 1, shape) == 100


def test_each_instance_of_a_group_may_hold_a_page_that_is_not_full():
    shape = ClusterShape(num_instances=4, num_pages=100, page_size=4)
    assert peak_pages([(10, 0)], 4, shape) == 13


def test_nobody_is_overtaken():
    waits = [waiting("a", 0, 4), waiting("long", 1, 500), waiting("b", 2, 4)]
    assert admitted(waits, num_pages=100) == ["a"]


def test_reserving_counts_everybody_who_runs():
    """The reference forgets all of them: it keeps a list of reservations that it empties as it goes."""
    runs = [running(f"r{i}", i, (0, 40)) for i in range(2)]  # 10 pages each, and 1000 tokens to come
    waits = [waiting("a", 5, 4, max_total_tokens=5), waiting("b", 6, 40, max_total_tokens=2000)]
    assert admitted(waits, runs, RESERVING, num_pages=530) == ["a"]
    assert admitted(waits, runs, RESERVING, num_pages=1100) == ["a", "b"]
    assert admitted(waits, runs, TRUSTING, num_pages=530) == ["a", "b"]


def test_whoever_comes_first_is_let_in_where_nobody_runs():
    config = BatchingConfig(reserves_max_tokens=True, watermark=0.5)
    assert admitted([waiting("a", 0, 400, max_total_tokens=10_000)], config=config, num_pages=100) == ["a"]


def test_the_watermark_stays_free_while_others_run():
    config = BatchingConfig(reserves_max_tokens=False, watermark=0.1)
    runs = [running("r", 0, (0, 4))]
    assert admitted([waiting("a", 1, 4 * 89)], runs, config, num_pages=100) == ["a"]
    assert admitted([waiting("a", 1, 4 * 90)], runs, config, num_pages=100) == []


def test_a_batch_keeps_the_limits_of_a_prefill():
    waits = [waiting(f"w{i}", i, 10) for i in range(9)]
    assert len(admitted(waits, max_num_batched_tokens=35)) == 3
    assert len(admitted(waits, max_num_batched_tokens=35, num_instances=2)) == 7
    assert len(admitted(waits, max_num_seqs=4)) == 4


def test_no_more_run_than_one_master_takes():
    runs = [running(f"r{i}", i, (0, 4)) for i in range(3)]
    waits = [waiting(f"w{i}", 5 + i, 4) for i in range(3)]
    assert admitted(waits, runs, max_num_seqs=4) == ["w0"]


def test_requests_without_output_need_neither_memory_nor_a_seat():
    runs = [running(f"r{i}", i, (0, 4)) for i in range(4)]
    waits = [waiting(f"w{i}", 5 + i, 50, keeps_kv=False) for i in range(3)]
    assert admitted(waits, runs, max_num_seqs=4, num_pages=4) == ["w0", "w1", "w2"]


def test_a_suspect_is_alone():
    waits = [waiting("a", 0, 4), waiting("suspect", 1, 4, is_suspect=True), waiting("b", 2, 4)]
    assert admitted(waits) == ["a"]
    assert admitted(waits[1:]) == ["suspect"]
