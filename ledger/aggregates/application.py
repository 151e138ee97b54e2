"""The application: the one way into the ledger.

`append` takes signed envelope bytes, checks signature and body, asks the event's aggregate whether
it may happen next, and stores it. Several envelopes given together are stored together or not at
all. Facts outside the ledger (is the rows blob there, did the EVM key sign) are checked by `gates`
that the bootstrap hands in, by event type.

Concurrency: two writers that decide on the same version of a stream collide on the store's unique
key; the loser reloads and decides again, at most MAX_DECISIONS times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.persistence import InfrastructureFactory, IntegrityError, PersistenceError
from eventsourcing.utils import Environment

from ledger.aggregates.base import (
    OPERATOR,
    WORKER,
    A,
    Aggregate,
    EnvelopeMapper,
    Recorded,
    stream_key,
    stream_of_event,
)
from ledger.aggregates.datanets import Contribution, Datanet
from ledger.aggregates.governance import Governance, Identity
from ledger.aggregates.inferences import Account, Inference
from ledger.aggregates.periods import Anchors, Claims, Periods
from ledger.aggregates.runs import Adapter, Run
from ledger.domain.envelope import (
    Envelope,
    decode_entry,
    encode_entry,
    leaf_hash,
    parse_envelope,
)
from ledger.domain.events import CATALOGUE, check_body
from ledger.errors import Conflict, Forbidden, InvalidEvent, LedgerError, NotFound, StorageError

MAX_DECISIONS = 8
MAX_EVENTS_PER_APPEND = 500
MAX_CLOCK_SKEW_US = 300 * 1_000_000
CACHED_AGGREGATES = 10_000
MAX_NAMED = 20
"""Events of a batch that a refusal names."""

Gate = Callable[[Envelope], None]

_CLASSES: tuple[type[Aggregate], ...] = (
    Governance, Identity, Datanet, Contribution, Run, Adapter,
    Inference, Account, Periods, Claims, Anchors,
)  # fmt: skip
AGGREGATES: Mapping[str, type[Aggregate]] = {cls.kind: cls for cls in _CLASSES}


@dataclass(frozen=True, kw_only=True)
class Appended:
    """Where an event stands: `index` is its leaf index, `recorded_at` the time in its log entry
    (us), `leaf_hash` the entry's. `replayed`: it stood there before, to the byte."""

    index: int
    recorded_at: int
    leaf_hash: bytes
    envelope: Envelope
    replayed: bool = False


class Ledger(Application[UUID]):
    """`factory` is the `eventsourcing` infrastructure (which recorder, which database); without
    one the library's own in-memory recorder serves. `entry_of` finds the log entry of an event by
    the event's id."""

    def __init__(
        self,
        *,
        log: str,
        operator: str,
        clock: Callable[[], int],
        entry_of: Callable[[str], bytes | None],
        gates: Mapping[str, Gate] | None = None,
        factory: InfrastructureFactory[Any] | None = None,
    ) -> None:
        self._given_factory = factory
        # Aggregates are immutable, so the cache hands them out without copying.
        settings = {
            "AGGREGATE_CACHE_MAXSIZE": str(CACHED_AGGREGATES),
            "DEEPCOPY_FROM_AGGREGATE_CACHE": "n",
        }
        super().__init__(settings)
        self.log_origin = log
        self.operator = operator
        self._clock = clock
        self._entry_of = entry_of
        self._gates = dict(gates or {})

    def construct_factory(self, env: Environment) -> InfrastructureFactory[Any]:
        return self._given_factory or super().construct_factory(env)

    def construct_mapper(self) -> EnvelopeMapper:
        return EnvelopeMapper(AGGREGATES)

    def append(self, raw: bytes) -> Appended:
        """Verify, decide and store one event. The very same bytes again are a success, and stored
        once. Raises InvalidEvent, Forbidden, NotFound, Conflict, PaymentRequired, Backpressure or
        StorageError; then nothing was stored."""
        return self.append_all([raw])[0]

    def append_all(self, raws: Sequence[bytes]) -> list[Appended]:
        """The same for several events that must be stored together, in this order."""
        if not 0 < len(raws) <= MAX_EVENTS_PER_APPEND:
            raise InvalidEvent(f"append 1 to {MAX_EVENTS_PER_APPEND} events at a time")
        events = self._check_all(raws)
        for _ in range(MAX_DECISIONS):
            try:
                return self._store(events)
            except IntegrityError as error:
                # Either another writer was quicker on a stream: decide again on its new state.
                # Or an event id is taken: deciding again cannot help.
                stored = self._replayed(events, error)
                if stored is not None:
                    return stored
            except PersistenceError as error:
                raise StorageError(f"the event store failed: {error}; retry") from error
            except LedgerError as error:
                # A repeated event mostly fails some other rule first; say that it is a repetition.
                stored = self._replayed(events, error)
                if stored is not None:
                    return stored
                raise
        raise Conflict("other writers kept changing the same things; reload and try again")

    def load(self, cls: type[A], *parts: object) -> A | None:
        """The present state of an aggregate, or None."""
        return _World(self, self.log_origin, self.operator).find(cls, *parts)

    def need(self, cls: type[A], *parts: object) -> A:
        found = self.load(cls, *parts)
        if found is None:
            raise NotFound(f"no {cls.kind} {' '.join(map(str, parts))} is recorded in this ledger")
        return found

    def _check_all(self, raws: Sequence[bytes]) -> list[Envelope]:
        events = [self._check(raw) for raw in raws]
        if len({event.id for event in events}) != len(events):
            raise InvalidEvent("two events of one append have the same id", field="id")
        return events

    def _check(self, raw: bytes) -> Envelope:
        event = parse_envelope(raw, log=self.log_origin)
        check_body(event.type, event.body)
        return event

    def _store(self, events: Sequence[Envelope]) -> list[Appended]:
        if max(event.at for event in events) > self._clock() + MAX_CLOCK_SKEW_US:
            raise InvalidEvent("at lies in the future; set the signer's clock", field="at")
        world = _World(self, self.log_origin, self.operator)
        pending = [world.apply(event) for event in events]
        # Gates read blobs and check foreign signatures: only for what the rules allow.
        for event in events:
            gate = self._gates.get(event.type)
            if gate:
                gate(event)
        ids = self.recorder.insert_events([self.mapper.to_stored_event(p) for p in pending])
        assert ids is not None
        world.remember()
        # Recorders of the library keep no time.
        recorded_at = getattr(ids, "recorded_at", None) or self._clock()
        return [
            _appended(encode_entry(id - 1, recorded_at, event.raw), event)
            for id, event in zip(ids, events, strict=True)
        ]

    def _replayed(self, events: Sequence[Envelope], cause: Exception) -> list[Appended] | None:
        """Where the events stand if all of them are in the log, to the byte; None if none is.

        Raises Conflict when some are, or when an id belongs to other bytes. `replayed` in its
        detail names the first event of the same actor and type: only then may a sender take the
        refusal of a repetition, signed anew, for success.
        """
        entries = [self._entry_of(str(event.id)) for event in events]
        found = [(event, entry) for event, entry in zip(events, entries, strict=True) if entry]
        for event, entry in found:
            stored = decode_entry(entry, verify=False)
            before = stored.envelope
            if (before.actor, before.type) != (event.actor, event.type):
                raise Conflict(
                    f"the id {event.id} is that of another event, at index {stored.index}: "
                    "choose another",
                    index=stored.index,
                ) from cause
            if len(found) < len(events) or before.raw != event.raw:
                raise Conflict(
                    f"event {event.id} is recorded already, at index {stored.index}"
                    + _among(found, events),
                    replayed=str(event.id),
                    index=stored.index,
                ) from cause
        return [_appended(entry, event, replayed=True) for event, entry in found] or None


