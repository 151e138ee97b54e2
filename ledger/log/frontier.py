"""The root of a growing tree, in O(log n) memory: its perfect subtrees, largest first. Pure.

RFC 9162 section 2.1.1: the root folds them from the right.
"""

from ledger.verify.merkle import EMPTY_ROOT, node_hash


class Frontier:
    """Perfect subtrees as (height, hash). `size` counts leaves."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[int, bytes]] = []

    def append(self, node: bytes, height: int = 0) -> None:
        """Add the next leaf hash, or a perfect subtree no higher than those before it."""
        assert self.size % (1 << height) == 0
        self.size += 1 << height
        while self._parts and self._parts[-1][0] == height:
            node = node_hash(self._parts.pop()[1], node)
            height += 1
        self._parts.append((height, node))

    def root(self, rest: bytes = b"") -> bytes:
        """The root of what was added; with `rest`, the root of fewer leaves than any part has (or
        as many as the last), as if they stood behind."""
        root = rest
        for _, left in reversed(self._parts):
            root = node_hash(left, root) if root else left
        return root or EMPTY_ROOT
