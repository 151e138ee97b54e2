"""The tight loop of an audit: one aligned stretch of the log, in one process.

Everything per entry happens here: its index, its leaf hash, the hashes above it within the stretch,
its id, and (unless told not to) its envelope, body and signature. What goes back to the parent is
small: the roots of full tiles, ids, and what differs. Whether an entry or the tile that contradicts
it is wrong cannot be told here; the signed root decides, in `audit.py`.

Speed: about 2 us an entry of 600 bytes go to hashing and cutting on one core, so batches are joined
and compared whole, and only where they differ does slow code look closer.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import pairwise

from ledger.domain.envelope import ENTRY_HEADER_BYTES, Envelope, decode_envelope, parse_envelope
from ledger.domain.events import check_body, stream_of
from ledger.errors import InvalidEvent
from ledger.log import second_opinion
from ledger.log.audit_parts import (
    CHUNK_ENTRIES,
    CHUNK_HEIGHT,
    ID_GROUPS,
    STRIP_ENTRIES,
    Anchor,
    Audited,
    Mismatch,
    NoteRoot,
    Options,
    Stretch,
)
from ledger.log.audit_read import HEADER_BYTES, LogReader, OpenReader, Place, Strip
from ledger.log.audit_rows import RowsReader
from ledger.log.audit_stored import (
    compare_tiles,
    note_columns,
    open_note_or_finding,
    root_offset,
)
from ledger.log.findings import BrokenData, Finding, first_difference
from ledger.verify.encoding import printable
from ledger.verify.merkle import HASH_BYTES
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH

MAX_FINDINGS_PER_CHUNK = 20
ANCHORED = b"checkpoint.anchored"


class ChunkAuditor:
    """Audits stretches with one reader."""

    def __init__(self, reader: LogReader, options: Options) -> None:
        self.reader = reader
        self._options = options
        self._tail = tail_pattern(options.key.name)
        self._tail_bytes = tail_bytes(options.key.name)

    def __call__(self, stretch: Stretch) -> Audited:
        done = Audited(start=stretch.start, stop=stretch.stop)
        leaves: list[bytes] = []
        ids: list[bytes] = []
        second: list[bytes] = []
        size = self._options.size
        try:
            for start in range(stretch.start, stretch.stop, STRIP_ENTRIES):
                stop = min(start + STRIP_ENTRIES, stretch.stop)
                strip = self.reader.strip(start, stop, size)
                hashes = [sha256(b"\x00" + entry).digest() for entry in strip.entries]
                leaves += hashes[: max(0, size - start)]
                self._entries(strip, ids, done)
                if strip.rows:
                    self._columns(strip, hashes, done)
                if self._options.pymerkle and start < size:
                    # One small tree a strip: pymerkle's nodes are large, and so is an entry.
                    second.append(second_opinion.root_of_entries(strip.entries[: size - start]))
        except BrokenData as error:
            done.findings.append(error.finding)
            index = error.finding.index
            done.broken = stretch.start if index is None else index
        done.ids = _grouped(ids)
        # What cannot be read may stand behind what is signed: the tree is whole all the same.
        if leaves and len(leaves) == min(size, stretch.stop) - stretch.start:
            self._tree(b"".join(leaves), done)
            if second:
                done.second = second_opinion.root_of_roots(second)
        del done.mismatches[MAX_FINDINGS_PER_CHUNK:]
        del done.findings[MAX_FINDINGS_PER_CHUNK:]
        return done

    # -- entries ---------------------------------------------------------------------------------

    def _entries(self, strip: Strip, ids: list[bytes], done: Audited) -> None:
        entries = strip.entries
        done.entries += len(entries)
        done.entry_bytes += sum(map(len, entries))
        self._times(strip, done)
        search, most, types = self._tail.search, self._tail_bytes, []
        texts = []
        for entry in entries:
            match = search(entry, max(len(entry) - most, HEADER_BYTES))
            if match is None:
                texts.append(b"")
                types.append(b"")
            else:
                id, type = match.groups()
                texts.append(id)
                types.append(type)
        if b"" in texts:
            self._bad_tails(strip, texts, done)
        joined = bytes.fromhex(b"".join(texts).replace(b"-", b"").decode())
        ids += [joined[at : at + 16] for at in range(0, len(joined), 16)]
        if ANCHORED in types:
            for n, type in enumerate(types):
                if type == ANCHORED:
                    self._anchor(strip, n, done)
        if strip.rows:
            self._names(strip, texts, types, done)
        if self._options.signatures:
            self._envelopes(strip, done)

    def _times(self, strip: Strip, done: Audited) -> None:
        times = [entry[8:HEADER_BYTES] for entry in strip.entries]
        done.first_time = done.first_time or times[0]
        before = [done.last_time, *times]
        if before != sorted(before):
            for n, (earlier, later) in enumerate(pairwise(before)):
                if later < earlier:
                    done.findings.append(
                        self._finding(
                            strip.start + n,
                            8,
                            expected=f"at least {int.from_bytes(earlier, 'big')}",
                            found=str(int.from_bytes(later, "big")),
                            says="recorded_at is before that of the entry before it",
                            kind="time",
                        )
                    )
        done.last_time = times[-1]

    def _bad_tails(self, strip: Strip, texts: list[bytes], done: Audited) -> None:
        for n, text in enumerate(texts):
            if not text:
                index, entry = strip.start + n, strip.entries[n]
                done.findings.append(
                    self._finding(
                        index,
                        ENTRY_HEADER_BYTES,
                        expected=f"an event signed for {printable(self._options.key.name)}",
                        found=_why_no_envelope(entry, self._options.key.name),
                        says=f"entry {index} is no event of this log",
                    )
                )

    def _envelopes(self, strip: Strip, done: Audited) -> None:
        origin = self._options.key.name
        for n, entry in enumerate(strip.entries):
            try:
                envelope = parse_envelope(entry[ENTRY_HEADER_BYTES:], log=origin)
                check_body(envelope.type, envelope.body)
            except InvalidEvent as error:
                if self._tail.search(entry, max(len(entry) - self._tail_bytes, HEADER_BYTES)):
                    done.findings.append(self._invalid(strip.start + n, error))
                continue
            done.signatures += 1
            if strip.rows:
                self._stream(strip.start + n, envelope, done)

    def _stream(self, index: int, envelope: Envelope, done: Audited) -> None:
        assert isinstance(self.reader, RowsReader)
        expected = stream_of(envelope.type, envelope.log, envelope.actor, envelope.body)
        stored = self._streams(index).get(index)
        if stored is not None and stored != expected.bytes:
            done.findings.append(
                _column(index, "originator_id", expected.bytes, stored, "it is in another stream")
            )

    def _streams(self, index: int) -> dict[int, bytes]:
        assert isinstance(self.reader, RowsReader)
        start = index - index % STRIP_ENTRIES
        if getattr(self, "_streams_at", None) != start:
            found = self.reader.archive.streams(start, start + STRIP_ENTRIES)
            self._streams_of = {start + n: stream for n, (stream, _) in enumerate(found)}
            self._streams_at = start
        return self._streams_of

    def _invalid(self, index: int, error: InvalidEvent) -> Finding:
        return self._finding(
            index,
            ENTRY_HEADER_BYTES,
            expected="a well-formed event with its actor's signature",
            found=str(error),
            says=f"entry {index} is not a valid event",
        )

    def _anchor(self, strip: Strip, n: int, done: Audited) -> None:
        index, entry = strip.start + n, strip.entries[n]
        try:
            envelope = decode_envelope(entry[ENTRY_HEADER_BYTES:])
            check_body(envelope.type, envelope.body)
        except InvalidEvent as error:
            if not self._options.signatures:  # else reported with the others
                done.findings.append(self._invalid(index, error))
            return
        body = envelope.body
        done.anchors.append(
            Anchor(index=index, size=int(body["size"]), root=bytes.fromhex(body["root"]))
        )

    def _finding(
        self,
        index: int,
        offset: int,
        *,
        expected: str,
        found: str,
        says: str,
        kind: str = "entry",
    ) -> Finding:
        where, at = _safe_place(self.reader, index, self._options.size).at(offset)
        return Finding(
            kind=kind,
            where=where,
            offset=at,
            expected=expected,
            found=found,
            says=says,
            index=index,
        )

    # -- columns of a database ---------------------------------------------------------------------

    def _columns(self, strip: Strip, hashes: Sequence[bytes], done: Audited) -> None:
        stored = [row[3] for row in strip.rows]
        if stored == hashes:
            return
        for n, (left, right) in enumerate(zip(hashes, stored, strict=True)):
            differs = first_difference(left, right)
            if differs is not None:
                index = strip.start + n
                done.mismatches.append(
                    Mismatch(
                        kind="leaf_hash",
                        level=0,
                        position=index,
                        where=f"stored_events notification_id={index + 1} column leaf_hash",
                        offset=differs,
                        computed=left,
                        stored=right,
                    )
                )

    def _names(
        self, strip: Strip, texts: Sequence[bytes], types: Sequence[bytes], done: Audited
    ) -> None:
        """event_id and topic repeat what the envelope says."""
        topics = [type.decode() for type in types]
        ids = [bytes.fromhex(text.decode().replace("-", "")) for text in texts]
        if [row[4] for row in strip.rows] == ids and [row[5] for row in strip.rows] == topics:
            return
        for n, row in enumerate(strip.rows):
            index = strip.start + n
            if not texts[n]:
                continue
            for column, have, want in (
                ("event_id", row[4] or b"", ids[n]),
                ("topic", (row[5] or "").encode(), types[n]),
            ):
                if have != want:
                    says = "it is not what the envelope says"
                    done.findings.append(_column(index, column, want, have, says))

    # -- the tree within the stretch ---------------------------------------------------------------

    def _tree(self, leaves: bytes, done: Audited) -> None:
        levels = _levels(leaves)
        done.tile_roots = levels[TILE_HEIGHT] if len(levels) > TILE_HEIGHT else b""
        done.tail = leaves[len(done.tile_roots) * TILE_WIDTH :]
        if len(leaves) == CHUNK_ENTRIES * HASH_BYTES:
            done.whole = levels[CHUNK_HEIGHT]
        first = done.start // TILE_WIDTH
        count = -(-len(leaves) // HASH_BYTES // TILE_WIDTH)
        compare_tiles(self.reader, self._options.size, 0, first, first + count, leaves, done)
        self._notes(levels, done)

    def _notes(self, levels: list[bytes], done: Audited) -> None:
        """Checkpoints of sizes (start, stop]; the empty tree's is the first stretch's too."""
        low = done.start + 1 if done.start else 0
        try:
            notes = self.reader.notes(low, done.stop + 1, self._options.size)
        except BrokenData as error:
            done.findings.append(error.finding)
            return
        for note in notes:
            opened = open_note_or_finding(note, self._options.key)
            if isinstance(opened, Finding):
                done.findings.append(opened)
                continue
            done.findings += note_columns(note, opened)
            done.notes.append(
                NoteRoot(
                    note=note,
                    root=opened.root,
                    root_offset=root_offset(note.note),
                    inner=_range_root(levels, opened.size - done.start),
                )
            )


# --- hashes ---


def _levels(leaves: bytes) -> list[bytes]:
    """Level h: the perfect subtrees of height h within a stretch, back to back."""
    levels = [leaves]
    while len(levels[-1]) >= 2 * HASH_BYTES:
        below = levels[-1]
        levels.append(
            b"".join(
                [
                    sha256(b"\x01" + below[at : at + 64]).digest()
                    for at in range(0, len(below) - HASH_BYTES, 64)
                ]
            )
        )
    return levels


def _range_root(levels: list[bytes], count: int) -> bytes:
    """The root of the first `count` leaves of a stretch; nothing where count is 0."""
    parts, at = [], 0
    for height in reversed(range(len(levels))):
        if count >> height & 1:
            start = (at >> height) * HASH_BYTES
            parts.append(levels[height][start : start + HASH_BYTES])
            at += 1 << height
    root = parts.pop() if parts else b""
    while parts:
        root = sha256(b"\x01" + parts.pop() + root).digest()
    return root


def _grouped(ids: list[bytes]) -> list[bytes]:
    ids.sort()
    bounds = [bisect_left(ids, bytes([n * 256 // ID_GROUPS])) for n in range(ID_GROUPS)]
    return [b"".join(ids[a:b]) for a, b in pairwise([*bounds, len(ids)])]


# --- envelopes ---


def tail_pattern(origin: str) -> re.Pattern[bytes]:
    """The end of every envelope of this log, canonical JSON in key order: id and type in it."""
    log = re.escape(json.dumps(origin, ensure_ascii=False).encode())
    digits = rb"[0-9a-f]"
    uuid = digits + rb"{8}-" + (digits + rb"{4}-") * 3 + digits + rb"{12}"
    return re.compile(
        rb'\},"id":"(' + uuid + rb')","log":' + log
        + rb',"sig":"[A-Za-z0-9+/]{86}==","type":"([a-z_.]{1,64})","v":1\}\Z'
    )  # fmt: skip


def tail_bytes(origin: str) -> int:
    """The most bytes that `tail_pattern` matches."""
    return 260 + len(json.dumps(origin, ensure_ascii=False).encode())


def _why_no_envelope(entry: bytes, origin: str) -> str:
    try:
        envelope = parse_envelope(entry[ENTRY_HEADER_BYTES:], log=origin)
    except InvalidEvent as error:
        return str(error)
    return f"an envelope of type {printable(envelope.type)}"


def _column(index: int, column: str, want: bytes, have: bytes, says: str) -> Finding:
    shown: Callable[[bytes], str] = (
        (lambda data: printable(data.decode("utf-8", "replace")))
        if column == "topic"
        else (lambda data: data.hex() or "nothing")
    )
    return Finding(
        kind="row",
        where=f"stored_events notification_id={index + 1} column {column}",
        offset=first_difference(want, have),
        expected=shown(want),
        found=shown(have),
        says=says,
        index=index,
    )


def _safe_place(reader: LogReader, index: int, size: int) -> Place:
    try:
        return reader.place(index, size)
    except BrokenData as error:
        return Place(where=error.finding.where, base=0)


# --- processes ---

_auditor: ChunkAuditor | None = None


def start_process(open_reader: OpenReader, options: Options) -> None:
    """Once in each process of the pool."""
    global _auditor
    _auditor = ChunkAuditor(open_reader(), options)


def audit_stretch(stretch: Stretch) -> Audited:
    assert _auditor is not None
    return _auditor(stretch)
