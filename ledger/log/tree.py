"""The Merkle tree as tiles: grow it, and read hashes out of it. Pure maths behind a one-method
reader.

A tile (level, n) holds up to 256 hashes (c2sp.org/tlog-tiles): at level 0 leaf hashes, above it the
roots of full tiles of the level below. Growing touches only the right edge, one tile per level;
any hash of the tree is at most one tile read and 255 hashes away. So proofs cost O(log n) reads and
nothing has to be kept in memory: a restart is not cold.

A stored tile may be longer than a smaller tree needs; its beginning is that tree's tile, because
hashes never change once written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ledger.errors import StorageError
from ledger.verify.merkle import EMPTY_ROOT, HASH_BYTES, node_hash, tree_root
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH, tiles_of

TileId = tuple[int, int]
"""(level, n)."""
ReadTiles = Callable[[Sequence[TileId]], Mapping[TileId, bytes]]
"""The one method: tiles by id, hashes back to back; missing ones may be left out."""
Place = tuple[TileId, slice]
"""Where the hash of a perfect subtree is, or the hashes right below it: 1 to 128 of one tile, as a
slice of its bytes."""


# --- growing ---


def integrate(size: int, leaves: Sequence[bytes], read: ReadTiles) -> dict[TileId, bytes]:
    """New and changed tiles when `leaves` (32-byte hashes) are appended to a tree of `size`.

    Reads at most one tile per level: the partial ones of the right edge. Raises StorageError when
    one of them is missing or too short.
    """
    edge_ids = [(t.level, t.n) for t in tiles_of(size) if t.level is not None]
    edge = _Tiles(read([id for id in edge_ids if _partial_width(size, id[0])]))
    changed: dict[TileId, bytes] = {}
    level, added = 0, list(leaves)
    while added:
        before = size >> (TILE_HEIGHT * level)
        n, width = divmod(before, TILE_WIDTH)
        kept = edge.hashes((level, n), slice(0, width * HASH_BYTES)) if width else []
        hashes = [*kept, *added]
        added = []
        for at in range(0, len(hashes), TILE_WIDTH):
            tile = hashes[at : at + TILE_WIDTH]
            changed[level, n + at // TILE_WIDTH] = b"".join(tile)
            if len(tile) == TILE_WIDTH:
                added.append(tree_root(tile))
        level += 1
    return changed


def _partial_width(size: int, level: int) -> int:
    return (size >> (TILE_HEIGHT * level)) % TILE_WIDTH


# --- reading ---


def root(size: int, read: ReadTiles) -> bytes:
    """The root of the tree of `size` leaves."""
    return range_hashes([(0, size)], read)[0] if size else EMPTY_ROOT


def range_hashes(ranges: Sequence[tuple[int, int]], read: ReadTiles) -> list[bytes]:
    """The Merkle tree hash of each range of leaves [low, high), in one read of all tiles needed.

    `low` must be a multiple of the largest power of two below the range's length, as every node of
    an RFC 9162 tree is.
    """
    parts = [_perfect(low, high) for low, high in ranges]
    needed = sorted({id for part in parts for id, _ in part})
    tiles = _Tiles(read(needed))
    return [_fold(tree_root(tiles.hashes(id, span)) for id, span in part) for part in parts]


def _perfect(low: int, high: int) -> list[Place]:
    """Where the perfect subtrees are that make up [low, high), largest first."""
    found = []
    while low < high:
        height = (high - low).bit_length() - 1
        level, inside = divmod(height, TILE_HEIGHT)
        n, start = divmod(low >> (TILE_HEIGHT * level), TILE_WIDTH)
        stop = start + (1 << inside)
        found.append(((level, n), slice(start * HASH_BYTES, stop * HASH_BYTES)))
        low += 1 << height
    return found


def _fold(hashes: Iterable[bytes]) -> bytes:
    """Left-heavy: the last two join first."""
    *rest, node = hashes
    for left in reversed(rest):
        node = node_hash(left, node)
    return node


class _Tiles:
    """Tiles as read, and a clear error for one that should be there."""

    def __init__(self, tiles: Mapping[TileId, bytes]) -> None:
        self._tiles = tiles

    def hashes(self, id: TileId, span: slice) -> list[bytes]:
        data = self._tiles.get(id, b"")[span]
        if len(data) != span.stop - span.start:
            level, n = id
            raise StorageError(
                f"tile {n} of level {level} is missing or shorter than {span.stop} bytes: the tile "
                "store is damaged; `tributary audit` finds out how far"
            )
        return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]


# --- which nodes a proof is made of ---


def inclusion_ranges(index: int, size: int) -> list[tuple[int, int]]:
    """Leaf ranges of the proof for `index` of `size`, sibling first (RFC 9162 section 2.1.3.1)."""
    assert 0 <= index < size
    low, high, path = 0, size, []
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            path.append((middle, high))
            high = middle
        else:
            path.append((low, middle))
            low = middle
    return path[::-1]


def consistency_ranges(size1: int, size2: int) -> list[tuple[int, int]]:
    """Leaf ranges of the proof from `size1` to `size2` (RFC 9162 section 2.1.4.1)."""
    assert 0 <= size1 <= size2
    if size1 in (0, size2):
        return []
    low, high, path = 0, size2, []
    while size1 != high:
        middle = low + _split(high - low)
        if size1 <= middle:
            path.append((middle, high))
            high = middle
        else:
            path.append((low, middle))
            low = middle
    if low:  # the old tree is no whole subtree, so its last part is not known by its root alone
        path.append((low, high))
    return path[::-1]


def _split(width: int) -> int:
    """The largest power of two smaller than `width`."""
    return 1 << (width - 1).bit_length() - 1
