"""Stored tiles and checkpoints beside what they should be."""

from ledger.errors import VerificationError
from ledger.log.audit_parts import Audited, Mismatch
from ledger.log.audit_read import LogReader, StoredNote, tiles_at
from ledger.log.findings import Finding, byte_at, first_difference, one_byte_off
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.merkle import HASH_BYTES
from ledger.verify.note import VerifierKey
from ledger.verify.tiles import TILE_WIDTH


def compare_tiles(
    reader: LogReader,
    size: int,
    level: int,
    first: int,
    stop: int,
    hashes: bytes,
    done: Audited,
) -> None:
    """Stored tiles [first, stop) of a level beside `hashes`, which begin at tile `first`."""
    seen: set[int] = set()
    for tile in reader.tiles(level, first, stop, size):
        seen.add(tile.n)
        done.tiles += 1
        start = (tile.n - first) * TILE_WIDTH * HASH_BYTES
        computed = hashes[start : start + tile.width * HASH_BYTES]
        differs = first_difference(computed, tile.data)
        if differs is None:
            continue
        if differs >= min(len(computed), len(tile.data)):
            done.findings.append(
                Finding(
                    kind="tile",
                    where=tile.where,
                    offset=differs,
                    expected=f"{len(computed)} bytes",
                    found=f"{len(tile.data)} bytes",
                    says="the tile has another length than its tree gives it",
                )
            )
            continue
        at = differs - differs % HASH_BYTES
        done.mismatches.append(
            Mismatch(
                kind="tile",
                level=level,
                position=tile.n * TILE_WIDTH + at // HASH_BYTES,
                where=tile.where,
                offset=differs,
                computed=computed[at : at + HASH_BYTES],
                stored=tile.data[at : at + HASH_BYTES],
            )
        )
    for n in range(first, min(stop, tiles_at(size, level))):
        if n not in seen:
            done.findings.append(
                Finding(
                    kind="tile",
                    where=f"tile {n} of level {level}",
                    offset=None,
                    expected="to be there",
                    found="nothing",
                    says="a tile of the signed tree is missing",
                )
            )


# --- checkpoints ---


def open_note_or_finding(note: StoredNote, key: VerifierKey) -> Checkpoint | Finding:
    """The tree head, when the note is signed by `key`; else where it is wrong."""
    try:
        return open_checkpoint(note.note, key).checkpoint
    except VerificationError as error:
        refused = error
    mended = one_byte_off(note.note, lambda data: _opens(data, key))
    at = mended[0] if mended else 0
    return Finding(
        kind="checkpoint",
        where=note.where,
        offset=note.offset + at if mended else note.offset,
        expected=f"0x{mended[1]:02x}" if mended else f"a note signed by {printable(key.name)}",
        found=byte_at(note.note, at) if mended else "another",
        says=f"the checkpoint does not open: {refused}",
    )


def _opens(data: bytes, key: VerifierKey) -> bool:
    try:
        open_checkpoint(data, key)
    except VerificationError:
        return False
    return True


def root_offset(note: bytes) -> int:
    """Where the third line of a note begins."""
    return note.index(b"\n", note.index(b"\n") + 1) + 1


def note_columns(note: StoredNote, head: Checkpoint) -> list[Finding]:
    """A table repeats size and root in columns, which nobody signed."""
    if note.root is None:
        return []
    pairs = (("root", note.root, head.root), ("size", b"%d" % note.size, b"%d" % head.size))
    return [
        Finding(
            kind="checkpoint",
            where=f"log_checkpoints size={note.size} column {column}",
            offset=first_difference(have, want),
            expected=want.hex() if column == "root" else want.decode(),
            found=have.hex() if column == "root" else have.decode(),
            says="it is not what the signed note says",
        )
        for column, have, want in pairs
        if have != want
    ]
