"""The port LogSource on a folder and on a database; the one over HTTP is `ledger/remote.py`.

All give a log as the files of c2sp.org/tlog-tiles, and beside them `vkey` (the log's public key)
and `checkpoints/<K>` (`records.py`) where there are any. What they give is not verified here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ledger.errors import NotFound, Unavailable
from ledger.log.serving import LogFiles
from ledger.log.tree import ReadTiles, TileId
from ledger.ports import LogSource
from ledger.verify.merkle import HASH_BYTES
from ledger.verify.tiles import (
    TILE_HEIGHT,
    TILE_WIDTH,
    Tile,
    decode_entries,
    encode_entries,
    tile_path,
)

CHECKPOINT, VKEY = "checkpoint", "vkey"
_PATH = re.compile(
    r"checkpoint|vkey|checkpoints/(x[0-9]{3}/)*[0-9]{3}"
    r"|tile/([0-9]{1,2}|entries)/(x[0-9]{3}/)*[0-9]{3}(\.p/[0-9]{1,3})?"
)


class FolderSource:
    """A log's files under a folder, as `tributary log export` writes them or any mirror does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str) -> bytes:
        if not _PATH.fullmatch(path):
            raise NotFound(f"{path!r} is no file of a log")
        try:
            return (self.folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"{self.folder} has no {path}") from None
        except OSError as error:
            raise Unavailable(f"cannot read {self.folder / path}: {error.strerror}") from error

    def partial_widths(self, level: int | None, n: int) -> list[int]:
        """Widths of the partial tiles of that number which lie here beside, or before, the full."""
        folder = self.folder / f"{tile_path(Tile(level=level, n=n))}.p"
        try:
            names = [entry.name for entry in folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,2}", name))


class StoreSource:
    """A database through its ports. With a key, `vkey`."""

    def __init__(self, files: LogFiles, *, vkey: str | None = None) -> None:
        self._files = files
        self._vkey = vkey

    def read(self, path: str) -> bytes:
        if path == VKEY and self._vkey is not None:
            return f"{self._vkey}\n".encode()
        return self._files.serve_path(path)[0]


def read_tile(source: LogSource, tile: Tile) -> bytes:
    """A tile of that width; where the partial one is gone, the beginning of the full one.

    c2sp.org/tlog-tiles lets a log drop partial tiles once the full one is there.
    """
    try:
        return source.read(tile_path(tile))
    except NotFound:
        if tile.width == TILE_WIDTH:
            raise
        gone = tile_path(tile)
    try:
        full = source.read(tile_path(replace(tile, width=TILE_WIDTH)))
    except NotFound:
        raise NotFound(f"the log has neither {gone} nor the full tile") from None
    if tile.level is not None:
        return full[: tile.width * HASH_BYTES]
    return encode_entries(decode_entries(full, TILE_WIDTH)[: tile.width])


def width_at(size: int, level: int, n: int) -> int:
    """How many hashes tile `n` of `level` has in a tree of `size` leaves; 0 for none."""
    return max(0, min((size >> (TILE_HEIGHT * level)) - n * TILE_WIDTH, TILE_WIDTH))


def tile_reader(source: LogSource, size: int) -> ReadTiles:
    """For `ledger.log.tree`: the tiles of the tree of `size` leaves."""

    def read(wanted: Sequence[TileId]) -> Mapping[TileId, bytes]:
        tiles = [Tile(level=level, n=n, width=width_at(size, level, n)) for level, n in wanted]
        return {(t.level or 0, t.n): read_tile(source, t) for t in tiles if t.width}

    return read
