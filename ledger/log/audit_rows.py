"""What an audit reads of a database: stored_events, log_head, log_tiles, log_checkpoints, through
the port Archive. Nothing a column says is believed: the audit computes what each should be."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ledger.errors import NotFound
from ledger.log.audit_read import (
    MAX_STRAYS,
    LogReader,
    Place,
    StoredNote,
    StoredTile,
    Strip,
    missing,
    stray,
    tiles_at,
)
from ledger.log.findings import BrokenData, Finding
from ledger.log.sources import width_at
from ledger.ports import Archive, ArchivedRow


@dataclass(frozen=True, kw_only=True)
class RowsOpener:
    open_archive: Callable[[], Archive]

    def __call__(self) -> LogReader:
        return RowsReader(self.open_archive())


class RowsReader:
    """The tables stored_events, log_head, log_tiles, log_checkpoints."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def close(self) -> None:
        close = getattr(self.archive, "close", None)
        if close is not None:
            close()

    def newest(self) -> StoredNote:
        found = self.archive.newest_checkpoint()
        if found is None:
            raise NotFound("the log has not signed a checkpoint yet")
        return StoredNote(
            where=f"log_checkpoints size={found.size} column note",
            offset=0,
            size=found.size,
            root=found.root,
            note=found.note,
        )

    def length(self, size: int) -> int:
        return self.archive.head()[0]

    def strip(self, start: int, stop: int, size: int) -> Strip:
        rows = self.archive.rows(start, stop)
        ids = [row[0] for row in rows]
        if ids != [*range(start + 1, stop + 1)]:
            pairs = zip(range(start + 1, stop + 1), ids, strict=False)
            gap = next((id for id, there in pairs if id != there), start + 1 + len(ids))
            raise BrokenData(missing("row", f"stored_events notification_id={gap}", gap - 1))
        pack = struct.Struct(">QQ").pack
        try:
            entries = [pack(row[0] - 1, row[1]) + row[2] for row in rows]
        except (struct.error, TypeError):  # a time below 0, a state that is NULL
            raise BrokenData(_no_entry(rows)) from None
        return Strip(start=start, entries=entries, rows=rows)

    def place(self, index: int, size: int) -> Place:
        return Place(where=f"stored_events notification_id={index + 1}", base=0, columns=True)

    def tiles(self, level: int, start: int, stop: int, size: int) -> list[StoredTile]:
        return [
            StoredTile(
                level=level,
                n=n,
                width=width_at(size, level, n),
                where=f"log_tiles level={level} n={n} column hashes",
                data=data,
            )
            for n, data in sorted(self.archive.tiles(level, start, stop).items())
        ]

    def notes(self, low: int, high: int, size: int) -> list[StoredNote]:
        return [
            StoredNote(
                where=f"log_checkpoints size={c.size} column note",
                offset=0,
                size=c.size,
                root=c.root,
                note=c.note,
            )
            for c in self.archive.checkpoints(low, min(high, size + 1))
        ]

    def strays(self, size: int) -> list[Finding]:
        found = [
            stray(f"log_tiles level={level} n={n}", f"a tile that no tree of {size} entries has")
            for level, n in self.archive.tile_ids_from(
                {level: tiles_at(size, level) for level in range(64)}, limit=MAX_STRAYS
            )
        ]
        head, last = self.archive.head()[0], self.archive.last_row()
        if last > head:
            found.append(
                stray(
                    f"stored_events notification_id={last}",
                    f"a row beyond log_head, whose size is {head}",
                )
            )
        if head < size:
            found.append(
                Finding(
                    kind="row", where="log_head column size", offset=None, expected=f">= {size}",
                    found=str(head), says="the log is shorter than what was signed",
                )
            )  # fmt: skip
        found += [
            Finding(
                kind="row",
                where=f"stored_events originator_id={stream}",
                offset=None,
                expected=f"versions 1 to {rows}, in the order of the log",
                found=f"versions up to {highest}",
                says="the versions of a stream are not 1, 2, 3, ...",
            )
            for stream, rows, highest in self.archive.broken_streams(limit=MAX_STRAYS)
        ]
        return found


def _no_entry(rows: Sequence[ArchivedRow]) -> Finding:
    """The first row whose columns cannot be the bytes of an entry."""
    row = next(row for row in rows if row[1] < 0 or row[2] is None)
    late = row[1] < 0
    return Finding(
        kind="entry",
        where=f"stored_events notification_id={row[0]} column {'recorded_at' if late else 'state'}",
        offset=None,
        expected="microseconds since 1970" if late else "an envelope",
        found=str(row[1]) if late else "NULL",
        says=f"entry {row[0] - 1} has no bytes",
        index=row[0] - 1,
    )
