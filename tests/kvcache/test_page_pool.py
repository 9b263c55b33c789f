import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.kvcache.page_pool import OutOfPagesError, PagePool


def test_allocated_pages_are_distinct_and_within_the_pool():
    pool = PagePool(0, 10)
    pages = np.concatenate([pool.allocate(4), pool.allocate(6)])
    assert sorted(pages.tolist()) == list(range(10))
    assert pages.dtype == np.int32


def test_allocation_is_all_or_nothing():
    pool = PagePool(3, 4)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="instance 3 has 2 free pages, 3 are needed"):
        pool.allocate(3)
    assert (pool.num_free, pool.num_used) == (2, 2)
    pool.check_integrity()


def test_a_single_page_comes_from_the_same_pool():
    pool = PagePool(0, 2)
    assert {pool.allocate_one(), pool.allocate_one()} == {0, 1}
    with pytest.raises(OutOfPagesError):
        pool.allocate_one()
    pool.check_integrity()


def test_a_shared_page_is_free_only_after_its_last_holder():
    pool = PagePool(0, 3)
    pages = pool.allocate(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.num_used == 1
    assert pool.num_holders()[pages].tolist() == [1, 0]
    pool.release(pages[:1])
    assert pool.num_used == 0
    pool.check_integrity()


def test_releasing_a_free_page_is_an_error():
    pool = PagePool(0, 3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="must be in use"):
        pool.release(pages)


def test_sharing_a_free_page_is_an_error():
    with pytest.raises(AssertionError, match="must be in use"):
        PagePool(0, 1).share(np.array([0], np.int32))


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(OutOfPagesError(1, 5, 2)))
    assert (error.instance, error.num_needed, error.num_free) == (1, 5, 2)


def test_check_integrity_finds_a_page_freed_twice():
    pool = PagePool(0, 4)
    broken = copy.deepcopy(pool)
    broken._free_stack[:2] = 1
    pool.check_integrity()
    with pytest.raises(AssertionError):
        broken.check_integrity()


@given(st.integers(0, 20), st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 7))))
def test_references_equal_holders_under_any_sequence(num_pages: int, operations: list[tuple[str, int]]):
    pool = PagePool(0, num_pages)
    holdings: list[np.ndarray] = []
    for operation, number in operations:
        if operation == "allocate":
            if number <= pool.num_free:
                holdings.append(pool.allocate(number))
            else:
                with pytest.raises(OutOfPagesError):
                    pool.allocate(number)
        elif holdings and operation == "share":
            holdings.append(holdings[number % len(holdings)])
            pool.share(holdings[-1])
        elif holdings:
            pool.release(holdings.pop(number % len(holdings)))
        expected = np.zeros(num_pages, np.int32)
        for pages in holdings:
            expected[pages] += 1
        assert pool.num_holders().tolist() == expected.tolist()
        assert pool.num_used == int((expected > 0).sum())
        pool.check_integrity()
