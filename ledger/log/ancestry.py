"""From some events to every entry that they rest on.

The walk goes level by level: the entries of a level are read together, what they name is looked up
together, and what is found is the next level. So it costs a few queries per level, however wide the
graph is. Its memory is bounded by MAX_ENTRIES and MAX_BUNDLE_BYTES; beyond them it stops with
TooLarge, for part of an ancestry proves nothing.

What rests on what: the references of `ledger.domain.events`, the contributions that a run's
training manifest names, and two tables below. NEEDS must be found; COMPANIONS, what else is known
about the same thing, may be missing. Nothing is trusted to be right: a bundle that would not verify
is a bug, and the tests verify every one that they assemble.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ledger.domain.envelope import Entry, decode_entry
from ledger.domain.events import CREATES, references
from ledger.errors import StorageError, TooLarge, Unavailable
from ledger.ports import BlobStore
from ledger.verify.bundle_format import MAX_BLOBS, MAX_BUNDLE_BYTES, MAX_ENTRIES
from ledger.verify.lineage import MAX_RUNS
from ledger.verify.manifest import parse_manifest

READ_BATCH = 1_000

Thing = tuple[str, str, str]
"""(event type, field, value): the first event of that type with that value in that body field;
the fields `actor` and `log` are the envelope's."""
Rule = tuple[str, str, str]
"""(event type, its field, our field): an event of that type whose field has the value of ours."""

_PERIOD: tuple[Rule, ...] = (("period.cutoff", "period", "period"),)
_CLOSED: tuple[Rule, ...] = (("period.closed", "period", "period"),)
_PROPOSED: tuple[Rule, ...] = (*_CLOSED, ("payout.proposed", "period", "period"))
_OPENED: tuple[Rule, ...] = (("ledger.opened", "log", "log"),)
_COMPLETED: tuple[Rule, ...] = (("run.completed", "run", "run"),)

NEEDS: Mapping[str, tuple[Rule, ...]] = {
    "datanet.closed": (("datanet.created", "datanet", "datanet"),),
    "period.closed": _PERIOD,
    "period.abandoned": _PERIOD,
    "payout.proposed": _PERIOD,
    "payout.activated": _PERIOD,
    "payout.vetoed": _PERIOD,
}
COMPANIONS: Mapping[str, tuple[Rule, ...]] = {
    "role.granted": _OPENED,
    "role.revoked": _OPENED,
    "fee_policy.set": _OPENED,
    "checkpoint.anchored": _OPENED,
    "identity.evm_bound": (("identity.registered", "actor", "actor"),),
    "contribution.recorded": (("contribution.approved", "contribution", "contribution"),),
    "run.requested": _COMPLETED,
    "adapter.published": _COMPLETED,
    "inference.recorded": (
        ("attribution.recorded", "inference", "inference"),
        ("fee.charged", "inference", "inference"),
    ),
    "fee.charged": (("fee_policy.set", "version", "policy_version"),),
    "deposit.recorded": (("identity.registered", "actor", "account"),),
    "period.abandoned": _CLOSED,
    "payout.proposed": _CLOSED,
    "payout.activated": _PROPOSED,
    "payout.vetoed": _PROPOSED,
}


@runtime_checkable
class EntryReader(Protocol):
    """The event store, read at many places at once."""

    def pick(self, indexes: Sequence[int]) -> list[bytes]:
        """Entry bytes of these indexes, ascending as given; StorageError when one is missing."""
        ...


