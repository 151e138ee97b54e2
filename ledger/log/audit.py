"""The audit: the whole log read again and every stored hash compared with what its entries give.

In this order; the numbers stand in the report:

1. *checkpoint*: the newest one opens under the log's key.
2. *entries*: each is there, carries its own index, and is an event of this log; recorded_at never
   falls; no event id occurs twice; with signatures on, each one's form, body and signature.
3. *tree*: rebuilt from the entries by our code, its root is the signed one.
4. *second opinion*: rebuilt once more by pymerkle.
5. *tiles*: every stored tile of every level is what the entries give.
6. *checkpoints*: every stored one is signed, and its root is the tree's at its size.
7. *anchors*: every `checkpoint.anchored` event names the tree's root at its size.
8. *tables* (a database): leaf_hash, event_id, topic, stream of each row; head, gaps, strays.

Stretches of 16,384 entries are audited by processes (`audit_chunk.py`); here their roots are
joined, and where a stored hash and the entries differ, `audit_judge.py` decides who is wrong. What
merely follows from a wrong entry (the root, later checkpoints) is not reported as a fault of its
own. Memory: 16 bytes an entry for the ids, 32 bytes per 256 entries for the tree.

Not shown by an audit: that the key is the one you mean, that nobody was shown another history
(witnesses, monitor), that events were allowed when they were recorded (`projections` books what the
rules of money do not allow as anomalies).
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ledger.log import second_opinion, tree
from ledger.log.audit_chunk import ChunkAuditor, audit_stretch, start_process
from ledger.log.audit_judge import Judge
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
from ledger.log.audit_read import LogReader, OpenReader, StoredNote, tiles_at
from ledger.log.audit_report import Report, Step
from ledger.log.audit_rows import RowsReader
from ledger.log.audit_stored import (
    compare_tiles,
    note_columns,
    open_note_or_finding,
    root_offset,
)
from ledger.log.findings import BrokenData, Finding
from ledger.log.frontier import Frontier
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.encoding import encode_base64
from ledger.verify.merkle import HASH_BYTES, leaf_hash, tree_root
from ledger.verify.note import VerifierKey
from ledger.verify.tiles import TILE_WIDTH

MAX_FINDINGS = 100
"""A report names the first so many; a log that is wrong in more places is wrong enough."""
MAX_LEVEL = 8
SMALL, SMALL_SIGNED = 262_144, 8_192
"""Fewer entries (without, with signatures) are audited sooner than further processes start."""
Progress = Callable[[int, int], None]
"""Entries done, and of how many."""


def audit_log(
    open_reader: OpenReader,
    key: VerifierKey,
    *,
    signatures: bool = True,
    pymerkle: bool = True,
    jobs: int = 1,
    progress: Progress = lambda done, of: None,
) -> Report:
    """Audit what `open_reader` opens, in `jobs` processes (1: this one).

    Raises NotFound where there is no checkpoint, Unavailable when the place stops answering; what
    is wrong with the log is in the report and raises nothing.
    """
    began = time.monotonic()
    reader = open_reader()
    try:
        audit = _Audit(reader, key, signatures=signatures, pymerkle=pymerkle)
        if audit.open():
            with _auditors(open_reader, reader, audit.options, jobs) as run:
                audit.stretches(run, progress)
            audit.finish()
    finally:
        reader.close()
    report = audit.report
    report.seconds = time.monotonic() - began
    return report


@contextmanager
def _auditors(
    open_reader: OpenReader, reader: LogReader, options: Options, jobs: int
) -> Iterator[Callable[[Iterable[Stretch]], Iterator[Audited]]]:
    small = SMALL_SIGNED if options.signatures else SMALL
    if jobs <= 1 or reader.length(options.size) < small:
        auditor = ChunkAuditor(reader, options)
        yield lambda stretches: map(auditor, stretches)
        return
    # Not fork: a process with threads and database connections must not be copied.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, start_process, (open_reader, options)) as pool:
        yield lambda stretches: pool.imap(audit_stretch, stretches)


class _Audit:
    def __init__(
        self, reader: LogReader, key: VerifierKey, *, signatures: bool, pymerkle: bool
    ) -> None:
        self._reader = reader
        self._key = key
        self._signatures = signatures
        self._asked_pymerkle = pymerkle
        self._pymerkle = pymerkle and second_opinion.installed()
        self.report = Report(log=key.name)
        self.options: Options
        self._newest: StoredNote
        self._head: Checkpoint
        # The tree as the entries give it.
        self._tile_roots = bytearray()
        self._tail = b""
        self._levels: dict[int, bytes] = {}
        self._seconds: list[bytes] = []
        self._frontier = Frontier()
        self._broken: int | None = None
        self._root = b""
        # What is still to be judged.
        self._mismatches: list[Mismatch] = []
        self._ids: list[list[bytes]] = [[] for _ in range(ID_GROUPS)]
        self._anchors: list[Anchor] = []
        self._other_roots: list[tuple[int, Finding]] = []
        self._first_blamed: int | None = None
        self._follow: dict[str, str] = {}
        self._last_time = b""
        self._counts = {"tiles": 0, "notes": 0, "signatures": 0, "duplicates": 0}
        self._by_step: dict[str, list[Finding]] = {}

    # -- 1 -----------------------------------------------------------------------------------------

    def open(self) -> bool:
        """The newest checkpoint; without it there is nothing to compare with."""
        self._newest = self._reader.newest()
        opened = open_note_or_finding(self._newest, self._key)
        if isinstance(opened, Finding):
            self._wrong("checkpoint", opened)
            self._steps()
            return False
        for finding in note_columns(self._newest, opened):
            self._wrong("checkpoint", finding)
        self._head = opened
        self.report.size, self.report.root = opened.size, opened.root
        self.options = Options(
            key=self._key, size=opened.size, signatures=self._signatures, pymerkle=self._pymerkle
        )
        return True

    # -- 2, and the parts of the rest that a stretch can do -------------------------------------

    def stretches(
        self, run: Callable[[Iterable[Stretch]], Iterator[Audited]], progress: Progress
    ) -> None:
        length = max(self._reader.length(self._head.size), 0)
        # One at a time: a signed size may be any number, whatever the log really holds.
        stretches = (
            Stretch(start=start, stop=min(start + CHUNK_ENTRIES, length))
            for start in range(0, length, CHUNK_ENTRIES)
        )
        if length < self._head.size:
            self._broken = length  # the tables' step says what is missing
        for done in run(stretches):
            self._take(done)
            progress(done.stop, length)
            if self._broken is not None and self._faults >= MAX_FINDINGS:
                break  # no tree can come of it, and a report names no more
        if self._head.size == 0:
            self._empty_notes()

    def _take(self, done: Audited) -> None:
        report = self.report
        report.entries += done.entries
        report.entry_bytes += done.entry_bytes
        self._counts["signatures"] += done.signatures
        self._counts["tiles"] += done.tiles
        for finding in done.findings:
            self._wrong(_STEP_OF.get(finding.kind, "entries"), finding)
        self._mismatches += done.mismatches[: MAX_FINDINGS - len(self._mismatches)]
        self._anchors += done.anchors
        for group, ids in zip(self._ids, done.ids, strict=False):
            group.append(ids)
        if done.first_time and done.first_time < self._last_time:
            where, at = self._reader.place(done.start, self._head.size).at(8)
            self._wrong(
                "entries",
                Finding(
                    kind="time", where=where, offset=at, index=done.start,
                    expected=f"at least {int.from_bytes(self._last_time, 'big')}",
                    found=str(int.from_bytes(done.first_time, "big")),
                    says="recorded_at is before that of the entry before it",
                ),
            )  # fmt: skip
        self._last_time = done.last_time or self._last_time
        whole = done.tile_roots or done.tail
        if done.broken is not None and done.start < self._head.size and not whole:
            self._broken = min(
                done.broken, self._head.size if self._broken is None else self._broken
            )
        if self._broken is None and done.start < self._head.size:
            self._check_notes(done.notes)
            self._grow(done)

    @property
    def _faults(self) -> int:
        return sum(map(len, self._by_step.values()))

    def _grow(self, done: Audited) -> None:
        self._tile_roots += done.tile_roots
        self._tail = done.tail
        if done.second:
            self._seconds.append(done.second)
        if done.whole:
            self._frontier.append(done.whole, CHUNK_HEIGHT)

    # -- 6 -----------------------------------------------------------------------------------------

    def _check_notes(self, notes: Sequence[NoteRoot]) -> None:
        """The frontier is that of the stretch's start: a note's root is one fold away."""
        for found in notes:
            self._counts["notes"] += 1
            root = self._frontier.root(found.inner)
            if root != found.root:
                self._other_roots.append(
                    (
                        found.note.size,
                        Finding(
                            kind="checkpoint",
                            where=found.note.where,
                            offset=found.note.offset + found.root_offset,
                            expected=encode_base64(root),
                            found=encode_base64(found.root),
                            says=f"the checkpoint of size {found.note.size} is not of this tree",
                        ),
                    )
                )

    def _empty_notes(self) -> None:
        for note in self._reader.notes(0, 1, 0):
            opened = open_note_or_finding(note, self._key)
            if isinstance(opened, Finding):
                self._wrong("checkpoints", opened)
            else:
                self._check_notes(
                    [NoteRoot(note=note, root=opened.root, root_offset=root_offset(note.note),
                              inner=b"")]
                )  # fmt: skip

    # -- the rest ----------------------------------------------------------------------------------

    def finish(self) -> None:
        if self._broken is None:
            self._build_levels()
            self._compare_upper_tiles()
            self._root = tree.root(self._head.size, self._computed)
        self._judge()
        if self._broken is None:
            self._check_root()
            self._check_anchors()
            for size, finding in self._other_roots:
                if not self._follows(size):
                    self._wrong("checkpoints", finding)
        self._check_ids()
        for finding in self._reader.strays(self._head.size):
            self._wrong("tables" if finding.kind == "row" else "tiles", finding)
        self._steps()

    def _judge(self) -> None:
        judge = Judge(self._reader, self._head)
        for found in judge.tiles(self._mismatches):
            self._wrong(_STEP_OF.get(found.kind, "entries"), found)
        self._first_blamed = judge.first_blamed

        # What a changed entry's form, signature and time break besides follows from its bytes.
        def follows(f: Finding) -> bool:
            before = f.index is not None and f.kind == "time" and f.index - 1 in judge.changed
            return (f.index in judge.changed or before) and f not in judge.named

        kept = [f for f in self._by_step.get("entries", []) if not follows(f)]
        self._by_step["entries"] = kept

    def _follows(self, size: int) -> bool:
        """Whether a wrong root of that size follows from an entry that is named."""
        return self._first_blamed is not None and self._first_blamed < size

    def _build_levels(self) -> None:
        """Level 1 is the roots of full level-0 tiles; each level above likewise."""
        level, hashes = 1, bytes(self._tile_roots)
        while hashes:
            self._levels[level] = hashes
            span = TILE_WIDTH * HASH_BYTES
            hashes = b"".join(
                tree_root(
                    [hashes[at + i : at + i + HASH_BYTES] for i in range(0, span, HASH_BYTES)]
                )
                for at in range(0, len(hashes) - span + 1, span)
            )
            level += 1

    def _computed(self, wanted: Sequence[tree.TileId]) -> dict[tree.TileId, bytes]:
        """Tiles as the entries give them: of level 0 only the last, partial one is kept."""
        span = TILE_WIDTH * HASH_BYTES
        found: dict[tree.TileId, bytes] = {}
        for level, n in wanted:
            if level == 0:
                found[level, n] = self._tail if n == self._head.size // TILE_WIDTH else b""
            else:
                found[level, n] = self._levels.get(level, b"")[n * span : (n + 1) * span]
        return found

    def _compare_upper_tiles(self) -> None:
        done = Audited(start=0, stop=0)
        for level in range(1, MAX_LEVEL):
            count = tiles_at(self._head.size, level)
            for first in range(0, count, TILE_WIDTH):
                hashes = self._levels[level][first * TILE_WIDTH * HASH_BYTES :]
                stop = min(first + TILE_WIDTH, count)
                compare_tiles(self._reader, self._head.size, level, first, stop, hashes, done)
        self._counts["tiles"] += done.tiles
        for finding in done.findings:
            self._wrong("tiles", finding)
        self._mismatches += done.mismatches

    # -- 3, 4, 7 -----------------------------------------------------------------------------------

    def _check_root(self) -> None:
        if self._pymerkle:
            second = second_opinion.root_of_roots(self._seconds)
            if second != self._head.root:
                self._wrong_root("second opinion", second, "pymerkle's root of the entries")
        if self._root != self._head.root:
            self._wrong_root("tree", self._root, "the root of the entries")

    def _wrong_root(self, step: str, root: bytes, what: str) -> None:
        if self._follows(self._head.size):
            self._follow[step] = (
                f"{what} is {root.hex()}, not the signed {self._head.root.hex()}: it follows from "
                f"entry {self._first_blamed}"
            )
            return
        at = self._newest.offset + root_offset(self._newest.note)
        self._wrong(
            step,
            Finding(
                kind="root",
                where=self._newest.where,
                offset=at,
                expected=f"{encode_base64(root)}, {what}",
                found=encode_base64(self._head.root),
                says=f"the signed root of size {self._head.size} is not that of the entries",
            ),
        )

    def _check_anchors(self) -> None:
        for anchor in self._anchors:
            there = anchor.size <= min(anchor.index, self._head.size)
            root = self._root_at(anchor.size) if there else None
            if root == anchor.root or self._follows(anchor.size):
                continue
            entry = self._entries_from(anchor.index, anchor.index + 1)[0]
            at = entry.find(anchor.root.hex().encode())
            where, offset = self._reader.place(anchor.index, self._head.size).at(max(at, 0))
            self._wrong(
                "anchors",
                Finding(
                    kind="anchor",
                    where=where,
                    offset=offset,
                    expected=root.hex()
                    if root
                    else f"a size of at most {min(anchor.index, self._head.size)}",
                    found=anchor.root.hex() if root else str(anchor.size),
                    says=f"entry {anchor.index} says that the chain holds another tree of "
                    f"{anchor.size} entries than this one",
                    index=anchor.index,
                ),
            )

    def _root_at(self, size: int) -> bytes:
        """The root of the first `size` entries; those of its partial tile are read again."""
        leaves: dict[tree.TileId, bytes] = {}
        start = size - size % TILE_WIDTH
        if start < size:
            hashes = map(leaf_hash, self._entries_from(start, size))
            leaves[0, start // TILE_WIDTH] = b"".join(hashes)
        return tree.root(size, lambda wanted: {**self._computed(wanted), **leaves})

    def _entries_from(self, first: int, stop: int) -> list[bytes]:
        """Entries of one bundle, read again."""
        start = first - first % TILE_WIDTH
        end = min(start + TILE_WIDTH, self._reader.length(self._head.size))
        found = self._reader.strip(start, end, self._head.size).entries
        return found[first - start : stop - start]

    # -- 2: ids ------------------------------------------------------------------------------------

    def _check_ids(self) -> None:
        for group in self._ids:
            ids = [blob[at : at + 16] for blob in group for at in range(0, len(blob), 16)]
            if len(set(ids)) == len(ids):
                continue
            seen: set[bytes] = set()
            for id in ids:
                if id in seen:
                    self._name_duplicate(id)
                    break
                seen.add(id)

    def _name_duplicate(self, id: bytes) -> None:
        text = (
            f"{id.hex()[:8]}-{id.hex()[8:12]}-{id.hex()[12:16]}-{id.hex()[16:20]}-{id.hex()[20:]}"
        )
        needle = f'"id":"{text}","log":'.encode()
        length, first = self._reader.length(self._head.size), None
        for start in range(0, length, STRIP_ENTRIES):
            stop = min(start + STRIP_ENTRIES, length)
            try:
                strip = self._reader.strip(start, stop, self._head.size)
            except BrokenData:  # reported where the entries were read
                continue
            for n, entry in enumerate(strip.entries):
                at = entry.rfind(needle)
                if at < 0:
                    continue
                if first is None:
                    first = start + n
                    continue
                where, offset = self._reader.place(start + n, self._head.size).at(at + 6)
                self._wrong(
                    "entries",
                    Finding(
                        kind="entry",
                        where=where,
                        offset=offset,
                        expected="an id that occurs once",
                        found=text,
                        says=f"entry {start + n} has the event id of entry {first}",
                        index=start + n,
                    ),
                )
                return

    # -- the report --------------------------------------------------------------------------------

    def _wrong(self, step: str, finding: Finding) -> None:
        self._by_step.setdefault(step, []).append(finding)

    def _steps(self) -> None:
        report = self.report
        if self._broken is not None:
            where = f"entry {self._broken} cannot be read, so the tree was not rebuilt"
        else:
            where = ""
        size = report.size
        lines = {
            "checkpoint": f"size {size}, root {report.root.hex()}, signed by {report.log}",
            "entries": f"{report.entries} entries, {report.entry_bytes} bytes"
            + (f", {self._counts['signatures']} signatures" if self._signatures else ""),
            "tree": where or "rebuilt from the entries: the signed root",
            "second opinion": where or "rebuilt by pymerkle: the signed root",
            "tiles": f"{self._counts['tiles']} stored tiles are what the entries give",
            "checkpoints": where or f"{self._counts['notes']} stored checkpoints are of this tree",
            "anchors": where or f"{len(self._anchors)} anchored roots are of this tree",
        }
        if not self._asked_pymerkle:
            lines["second opinion"] = "not asked for"
        elif not self._pymerkle:
            lines["second opinion"] = (
                "pymerkle is not installed, so nobody else rebuilt the tree: "
                "pip install 'tributary-ledger[audit]'"
            )
        not_run = {"second opinion"} if not self._pymerkle else set()
        if self._broken is not None:
            not_run |= {"tree", "second opinion", "checkpoints", "anchors"}
        opened = "options" in vars(self)
        for name, says in lines.items():
            found = self._by_step.get(name, [])
            wrong = found or name in self._follow
            state = "wrong" if wrong else "skipped" if name in not_run else "ok"
            if not opened and name != "checkpoint":
                state, says = "skipped", "there is no checkpoint to compare with"
            says = str(found[0]) if found else self._follow.get(name, says)
            report.steps.append(Step(name=name, state=state, says=says))
        self._tables_step(opened)
        order = [*lines, "tables"]
        findings = [f for name in order for f in self._by_step.get(name, [])]
        report.findings = findings[:MAX_FINDINGS]

    def _tables_step(self, opened: bool) -> None:
        if isinstance(self._reader, RowsReader) and opened:
            found = self._by_step.get("tables", [])
            beyond = max(self.report.entries - self.report.size, 0)
            says = f"columns agree; {beyond} entries are not signed for yet"
            self.report.steps.append(
                Step(
                    name="tables",
                    state="wrong" if found else "ok",
                    says=str(found[0]) if found else says,
                )
            )


_STEP_OF = {"tile": "tiles", "checkpoint": "checkpoints", "row": "tables"}
