"""The port Archive on PostgreSQL: the tables of a log as they are, for audit, export and restore.

Reading: everything in one REPEATABLE READ transaction, whose snapshot other processes may share
(`opener`), so that an audit of a running ledger sees one state, to the row. Nothing is interpreted
here: gaps, odd lengths and wrong hashes come out as they lie in the table.

Restoring: one transaction. Until its commit nobody sees a row, and a kill leaves an empty store; so
there is nothing to resume and nothing to repair. It holds the row of log_head and the sequencer's
lock, so that no server appends or signs meanwhile.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import Connection

from ledger.errors import Conflict, StorageError
from ledger.ports import ArchivedRow, RestoredRow, StoredCheckpoint
from ledger.store.postgres import first_line, storage_error
from ledger.store.tiles import SEQUENCER_LOCK

_ROWS = (
    "SELECT notification_id, recorded_at, state, leaf_hash, uuid_send(event_id), topic"
    " FROM stored_events WHERE notification_id > %s AND notification_id <= %s"
    " ORDER BY notification_id"
)
_COPY_EVENTS = (
    "COPY stored_events (originator_id, originator_version, topic, state, notification_id,"
    " recorded_at, leaf_hash, event_id) FROM STDIN (FORMAT BINARY)"
)


@dataclass(frozen=True, kw_only=True)
class ArchiveOpener:
    """Opens the same picture of the database in another process. Picklable."""

    url: str
    snapshot: str | None = None

    def __call__(self) -> "PostgresArchive":
        return PostgresArchive(self.url, snapshot=self.snapshot)


class PostgresArchive:
    """One connection; not thread-safe. Close it: a snapshot keeps rows alive.

    One picture of the database, its own or the `snapshot` of another.
    """

    def __init__(self, url: str, *, snapshot: str | None = None) -> None:
        self.url = url
        with _storage_errors():
            self._connection: Connection[Any] = psycopg.connect(
                url, autocommit=True, application_name="tributary archive"
            )
            self._connection.execute("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if snapshot is not None:
                self._connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            self._connection.execute("SELECT 1 FROM log_head")  # the picture is taken now

    def close(self) -> None:
        with suppress(psycopg.Error):
            self._connection.close()

    def opener(self) -> ArchiveOpener:
        """For other processes; valid while this one is open."""
        row = self._one("SELECT pg_export_snapshot()")
        return ArchiveOpener(url=self.url, snapshot=str(row[0]))

    def head(self) -> tuple[int, int]:
        row = self._one("SELECT size, recorded_at FROM log_head")
        return int(row[0]), int(row[1])

    def last_row(self) -> int:
        row = self._one("SELECT coalesce(max(notification_id), 0) FROM stored_events")
        return int(row[0])

    def rows(self, start: int, stop: int) -> list[ArchivedRow]:
        with _storage_errors():
            return self._connection.execute(_ROWS, [start, stop], binary=True).fetchall()

    def tiles(self, level: int, start: int, stop: int) -> Mapping[int, bytes]:
        with _storage_errors():
            return dict(
                self._connection.execute(
                    "SELECT n, hashes FROM log_tiles WHERE level = %s AND n >= %s AND n < %s",
                    [level, start, stop],
                    binary=True,
                ).fetchall()
            )

    def tile_ids_from(self, limits: Mapping[int, int], *, limit: int) -> list[tuple[int, int]]:
        with _storage_errors():
            return self._connection.execute(
                "SELECT level, n FROM log_tiles LEFT JOIN unnest(%s::integer[], %s::bigint[])"
                " AS l (level, first) USING (level) WHERE n >= coalesce(first, 0)"
                " ORDER BY level, n LIMIT %s",
                [list(limits), list(limits.values()), limit],
            ).fetchall()

    def newest_checkpoint(self) -> StoredCheckpoint | None:
        found = self._checkpoints("ORDER BY size DESC LIMIT 1", [])
        return found[0] if found else None

    def checkpoints(self, low: int, high: int) -> list[StoredCheckpoint]:
        return self._checkpoints("WHERE size >= %s AND size < %s ORDER BY size", [low, high])

    def broken_streams(self, *, limit: int) -> list[tuple[str, int, int]]:
        with _storage_errors():
            return self._connection.execute(
                "SELECT originator_id::text, count(*), max(originator_version) FROM ("
                "SELECT originator_id, originator_version, row_number() OVER stream AS place,"
                " notification_id < lag(notification_id) OVER stream AS back FROM stored_events"
                " WINDOW stream AS (PARTITION BY originator_id ORDER BY originator_version)) AS s"
                " GROUP BY originator_id HAVING bool_or(originator_version <> place OR back)"
                " ORDER BY 1 LIMIT %s",
                [limit],
            ).fetchall()

    def streams(self, start: int, stop: int) -> list[tuple[bytes, int]]:
        with _storage_errors():
            return self._connection.execute(
                "SELECT uuid_send(originator_id), originator_version FROM stored_events"
                " WHERE notification_id > %s AND notification_id <= %s ORDER BY notification_id",
                [start, stop],
                binary=True,
            ).fetchall()

    def _checkpoints(self, where: str, values: list[object]) -> list[StoredCheckpoint]:
        with _storage_errors():
            rows = self._connection.execute(
                f"SELECT size, root, note, signed_at FROM log_checkpoints {where}",  # noqa: S608
                values,
                binary=True,
            ).fetchall()
        return [
            StoredCheckpoint(size=size, root=bytes(root), note=bytes(note), signed_at=signed_at)
            for size, root, note, signed_at in rows
        ]

    def _one(self, query: str) -> tuple[Any, ...]:
        with _storage_errors():
            row = self._connection.execute(query).fetchone()
        if row is None:
            raise StorageError("log_head has lost its row: restore the database from a backup")
        return tuple(row)


# --- restoring ---


class _Restoring:
    """The port RestoreSession, inside the transaction of `restoring`."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection

    def add_events(self, rows: Iterable[RestoredRow]) -> None:
        with self._connection.cursor() as cursor, cursor.copy(_COPY_EVENTS) as copy:
            copy.set_types(["uuid", "int8", "text", "bytea", "int8", "int8", "bytea", "uuid"])
            for row in rows:
                copy.write_row(row)

    def add_tiles(self, tiles: Mapping[tuple[int, int], bytes]) -> None:
        with (
            self._connection.cursor() as cursor,
            cursor.copy("COPY log_tiles (level, n, hashes) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.set_types(["int4", "int8", "bytea"])
            for (level, n), hashes in tiles.items():
                copy.write_row((level, n, hashes))

    def add_checkpoints(self, checkpoints: Sequence[StoredCheckpoint]) -> None:
        with (
            self._connection.cursor() as cursor,
            cursor.copy(
                "COPY log_checkpoints (size, root, note, signed_at) FROM STDIN (FORMAT BINARY)"
            ) as copy,
        ):
            copy.set_types(["int8", "bytea", "bytea", "int8"])
            for c in checkpoints:
                copy.write_row((c.size, c.root, c.note, c.signed_at))

    def set_head(self, size: int, recorded_at: int) -> None:
        self._connection.execute(
            "UPDATE log_head SET size = %s, recorded_at = %s", [size, recorded_at]
        )


@contextmanager
def restoring(url: str) -> Iterator[_Restoring]:
    """A session on an empty event store; leaving the block without an error commits it whole.

    Raises Conflict when the store holds anything, or when a server is running on it.
    """
    try:
        with psycopg.connect(url, application_name="tributary import") as connection:
            connection.execute("SET synchronous_commit = on")
            row = connection.execute(
                "SELECT pg_try_advisory_xact_lock(%s)", [SEQUENCER_LOCK]
            ).fetchone()
            if row is None or not row[0]:
                raise Conflict("a ledger runs on this database: stop it, then import")
            # Held to the end: an append that comes meanwhile waits, and then stands behind ours.
            connection.execute("SELECT size FROM log_head FOR UPDATE")
            _refuse_unless_empty(connection)
            yield _Restoring(connection)
            connection.execute("SELECT pg_notify('stored_events', '')")
    except psycopg.errors.UniqueViolation as error:
        raise Conflict(
            f"the log repeats what may occur once: {error.diag.message_detail}; nothing was "
            "imported"
        ) from error
    except psycopg.Error as error:
        raise storage_error(error) from error


def _refuse_unless_empty(connection: Connection[Any]) -> None:
    for table in ("stored_events", "log_tiles", "log_checkpoints"):
        row = connection.execute(
            f"SELECT EXISTS (SELECT 1 FROM {table})"  # noqa: S608
        ).fetchone()
        if row is not None and row[0]:
            raise Conflict(
                f"the database is not empty ({table} has rows): an import goes into a new one "
                "only, since a log is never overwritten. Create a database and point DATABASE_URL "
                "at it, or set another TRIBUTARY_HOME"
            )
    row = connection.execute("SELECT size FROM log_head").fetchone()
    if row is None or row[0] != 0:
        raise Conflict("log_head is not at 0: this is not a fresh database; create a new one")


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise StorageError(f"PostgreSQL went away: {first_line(error)}; start again") from error
    except psycopg.Error as error:
        raise storage_error(error) from error