class EventIndex(Protocol):
    """Where things are in the log. Answered from projected rows: as fresh as `position`."""

    def position(self) -> int:
        """How many events it knows, from the first on."""
        ...

    def firsts(self, wanted: Collection[Thing]) -> Mapping[Thing, int]:
        """Leaf indexes of those things that are known."""
        ...

    def bindings(self, account: str) -> list[int]:
        """The identity.evm_bound events that name this address (lower case)."""
        ...

    def settlements(self, before: int) -> list[int]:
        """Cut-offs, vetoes and abandonments of periods below this index: what moved money between
        earned and held."""
        ...

    def earnings(self, owners: Collection[str], before: int, limit: int) -> list[int]:
        """The first `limit` events below this index that gave these actors something, or made it
        wait: holds of their contributions, and the ends of these."""
        ...

    def claimed_period(self, account: str, cumulative_wei: int, before: int) -> int | None:
        """The newest period activated below this index that owed the address exactly so much."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ancestry:
    """Entries by leaf index, and the training manifests that they name."""

    entries: Mapping[int, bytes]
    blobs: Mapping[str, bytes]


@dataclass(kw_only=True)
class _Walk:
    """What was gathered so far; `size` bounds the indexes, `hint` says what to ask for instead."""

    reader: EntryReader
    index: EventIndex
    store: BlobStore
    size: int
    hint: str
    entries: dict[int, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    runs: int = 0
    weight: int = 0
    asked: set[Thing] = field(default_factory=set)

    def level(self, indexes: Collection[int]) -> set[int]:
        """Take these entries in; the indexes of what they name."""
        needs: dict[Thing, str] = {}
        wanted: set[Thing] = set()
        for entry in self.read(indexes):
            for thing in _needs(entry):
                needs.setdefault(thing, f"entry {entry.index} ({entry.envelope.type})")
            wanted |= set(_companions(entry))
            if entry.envelope.type == "run.completed":
                name = entry.envelope.body["manifest_sha256"]
                for contribution in self.manifest(name):
                    thing = ("contribution.recorded", "contribution", contribution)
                    needs.setdefault(thing, f"training manifest {name}")
        fresh = (wanted | needs.keys()) - self.asked
        self.asked |= fresh
        found = self.index.firsts(fresh)
        for thing in sorted(needs.keys() & fresh):
            if thing not in found:
                raise self.missing(thing, needs[thing])
        return set(found.values())

    def read(self, indexes: Collection[int]) -> Iterator[Entry]:
        fresh = sorted(n for n in indexes if n < self.size and n not in self.entries)
        self.check("entries", len(self.entries) + len(fresh), "MAX_ENTRIES", MAX_ENTRIES)
        for start in range(0, len(fresh), READ_BATCH):
            batch = fresh[start : start + READ_BATCH]
            for n, data in zip(batch, self.reader.pick(batch), strict=True):
                self.entries[n] = data
                self.weigh(data)
                yield decode_entry(data, verify=False)

    def manifest(self, name: str) -> Collection[str]:
        """The contributions that a training manifest names."""
        self.runs += 1
        self.check("training runs", self.runs, "MAX_RUNS", MAX_RUNS)
        if name not in self.blobs:
            self.check("training manifests", len(self.blobs) + 1, "MAX_BLOBS", MAX_BLOBS)
            self.blobs[name] = self.store.get(name)
            self.weigh(self.blobs[name])
        return parse_manifest(self.blobs[name]).rows

    def weigh(self, data: bytes) -> None:
        """Base64 alone is four bytes for three: what is over now only grows."""
        self.weight += len(data) * 4 // 3
        self.check("bytes", self.weight, "MAX_BUNDLE_BYTES", MAX_BUNDLE_BYTES)

    def check(self, what: str, count: int, name: str, limit: int) -> None:
        if count > limit:
            raise TooLarge(f"the lineage has more than {name} = {limit} {what}: {self.hint}")

    def missing(self, thing: Thing, where: str) -> Exception:
        event_type, name, value = thing
        position = self.index.position()
        if position < self.size:
            return Unavailable(
                f"{where} rests on the {event_type} of {name} {value}, which is not projected yet "
                f"(the projections are at {position} of {self.size}); retry in a second"
            )
        return StorageError(
            f"{where} names {name} {value}, but the log has no {event_type} of it: run "
            "`tributary audit`"
        )


def gather(
    start: Collection[int],
    *,
    size: int,
    reader: EntryReader,
    index: EventIndex,
    blobs: BlobStore,
    hint: str,
) -> Ancestry:
    """The entries at `start` and everything below `size` that they rest on.

    Raises TooLarge with `hint` beyond a limit of the format, Unavailable while the projections are
    behind, StorageError when the store lost something.
    """
    walk = _Walk(reader=reader, index=index, store=blobs, size=size, hint=hint)
    level = set(start)
    while level:
        level = walk.level(level) - walk.entries.keys()
        level = {n for n in level if n < size}
    return Ancestry(entries=walk.entries, blobs=walk.blobs)


def _needs(entry: Entry) -> Iterator[Thing]:
    event = entry.envelope
    for _, kind, id in references(event.type, event.body):
        yield CREATES[kind], kind, id
    for event_type, name, ours in NEEDS.get(event.type, ()):
        yield event_type, name, _value(entry, ours)


def _companions(entry: Entry) -> Iterator[Thing]:
    for event_type, name, ours in COMPANIONS.get(entry.envelope.type, ()):
        yield event_type, name, _value(entry, ours)


def _value(entry: Entry, name: str) -> str:
    event = entry.envelope
    if name in ("actor", "log"):
        return event.actor if name == "actor" else event.log
    return str(event.body[name])
