"""PostgreSQL as the service's store: the connection pool, and the event store read as a log.

Everything that speaks SQL to the event store is in this room: this module (pool, EntryLog),
`recorder.py` (the one writer of events), `tiles.py` (TileStore), `migrate.py`. Driver errors leave
it as StorageError, with what to do; passwords never appear in a message.
"""

import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import psycopg
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

from ledger.domain.envelope import encode_entry
from ledger.errors import StorageError

POOL_SIZE = 8
CONNECT_TIMEOUT_S = 10.0
# How stale a waiter can be when a notification is lost (a reconnect, a proxy that drops them).
POLL_S = 0.5
RECONNECT_S = 0.2
CHANNEL = "stored_events"

CHECK_AFTER_S = 0.05
"""A connection that has been idle for longer is asked before it is lent: then nobody is in a hurry,
and a session that is just being ended has had the time to end."""


class CheckedConnection(Connection[Any]):
    """Knows when it last served well (monotonic seconds)."""

    served_at = 0.0


class Pool(ConnectionPool[Connection[Any]]):
    """Lends no dead connection, and does not ask the server each time: that is a round trip. A
    server that ends a session says so, or closes the socket: then there is something to read."""

    def check_before_lending(self, connection: Connection[Any]) -> None:
        assert isinstance(connection, CheckedConnection)
        mailbox = select.poll()
        mailbox.register(connection.fileno(), select.POLLIN)
        if mailbox.poll(0) or time.monotonic() > connection.served_at + CHECK_AFTER_S:
            self.check_connection(connection)


def connect(url: str, *, max_size: int = POOL_SIZE, name: str = "ledger") -> Pool:
    """An open pool of autocommit connections; each is checked before it is lent.

    Raises StorageError, at once and with the server's words, when the first connection fails.
    Close it when done.
    """
    try:
        psycopg.connect(url).close()
    except psycopg.Error as error:
        raise StorageError(f"{_unreachable(url)} ({first_line(error)})") from error
    pool = Pool(
        url,
        connection_class=CheckedConnection,
        kwargs={"autocommit": True, "application_name": f"tributary {name}"},
        min_size=1,
        max_size=max_size,
        timeout=CONNECT_TIMEOUT_S,
        check=lambda connection: pool.check_before_lending(connection),
        configure=make_durable,
        name=name,
        open=False,
    )
    pool.open()
    return pool


def make_durable(connection: Connection[Any]) -> None:
    """A commit that readers see must survive a crash of the server, whatever its defaults are."""
    connection.autocommit = True
    connection.execute("SET synchronous_commit = on")


@contextmanager
def lend(pool: Pool) -> Iterator[Connection[Any]]:
    """A connection for one piece of work; driver errors become StorageError."""
    try:
        with pool.connection() as connection:
            yield connection
            if isinstance(connection, CheckedConnection):
                connection.served_at = time.monotonic()
    except PoolTimeout as error:
        raise StorageError(_unreachable(pool.conninfo)) from error
    except psycopg.Error as error:
        raise storage_error(error) from error


def storage_error(error: psycopg.Error) -> StorageError:
    """What a driver error means to whoever asked."""
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedFunction):
        return StorageError("the database lacks our tables: run `tributary migrate`")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return StorageError(f"PostgreSQL went away: {first_line(error)}; retry in a moment")
    return StorageError(f"PostgreSQL refused: {first_line(error)}", sqlstate=error.sqlstate)


