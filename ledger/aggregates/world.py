"""What decisions see: the aggregates as they stand, and on top the effects of what was decided.

Three readers of the event store, from exact to cheap:

- `View` belongs to the one thread that commits. It knows for which size of the log its states
  hold; events decided on it are stored only at that size, so every decision rests on exactly what
  is in the log, also when other processes append to it.
- `Reader` serves everybody else, and reads what is new before it answers.
- `View.peek` is a guess without any reading, good enough to decide whether an expensive check is
  worth its while.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any
from uuid import UUID

from eventsourcing.persistence import ApplicationRecorder, PersistenceError, StoredEvent

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
from ledger.aggregates.governance import Governance
from ledger.domain.envelope import Envelope
from ledger.domain.events import CATALOGUE
from ledger.errors import Conflict, Forbidden, StorageError

CACHED_AGGREGATES = 10_000
MAX_CATCH_UP = 2_000
"""Events of others that are looked at one by one; after more than these all states are reloaded."""

Load = Callable[[UUID], Aggregate | None]
States = dict[UUID, Aggregate | None]


class World:
    """One append's view: what `load` gives, and the effects of its own events so far."""

    def __init__(
        self, log: str, operator: str, load: Load, aggregates: Mapping[str, type[Aggregate]]
    ) -> None:
        self.log = log
        self.operator = operator
        self.changed: dict[UUID, Aggregate] = {}
        self._load = load
        self._aggregates = aggregates
        self._created: set[UUID] = set()

    def find(self, cls: type[A], *parts: object) -> A | None:
        found = self._state(stream_key(self.log, cls, parts))
        assert found is None or isinstance(found, cls)
        return found

    def has_role(self, actor: str, role: str) -> bool:
        governance = self.find(Governance)
        return governance is not None and governance.has_role(actor, role)

    def is_new(self, cls: type[Aggregate], *parts: object) -> bool:
        """Whether the aggregate was created by an event of this very append."""
        return stream_key(self.log, cls, parts) in self._created

    def apply(self, event: Envelope) -> Recorded:
        """Decide on one event; what is decided next sees its effect."""
        cls = self._aggregates[CATALOGUE[event.type].aggregate]
        if event.type != "ledger.opened" and self.find(Governance) is None:
            raise Conflict("this ledger is not open yet; the operator opens it first")
        self._refuse_reserved_id(event)
        stream = stream_of_event(event)
        state: Any = self._state(stream)
        cls.decide(state, event, self)
        recorded = Recorded(stream, state.version + 1 if state else 1, event, cls)
        self.changed[stream] = recorded.mutate(state)
        if state is None:
            self._created.add(stream)
        return recorded

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

    def _state(self, stream: UUID) -> Aggregate | None:
        return self.changed[stream] if stream in self.changed else self._load(stream)


class Streams:
    """Aggregates from their stored events. Raises StorageError."""

    def __init__(self, recorder: ApplicationRecorder, mapper: EnvelopeMapper) -> None:
        self._recorder = recorder
        self._mapper = mapper

    def load(self, stream: UUID, since: Aggregate | None = None) -> Aggregate | None:
        """The present state; `since` is an earlier one, from which on is read."""
        with _storage_errors():
            stored = self._recorder.select_events(stream, gt=since.version if since else None)
        return self._replay(since, stored)

    def load_all(self, streams: Sequence[UUID]) -> States:
        """Several, in one query where the recorder knows how."""
        select = getattr(self._recorder, "select_streams", None)
        if select is None:
            return {stream: self.load(stream) for stream in streams}
        found: States = dict.fromkeys(streams)
        with _storage_errors():
            stored: Iterable[StoredEvent] = select(streams)
        for event in stored:
            assert isinstance(event.originator_id, UUID)
            found[event.originator_id] = self._replay(found[event.originator_id], [event])
        return found

    def size(self) -> int:
        with _storage_errors():
            return self._recorder.max_notification_id() or 0

    def touched(self, start: int, stop: int) -> set[Any]:
        """The streams of entries [start, stop)."""
        with _storage_errors():
            stored = self._recorder.select_notifications(start + 1, stop - start, stop)
        return {notification.originator_id for notification in stored}

    def _replay(self, state: Aggregate | None, stored: Iterable[StoredEvent]) -> Aggregate | None:
        for event in stored:
            state = self._mapper.to_domain_event(event).mutate(state)
        return state


@contextmanager
def _storage_errors() -> Any:
    try:
        yield
    except PersistenceError as error:
        raise StorageError(f"the event store failed: {error}; retry") from error


class View:
    """States as they are at `size` entries, and on top those that the present transaction would
    lead to. One thread's own, but for `peek`."""

    def __init__(self, streams: Streams) -> None:
        self.size: int | None = None
        self._streams = streams
        self._states: OrderedDict[UUID, Aggregate | None] = OrderedDict()
        self._undecided: dict[UUID, Aggregate] = {}

    def begin(self, streams: Sequence[UUID]) -> None:
        """A new transaction, which will need `streams`. One before it that was not kept is
        forgotten, and what it would have changed is read again: it may have failed because of it.
        """
        for stream in self._undecided:
            self._states.pop(stream, None)
        self._undecided.clear()
        while len(self._states) > CACHED_AGGREGATES:
            self._states.popitem(last=False)
        if self.size is None:
            self.catch_up()
        unknown = [stream for stream in dict.fromkeys(streams) if stream not in self._states]
        if unknown:
            self._states.update(self._streams.load_all(unknown))

    def load(self, stream: UUID) -> Aggregate | None:
        if stream in self._undecided:
            return self._undecided[stream]
        if stream not in self._states:
            self._states[stream] = self._streams.load(stream)
        self._states.move_to_end(stream)
        return self._states[stream]

    def add(self, changed: Mapping[UUID, Aggregate]) -> None:
        """Decided, not yet stored."""
        self._undecided.update(changed)

    def keep(self, size: int) -> None:
        """What was added is stored now; the log has `size` entries."""
        self._states.update(self._undecided)
        self._undecided.clear()
        self.size = size

    def catch_up(self) -> None:
        """Forget what others have changed since `size`."""
        size = self._streams.size()
        if self.size is None or not self.size <= size <= self.size + MAX_CATCH_UP:
            self._states.clear()
        else:
            for stream in self._streams.touched(self.size, size):
                self._states.pop(stream, None)
        self.size = size

    def peek(self, stream: UUID) -> Aggregate | None:
        """What is known without reading; any thread may ask."""
        return self._states.get(stream)


class Reader:
    """Present states for any thread."""

    def __init__(self, streams: Streams, view: View) -> None:
        self._streams = streams
        self._view = view
        self._lock = Lock()
        self._states: OrderedDict[UUID, Aggregate] = OrderedDict()

    def load(self, stream: UUID) -> Aggregate | None:
        known = max(
            filter(None, (self._view.peek(stream), self._states.get(stream))),
            key=lambda state: state.version,
            default=None,
        )
        state = self._streams.load(stream, known)
        if state is not None:
            with self._lock:
                self._states[stream] = state
                self._states.move_to_end(stream)
                if len(self._states) > CACHED_AGGREGATES:
                    self._states.popitem(last=False)
        return state
