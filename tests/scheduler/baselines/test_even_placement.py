import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.plan import TokenInterval
from loongjax.scheduler.baselines.even_placement import spread_keys
from tests.scheduler.views import waiting


@given(
    free=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    wanted=st.integers(1, 60),
    page_size=st.sampled_from([1, 4]),
    slack=st.integers(0, 3),
)
def test_what_is_left_is_as_even_as_pages_allow(free: list[int], wanted: int, page_size: int, slack: int):
    num_pages = min(wanted, sum(free))
    if num_pages == 0:
        return
    num_tokens = max(1, num_pages * page_size - min(slack, page_size - 1))
    left = dict(enumerate(free))
    (placed,) = spread_keys([waiting("a", 0, num_tokens)], left, page_size=page_size)
    # Page by page from whoever has most left: slow, and as even as can be.
    expected = sorted(free)
    for _ in range(num_pages):
        expected.sort()
        expected[-1] -= 1
    assert sorted(left.values()) == sorted(expected)
    used = dict.fromkeys(left, 0)
    position = 0
    for interval in placed.kept:
        assert interval.begin == position
        assert interval.begin % page_size == 0
        used[interval.instance] += -(-interval.num_tokens // page_size)
        position = interval.end
    assert position == num_tokens
    assert {instance: free[instance] - count for instance, count in used.items()} == left


def test_a_prompt_is_spread_over_an_empty_group_evenly():
    (placed,) = spread_keys([waiting("a", 0, 16)], {0: 10, 1: 10, 2: 10, 3: 10}, page_size=2)
    assert sorted(interval.num_tokens for interval in placed.kept) == [4, 4, 4, 4]


def test_the_newest_token_lies_where_the_next_ones_will():
    (placed,) = spread_keys([waiting("a", 0, 15)], {2: 10, 0: 10, 1: 10}, page_size=4)
    assert placed.kept[-1].instance == 2


def test_requests_of_a_batch_are_placed_one_after_the_other():
    free = {0: 5, 1: 5}
    first, second = spread_keys([waiting("a", 0, 4), waiting("b", 1, 4)], free, page_size=4)
    assert first.kept == (TokenInterval(0, 0, 4),)
    assert second.kept == (TokenInterval(1, 0, 4),)
    assert free == {0: 4, 1: 4}


def test_a_request_without_output_keeps_nothing():
    free = {0: 0}
    (placed,) = spread_keys([waiting("a", 0, 4, keeps_kv=False)], free, page_size=4)
    assert placed.kept == ()
    assert free == {0: 0}


def test_more_keys_than_pages_are_a_bug():
    with pytest.raises(AssertionError):
        spread_keys([waiting("a", 0, 9)], {0: 1, 1: 1}, page_size=4)
