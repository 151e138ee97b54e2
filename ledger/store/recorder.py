"""The one writer of events: a gap-free recorder for the `eventsourcing` library.

Rows are added by a single call of the SQL function append_events (0003.append-at-a-size), in
autocommit: it takes the row lock of log_head, gives out the next indexes, stores leaf hashes in
the same rows, notifies. Hence notification ids are dense, in commit order, and a reader that has
seen n has seen everything up to n. The library's stock recorder has gaps after conflicts, and
hangs in pipeline mode on large inserts.

When the connection is lost while a call runs, nobody knows whether it was committed. The call is
repeated; if it now conflicts and the rows stored are exactly ours, the first one was committed,
and that is success, not a conflict.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg
from eventsourcing.persistence import (
    ApplicationRecorder,
    DataError,
    IntegrityError,
    InterfaceError,
    NotSupportedError,
    OperationalError,
    StoredEvent,
    Subscription,
)
from eventsourcing.postgres import (
    ConnectionPool,
    PostgresApplicationRecorder,
    PostgresDatastore,
    PostgresFactory,
    PostgresSubscription,
)
from eventsourcing.utils import Environment
from psycopg import Connection
from psycopg.rows import DictRow, dict_row

from ledger.errors import Conflict, StorageError
from ledger.store.postgres import first_line, make_durable

TABLE = "stored_events"
SNAPSHOT_TABLE_PREFIX = "stored_"
MAX_OUTAGE_S = 15.0
RETRY_WAIT_S = 0.2
CONNECT_TIMEOUT_S = 3.0
LISTEN_POLL_S = 0.5
STOP_POLL_S = 0.1
POOL_SIZE = 2
MAX_POOL_SIZE = 16

Clock = Callable[[], int]
EventIdOf = Callable[[StoredEvent], UUID | None]
Decorate = Callable[[ApplicationRecorder], ApplicationRecorder]


class StaleVersion(IntegrityError, Conflict):
    """Another writer stored that version of the stream first: reload and decide again."""


class ReplayedEvent(IntegrityError, Conflict):
    """An event with that id is in the log: deciding again cannot help."""


class StoreUnavailable(OperationalError, StorageError):
    """PostgreSQL stayed away for MAX_OUTAGE_S: the fate of the append is unknown."""


class Placed(list[int]):
    """Notification ids (leaf index + 1) of events stored together; `recorded_at` is when, in us.
    Slices keep it."""

    def __init__(self, ids: Iterable[int], recorded_at: int) -> None:
        super().__init__(ids)
        self.recorded_at = recorded_at

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return Placed(found, self.recorded_at) if isinstance(at, slice) else found


def system_clock() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def envelope_id(event: StoredEvent) -> UUID:
    """The id that the event carries beside it, else the one inside the envelope (whose form was
    checked before it came here)."""
    known: UUID | None = getattr(event, "event_id", None)
    return known or UUID(json.loads(event.state)["id"])


class GapFreeRecorder(PostgresApplicationRecorder):
    """`event_id_of` gives the id that may occur only once, or None where there is none."""

    def __init__(
        self,
        datastore: PostgresDatastore,
        *,
        events_table_name: str = TABLE,
        clock: Clock = system_clock,
        event_id_of: EventIdOf = lambda event: None,
    ) -> None:
        if events_table_name != TABLE:
            raise NotSupportedError(f"events live in {TABLE}, not in {events_table_name}")
        super().__init__(datastore, events_table_name=events_table_name)
        self._clock = clock
        self._event_id_of = event_id_of

    def create_table(self) -> None:
        raise NotSupportedError("tables come from migrations/: set CREATE_TABLE=n")

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Placed | None:
        """Store all or none. Raises StaleVersion or ReplayedEvent.

        With `expected_size` (entries of the log that the caller has seen) None is the answer, and
        nothing was stored, when the log has another size by now.

        StoreUnavailable means that PostgreSQL did not come back: repeating the same call later is
        safe, since events already stored are refused as what they are.
        """
        if not stored_events:
            return None
        event_ids = [self._event_id_of(event) for event in stored_events]
        expected_size: int | None = kwargs.get("expected_size")
        in_doubt = False
        deadline = time.monotonic() + MAX_OUTAGE_S
        while True:
            try:
                try:
                    stored = self._append(stored_events, event_ids, expected_size)
                    if stored is None and in_doubt:
                        return self._stored_as(stored_events, event_ids)
                    return stored
                except IntegrityError:
                    stored = self._stored_as(stored_events, event_ids) if in_doubt else None
                    if stored is None:
                        raise
                    return stored
            except (OperationalError, InterfaceError) as error:
                in_doubt = True
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"PostgreSQL did not come back within {MAX_OUTAGE_S:.0f} s "
                        f"({first_line(error)}): retry the same append"
                    ) from error
            time.sleep(RETRY_WAIT_S)
            self._drop_dead_connections()

    def select_streams(self, streams: Sequence[UUID]) -> list[StoredEvent]:
        """All events of several streams, each stream's in order."""
        with self.datastore.get_connection() as connection:
            rows = connection.execute(
                "SELECT originator_id, originator_version, topic, state"  # noqa: S608
                f" FROM {TABLE} WHERE originator_id = ANY(%b::uuid[])"
                " ORDER BY originator_id, originator_version",
                [list(streams)],
                binary=True,
                prepare=True,
            ).fetchall()
        return [StoredEvent(**row) for row in rows]

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        return GapFreeSubscription(recorder=self, gt=gt, topics=topics)

    def _append(
        self,
        events: Sequence[StoredEvent],
        event_ids: Sequence[UUID | None],
        expected_size: int | None,
    ) -> Placed | None:
        with self.datastore.get_connection() as connection:
            try:
                row = connection.execute(
                    "SELECT first_index, at_us FROM append_events(%b::uuid[], %b::bigint[],"
                    " %b::text[], %b::bytea[], %b::uuid[], %b::bigint, %b::bigint)",
                    (
                        [event.originator_id for event in events],
                        [event.originator_version for event in events],
                        [event.topic for event in events],
                        [event.state for event in events],
                        list(event_ids),
                        self._clock(),
                        expected_size,
                    ),
                    prepare=True,
                ).fetchone()
            except psycopg.errors.UniqueViolation as error:
                raise self._conflict(connection, events, event_ids, error) from error
            except psycopg.errors.CheckViolation as error:
                raise DataError(str(error)) from error
        assert row is not None
        first = row["first_index"]
        if first is None:
            return None
        return Placed(range(first + 1, first + 1 + len(events)), row["at_us"])

    def _conflict(
        self,
        connection: Connection[DictRow],
        events: Sequence[StoredEvent],
        event_ids: Sequence[UUID | None],
        error: psycopg.errors.UniqueViolation,
    ) -> IntegrityError:
        """A replay often violates the stream's key too, and PostgreSQL reports the first only."""
        taken = connection.execute(
            f"SELECT event_id, notification_id - 1 AS index FROM {TABLE}"  # noqa: S608
            " WHERE event_id = ANY(%s::uuid[]) LIMIT 1",
            [[id for id in event_ids if id is not None]],
        ).fetchone()
        if taken is not None:
            return ReplayedEvent(
                f"event {taken['event_id']} is recorded already, at index {taken['index']}",
                replayed=str(taken["event_id"]),
                index=int(taken["index"]),
            )
        if error.diag.constraint_name == f"{TABLE}_event_id_idx":
            return ReplayedEvent("two events of one append have the same id")
        if error.diag.constraint_name == f"{TABLE}_pkey":
            streams = sorted({str(event.originator_id) for event in events})
            return StaleVersion(
                f"another event has that version in stream {', '.join(streams[:3])}; reload it"
            )
        raise StorageError(
            f"log_head disagrees with {TABLE}: {error.diag.message_detail}; something else than "
            "append_events wrote to the database: restore it from a backup"
        ) from error

    def _stored_as(
        self, events: Sequence[StoredEvent], event_ids: Sequence[UUID | None]
    ) -> Placed | None:
        """Where they stand if exactly these rows are stored, consecutively; else None."""
        with self.datastore.get_connection() as connection:
            rows = connection.execute(
                "SELECT notification_id, topic, state, event_id, recorded_at"  # noqa: S608
                f" FROM {TABLE} JOIN unnest(%s::uuid[], %s::bigint[]) WITH ORDINALITY"
                " AS ours (originator_id, originator_version, position)"
                " USING (originator_id, originator_version) ORDER BY position",
                (
                    [event.originator_id for event in events],
                    [event.originator_version for event in events],
                ),
            ).fetchall()
        ours = [(e.topic, e.state, id) for e, id in zip(events, event_ids, strict=True)]
        stored = [(row["topic"], bytes(row["state"]), row["event_id"]) for row in rows]
        ids = [int(row["notification_id"]) for row in rows]
        if stored != ours or ids != list(range(ids[0], ids[0] + len(ids))):
            return None
        return Placed(ids, rows[0]["recorded_at"])

    def _drop_dead_connections(self) -> None:
        """After a server crash every pooled connection is dead; do not spend a try on each."""
        with suppress(psycopg.Error):
            self.datastore.pool.check()


