"""Page pool with reference counts, a free list, and LRU eviction of cached pages."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

from moe_jax.scheduler.limits import CacheGroup
from moe_jax.scheduler.prefix_tree import PrefixNode


class PagePool:
    """Pages of one cache group on one token shard. Each page is free, referenced by requests, or evictable.

    An evictable page has no reference but stays cached for its content, until LRU eviction reuses it. A request frees
    its last pages first, so that a page is evicted before the pages that precede it in the sequence.
    """

    __slots__ = ("_evictable", "_free_list", "_nodes", "_number", "group", "ref_counts")

    def __init__(self, number: int, group: CacheGroup) -> None:
        self.group = group
        self._number = number
        self._free_list = list(range(group.pages))[::-1]
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Cached pages without a reference, least recently used first."""
        self._nodes: list[PrefixNode | None] = [None] * group.pages
        """Prefix node of each page; `None` for pages that are not cached."""
        self.ref_counts = [0] * group.pages
        """Number of requests that hold each page."""

    @property
    def available(self) -> int:
        """Number of pages that can be allocated: free and evictable ones."""
        return len(self._free_list) + len(self._evictable)

    @property
    def used(self) -> int:
        """Number of pages that requests hold."""
        return len(self.ref_counts) - self.available

    def allocate(self, count: int, ids: array[int]) -> bool:
        """Append `count` writable pages to `ids`: free pages, then evicted ones.

        Return False, with none taken, if there are too few.
        """
        free_list = self._free_list
        if len(free_list) < count and not self._evict(count - len(free_list)):
            return False
        while count:
            count -= 1
            page = free_list.pop()
            self.ref_counts[page] = 1
            ids.append(page)
        return True

    def touch(self, page: int) -> None:
        """Add a reference to a cached page, which is then no longer evictable."""
        assert self._nodes[page] is not None
        if not self.ref_counts[page]:
            del self._evictable[page]
        self.ref_counts[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Drop one reference to each page. At 0, cached pages become evictable and other pages free."""
        ref_counts = self.ref_counts
        for page in pages:
            count = ref_counts[page] = ref_counts[page] - 1
            assert count >= 0, "each reference is dropped once"
            if not count:
                if self._nodes[page] is None:
                    self._free_list.append(page)
                else:
                    self._evictable[page] = None

    def cache(self, page: int, node: PrefixNode) -> None:
        """Attach a full page to its prefix node, unless the node has a page of the same content."""
        if node.pages[self._number] is None:
            node.pages[self._number] = page
            self._nodes[page] = node
            node.ref_count += 1

    def _evict(self, count: int) -> bool:
        """Move `count` evictable pages to the free list. Return False, with none moved, if there are too few."""
        if len(self._evictable) < count:
            return False
        for _ in range(count):
            page, _ = self._evictable.popitem(last=False)
            node = self._nodes[page]
            assert node is not None
            node.pages[self._number] = self._nodes[page] = None
            node.release()
            self._free_list.append(page)
        return True
