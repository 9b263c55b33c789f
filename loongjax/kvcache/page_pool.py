"""The pages of one instance's part of the KV pool."""

from __future__ import annotations

import numpy as np

from loongjax.core.cluster import InstanceId


class OutOfPagesError(Exception):
    """An instance has fewer free pages than an operation needs. Nothing has changed. Never leaves the engine."""

    def __init__(self, instance: InstanceId, num_needed: int, num_free: int) -> None:
        super().__init__(f"instance {instance} has {num_free} free pages, {num_needed} are needed")
        self.instance = instance
        self.num_needed = num_needed
        self.num_free = num_free

    def __reduce__(self) -> tuple[type, tuple[InstanceId, int, int]]:
        return type(self), (self.instance, self.num_needed, self.num_free)


class PagePool:
    """Pages 0 to num_pages - 1, each free or held by one or more holders.

    Which free pages come next is not specified. Every operation is O(1) a page.
    """

    def __init__(self, instance: InstanceId, num_pages: int) -> None:
        assert num_pages >= 0, num_pages
        self._instance = instance
        self._num_holders = np.zeros(num_pages, np.int32)
        self._free_stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        """The first `num_free` entries are the free pages; the rest is stale."""
        self.num_free = num_pages

    @property
    def num_pages(self) -> int:
        return len(self._free_stack)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, num_pages: int) -> np.ndarray:
        """Takes pages for one holder: int32 [num_pages], distinct.

        Raises:
            OutOfPagesError: fewer are free; none is taken then.
        """
        self.check_free(num_pages)
        end = self.num_free
        self.num_free = end - num_pages
        pages = self._free_stack[self.num_free : end][::-1].copy()
        self._num_holders[pages] = 1
        return pages

    def allocate_one(self) -> int:
        """The same for a single page, which is what a decode step needs.

        Raises:
            OutOfPagesError: none is free.
        """
        if not self.num_free:
            raise OutOfPagesError(self._instance, 1, 0)
        self.num_free -= 1
        page = int(self._free_stack[self.num_free])
        self._num_holders[page] = 1
        return page

    def check_free(self, num_pages: int) -> None:
        """Raises OutOfPagesError if fewer pages are free."""
        if num_pages > self.num_free:
            raise OutOfPagesError(self._instance, num_pages, self.num_free)

    def share(self, pages: np.ndarray) -> None:
        """Adds a holder to each of these distinct, used pages."""
        assert (self._num_holders[pages] > 0).all(), "a shared page must be in use"
        self._num_holders[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Takes a holder from each of these distinct, used pages; those without another are free again."""
        num_holders = self._num_holders[pages]
        assert (num_holders > 0).all(), "a released page must be in use"
        self._num_holders[pages] = num_holders - 1
        freed = pages[num_holders == 1]
        self._free_stack[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def num_holders(self) -> np.ndarray:
        """int32 [num_pages], by page; 0 where free. A copy."""
        return self._num_holders.copy()

    def check_integrity(self) -> None:
        """Asserts that every page is either free, listed once, or has a holder."""
        assert 0 <= self.num_free <= self.num_pages
        free = self._free_stack[: self.num_free]
        is_free = np.zeros(self.num_pages, bool)
        is_free[free] = True
        assert int(is_free.sum()) == self.num_free, "a page is listed as free twice"
        assert (self._num_holders >= 0).all()
        assert (is_free == (self._num_holders == 0)).all(), "a page is both free and held, or neither"
