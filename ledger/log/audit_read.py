"""A log as an audit reads it: its entries in strips, and everything else that is stored, with the
place of each byte. The two kinds are `audit_files.py` (a folder, a web server) and `audit_rows.py`
(the tables of a database).

Readers interpret as little as they can. What cannot be read as entries raises BrokenData with the
first bad byte; all else is handed over as it lies there, and compared by the audit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ledger.log.findings import Finding
from ledger.ports import ArchivedRow
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH

HEADER_BYTES = 16
MAX_STRAYS = 20
"""Things that belong to no tree: so many are named."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an entry lies. Its byte k is byte `base + k` of `where`; in a table, the first 16 are
    columns of their own."""

    where: str
    base: int
    columns: bool = False

    def at(self, offset: int) -> tuple[str, int]:
        if not self.columns:
            return self.where, self.base + offset
        if offset < HEADER_BYTES:
            name, start = ("notification_id", 0) if offset < 8 else ("recorded_at", 8)
            return f"{self.where} column {name}", offset - start
        return f"{self.where} column state", offset - HEADER_BYTES


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Entries [start, ...) and the places of each."""

    start: int
    entries: list[bytes]
    rows: Sequence[ArchivedRow] = ()
    """Of a database: the rows they were made of."""


@dataclass(frozen=True, kw_only=True)
class StoredTile:
    level: int
    n: int
    width: int
    where: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class StoredNote:
    """A checkpoint as it lies there. `offset` is where the note begins in `where`. A table repeats
    size and root in columns."""

    where: str
    offset: int
    size: int
    note: bytes
    root: bytes | None = None


class LogReader(Protocol):
    """One per process: not thread-safe."""

    def newest(self) -> StoredNote:
        """The checkpoint that the audit is about. Raises NotFound."""
        ...

    def length(self, size: int) -> int:
        """How many entries are stored, where `size` are signed."""
        ...

    def strip(self, start: int, stop: int, size: int) -> Strip: ...

    def place(self, index: int, size: int) -> Place: ...

    def tiles(self, level: int, start: int, stop: int, size: int) -> list[StoredTile]:
        """Every stored tile of those numbers that a tree of `size` has, older partial ones too;
        a missing one is left out."""
        ...

    def notes(self, low: int, high: int, size: int) -> list[StoredNote]:
        """Stored checkpoints of sizes [low, high) up to `size`. Raises BrokenData."""
        ...

    def strays(self, size: int) -> list[Finding]:
        """What is stored and belongs to no tree of `size`."""
        ...

    def close(self) -> None: ...


OpenReader = Callable[[], LogReader]
"""Picklable: each process of an audit opens its own."""


def tiles_at(size: int, level: int) -> int:
    """How many tiles a level has, the partial one included."""
    return -(-(size >> (TILE_HEIGHT * level)) // TILE_WIDTH)


def stray(where: str, says: str) -> Finding:
    return Finding(
        kind="stray", where=where, offset=None, expected="nothing", found="something", says=says
    )


def missing(kind: str, where: str, index: int | None = None) -> Finding:
    return Finding(
        kind=kind, where=where, offset=None, expected="to be there", found="nothing",
        says="it is missing", index=index,
    )  # fmt: skip
