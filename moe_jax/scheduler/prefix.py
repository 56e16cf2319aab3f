"""Which pages hold which tokens, exactly: a tree with a node for each full page after those before it.

Pages shared by content are those of vLLM (Kwon et al., arXiv:2309.06180) and RadixAttention (Zheng et al.,
arXiv:2312.07104).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

from moe_jax.scheduler.limits import CacheGroup


class Node:
    """The tokens of a page, after those of all its parents."""

    __slots__ = ("children", "pages", "parent", "tokens", "uses")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[tuple[int, ...], Node] = {}
        self.pages: list[int | None] = [None] * groups
        """The page that holds them, in each group of layers."""
        self.uses = 0
        """Children, pages, and requests that stand here; without any, it goes."""

    def child(self, tokens: tuple[int, ...]) -> Node:
        """The node of the page after this one, made if need be."""
        node = self.children.get(tokens)
        if node is None:
            node = self.children[tokens] = Node(self, tokens, len(self.pages))
            self.uses += 1
        return node

    def leave(self) -> None:
        """Take back a use, and with the last one the node, and parents that nothing else uses."""
        node = self
        node.uses -= 1
        while not node.uses and node.parent is not None:
            del node.parent.children[node.tokens]
            node = node.parent
            node.uses -= 1


class Pool:
    """The pages of one group of layers on one token shard: free, held by requests, or idle, kept for what they hold.

    Idle pages go least recently used first. Requests let go of their last pages first, so that of pages that were held
    together, those that are of no use without the others go before them.
    """

    __slots__ = ("_free", "_idle", "_nodes", "_number", "group", "references")

    def __init__(self, number: int, group: CacheGroup) -> None:
        pages = group.pages
        self.group = group
        self._number = number
        self._free = list(range(pages))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes: list[Node | None] = [None] * pages
        self.references = [0] * pages
        """Of each page, how many requests hold it."""

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return len(self.references) - self.available

    def take(self, count: int, into: array[int]) -> bool:
        """Add pages to write to those of a request: free ones, then the idle ones that were not used for longest.
        Returns whether there were so many; else none is taken."""
        free = self._free
        if len(free) < count and not self._forget(count - len(free)):
            return False
        while count:
            count -= 1
            page = free.pop()
            self.references[page] = 1
            into.append(page)
        return True

    def _forget(self, count: int) -> bool:
        """Free so many idle pages, or none where there are not so many."""
        if len(self._idle) < count:
            return False
        for _ in range(count):
            page, _ = self._idle.popitem(last=False)
            node = self._nodes[page]
            assert node is not None
            node.pages[self._number] = self._nodes[page] = None
            node.leave()
            self._free.append(page)
        return True

    def hold(self, page: int) -> None:
        """One more request holds a page that is kept for its content."""
        assert self._nodes[page] is not None
        if not self.references[page]:
            del self._idle[page]
        self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One request less holds these pages."""
        references = self.references
        for page in pages:
            held = references[page] = references[page] - 1
            assert held >= 0, "each hold is released once"
            if not held:
                if self._nodes[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def offer(self, page: int, node: Node) -> None:
        """Let others find a page, unless they find another with the same content."""
        if node.pages[self._number] is None:
            node.pages[self._number] = page
            self._nodes[page] = node
            node.uses += 1
