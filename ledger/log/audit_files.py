"""What an audit reads of C2SP files, and of `checkpoints/<K>` where they are.

A bundle that cannot be cut into entries is looked at closely: each entry begins with its index,
which says whether an index or the length before it is wrong.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ledger.errors import MalformedProof, NotFound
from ledger.log.audit_read import (
    HEADER_BYTES,
    MAX_STRAYS,
    LogReader,
    Place,
    StoredNote,
    StoredTile,
    Strip,
    missing,
    stray,
)
from ledger.log.findings import BrokenData, Finding, byte_at, first_difference
from ledger.log.records import SIZES_PER_FILE, RecordLine, parse_records, record_path
from ledger.log.sources import CHECKPOINT, FolderSource, read_tile, width_at
from ledger.ports import LogSource
from ledger.verify.tiles import TILE_WIDTH, Tile, parse_tile_path, tile_path


@dataclass(frozen=True, kw_only=True)
class FilesOpener:
    open_source: Callable[[], LogSource]

    def __call__(self) -> LogReader:
        return FilesReader(self.open_source())


class FilesReader:
    """C2SP files, and `checkpoints/<K>` where they are."""

    def __init__(self, source: LogSource) -> None:
        self._source = source
        self._folder = source if isinstance(source, FolderSource) else None
        self._parsed: tuple[int, list[RecordLine]] = (-1, [])

    def close(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def newest(self) -> StoredNote:
        note = self._source.read(CHECKPOINT)
        return StoredNote(where=CHECKPOINT, offset=0, size=-1, note=note)

    def length(self, size: int) -> int:
        return size

    def strip(self, start: int, stop: int, size: int) -> Strip:
        assert start % TILE_WIDTH == 0
        entries: list[bytes] = []
        for n in range(start // TILE_WIDTH, -(-stop // TILE_WIDTH)):
            tile = Tile(level=None, n=n, width=width_at(size, 0, n))
            data = self._bundle(tile)
            found = _cut(data, n * TILE_WIDTH, tile.width)
            if found is None:
                raise BrokenData(_diagnose(data, n * TILE_WIDTH, tile))
            entries += found
        return Strip(start=start, entries=entries)

    def place(self, index: int, size: int) -> Place:
        n, position = divmod(index, TILE_WIDTH)
        tile = Tile(level=None, n=n, width=width_at(size, 0, n))
        data, at = self._bundle(tile), 0
        for _ in range(position):
            at += 2 + int.from_bytes(data[at : at + 2], "big")
        return Place(where=tile_path(tile), base=at + 2)

    def _bundle(self, tile: Tile) -> bytes:
        try:
            return read_tile(self._source, tile)
        except NotFound:
            raise BrokenData(missing("entry", tile_path(tile), tile.n * TILE_WIDTH)) from None
        except MalformedProof:  # cut out of a full bundle that is broken
            full = Tile(level=None, n=tile.n)
            data = self._source.read(tile_path(full))
            raise BrokenData(_diagnose(data, tile.n * TILE_WIDTH, full)) from None

    def tiles(self, level: int, start: int, stop: int, size: int) -> list[StoredTile]:
        found = []
        for n in range(start, stop):
            whole = width_at(size, level, n)
            widths = {whole}
            if self._folder is not None:
                widths |= {w for w in self._folder.partial_widths(level, n) if w <= whole}
            for width in sorted(widths, reverse=True):
                tile = Tile(level=level, n=n, width=width)
                try:
                    # A width that is the tree's own may be gone for the full tile; others lie here.
                    read = read_tile if width == whole else _read_exactly
                    data = read(self._source, tile)
                except NotFound:
                    continue
                found.append(
                    StoredTile(level=level, n=n, width=width, where=tile_path(tile), data=data)
                )
        return found

    def notes(self, low: int, high: int, size: int) -> list[StoredNote]:
        found = []
        for number in range(low // SIZES_PER_FILE, -(-high // SIZES_PER_FILE)):
            found += [
                StoredNote(
                    where=record_path(number),
                    offset=line.note_offset,
                    size=line.checkpoint.size,
                    note=line.checkpoint.note,
                )
                for line in self._records(number)
                if low <= line.checkpoint.size < min(high, size + 1)
            ]
        return found

    def _records(self, number: int) -> list[RecordLine]:
        if self._parsed[0] != number:
            path = record_path(number)
            try:
                self._parsed = number, parse_records(self._source.read(path), number)
            except NotFound:
                self._parsed = number, []
            except MalformedProof as error:
                raise BrokenData(_bad_record(path, error)) from error
        return self._parsed[1]

    def strays(self, size: int) -> list[Finding]:
        """Files under `tile/` that name no tile, and older bundles that are not the beginning of
        their full one. Tiles of a larger tree are what an interrupted export leaves: no finding."""
        if self._folder is None:
            return []
        found: list[Finding] = []
        root = self._folder.folder
        for file in sorted(root.glob("tile/**/*")):
            if len(found) >= MAX_STRAYS:
                break
            if file.is_dir() or file.name.endswith(".new"):
                continue
            path = str(file.relative_to(root))
            try:
                tile = parse_tile_path(path)
            except MalformedProof:
                found.append(stray(path, "a file that is no tile of a log"))
                continue
            if tile.level is None and tile.width < width_at(size, 0, tile.n):
                found += self._older_bundle(tile, size)
        return found

    def _older_bundle(self, tile: Tile, size: int) -> list[Finding]:
        whole = Tile(level=None, n=tile.n, width=width_at(size, 0, tile.n))
        try:
            newer = self._source.read(tile_path(whole))
        except NotFound:
            return []  # reported as missing where the entries are read
        older, at = self._source.read(tile_path(tile)), 0
        for _ in range(tile.width):
            at += 2 + int.from_bytes(newer[at : at + 2], "big")
        differs = first_difference(newer[:at], older)
        if differs is None:
            return []
        return [
            Finding(
                kind="entry",
                where=tile_path(tile),
                offset=differs,
                expected=byte_at(newer[:at], differs),
                found=byte_at(older, differs),
                says=f"this older bundle is not the beginning of {tile_path(whole)}",
            )
        ]


def _read_exactly(source: LogSource, tile: Tile) -> bytes:
    return source.read(tile_path(tile))


def _bad_record(path: str, error: MalformedProof) -> Finding:
    offset = error.detail.get("offset", 0)
    return Finding(
        kind="checkpoint",
        where=path,
        offset=offset if isinstance(offset, int) else 0,
        expected="a checkpoint record",
        found="something else",
        says=str(error),
    )


def _cut(data: bytes, first: int, width: int) -> list[bytes] | None:
    """The entries of a bundle, when each has its own index and they fill it; else None."""
    entries: list[bytes] = []
    at, length = 0, len(data)
    if length < 2 * width:
        return None
    for _ in range(width):
        if at + 2 > length:
            return None
        end = at + 2 + (data[at] << 8 | data[at + 1])
        entries.append(data[at + 2 : end])
        at = end
    indexes = struct.pack(f">{width}Q", *range(first, first + width))
    whole = at == length and min(map(len, entries)) > HEADER_BYTES
    return entries if whole and b"".join([e[:8] for e in entries]) == indexes else None


def _diagnose(data: bytes, first: int, tile: Tile) -> Finding:
    """The first bad byte of a bundle that `_cut` refused: each entry begins with its index, which
    says whether an index or the length before it is wrong."""
    path, starts = tile_path(tile), [0]
    for position in range(tile.width):
        start, index = starts[-1], first + position
        header = index.to_bytes(8, "big")
        stated = int.from_bytes(data[start : start + 2], "big")
        following = (index + 1).to_bytes(8, "big")
        is_last = position == tile.width - 1
        end = start + 2 + stated
        if data[start + 2 : start + 10] != header:
            at = start + 2
            differs = first_difference(header, data[at : at + 8]) or 0
            return Finding(
                kind="entry",
                where=path,
                offset=min(at + differs, len(data)),
                expected=f"0x{header[differs]:02x} (index {index})",
                found=byte_at(data, at + differs),
                says=f"entry {index} does not carry its own index"
                if at < len(data)
                else f"the bundle ends before entry {index}",
                index=index,
            )
        fits = end == len(data) if is_last else data[end + 2 : end + 10] == following
        if fits and stated > HEADER_BYTES:
            starts.append(end)
            continue
        # Either the length is wrong, or the next index is: look for the next index elsewhere.
        seen = len(data) if is_last else data.find(following, start + 2 + HEADER_BYTES) - 2
        if seen > 0 and seen != end and 0 < seen - start - 2 <= 65_535:
            right = (seen - start - 2).to_bytes(2, "big")
            differs = first_difference(right, data[start : start + 2]) or 0
            return Finding(
                kind="entry",
                where=path,
                offset=start + differs,
                expected=f"0x{right[differs]:02x} (a length of {seen - start - 2})",
                found=byte_at(data, start + differs),
                says=f"the length of entry {index} is wrong, or bytes of it are missing",
                index=index,
            )
        if end >= len(data):
            return Finding(
                kind="entry",
                where=path,
                offset=len(data),
                expected=f"{end - len(data)} more bytes"
                if is_last
                else f"the rest of {tile.width} entries",
                found="the end",
                says=f"the bundle ends within or after entry {index}",
                index=index,
            )
        starts.append(end)
    return stray(path, "this bundle cannot be read")
