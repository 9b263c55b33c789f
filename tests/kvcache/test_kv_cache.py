import dataclasses

import numpy as np
import pytest

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import TokenInterval
from loongjax.kvcache.kv_cache import KVCache
from loongjax.kvcache.page_pool import OutOfPagesError


def make_cache(*, num_instances: int = 3, num_pages: int = 8, page_size: int = 4) -> KVCache:
    return KVCache(ClusterShape(num_instances=num_instances, num_pages=num_pages, page_size=page_size))


def test_kept_slots_follow_the_pages_of_the_table():
    cache = make_cache()
    (kept,) = cache.keep("a", [TokenInterval(1, 0, 10)])
    (table,) = cache.tables("a")
    assert (kept.instance, kept.begin, kept.end, table.instance, table.num_tokens) == (1, 0, 10, 1, 10)
    assert kept.slots.dtype == table.page_indices.dtype == np.int32
    assert kept.slots.tolist() == [int(table.page_indices[j // 4]) * 4 + j % 4 for j in range(10)]
    assert cache.used_pages(1) == 3
    cache.check_integrity()


def test_intervals_of_one_instance_form_one_dense_sequence():
    cache = make_cache()
    first, _, last = cache.keep("a", [TokenInterval(0, 0, 4), TokenInterval(1, 4, 8), TokenInterval(0, 8, 11)])
    pages = {table.instance: table.page_indices for table in cache.tables("a")}
    assert [*first.slots, *last.slots] == [int(pages[0][j // 4]) * 4 + j % 4 for j in range(7)]
    assert cache.local_lens("a") == ((1, 4), (0, 7))


def test_keeping_is_all_or_nothing_across_instances():
    cache = make_cache(num_pages=2)
    intervals = [TokenInterval(0, 0, 8), TokenInterval(1, 8, 24)]
    assert not cache.can_keep(intervals)
    with pytest.raises(OutOfPagesError):
        cache.keep("a", intervals)
    assert [cache.used_pages(instance) for instance in range(3)] == [0, 0, 0]
    assert "a" not in cache
    cache.check_integrity()


def test_a_request_without_kept_tokens_holds_nothing():
    cache = make_cache()
    assert cache.keep("a", ()) == ()
    assert (cache.num_tokens("a"), cache.holders("a"), cache.tables("a")) == (0, (), ())
    cache.check_integrity()
    cache.release("a")
    assert len(cache) == 0


@pytest.mark.parametrize(
    "intervals",
    [
        [TokenInterval(0, 4, 8)],
        [TokenInterval(0, 0, 4), TokenInterval(1, 8, 12)],
        [TokenInterval(0, 0, 3), TokenInterval(1, 3, 8)],
        [TokenInterval(0, 0, 0)],
    ],
    ids=["not from zero", "gap", "boundary within a page", "empty"],
)
def test_intervals_that_do_not_tile_are_an_error(intervals: list[TokenInterval]):
    with pytest.raises(AssertionError):
        make_cache().keep("a", intervals)


def test_appends_fill_the_last_page_before_they_take_another():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 3)])
    slots = [cache.append("a", 0) for _ in range(3)]
    (table,) = cache.tables("a")
    assert slots == [int(table.page_indices[j // 4]) * 4 + j % 4 for j in (3, 4, 5)]
    assert (cache.used_pages(0), cache.num_tokens("a")) == (2, 6)


def test_new_tokens_stay_with_the_master_they_are_given():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 4)])
    for master in (1, 1, 2, 0):
        cache.append("a", master)
    assert cache.local_lens("a") == ((1, 2), (2, 1), (0, 5))
    assert cache.intervals("a") == (
        TokenInterval(1, 4, 6),
        TokenInterval(2, 6, 7),
        TokenInterval(0, 0, 4),
        TokenInterval(0, 7, 8),
    )
    cache.check_integrity()


def test_an_append_without_a_page_changes_nothing():
    cache = make_cache(num_pages=1)
    cache.keep("a", [TokenInterval(0, 0, 4)])
    cache.keep("b", [TokenInterval(1, 0, 3)])
    assert not cache.can_append(["a"], 0)
    assert not cache.can_append(["a"], 1)
    assert cache.can_append(["b"], 1)
    for instance in (0, 1):
        with pytest.raises(OutOfPagesError):
            cache.append("a", instance)
    assert cache.local_lens("a") == ((0, 4),)
    cache.check_integrity()


def test_a_table_handed_out_never_changes():
    cache = make_cache(num_pages=64, page_size=1)
    cache.keep("a", [TokenInterval(0, 0, 7)])
    tables, copies = [], []
    for step in range(40):
        cache.append("a", 0)
        if step % 9 == 8:
            cache.migrate("a", 0, 1, 5)
        for table in cache.tables("a"):
            tables.append(table.page_indices)
            copies.append(table.page_indices.copy())
    cache.release("a")
    cache.keep("b", [TokenInterval(0, 0, 60)])
    assert all((table == copied).all() for table, copied in zip(tables, copies, strict=True))


def test_tables_cannot_be_written_to():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 3)])
    (table,) = cache.tables("a")
    with pytest.raises(ValueError, match="read-only"):
        table.page_indices[0] = 1


