"""The tree once more, by pymerkle: another author's code, from the raw entries up.

The one file that imports pymerkle, and only when an audit asks (extra `audit`; it is GPLv3+, and no
part of the service). Memory stays bounded: a pymerkle tree over each aligned stretch of entries,
and one whose leaves are those trees' roots. That is RFC 9162's tree, since it is split at powers of
two; every hash in it is made by pymerkle.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ledger.verify.merkle import EMPTY_ROOT


def installed() -> bool:
    try:
        import pymerkle
    except ImportError:
        return False
    return bool(pymerkle)


def root_of_entries(entries: Iterable[bytes]) -> bytes:
    """The root over raw entries, 32 bytes."""
    from pymerkle import InmemoryTree

    tree = InmemoryTree(algorithm="sha256")
    tree.append_entries(entries)
    return bytes(tree.get_root())


def root_of_roots(roots: Sequence[bytes]) -> bytes:
    """The root of the whole tree from those of its aligned stretches, all but the last full."""
    if not roots:
        return EMPTY_ROOT
    return bytes(_tree_of_hashes()(roots).get_root())


def _tree_of_hashes() -> Any:
    from pymerkle.core import BaseMerkleTree

    class TreeOfHashes(BaseMerkleTree):  # type: ignore[misc]
        """pymerkle's tree over leaf hashes that are given and not computed."""

        def __init__(self, hashes: Sequence[bytes]) -> None:
            super().__init__("sha256")
            self._hashes = hashes

        def _encode_entry(self, data: bytes) -> bytes:
            return data

        def _store_leaf(self, data: bytes, digest: bytes) -> int:
            raise NotImplementedError("its leaves are given")

        def _get_leaf(self, index: int) -> bytes:
            return self._hashes[index - 1]

        def _get_leaves(self, offset: int, width: int) -> Sequence[bytes]:
            return self._hashes[offset : offset + width]

        def _get_size(self) -> int:
            return len(self._hashes)

    return TreeOfHashes
