"""Prefix tree over full cache pages: a node for the tokens of each page, below the node of the page before.

The keys are the tokens themselves, so a match is exact. Pages are shared by content as in vLLM (Kwon et al.,
arXiv:2309.06180) and RadixAttention (Zheng et al., arXiv:2312.07104).
"""

from __future__ import annotations


class PrefixNode:
    """Tokens of one full page, after the tokens of all parent nodes."""

    __slots__ = ("children", "pages", "parent", "ref_count", "tokens")

    def __init__(self, parent: PrefixNode | None, tokens: tuple[int, ...], groups: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        """Child nodes by the tokens of their pages."""
        self.pages: list[int | None] = [None] * groups
        """Page that holds the tokens in each cache group; `None` if it is not cached."""
        self.ref_count = 0
        """Number of children, cached pages, and requests that refer to the node. The node is removed at 0."""

    def child(self, tokens: tuple[int, ...]) -> PrefixNode:
        """Return the child of these tokens, created if it is missing."""
        node = self.children.get(tokens)
        if node is None:
            node = self.children[tokens] = PrefixNode(self, tokens, len(self.pages))
            self.ref_count += 1
        return node

    def release(self) -> None:
        """Drop one reference. At 0, remove the node, and the parents that it leaves without a reference."""
        node = self
        node.ref_count -= 1
        while not node.ref_count and node.parent is not None:
            del node.parent.children[node.tokens]
            node = node.parent
            node.ref_count -= 1
