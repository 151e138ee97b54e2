"""Assemble a lineage bundle: from one event, everything that it rests on, with proofs.

The walk follows `ledger.domain.events.references` and the training manifest, so that what is
gathered here is what `ledger.verify.lineage` asks for. Nothing is trusted to be right: a bundle
that would not verify is a bug, and the tests verify every one that they assemble.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

from ledger.domain.envelope import Entry, decode_entry
from ledger.domain.events import CREATES, references
from ledger.errors import NotFound, StorageError, TooLarge
from ledger.log.prover import Prover
from ledger.ports import BlobStore, EntryLog, StoredCheckpoint, TileStore
from ledger.verify.bundle_format import (
    MAX_BUNDLE_BYTES,
    MAX_ENTRIES,
    AnchoredCheckpoint,
    Bundle,
    BundledEntry,
    format_bundle,
)
from ledger.verify.manifest import parse_manifest
from ledger.verify.note import VerifierKey, format_vkey

SCAN_BATCH = 1_000

# Beside what an event refers to: what else is known about the same thing, where it exists.
COMPANIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "contribution.recorded": (("contribution.approved", "contribution"),),
    "run.requested": (("run.completed", "run"),),
    "adapter.published": (("run.completed", "run"),),
    "inference.recorded": (("attribution.recorded", "inference"), ("fee.charged", "inference")),
}


class EventIndex(Protocol):
    """Where things are in the log: a look-up that a projection, or `ScannedIndex`, can answer."""

    def first(self, event_type: str, kind: str, id: str) -> int | None:
        """Index of the first event of that type whose body field `kind` is `id`."""
        ...


class ScannedIndex:
    """An EventIndex in memory: reads the log once and then what was added since.

    About 200 bytes per event and thing named; a large ledger answers from a projection instead.
    """

    def __init__(self, log: EntryLog) -> None:
        self._log = log
        self._read = 0
        self._first: dict[tuple[str, str, str], int] = {}
        self._lock = Lock()  # two readers at once would count the same batch twice and skip one

    def first(self, event_type: str, kind: str, id: str) -> int | None:
        with self._lock:
            self._catch_up()
        return self._first.get((event_type, kind, id))

    def _catch_up(self) -> None:
        while entries := self._log.entries(self._read, self._read + SCAN_BATCH):
            for data in entries:
                entry = decode_entry(data, verify=False)
                body = entry.envelope.body
                for kind in CREATES:
                    if kind in body:
                        self._first.setdefault((entry.envelope.type, kind, body[kind]), entry.index)
            self._read += len(entries)


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """A checkpoint that an EVM chain holds, and the L1 section captured when it was committed."""

    checkpoint: StoredCheckpoint
    section: Mapping[str, Any]


class Bundler:
    """Bundles of one log."""

    def __init__(
        self,
        *,
        log: EntryLog,
        tiles: TileStore,
        blobs: BlobStore,
        index: EventIndex,
        vkey: VerifierKey,
    ) -> None:
        self._log = log
        self._tiles = tiles
        self._blobs = blobs
        self._index = index
        self._vkey = vkey
        self._prover = Prover(tiles)

    def bundle(self, event_id: str, *, anchored: Anchored | None = None) -> bytes:
        """The lineage bundle of an event.

        Stands on the anchored checkpoint when that covers every entry, else on the newest one and
        carries the consistency proof between the two. Raises NotFound for an unknown event or one
        that no checkpoint covers yet, TooLarge beyond the format's limits.
        """
        newest = self._tiles.latest()
        subject = self._log.index_of(event_id)
        if subject is None:
            raise NotFound(f"no event {event_id} is recorded in this ledger")
        if newest is None or subject >= newest.size:
            raise NotFound(f"event {event_id} is not in a signed checkpoint yet; try again shortly")
        entries, blobs = self._closure(subject, newest.size)
        head = newest
        if anchored and anchored.checkpoint.size > max(entries):
            head = anchored.checkpoint
        data = format_bundle(
            Bundle(
                log=self._vkey.name,
                vkey=format_vkey(self._vkey),
                subject=decode_entry(entries[subject], verify=False).envelope.id,
                checkpoint=head.note,
                entries=self._with_proofs(entries, head.size),
                blobs=blobs,
                l1=self._anchored(anchored, head) if anchored else None,
            )
        )
        if len(data) > MAX_BUNDLE_BYTES:
            raise TooLarge(f"the bundle would exceed MAX_BUNDLE_BYTES = {MAX_BUNDLE_BYTES}")
        return data

    def _with_proofs(self, entries: Mapping[int, bytes], size: int) -> tuple[BundledEntry, ...]:
        indexes = sorted(entries)
        proofs = self._prover.inclusions(indexes, size)
        return tuple(
            BundledEntry(index=index, entry=entries[index], proof=tuple(proofs[index]))
            for index in indexes
        )

    def _anchored(self, anchored: Anchored, head: StoredCheckpoint) -> AnchoredCheckpoint:
        proof = self._prover.consistency(anchored.checkpoint.size, head.size)
        return AnchoredCheckpoint(
            checkpoint=anchored.checkpoint.note,
            consistency=tuple(proof),
            section=anchored.section,
        )

    def _closure(self, subject: int, size: int) -> tuple[dict[int, bytes], dict[str, bytes]]:
        """Every entry below `size` that the subject rests on, and the manifests among them."""
        entries: dict[int, bytes] = {}
        blobs: dict[str, bytes] = {}
        todo = [subject]
        while todo:
            index = todo.pop()
            if index in entries or index >= size:
                continue
            if len(entries) == MAX_ENTRIES:
                raise TooLarge(f"the lineage has more than MAX_ENTRIES = {MAX_ENTRIES} entries")
            entries[index] = self._entry(index)
            entry = decode_entry(entries[index], verify=False)
            todo += self._neighbours(entry)
            if entry.envelope.type == "run.completed":
                name = entry.envelope.body["manifest_sha256"]
                blobs[name] = self._blobs.get(name)
                todo += self._contributions(blobs[name])
        return entries, blobs

    def _neighbours(self, entry: Entry) -> Iterator[int]:
        event = entry.envelope
        for name, kind, id in references(event.type, event.body):
            yield self._need(CREATES[kind], kind, id, f"entry {entry.index}, body.{name}")
        for event_type, kind in COMPANIONS.get(event.type, ()):
            found = self._index.first(event_type, kind, event.body[kind])
            if found is not None:
                yield found

    def _contributions(self, manifest: bytes) -> Iterator[int]:
        for id in parse_manifest(manifest).rows:
            yield self._need("contribution.recorded", "contribution", id, "a training manifest")

    def _need(self, event_type: str, kind: str, id: str, where: str) -> int:
        found = self._index.first(event_type, kind, id)
        if found is None:
            raise StorageError(f"{where} names {kind} {id}, but the log has no {event_type} of it")
        return found

    def _entry(self, index: int) -> bytes:
        entries = self._log.entries(index, index + 1)
        if not entries:
            raise StorageError(f"the event store has no entry {index}, though it is signed for")
        return entries[0]