class GapFreeSubscription(PostgresSubscription):
    """Yields every event after `gt`, in order, once, across reconnects and server crashes.

    Three repairs of the stock one: it looks again once LISTEN has taken effect (an event stored
    between the first look and LISTEN went unnoticed), and whenever LISTEN_POLL_S passes in
    silence; an outage is waited out instead of ending the iteration; the connection stops
    listening before it goes back to the pool.
    """

    def _listen(self) -> None:
        while not self._has_been_stopped and not self._thread_error:
            try:
                with self._recorder.datastore.get_connection() as connection:
                    self._listen_on(connection)
            except (OperationalError, InterfaceError):
                time.sleep(RETRY_WAIT_S)
            except BaseException as error:
                self._thread_error = self._thread_error or error
                self.stop()

    def _listen_on(self, connection: Connection[DictRow]) -> None:
        connection.execute(f"LISTEN {self._recorder.channel_name}")
        try:
            quiet_s = LISTEN_POLL_S
            while not self._has_been_stopped and not self._thread_error:
                if quiet_s >= LISTEN_POLL_S:
                    self._has_been_notified.set()
                    quiet_s = 0.0
                quiet_s += STOP_POLL_S
                for _ in connection.notifies(timeout=STOP_POLL_S, stop_after=1):
                    self._has_been_notified.set()
        finally:
            with suppress(psycopg.Error):
                connection.execute("UNLISTEN *")

    def _pull(self) -> None:
        try:
            super()._pull()
        except (OperationalError, InterfaceError):
            time.sleep(RETRY_WAIT_S)
            self._has_been_notified.set()  # look again


