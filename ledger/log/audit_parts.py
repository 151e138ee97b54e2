"""What goes between the processes of an audit: the work, and what it gave. All is picklable."""

from dataclasses import dataclass, field

from ledger.log.audit_read import StoredNote
from ledger.log.findings import Finding
from ledger.verify.note import VerifierKey

CHUNK_HEIGHT = 14
CHUNK_ENTRIES = 1 << CHUNK_HEIGHT
"""A stretch: one perfect subtree, 64 bundles. The unit of work of a process."""
STRIP_ENTRIES = 1_024
"""Entries in memory at a time: at most 64 MiB."""
ID_GROUPS = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to audit: the tree of `size` leaves that `key` signed for, and how closely."""

    key: VerifierKey
    size: int
    signatures: bool
    pymerkle: bool


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Entries [start, stop): `start` is a multiple of CHUNK_ENTRIES."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A stored hash and the one that the entries give. The signed root will say which is right.

    At level 0 `position` is a leaf index; above, the number of a node of that level.
    """

    kind: str
    level: int
    position: int
    where: str
    offset: int
    computed: bytes
    stored: bytes


@dataclass(frozen=True, kw_only=True)
class NoteRoot:
    """A stored checkpoint that its signature supports, and the root of its part of the stretch."""

    note: StoredNote
    root: bytes
    root_offset: int
    inner: bytes


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A `checkpoint.anchored` event at leaf `index`."""

    index: int
    size: int
    root: bytes


@dataclass(kw_only=True)
class Audited:
    """What a stretch gave. `broken` is the first entry that could not be read."""

    start: int
    stop: int
    entries: int = 0
    entry_bytes: int = 0
    signatures: int = 0
    tiles: int = 0
    broken: int | None = None
    tile_roots: bytes = b""
    tail: bytes = b""
    """Leaf hashes behind the last full tile."""
    whole: bytes = b""
    """The root of the stretch when it is full, 32 bytes."""
    second: bytes = b""
    """The root of the stretch by pymerkle."""
    last_time: bytes = b""
    first_time: bytes = b""
    ids: list[bytes] = field(default_factory=list)
    """Event ids, 16 bytes each, grouped by their first half byte and sorted."""
    anchors: list[Anchor] = field(default_factory=list)
    notes: list[NoteRoot] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
