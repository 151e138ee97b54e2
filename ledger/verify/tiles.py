"""The files of a log, by name: c2sp.org/tlog-tiles. Pure.

`tile/<L>/<N>[.p/<W>]` holds W (256 unless partial) hashes of 32 bytes: at level 0 leaf hashes,
above it the roots of *full* tiles of the level below. `tile/entries/<N>[.p/<W>]` holds the entries
of level-0 tile N, each behind its length as a big-endian u16. N is written in groups of three
digits, every group but the last with an x: 1234067 is `x001/x234/067`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ledger.errors import MalformedProof
from ledger.verify.encoding import printable
from ledger.verify.merkle import HASH_BYTES

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
MAX_LEVEL = 63
MAX_TILE_NUMBER = 2**63 - 1
MAX_BUNDLED_ENTRY_BYTES = 2**16 - 1

_PATH = re.compile(
    r"tile/(?P<level>0|[1-9][0-9]?|entries)/(?P<n>(?:x[0-9]{3}/)*[0-9]{3})"
    r"(?:\.p/(?P<width>[1-9][0-9]{0,2}))?"
)
MAX_PATH_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Tile `n` of a level, or of the entries when `level` is None; `width` is 1 to 256."""

    level: int | None
    n: int
    width: int = TILE_WIDTH


def tile_path(tile: Tile) -> str:
    """`tile/0/x001/x234/067.p/5`."""
    digits = str(tile.n)
    digits = digits.zfill(-(-len(digits) // 3) * 3)
    groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    number = "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:])
    suffix = "" if tile.width == TILE_WIDTH else f".p/{tile.width}"
    return f"tile/{'entries' if tile.level is None else tile.level}/{number}{suffix}"


def parse_tile_path(path: str) -> Tile:
    """The tile that a path names, in its one spelling. Raises MalformedProof."""
    match = _PATH.fullmatch(path) if len(path) <= MAX_PATH_CHARS else None
    if match:
        n = int(match["n"].replace("/", "").replace("x", ""))
        level = None if match["level"] == "entries" else int(match["level"])
        tile = Tile(level=level, n=n, width=int(match["width"] or TILE_WIDTH))
        # Spelling it again catches leading zero groups and a full tile written as .p/256.
        if n <= MAX_TILE_NUMBER and (level or 0) <= MAX_LEVEL and tile_path(tile) == path:
            return tile
    raise MalformedProof(
        f"{printable(path)!r} names no tile: expected tile/<level>/<number>[.p/<width>], like "
        "tile/0/x001/234 or tile/entries/000.p/17"
    )


def tiles_of(size: int) -> list[Tile]:
    """The rightmost tile of every level that a tree of `size` leaves has, partial or full.

    Together with the full tiles to their left they are the whole tree.
    """
    edge: list[Tile] = []
    level = 0
    while size:
        n, width = divmod(size, TILE_WIDTH)
        if width:
            edge.append(Tile(level=level, n=n, width=width))
        else:
            edge.append(Tile(level=level, n=n - 1))
        size, level = n, level + 1
    return edge


def tile_hashes(data: bytes, width: int) -> list[bytes]:
    """The hashes of a tile of `width`, which must be its exact length. Raises MalformedProof."""
    if len(data) != width * HASH_BYTES:
        raise MalformedProof(
            f"a tile of width {width} has {width * HASH_BYTES} bytes, this one {len(data)}"
        )
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def encode_entries(entries: Sequence[bytes]) -> bytes:
    """An entry bundle: every entry behind its length, u16 big-endian."""
    assert len(entries) <= TILE_WIDTH
    assert all(len(entry) <= MAX_BUNDLED_ENTRY_BYTES for entry in entries)
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def decode_entries(data: bytes, width: int) -> list[bytes]:
    """The `width` entries of a bundle, to its last byte. Raises MalformedProof."""
    entries: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if end > len(data) or at + 2 > len(data) or len(entries) == width:
            raise MalformedProof(f"entry {len(entries)} runs past the end of its bundle of {width}")
        entries.append(data[at + 2 : end])
        at = end
    if len(entries) != width:
        raise MalformedProof(f"the bundle holds {len(entries)} entries, expected {width}")
    return entries