class GapFreeFactory(PostgresFactory):
    """The library's infrastructure on one DATABASE_URL, tables made by migrations.

    By environment: PERSISTENCE_MODULE=ledger.store.recorder:GapFreeFactory and
    DATABASE_URL. By construction:
    `GapFreeFactory.on(url, ...)`, which takes the clock, the event id and a decorator (group
    commit) too. Close it, or the application that has it: that closes the decorator first.
    """

    def __init__(self, env: Environment | Mapping[str, str] | None) -> None:
        given = env if isinstance(env, Environment) else Environment(env=dict(env or {}))
        url = given.get("DATABASE_URL") or ""
        placeholders = {
            self.POSTGRES_DBNAME: "",
            self.POSTGRES_HOST: "",
            self.POSTGRES_USER: "",
            self.POSTGRES_PASSWORD: "",
            self.CREATE_TABLE: "n",
        }
        super().__init__(Environment(given.name, {**given, **placeholders}))
        # The library knows host, port, user and password only; a URL carries TLS and more.
        self.datastore.pool = ConnectionPool(
            url,
            connection_class=Connection[DictRow],
            kwargs={"row_factory": dict_row, "application_name": "tributary recorder"},
            min_size=POOL_SIZE,
            max_size=MAX_POOL_SIZE,
            timeout=CONNECT_TIMEOUT_S,
            configure=make_durable,
            open=False,
        )
        self._clock: Clock = system_clock
        self._event_id_of: EventIdOf = envelope_id
        self._decorate: Decorate = lambda recorder: recorder
        self._recorders: list[ApplicationRecorder] = []

    @classmethod
    def on(
        cls,
        url: str,
        *,
        clock: Clock = system_clock,
        event_id_of: EventIdOf = envelope_id,
        decorate: Decorate = lambda recorder: recorder,
    ) -> "GapFreeFactory":
        """`decorate` wraps the recorder that applications get; its `close()`, if it has one, is
        called before connections are closed."""
        factory = cls({"DATABASE_URL": url})
        factory._clock, factory._event_id_of, factory._decorate = clock, event_id_of, decorate
        return factory

    def application_recorder(self) -> ApplicationRecorder:
        recorder = self._decorate(
            GapFreeRecorder(self.datastore, clock=self._clock, event_id_of=self._event_id_of)
        )
        self._recorders.append(recorder)
        return recorder

    def aggregate_recorder(self, purpose: str = "events") -> Any:
        return self.aggregate_recorder_class(
            self.datastore, events_table_name=SNAPSHOT_TABLE_PREFIX + purpose
        )

    def close(self) -> None:
        while self._recorders:
            close = getattr(self._recorders.pop(), "close", None)
            if close is not None:
                close()
        super().close()
