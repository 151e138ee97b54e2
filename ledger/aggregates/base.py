"""What every aggregate shares: signed envelopes as `eventsourcing` domain events.

An aggregate is a frozen dataclass with two class methods. `decide(state, event, world)` raises
unless the event may happen next; `evolve(state, event)` gives the state after it and never fails.
The stored state of an event *is* its envelope, byte for byte, so what was signed is what is kept.
This room does no I/O of its own: the library's recorder does, behind `Application`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar
from uuid import UUID

from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import Mapper, StoredEvent

from ledger.domain.envelope import Envelope, decode_envelope
from ledger.domain.events import CATALOGUE, stream_id, stream_of
from ledger.errors import Conflict, Forbidden, NotFound

OPERATOR, WORKER, GOVERNANCE = "operator", "worker", "governance"


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """State of one stream. `version` counts its events; `id` is `stream_id(kind, ...)`."""

    kind: ClassVar[str]

    id: UUID
    version: int = 0

    @classmethod
    def decide(cls, state: Self | None, event: Envelope, world: "World") -> None:
        raise NotImplementedError

    @classmethod
    def evolve(cls, state: Self | None, event: Envelope, id: UUID) -> Self:
        raise NotImplementedError


A = TypeVar("A", bound=Aggregate)


class World(Protocol):
    """What a decision may look at besides its own stream."""

    log: str
    operator: str

    def find(self, cls: type[A], *parts: object) -> A | None: ...

    def has_role(self, actor: str, role: str) -> bool: ...

    def is_new(self, cls: type["Aggregate"], *parts: object) -> bool: ...


def need(world: World, cls: type[A], *parts: object) -> A:
    found = world.find(cls, *parts)
    if found is None:
        named = " ".join(map(str, parts))
        raise NotFound(f"no {cls.kind} {named} is recorded in this ledger")
    return found


def need_role(world: World, event: Envelope, role: str) -> None:
    if not world.has_role(event.actor, role):
        raise Forbidden(f"{event.type} needs the role {role!r}, which {event.actor} does not have")


def refuse_existing(state: Aggregate | None, what: str) -> None:
    if state is not None:
        raise Conflict(f"{what} is already recorded; choose a new id")


def need_state(state: A | None, what: str) -> A:
    if state is None:
        raise NotFound(f"{what} is not recorded in this ledger")
    return state


def need_status(actual: str, allowed: tuple[str, ...], what: str) -> None:
    if actual not in allowed:
        raise Conflict(f"{what} is {actual}; this needs it to be {' or '.join(allowed)}")


@dataclass(frozen=True)
class Recorded:
    """A domain event of the `eventsourcing` library: an envelope at its place in a stream."""

    originator_id: UUID
    originator_version: int
    envelope: Envelope
    aggregate_class: type[Aggregate]

    def mutate(self, aggregate: Aggregate | None) -> Aggregate:
        state = self.aggregate_class.evolve(aggregate, self.envelope, self.originator_id)
        return replace(state, version=self.originator_version)


@dataclass(frozen=True)
class IdentifiedEvent(StoredEvent):
    """Carries the envelope's id beside it, so that nobody has to parse for it again."""

    event_id: UUID


class EnvelopeMapper(Mapper[UUID]):
    """Stored state = envelope bytes, topic = event type. No pickling, no cipher, no compression.

    `aggregates` maps the catalogue's aggregate names to classes.
    """

    def __init__(self, aggregates: Mapping[str, type[Aggregate]]) -> None:
        super().__init__(transcoder=None)  # type: ignore[arg-type]
        self._aggregates = aggregates

    def to_stored_event(self, domain_event: DomainEventProtocol[UUID]) -> StoredEvent:
        assert isinstance(domain_event, Recorded)
        return IdentifiedEvent(
            originator_id=domain_event.originator_id,
            originator_version=domain_event.originator_version,
            topic=domain_event.envelope.type,
            state=domain_event.envelope.raw,
            event_id=domain_event.envelope.id,
        )

    def to_domain_event(self, stored_event: StoredEvent) -> Any:
        assert isinstance(stored_event.originator_id, UUID)
        return Recorded(
            originator_id=stored_event.originator_id,
            originator_version=stored_event.originator_version,
            envelope=decode_envelope(stored_event.state),
            aggregate_class=self._aggregates[CATALOGUE[stored_event.topic].aggregate],
        )


def stream_of_event(event: Envelope) -> UUID:
    return stream_of(event.type, event.log, event.actor, event.body)


def stream_key(world_log: str, cls: type[Aggregate], parts: tuple[object, ...]) -> UUID:
    """Streams without a key of their own are one per ledger."""
    if not parts:
        return stream_id(cls.kind, world_log)
    return stream_id(cls.kind, *(str(p).lower() for p in parts))
