"""Proofs out of stored tiles: O(log n) tiles per proof, read in one go. Keeps nothing."""

from collections.abc import Mapping, Sequence

from ledger.errors import NotFound
from ledger.log import tree
from ledger.ports import StoredCheckpoint, TileStore
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof


class Prover:
    """Inclusion and consistency proofs for any tree up to the newest checkpoint."""

    def __init__(self, tiles: TileStore) -> None:
        self._tiles = tiles

    def root(self, size: int) -> bytes:
        """The root of the tree of the first `size` entries."""
        return tree.root(size, self._tiles.tiles)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """From the leaf's sibling to the root's child. NotFound unless `index` is below `size`."""
        return self.inclusions([index], size)[index]

    def inclusions(self, indexes: Sequence[int], size: int) -> Mapping[int, list[bytes]]:
        """Proofs for many entries of one tree; tiles that they share are read once."""
        for index in indexes:
            if not 0 <= index < size:
                raise NotFound(f"entry {index} is not in the tree of size {size} (yet)")
        paths = {index: tree.inclusion_ranges(index, size) for index in indexes}
        ranges = sorted({part for path in paths.values() for part in path})
        known = dict(zip(ranges, tree.range_hashes(ranges, self._tiles.tiles), strict=True))
        return {index: [known[part] for part in path] for index, path in paths.items()}

    def consistency(self, size1: int, size2: int) -> list[bytes]:
        """That the tree of `size1` is the beginning of the tree of `size2`."""
        if not 0 <= size1 <= size2:
            raise NotFound(f"no proof leads from size {size1} to size {size2}")
        return tree.range_hashes(tree.consistency_ranges(size1, size2), self._tiles.tiles)

    def tlog_proof(self, index: int, checkpoint: StoredCheckpoint) -> bytes:
        """A `.tlog-proof` file (c2sp.org/tlog-proof@v1) of one entry under that checkpoint."""
        return self.tlog_proofs([index], checkpoint)[index]

    def tlog_proofs(
        self, indexes: Sequence[int], checkpoint: StoredCheckpoint
    ) -> Mapping[int, bytes]:
        """The same for many entries; tiles that they share are read once."""
        return {
            index: format_tlog_proof(
                TlogProof(index=index, proof=tuple(proof), checkpoint=checkpoint.note)
            )
            for index, proof in self.inclusions(indexes, checkpoint.size).items()
        }
