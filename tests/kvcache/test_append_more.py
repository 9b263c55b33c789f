"""Many slots at once are the same as one after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import TokenInterval
from loongjax.kvcache.kv_cache import KVCache
from loongjax.kvcache.page_pool import OutOfPagesError


def cache(page_size: int, num_kept: int, num_pages: int = 40) -> KVCache:
    kv_cache = KVCache(ClusterShape(num_instances=2, num_pages=num_pages, page_size=page_size))
    kv_cache.keep("r", (TokenInterval(0, 0, num_kept),))
    kv_cache.append("r", 1)
    return kv_cache


@given(page_size=st.sampled_from((1, 4, 16)), num_kept=st.integers(1, 30), num_more=st.integers(0, 30))
def test_it_takes_the_pages_that_single_appends_take(page_size: int, num_kept: int, num_more: int):
    at_once, one_by_one = cache(page_size, num_kept), cache(page_size, num_kept)
    at_once.append_more("r", num_more)
    for _ in range(num_more):
        one_by_one.append("r", 1)
    at_once.check_integrity()
    assert at_once.local_lens("r") == one_by_one.local_lens("r") == ((0, num_kept), (1, 1 + num_more))
    assert at_once.used_pages(1) == one_by_one.used_pages(1)
    assert at_once.intervals("r") == one_by_one.intervals("r")


def test_without_enough_pages_nothing_changes():
    kv_cache = cache(4, 4, num_pages=2)
    with pytest.raises(OutOfPagesError):
        kv_cache.append_more("r", 8)
    kv_cache.check_integrity()
    assert kv_cache.local_lens("r") == ((0, 4), (1, 1))
