"""The application: the one way into the ledger.

`append` takes signed envelope bytes, checks signature and body, asks the event's aggregate whether
it may happen next, and stores it. Several envelopes given together are stored together or not at
all. Facts outside the ledger (is the rows blob there, did the EVM key sign) are checked by `gates`
that the bootstrap hands in, by event type; a gate reads blobs and checks foreign signatures, so it
is asked only about what the rules seem to allow.

The way of an append, and where each part runs:

1. `check`: form, signature, body. The caller's thread; nothing is read.
2. `pass_gates`, for types that have one. The caller's thread; it may take its time.
3. `ask`: queued for the one thread that decides and commits (`ledger.log.appender`). Whatever
   waits there is decided in order, on one view, and stored in one transaction: only if the log
   still has the size that the view is of. So nothing another process appends is overlooked.
4. `placed`: where the events stand now. Or `settle`, when they were refused: the very same bytes
   may be in the log already, and that is a success.

`append` is all four; a caller that must not block (an event loop) takes them one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.persistence import (
    ApplicationRecorder,
    InfrastructureFactory,
    IntegrityError,
    PersistenceError,
    StoredEvent,
)
from eventsourcing.utils import Environment

from ledger.aggregates.base import A, Aggregate, EnvelopeMapper, stream_of_event
from ledger.aggregates.datanets import Contribution, Datanet
from ledger.aggregates.governance import Governance, Identity
from ledger.aggregates.inferences import Account, Inference
from ledger.aggregates.periods import Anchors, Claims, Periods
from ledger.aggregates.runs import Adapter, Run
from ledger.aggregates.world import Load, Reader, Streams, View, World
from ledger.domain.envelope import (
    Envelope,
    decode_entry,
    encode_entry,
    leaf_hash,
    parse_envelope,
)
from ledger.domain.events import check_body
from ledger.errors import (
    Backpressure,
    Conflict,
    InvalidEvent,
    LedgerError,
    NotFound,
    StorageError,
    Unavailable,
)

MAX_DECISIONS = 8
MAX_EVENTS_PER_APPEND = 500
MAX_CLOCK_SKEW_US = 300 * 1_000_000
MAX_NAMED = 20
"""Events of a batch that a refusal names."""

Gate = Callable[[Sequence[Envelope]], None]
"""Gets all events of its type in one append; raises what is wrong with them."""
Ids = Sequence[int]
"""Notification ids, one more than leaf indexes."""

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


class Queue(Protocol):
    """Where appends are decided and committed: `GroupCommit`, or `_OneByOne`."""

    def ask(
        self, asked: Sequence[Envelope], *, count: int, size_bytes: int
    ) -> "Future[Ids | None]": ...


class Ledger(Application[UUID]):
    """`factory` is the `eventsourcing` infrastructure (which recorder, which database); without
    one the library's own in-memory recorder serves. `entries_of` finds log entries by the ids of
    their events."""

    def __init__(
        self,
        *,
        log: str,
        operator: str,
        clock: Callable[[], int],
        entries_of: Callable[[Sequence[UUID]], Mapping[UUID, bytes]],
        gates: Mapping[str, Gate] | None = None,
        factory: InfrastructureFactory[Any] | None = None,
    ) -> None:
        self._given_factory = factory
        super().__init__()
        self.log_origin = log
        self.operator = operator
        self._clock = clock
        self._entries_of = entries_of
        self._gates = dict(gates or {})
        assert isinstance(self.mapper, EnvelopeMapper)
        streams = Streams(self.recorder, self.mapper)
        self._view = View(streams)
        self._reader = Reader(streams, self._view)
        decider = Decider(self._view, self._world, self.mapper)
        # A recorder that groups commits decides where it commits.
        decide_with = getattr(self.recorder, "decide_with", None)
        self._queue: Queue = (
            decide_with(decider) if decide_with else _OneByOne(self.recorder, decider)
        )

    def construct_factory(self, env: Environment) -> InfrastructureFactory[Any]:
        return self._given_factory or super().construct_factory(env)

    def construct_mapper(self) -> EnvelopeMapper:
        return EnvelopeMapper(AGGREGATES)

    # --- the whole way ------------------------------------------------------------------------

    def append(self, raw: bytes) -> Appended:
        """Verify, decide and store one event. The very same bytes again are a success, and stored
        once. Raises InvalidEvent, Forbidden, NotFound, Conflict, PaymentRequired, Backpressure or
        StorageError; then nothing was stored."""
        return self.append_all([raw])[0]

    def append_all(self, raws: Sequence[bytes]) -> list[Appended]:
        """The same for several events that must be stored together, in this order."""
        return self.append_checked(self.check(raws))

    def append_checked(self, events: Sequence[Envelope]) -> list[Appended]:
        for _ in range(MAX_DECISIONS):
            try:
                self.pass_gates(events)
                return self.placed(events, self.ask(events).result())
            except (LedgerError, PersistenceError) as error:
                stored = self.settle(events, error)
                if stored is not None:
                    return stored
        raise Conflict("other writers kept changing the same things; reload and try again")

    def load(self, cls: type[A], *parts: object) -> A | None:
        """The present state of an aggregate, or None."""
        return self._world(self._reader.load).find(cls, *parts)

    def need(self, cls: type[A], *parts: object) -> A:
        found = self.load(cls, *parts)
        if found is None:
            raise NotFound(f"no {cls.kind} {' '.join(map(str, parts))} is recorded in this ledger")
        return found

    # --- step by step -------------------------------------------------------------------------

    def check(self, raws: Sequence[bytes]) -> list[Envelope]:
        """Form, signature and body of each. Reads nothing. Raises InvalidEvent."""
        if not 0 < len(raws) <= MAX_EVENTS_PER_APPEND:
            raise InvalidEvent(f"append 1 to {MAX_EVENTS_PER_APPEND} events at a time")
        events = [self._check(raw) for raw in raws]
        if len({event.id for event in events}) != len(events):
            raise InvalidEvent("two events of one append have the same id", field="id")
        return events

    def gated(self, events: Sequence[Envelope]) -> bool:
        """Whether `pass_gates` has anything to do, and may block."""
        return any(event.type in self._gates for event in events)

    def pass_gates(self, events: Sequence[Envelope]) -> None:
        """Ask the gates about events that the rules seem to allow; what the rules refuse for sure
        is refused here. The decision that counts is made when the events are committed."""
        if not self.gated(events):
            return
        try:
            self._rehearse(events, self._view.peek)
        except LedgerError:
            self._rehearse(events, self._reader.load)
        for name, gate in self._gates.items():
            mine = [event for event in events if event.type == name]
            if mine:
                gate(mine)

    def ask(self, events: Sequence[Envelope]) -> "Future[Ids | None]":
        """Queue checked events, whose gates are passed, to be decided and stored together."""
        if max(event.at for event in events) > self._clock() + MAX_CLOCK_SKEW_US:
            raise InvalidEvent("at lies in the future; set the signer's clock", field="at")
        size_bytes = sum(len(event.raw) for event in events)
        return self._queue.ask(events, count=len(events), size_bytes=size_bytes)

    def placed(self, events: Sequence[Envelope], ids: Ids | None) -> list[Appended]:
        """Where events stand that were stored with these ids."""
        assert ids is not None
        # Recorders of the library keep no time.
        recorded_at = getattr(ids, "recorded_at", None) or self._clock()
        return [
            _appended(encode_entry(id - 1, recorded_at, event.raw), event)
            for id, event in zip(ids, events, strict=True)
        ]

    def settle(self, events: Sequence[Envelope], error: Exception) -> list[Appended] | None:
        """What to answer when `pass_gates` or `ask` failed with `error`. Reads the store.

        Where the events stand if all of them are in the log, to the byte: a repeated event mostly
        breaks some other rule first. None when they should be asked again, another writer having
        been quicker. Raises Conflict when the log has some of them, or an id belongs to other
        bytes; else `error`, as a LedgerError.
        """
        if isinstance(error, Backpressure | Unavailable):
            raise error
        if isinstance(error, PersistenceError) and not isinstance(error, IntegrityError):
            raise StorageError(f"the event store failed: {error}; retry") from error
        stored = self._replayed(events, error)
        if stored is None and not isinstance(error, IntegrityError):
            raise error
        return stored

    # --- parts --------------------------------------------------------------------------------

    def _check(self, raw: bytes) -> Envelope:
        event = parse_envelope(raw, log=self.log_origin)
        check_body(event.type, event.body)
        return event

    def _world(self, load: Load) -> World:
        return World(self.log_origin, self.operator, load, AGGREGATES)

    def _rehearse(self, events: Sequence[Envelope], load: Load) -> None:
        world = self._world(load)
        for event in events:
            world.apply(event)

    def _replayed(self, events: Sequence[Envelope], cause: Exception) -> list[Appended] | None:
        """Where the events stand if all of them are in the log, to the byte; None if none is.

        Raises Conflict when some are, or when an id belongs to other bytes. `replayed` in its
        detail names the first event of the same actor and type: only then may a sender take the
        refusal of a repetition, signed anew, for success.
        """
        entries = self._entries_of([event.id for event in events])
        found = [(event, entries[event.id]) for event in events if event.id in entries]
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


class Decider:
    """Turns what is asked into events to store. Used by the committing thread alone, which calls
    `begin`, `decide` for each ask, then `keep` once they are stored; or `begin` again."""

    def __init__(self, view: View, world: Callable[[Load], World], mapper: EnvelopeMapper) -> None:
        self._view = view
        self._world = world
        self._mapper = mapper

    def begin(self, asked: Sequence[Sequence[Envelope]]) -> int:
        """A new transaction; the size of the log that its decisions hold for."""
        self._view.begin([stream_of_event(event) for events in asked for event in events])
        assert self._view.size is not None
        return self._view.size

    def decide(self, asked: Sequence[Envelope]) -> list[StoredEvent]:
        """The events to store. Raises what is wrong with them; then none has had an effect."""
        world = self._world(self._view.load)
        chosen = [self._mapper.to_stored_event(world.apply(event)) for event in asked]
        self._view.add(world.changed)
        return chosen

    def keep(self, size: int) -> None:
        """All that was decided is stored; the log has `size` entries now."""
        self._view.keep(size)

    def catch_up(self) -> bool:
        """Learn what others have appended; whether there was anything."""
        before = self._view.size
        self._view.catch_up()
        return self._view.size != before


class _OneByOne:
    """A queue for recorders that group nothing: each ask is decided and stored at once."""

    def __init__(self, recorder: ApplicationRecorder, decider: Decider) -> None:
        self._recorder = recorder
        self._decider = decider
        self._lock = Lock()

    def ask(
        self, asked: Sequence[Envelope], *, count: int, size_bytes: int
    ) -> "Future[Ids | None]":
        done: Future[Ids | None] = Future()
        with self._lock:
            try:
                done.set_result(self._store(asked))
            except Exception as error:
                done.set_exception(error)
        return done

    def _store(self, asked: Sequence[Envelope]) -> Ids:
        for _ in range(MAX_DECISIONS):
            size = self._decider.begin([asked])
            try:
                chosen = self._decider.decide(asked)
            except LedgerError:
                if self._decider.catch_up():
                    continue
                raise
            ids = self._recorder.insert_events(chosen, expected_size=size)
            if ids is not None:
                self._decider.keep(ids[-1])
                return ids
            self._decider.catch_up()
        raise Conflict("other writers kept appending; retry")


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