def _among(found: Sequence[tuple[Envelope, bytes]], events: Sequence[Envelope]) -> str:
    """Which events of a batch are in the log, where it says more than the first one's id."""
    if len(events) == 1:
        return ""
    places = {event.id: n for n, event in enumerate(events, 1)}
    named = ", ".join(str(places[event.id]) for event, _ in found[:MAX_NAMED])
    more = ", ..." if len(found) > MAX_NAMED else ""
    return f"; of these {len(events)} events, the log has number {named}{more}: leave them out"


def _appended(entry: bytes, event: Envelope, *, replayed: bool = False) -> Appended:
    return Appended(
        index=int.from_bytes(entry[:8], "big"),
        recorded_at=int.from_bytes(entry[8:16], "big"),
        leaf_hash=leaf_hash(entry),
        envelope=event,
        replayed=replayed,
    )


class _World:
    """What decisions see: stored aggregates, and on top the effects of events not yet stored."""

    def __init__(self, ledger: Ledger, log: str, operator: str) -> None:
        self.log = log
        self.operator = operator
        self._ledger = ledger
        self._seen: dict[UUID, Aggregate | None] = {}
        self._created: set[UUID] = set()

    def find(self, cls: type[A], *parts: object) -> A | None:
        found = self._load(stream_key(self.log, cls, parts))
        assert found is None or isinstance(found, cls)
        return found

    def has_role(self, actor: str, role: str) -> bool:
        governance = self.find(Governance)
        return governance is not None and governance.has_role(actor, role)

    def apply(self, event: Envelope) -> Recorded:
        """Decide on one event; what is decided next sees its effect."""
        cls = AGGREGATES[CATALOGUE[event.type].aggregate]
        if event.type != "ledger.opened" and self.find(Governance) is None:
            raise Conflict("this ledger is not open yet; the operator opens it first")
        self._refuse_reserved_id(event)
        stream = stream_of_event(event)
        state: Any = self._load(stream)
        cls.decide(state, event, self)
        recorded = Recorded(stream, state.version + 1 if state else 1, event, cls)
        self._seen[stream] = recorded.mutate(state)
        if state is None:
            self._created.add(stream)
        return recorded

    def is_new(self, cls: type[Aggregate], *parts: object) -> bool:
        """Whether the aggregate was created by an event of this very append."""
        return stream_key(self.log, cls, parts) in self._created

    def remember(self) -> None:
        """After the events were stored: the states they led to need no replay next time."""
        for stream, state in self._seen.items():
            self._cache(stream, state)

    def _cache(self, stream: UUID, state: Aggregate | None) -> None:
        # The library fills its cache on a miss only and counts on aggregates that change in place.
        # Ours do not: without this every load would replay all that came since the first.
        cache = self._ledger.repository.cache
        if cache is not None and state is not None:
            cache.put(stream, state)

    def _refuse_reserved_id(self, event: Envelope) -> None:
        """Ids of version 5 are functions of what they stand for (one fee per inference, one event
        per chain log): anyone can compute them, so only the ledger's own actors may use them."""
        if event.id.version == 5 and not any(
            self.has_role(event.actor, role) for role in (OPERATOR, WORKER)
        ):
            raise Forbidden(
                "event ids of version 5 are kept for the ledger's own events; "
                "use a random UUID (version 4)",
                field="id",
            )

    def _load(self, stream: UUID) -> Aggregate | None:
        if stream not in self._seen:
            try:
                self._seen[stream] = self._ledger.repository.get(stream)
                self._cache(stream, self._seen[stream])
            except AggregateNotFoundError:
                self._seen[stream] = None
            except PersistenceError as error:
                raise StorageError(f"the event store failed: {error}; retry") from error
        return self._seen[stream]
