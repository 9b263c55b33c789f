"""Chunks of tokens take the slots that their tokens would take one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import TokenInterval
from loongjax.kvcache.kv_cache import KVCache
from loongjax.kvcache.page_pool import OutOfPagesError


def cache(page_size: int, num_pages: int = 60) -> KVCache:
    return KVCache(ClusterShape(num_instances=2, num_pages=num_pages, page_size=page_size))


@given(page_size=st.sampled_from((1, 4, 16)), chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_chunks_take_the_slots_of_single_appends(page_size: int, chunks: list[int]):
    in_chunks, one_by_one = cache(page_size), cache(page_size)
    slots = np.concatenate([in_chunks.extend("r", 1, num_tokens) for num_tokens in chunks])
    one_by_one.keep("r", ())
    assert slots.tolist() == [one_by_one.append("r", 1) for _ in range(sum(chunks))]
    assert slots.dtype == np.int32
    in_chunks.check_integrity()
    assert in_chunks.intervals("r") == one_by_one.intervals("r") == (TokenInterval(1, 0, sum(chunks)),)
    assert in_chunks.used_pages(1) == one_by_one.used_pages(1)


def test_a_request_goes_on_where_a_prefill_left_it():
    kv_cache = cache(4)
    (kept,) = kv_cache.keep("r", (TokenInterval(0, 0, 6),))
    slots = kv_cache.extend("r", 0, 3)
    kv_cache.check_integrity()
    (table,) = kv_cache.tables("r")
    all_slots = (table.page_indices[:, None] * 4 + np.arange(4)).reshape(-1)[:9]
    assert all_slots.tolist() == [*kept.slots.tolist(), *slots.tolist()]
    assert kv_cache.append("r", 0) == table.page_indices[2] * 4 + 1


def test_without_enough_pages_nothing_changes():
    kv_cache = cache(4, num_pages=2)
    with pytest.raises(OutOfPagesError):
        kv_cache.extend("new", 0, 9)
    assert "new" not in kv_cache
    kv_cache.extend("r", 0, 5)
    with pytest.raises(OutOfPagesError):
        kv_cache.extend("r", 0, 4)
    kv_cache.check_integrity()
    assert kv_cache.local_lens("r") == ((0, 5),)
    assert kv_cache.free_pages(0) == 0
