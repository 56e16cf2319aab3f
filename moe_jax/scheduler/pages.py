"""The cache pages of one token shard: taken as sequences grow, let go as windows slide, shared where prompts agree.

Tables, and their pages of a fixed number of positions, are those of PagedAttention (Kwon et al., arXiv:2309.06180).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from moe_jax.scheduler.limits import Limits
from moe_jax.scheduler.prefix import Node, Pool
from moe_jax.scheduler.request import NEVER, PageTable, Request


class Pages:
    """A pool of pages for each group of layers, and the tree of those that can be shared."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._page = limits.page
        self._root = Node(None, (), len(limits.groups))
        self.pools = [Pool(number, group) for number, group in enumerate(limits.groups)]

    def match(self, request: Request) -> list[Node]:
        """The longest beginning of the known tokens, in full pages, that the cache can continue from.

        The last known token is never part of it, for its row gives the next token. What each group of layers sees from
        the position after the beginning must be there; what its window has passed need not. It ends with a block.
        """
        if not (self._limits.prefix_cache and request.shares_prefix):
            return []
        node, walked, best = self._root, [], 0
        runs = [0] * len(self.pools)
        for end in range(self._page, request.known, self._page):
            child = node.children.get(self._key(request, end))
            if child is None:
                break
            node = child
            walked.append(node)
            runs = [0 if page is None else run + 1 for run, page in zip(runs, node.pages, strict=True)]
            needs = (len(walked) - pool.group.first_page(end, self._page) for pool in self.pools)
            if end % self._limits.block == 0 and all(run >= need for run, need in zip(runs, needs, strict=True)):
                best = len(walked)
        return walked[:best]

    def fits(self, request: Request, hit: Sequence[Node], spare: Sequence[int]) -> bool:
        """Whether a request can be admitted with what it shares, and `spare` pages of each group stay to be had."""
        for number, pool in enumerate(self.pools):
            idle = sum(not pool.references[page] for page in self._shared(hit, number))
            if idle + self._new(request, hit, pool) + spare[number] > pool.available:
                return False
        return True

    def admit(self, request: Request, hit: Sequence[Node]) -> None:
        """Give a request its first pages: those it shares, and of groups without a window all for its known tokens."""
        request.computed = request.cached = len(hit) * self._page
        request.shared = len(hit)
        if self._limits.prefix_cache and request.shares_prefix:
            request.node = hit[-1] if hit else self._root
            request.node.uses += 1
        for number, pool in enumerate(self.pools):
            ids = array("i", self._shared(hit, number))
            table = PageTable(pool, len(hit) - len(ids), ids)
            for page in ids:
                pool.hold(page)
            had = pool.take(self._new(request, hit, pool), ids)
            assert had, "only what fits is admitted"
            request.pages.append(table)
        request.allocated = min((table.first + len(table.ids)) * self._page for table in request.pages)

    def extend(self, request: Request, end: int) -> bool:
        """Have pages for all positions before `end`, and let go of those that windows have passed.

        Pages are let go here only, before they are taken, so that no step writes a page that it still reads. Returns
        whether there were enough; those taken stay with the request either way.
        """
        page = self._page
        pages = -(-end // page)
        for table in request.pages:
            pool, ids = table.pool, table.ids
            if pool.group.window is not None:
                self._slide(table, request.computed)
            missing = pages - table.first - len(ids)
            if missing > 0 and not pool.take(missing, ids):
                return False
        request.allocated = pages * page
        return True

    def missing(self, request: Request, end: int) -> list[int]:
        """Pages of each group that `extend` would take, less those that it would let go."""
        pages = -(-end // self._page)
        firsts = (max(t.first, t.pool.group.first_page(request.computed, self._page)) for t in request.pages)
        return [max(pages - first - len(table.ids), 0) for first, table in zip(firsts, request.pages, strict=True)]

    def share(self, request: Request, positions: int) -> None:
        """Let others find the full pages of the first `positions`, which must be known, whole blocks, and written by
        planned steps.

        Those others may be of the same step, for in each layer it writes before it reads.
        """
        at, page = request.node, self._page
        if at is None:
            return
        for number in range(request.shared, positions // page):
            node = at.child(self._key(request, (number + 1) * page))
            for table in request.pages:
                if number >= table.first:
                    table.pool.offer(table.ids[number - table.first], node)
            node.uses += 1
            at.leave()
            at = node
        request.node, request.shared = at, positions // page
        request.share_at = (request.shared + 1) * page + 1 - len(request.prompt)

    def release(self, request: Request) -> None:
        """Take everything back."""
        for table in request.pages:
            table.pool.release(reversed(table.ids))
        request.pages = []
        request.share_at = NEVER
        if request.node is not None:
            request.node.leave()
            request.node = None

    def _key(self, request: Request, end: int) -> tuple[int, ...]:
        """The tokens, after those of its parents, that decide what the page before `end` holds: to the end of the last
        block in it."""
        return request.sequence(end - self._page, _whole(end, self._limits.block))

    def _slide(self, table: PageTable, position: int) -> None:
        """Let go of the pages that the row at a position no longer sees, nor any later one."""
        passed = table.pool.group.first_page(position, self._page) - table.first
        if passed > 0:
            table.pool.release(table.ids[:passed])
            del table.ids[:passed]
            table.first += passed

    def _shared(self, hit: Sequence[Node], number: int) -> list[int]:
        """The pages of a group that the position after the nodes of `hit` sees."""
        pages = []
        for node in hit[self.pools[number].group.first_page(len(hit) * self._page, self._page) :]:
            page = node.pages[number]
            assert page is not None
            pages.append(page)
        return pages

    def _new(self, request: Request, hit: Sequence[Node], pool: Pool) -> int:
        """Pages that a request takes when it is admitted: for one position more than is known, so that its next token
        can be fed, to the end of the block; where there is a window, for one chunk."""
        end = min(_whole(request.known + 1, self._limits.block), request.max_positions)
        if pool.group.window is not None:
            end = min(end, len(hit) * self._page + self._limits.chunk)
        return -(-end // self._page) - len(hit)


def _whole(positions: int, block: int) -> int:
    """So many, and what the last block lacks."""
    return -(-positions // block) * block
