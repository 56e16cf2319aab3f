"""Cache pages of one token shard: allocated as sequences grow, freed as windows slide, shared by common prefixes.

Page tables with pages of a fixed number of positions are those of PagedAttention (Kwon et al., arXiv:2309.06180).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from moe_jax.scheduler.limits import Limits
from moe_jax.scheduler.page_pool import PagePool
from moe_jax.scheduler.prefix_tree import PrefixNode
from moe_jax.scheduler.request import NEVER, Request, RequestPages


class Pages:
    """Page pools of all cache groups, and the prefix tree of their cached pages."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._page = limits.page
        self._root = PrefixNode(None, (), len(limits.groups))
        self.pools = [PagePool(number, group) for number, group in enumerate(limits.groups)]
        """Page pool of each cache group."""

    def match_prefix(self, request: Request) -> list[PrefixNode]:
        """Return the nodes of the longest cached prefix that the request can continue from.

        A prefix has full pages, ends with a block, and leaves out the last known token, whose row samples the next one.
        Each cache group must have the pages that the first computed position attends to; pages that its window has
        passed may be missing.
        """
        if not (self._limits.prefix_cache and request.shares_prefix):
            return []
        node, path, longest = self._root, [], 0
        runs = [0] * len(self.pools)
        for end in range(self._page, request.known, self._page):
            child = node.children.get(self._key(request, end))
            if child is None:
                break
            node = child
            path.append(node)
            runs = [0 if page is None else run + 1 for run, page in zip(runs, node.pages, strict=True)]
            needs = (len(path) - pool.group.first_page(end, self._page) for pool in self.pools)
            if end % self._limits.block == 0 and all(run >= need for run, need in zip(runs, needs, strict=True)):
                longest = len(path)
        return path[:longest]

    def can_allocate(self, request: Request, prefix: Sequence[PrefixNode], reserved: Sequence[int]) -> bool:
        """Return True if `allocate` leaves `reserved` pages of each cache group available."""
        for number, pool in enumerate(self.pools):
            evictable = sum(not pool.ref_counts[page] for page in self._prefix_pages(prefix, number))
            if evictable + self._new_pages(request, prefix, pool) + reserved[number] > pool.available:
                return False
        return True

    def allocate(self, request: Request, prefix: Sequence[PrefixNode]) -> None:
        """Give an admitted request its first pages: the pages of the prefix, and new ones for prefill."""
        request.computed = request.cached = len(prefix) * self._page
        request.prefix_pages = len(prefix)
        if self._limits.prefix_cache and request.shares_prefix:
            request.prefix_node = prefix[-1] if prefix else self._root
            request.prefix_node.ref_count += 1
        for number, pool in enumerate(self.pools):
            ids = array("i", self._prefix_pages(prefix, number))
            table = RequestPages(pool, len(prefix) - len(ids), ids)
            for page in ids:
                pool.touch(page)
            is_allocated = pool.allocate(self._new_pages(request, prefix, pool), ids)
            assert is_allocated, "can_allocate is checked before admission"
            request.pages.append(table)
        request.allocated = min((table.first + len(table.ids)) * self._page for table in request.pages)

    def extend(self, request: Request, end: int) -> bool:
        """Allocate pages for all positions before `end`, after freeing the pages that windows have passed.

        Pages that windows have passed are freed here only, just before new ones are taken, so that no step writes a
        page that it still reads. Return False if pages are missing; the request keeps the pages that it got.
        """
        page = self._page
        pages = -(-end // page)
        for table in request.pages:
            pool, ids = table.pool, table.ids
            if pool.group.window is not None:
                self._free_passed(table, request.computed)
            missing = pages - table.first - len(ids)
            if missing > 0 and not pool.allocate(missing, ids):
                return False
        request.allocated = pages * page
        return True

    def missing(self, request: Request, end: int) -> list[int]:
        """Number of pages of each cache group that `extend` would allocate, less the number that it would free."""
        pages = -(-end // self._page)
        firsts = (max(t.first, t.pool.group.first_page(request.computed, self._page)) for t in request.pages)
        return [max(pages - first - len(table.ids), 0) for first, table in zip(firsts, request.pages, strict=True)]

    def cache_full_pages(self, request: Request, positions: int) -> None:
        """Add the full pages of the first `positions` to the prefix tree.

        These positions must be known, whole blocks, and written by planned steps. Requests of the same step may share
        the pages, too: in each layer, a step writes before it reads.
        """
        node, page = request.prefix_node, self._page
        if node is None:
            return
        for number in range(request.prefix_pages, positions // page):
            child = node.child(self._key(request, (number + 1) * page))
            for table in request.pages:
                if number >= table.first:
                    table.pool.cache(table.ids[number - table.first], child)
            child.ref_count += 1
            node.release()
            node = child
        request.prefix_node, request.prefix_pages = node, positions // page
        request.cache_next_at = (request.prefix_pages + 1) * page + 1 - len(request.prompt)

    def free(self, request: Request) -> None:
        """Free all pages of a request."""
        for table in request.pages:
            table.pool.free(reversed(table.ids))
        request.pages = []
        request.cache_next_at = NEVER
        if request.prefix_node is not None:
            request.prefix_node.release()
            request.prefix_node = None

    def _key(self, request: Request, end: int) -> tuple[int, ...]:
        """Tokens that decide the content of the page before `end`, given its parents: all of its last block."""
        return request.sequence(end - self._page, self._limits.whole_blocks(end))

    def _free_passed(self, table: RequestPages, position: int) -> None:
        """Free the pages that neither the row at `position` nor a later one attends to."""
        passed = table.pool.group.first_page(position, self._page) - table.first
        if passed > 0:
            table.pool.free(table.ids[:passed])
            del table.ids[:passed]
            table.first += passed

    def _prefix_pages(self, prefix: Sequence[PrefixNode], number: int) -> list[int]:
        """Pages of cache group `number` that the position after the prefix attends to."""
        pages = []
        for node in prefix[self.pools[number].group.first_page(len(prefix) * self._page, self._page) :]:
            page = node.pages[number]
            assert page is not None
            pages.append(page)
        return pages

    def _new_pages(self, request: Request, prefix: Sequence[PrefixNode], pool: PagePool) -> int:
        """Number of new pages that a request gets when it is admitted.

        They cover one position more than is known, so that the next token can be fed, up to the end of its block. With
        a window, they cover one chunk only.
        """
        end = min(self._limits.whole_blocks(request.known + 1), request.max_positions)
        if pool.group.window is not None:
            end = min(end, len(prefix) * self._page + self._limits.max_chunk_tokens)
        return -(-end // self._page) - len(prefix)
