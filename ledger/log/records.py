"""Every checkpoint a log has signed, as files beside its C2SP ones: `checkpoints/<K>`.

c2sp.org/tlog-tiles serves the newest checkpoint alone. An auditor, and whoever restores a log, want
all of them: anchors and cosignatures are about older ones. File K holds those of sizes
[2,048 K, 2,048 (K + 1)), so the tree's size says which files there can be and nothing has to be
listed; K is written as a tile number. One canonical JSON object a line, ascending by size::

    {"note":"<the signed note>","signed_at":<us>,"size":<n>}

A file is absent where no checkpoint of those sizes is known. It grows with the log, and a line may
gain signatures, so it is not for caching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import InvalidEvent, MalformedProof, NotFound, VerificationError
from ledger.ports import StoredCheckpoint
from ledger.verify.checkpoint import parse_checkpoint
from ledger.verify.note import parse_note
from ledger.verify.tiles import Tile, tile_path

SIZES_PER_FILE = 2_048
"""A quiet log signs every size: with 100 signatures on each, a file stays under 32 MiB."""
MAX_DIGITS = 15
_FIELDS = {"note", "signed_at", "size"}


@dataclass(frozen=True, kw_only=True)
class RecordLine:
    """One line as found: `offset` and `note_offset` are bytes from the start of the file."""

    offset: int
    note_offset: int
    checkpoint: StoredCheckpoint


def record_path(file: int) -> str:
    """`checkpoints/x001/234`."""
    number = tile_path(Tile(level=None, n=file)).removeprefix("tile/entries/")
    return f"checkpoints/{number}"


def record_files(size: int) -> range:
    """The files that the checkpoints of a tree of `size` can be in."""
    return range(size // SIZES_PER_FILE + 1)


def record_sizes(path: str) -> range:
    """The sizes whose checkpoints lie in the file at `path`. Raises NotFound: no such path."""
    digits = path.removeprefix("checkpoints/").replace("/", "").replace("x", "")
    number = int(digits) if digits.isdecimal() and len(digits) <= MAX_DIGITS else -1
    if number < 0 or record_path(number) != path:
        raise NotFound(f"{path[:200]!r} is no file of a log")
    return range(number * SIZES_PER_FILE, (number + 1) * SIZES_PER_FILE)


def format_records(checkpoints: Sequence[StoredCheckpoint]) -> bytes:
    """The file of these checkpoints, which are ascending by size."""
    return b"".join(
        canonical_json({"note": c.note.decode(), "signed_at": c.signed_at, "size": c.size}) + b"\n"
        for c in checkpoints
    )


def parse_records(data: bytes, file: int) -> list[RecordLine]:
    """The lines of file number `file`; signatures are not checked here. Raises MalformedProof,
    with the offset of the line it is about as `offset`."""
    found: list[RecordLine] = []
    offset, last = 0, -1
    for line in data.splitlines(keepends=True):
        try:
            checkpoint = _parse_line(line)
            if checkpoint.size <= last or checkpoint.size // SIZES_PER_FILE != file:
                raise MalformedProof(f"size {checkpoint.size} does not belong on this line")
        except (InvalidEvent, VerificationError, UnicodeDecodeError) as error:
            raise MalformedProof(
                f"line {len(found) + 1} of {record_path(file)} is no checkpoint record: {error}",
                offset=offset,
            ) from error
        note_offset = offset + line.index(b'"note":"') + len(b'"note":"')
        found.append(RecordLine(offset=offset, note_offset=note_offset, checkpoint=checkpoint))
        offset, last = offset + len(line), checkpoint.size
    return found


def _parse_line(line: bytes) -> StoredCheckpoint:
    if not line.endswith(b"\n"):
        raise MalformedProof("the last line has no end")
    value = parse_canonical(line[:-1])
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise MalformedProof(f"a record has exactly the fields {', '.join(sorted(_FIELDS))}")
    note, signed_at, size = value["note"], value["signed_at"], value["size"]
    if not isinstance(note, str) or type(signed_at) is not int or signed_at < 0:
        raise MalformedProof("note is a string, signed_at microseconds since 1970")
    head = parse_checkpoint(parse_note(note.encode()).text)
    if type(size) is not int or size != head.size:
        raise MalformedProof(f"size is {size!r}, the note is of size {head.size}")
    return StoredCheckpoint(size=size, root=head.root, note=note.encode(), signed_at=signed_at)
