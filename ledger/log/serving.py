"""A log's files by path, as c2sp.org/tlog-tiles serves them: the API's routes call this and add the
headers. No HTTP here.

Only what the newest checkpoint covers is served, so that every file can be checked against a
signature; entries that are stored but not yet signed for do not exist here. Beside the files of
that page, `checkpoints/<K>` has every checkpoint that was signed (`records.py`).
"""

from ledger.errors import MalformedProof, NotFound
from ledger.log.records import format_records, record_sizes
from ledger.ports import EntryLog, StoredCheckpoint, TileStore
from ledger.verify.merkle import HASH_BYTES
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH, Tile, encode_entries, parse_tile_path

TEXT = "text/plain; charset=utf-8"
BINARY = "application/octet-stream"


class LogFiles:
    """`checkpoint`, `checkpoints/<K>`, `tile/<L>/<N>[.p/<W>]` and `tile/entries/<N>[.p/<W>]`."""

    def __init__(self, *, log: EntryLog, tiles: TileStore) -> None:
        self._log = log
        self._tiles = tiles

    def serve_path(self, path: str) -> tuple[bytes, str, bool]:
        """Bytes, content type, and whether they may be cached for ever. Raises NotFound."""
        newest = self._tiles.latest()
        if newest is None:
            raise NotFound("the log has not signed a checkpoint yet; try again in a second")
        if path == "checkpoint":
            return newest.note, TEXT, False
        if path.startswith("checkpoints/"):
            return self._records(path), TEXT, False
        try:
            tile = parse_tile_path(path)
        except MalformedProof as error:
            raise NotFound(str(error)) from error
        _need_covered(tile, newest, path)
        data = self._entries(tile) if tile.level is None else self._hashes(tile, tile.level)
        return data, BINARY, True

    def _records(self, path: str) -> bytes:
        sizes = record_sizes(path)
        found = self._tiles.checkpoints(sizes.start, sizes.stop)
        if not found:
            raise NotFound(f"no checkpoint has a size from {sizes.start} to {sizes.stop - 1}")
        return format_records(found)

    def _hashes(self, tile: Tile, level: int) -> bytes:
        data = self._tiles.tile(level, tile.n)
        if data is None or len(data) < tile.width * HASH_BYTES:
            raise NotFound(f"the tile store has no tile {level}/{tile.n} of width {tile.width}")
        # Narrower than stored: the tile of an earlier checkpoint is the beginning of this one.
        return data[: tile.width * HASH_BYTES]

    def _entries(self, tile: Tile) -> bytes:
        start = tile.n * TILE_WIDTH
        entries = self._log.entries(start, start + tile.width)
        if len(entries) != tile.width:
            raise NotFound(f"the event store has not all entries of bundle {tile.n}")
        return encode_entries(entries)


def _need_covered(tile: Tile, newest: StoredCheckpoint, path: str) -> None:
    """The newest checkpoint's tree must have all of the tile's hashes."""
    hashes = newest.size >> (TILE_HEIGHT * (tile.level or 0))
    if tile.n * TILE_WIDTH + tile.width > hashes:
        raise NotFound(f"{path} is not part of the signed tree of size {newest.size}")