def test_local_lens_are_the_same_tuple_until_they_change():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8), TokenInterval(1, 8, 10)])
    cache.keep("b", [TokenInterval(2, 0, 3)])
    before = cache.local_lens("b")
    changes = [cache.local_lens("a")]
    for change in (lambda: cache.append("a", 1), lambda: cache.migrate("a", 0, 1, 2), lambda: cache.append("a", 0)):
        change()
        assert cache.local_lens("a") != changes[-1]
        changes.append(cache.local_lens("a"))
    assert cache.local_lens("b") is before


def test_migration_moves_the_last_local_tokens_to_the_end_of_the_target():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8), TokenInterval(1, 8, 10)])
    before = {table.instance: table.page_indices for table in cache.tables("a")}
    source_slots, target_slots = cache.migrate("a", 0, 1, 5)
    after = {table.instance: table.page_indices for table in cache.tables("a")}
    assert source_slots.tolist() == [int(before[0][j // 4]) * 4 + j % 4 for j in range(3, 8)]
    assert target_slots.tolist() == [int(after[1][j // 4]) * 4 + j % 4 for j in range(2, 7)]
    assert cache.local_lens("a") == ((0, 3), (1, 7))
    assert cache.intervals("a") == (TokenInterval(0, 0, 3), TokenInterval(1, 8, 10), TokenInterval(1, 3, 8))
    assert (cache.used_pages(0), cache.used_pages(1)) == (1, 2)
    cache.check_integrity()


def test_migrating_everything_frees_the_source():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8), TokenInterval(1, 8, 10)])
    cache.migrate("a", 1, 0, 2)
    assert cache.holders("a") == (0,)
    assert cache.used_pages(1) == 0
    cache.append("a", 0)
    assert cache.local_lens("a") == ((0, 11),)
    cache.check_integrity()


def test_tables_follow_a_page_that_was_exchanged():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8), TokenInterval(1, 8, 10)])
    cache.tables("a")
    cache.migrate("a", 0, 1, 4)
    cache.keep("b", [TokenInterval(0, 0, 4)])
    cache.migrate("a", 1, 0, 4)
    pages = {table.instance: set(table.page_indices.tolist()) for table in cache.tables("a")}
    (other,) = cache.tables("b")
    assert pages[0].isdisjoint(other.page_indices.tolist())
    cache.check_integrity()


def test_check_integrity_finds_a_stale_table():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8)])
    (table,) = cache.tables("a")
    (local,) = cache._requests["a"]
    local._table = dataclasses.replace(table, page_indices=table.page_indices[::-1])
    with pytest.raises(AssertionError, match="stale table"):
        cache.check_integrity()


def test_migration_without_room_changes_nothing():
    cache = make_cache(num_pages=2)
    cache.keep("a", [TokenInterval(0, 0, 8)])
    cache.keep("b", [TokenInterval(1, 0, 5)])
    with pytest.raises(OutOfPagesError):
        cache.migrate("a", 0, 1, 1)
    assert cache.local_lens("a") == ((0, 8),)
    assert cache.used_pages(1) == 2
    cache.check_integrity()


def test_release_frees_the_pages_of_that_request_alone():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8), TokenInterval(1, 8, 10)])
    cache.keep("b", [TokenInterval(0, 0, 5)])
    cache.release("a")
    assert [cache.used_pages(instance) for instance in range(3)] == [2, 0, 0]
    assert [cache.free_pages(instance) for instance in range(3)] == [6, 8, 8]
    assert cache.request_ids == ("b",)
    cache.check_integrity()


def test_pages_needed_are_counted_by_instance_not_by_interval():
    cache = make_cache()
    intervals = [TokenInterval(0, 0, 4), TokenInterval(1, 4, 8), TokenInterval(0, 8, 9)]
    assert cache.num_pages_needed(intervals) == {0: 2, 1: 1}


def test_check_integrity_finds_a_lost_page():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 8)])
    cache._requests.clear()
    with pytest.raises(AssertionError, match="references != holders"):
        cache.check_integrity()


def test_check_integrity_finds_a_page_with_two_owners():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 4)])
    cache.keep("b", [TokenInterval(0, 0, 4)])
    (a,), (b,) = cache._requests["a"], cache._requests["b"]
    b._buffer[0] = a._buffer[0]
    b.last_page = a.last_page
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_check_integrity_finds_a_token_in_two_places():
    cache = make_cache()
    cache.keep("a", [TokenInterval(0, 0, 4), TokenInterval(1, 4, 8)])
    _, local = cache._requests["a"]
    local.intervals[0][:] = [0, 4]
    with pytest.raises(AssertionError, match="does not tile"):
        cache.check_integrity()