def _unreachable(url: object) -> str:
    options = conninfo_to_dict(url) if isinstance(url, str) else {}
    place = " ".join(
        f"{k}={options[k]}" for k in ("host", "port", "dbname", "user") if k in options
    )
    return f"PostgreSQL does not answer at {place}: is it running? check DATABASE_URL"


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class PostgresEntryLog:
    """The port EntryLog on the tables of 0001.event-store.

    `wait` is served by one listening thread and one connection of its own, however many wait; it
    starts with the first `wait`, reconnects by itself and ends with `close`.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._grown = threading.Condition()
        self._known_size = 0
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None

    def size(self) -> int:
        with lend(self._pool) as connection:
            return _size(connection)

    def entries(self, start: int, stop: int) -> list[bytes]:
        rows = self._rows("recorded_at, state", start, stop)
        return [encode_entry(id - 1, recorded_at, state) for id, recorded_at, state in rows]

    def pick(self, indexes: Sequence[int]) -> list[bytes]:
        """Entry bytes of these indexes, which ascend, in one query."""
        with lend(self._pool) as connection:
            rows = connection.execute(
                "SELECT notification_id, recorded_at, state FROM stored_events"
                " WHERE notification_id = ANY(%s) ORDER BY notification_id",
                [[index + 1 for index in indexes]],
                binary=True,
            ).fetchall()
        if [row[0] - 1 for row in rows] != list(indexes):
            raise StorageError(
                f"the event store lacks some of the entries {list(indexes)[:10]}: restore it from "
                "a backup and run `tributary audit`"
            )
        return [encode_entry(id - 1, recorded_at, state) for id, recorded_at, state in rows]

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]:
        return [leaf_hash for _, leaf_hash in self._rows("leaf_hash", start, stop)]

    def index_of(self, event_id: str) -> int | None:
        with lend(self._pool) as connection:
            try:
                row = connection.execute(
                    "SELECT notification_id - 1 FROM stored_events WHERE event_id = %s::uuid",
                    [event_id],
                ).fetchone()
            except psycopg.DataError:
                return None  # not a UUID: no event has that id
        return None if row is None else int(row[0])

    def entries_of(self, event_ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        with lend(self._pool) as connection:
            rows = connection.execute(
                "SELECT event_id, notification_id, recorded_at, state FROM stored_events"
                " WHERE event_id = ANY(%s::uuid[])",
                [list(event_ids)],
                binary=True,
            ).fetchall()
        return {event: encode_entry(id - 1, at, state) for event, id, at, state in rows}

    def wait(self, size: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        now = self.size()
        if now > size or timeout_s <= 0:
            return now
        self._listen_in_background()
        with self._grown:
            self._grown.wait_for(
                lambda: self._known_size > size or self._closing.is_set(),
                max(0.0, deadline - time.monotonic()),
            )
            if self._known_size > size:
                return self._known_size
        return self.size()

    def close(self) -> None:
        """End the listening thread. Waiters return at once."""
        self._closing.set()
        with self._grown:
            self._grown.notify_all()
        if self._listener is not None:
            self._listener.join()

    def _rows(self, columns: str, start: int, stop: int) -> list[Any]:
        assert start >= 0
        with lend(self._pool) as connection:
            rows = connection.execute(
                f"SELECT notification_id, {columns} FROM stored_events"  # noqa: S608
                " WHERE notification_id > %s AND notification_id <= %s ORDER BY notification_id",
                [start, stop],
                binary=True,
            ).fetchall()
        if rows and (rows[0][0] != start + 1 or rows[-1][0] != start + len(rows)):
            raise StorageError(
                f"the event store has a gap in [{start}, {stop}): something else than "
                "append_events wrote to it; restore it from a backup and run `tributary audit`"
            )
        return rows

    # -- waiting -------------------------------------------------------------------------------

    def _listen_in_background(self) -> None:
        with self._grown:
            if self._listener is None and not self._closing.is_set():
                self._listener = threading.Thread(
                    target=self._listen, name="entry-log-listener", daemon=True
                )
                self._listener.start()

    def _listen(self) -> None:
        while not self._closing.is_set():
            # An outage is for callers to report, through size(); here it is only waited out.
            with suppress(psycopg.Error, StorageError):
                self._listen_once()
            self._closing.wait(RECONNECT_S)

    def _listen_once(self) -> None:
        url, options = self._pool.conninfo, self._pool.kwargs
        assert isinstance(url, str)
        assert isinstance(options, dict)
        with psycopg.connect(url, **options) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            while not self._closing.is_set():
                # First look, then listen: what came before LISTEN took effect is not announced.
                self._announce(_size(connection))
                for _ in connection.notifies(timeout=POLL_S, stop_after=1):
                    pass

    def _announce(self, size: int) -> None:
        with self._grown:
            if size > self._known_size:
                self._known_size = size
                self._grown.notify_all()


def _size(connection: Connection[Any]) -> int:
    row = connection.execute("SELECT size FROM log_head").fetchone()
    if row is None:
        raise StorageError("log_head has lost its row: restore the database from a backup")
    return int(row[0])
