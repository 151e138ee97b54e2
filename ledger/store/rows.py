"""Projected rows in PostgreSQL: the port `Rows` with a write buffer, and the projector's store.

One batch is one transaction. It takes the projector's advisory lock (released by the server with
the transaction, so nothing survives a killed process), reads the position, and on leaving writes
the buffered rows, one statement per table, with the new position. A crash anywhere before the
commit leaves the old rows and the old position; the commit is their only boundary. It is
asynchronous (`synchronous_commit = off`): a server crash may undo the last batches whole, position
included, and they are folded again.

Reads are lazy and seen through the buffer. Rows stay cached from one batch to the next for as long
as the position says that nobody else wrote in between: rows depend on the position alone.

This file knows the shape of tables but none by name; `migrations/0020.projections.sql` makes them.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, Protocol

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from ledger.errors import StorageError
from ledger.ports import Key, Row, Rows

SCHEMA = "projections"
# "trib" in ASCII, then 0x20 for the projector (migrate.py and postgres.py hold the others).
PROJECTOR_LOCK = 0x74726962_00000020
MAX_CACHED_ROWS = 200_000
SCAN_BATCH_ROWS = 2_000

_SQL_TYPES = {"text": "text", "int": "bigint", "wei": "numeric", "bool": "boolean"}


class ColumnShape(Protocol):
    @property
    def kind(self) -> str:
        """'text', 'int', 'wei' or 'bool'."""
        ...


class TableShape(Protocol):
    """What `projections.base.Table` is; stated here because this room may not import that one."""

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> Mapping[str, ColumnShape]: ...

    @property
    def columns(self) -> Mapping[str, ColumnShape]: ...


class _Statements:
    """The SQL of one table, composed once."""

    def __init__(self, shape: TableShape) -> None:
        table = sql.Identifier(SCHEMA, shape.name)
        kinds = {name: column.kind for name, column in {**shape.key, **shape.columns}.items()}
        names, keys = [sql.Identifier(n) for n in kinds], [sql.Identifier(n) for n in shape.key]
        comma, conjunction = sql.SQL(", "), sql.SQL(" AND ")
        self.key_size = len(keys)
        self.columns = tuple(shape.columns)
        self.arity = len(kinds)
        self.select = sql.SQL("SELECT {} FROM {}").format(comma.join(names), table)
        order = sql.SQL(" ORDER BY {}").format(comma.join(keys))
        self.by_prefix = [
            self.select
            + (sql.SQL(" WHERE ") if size else sql.SQL(""))
            + conjunction.join(sql.SQL("{} = %s").format(key) for key in keys[:size])
            + order
            for size in range(len(keys) + 1)
        ]
        # Values travel as arrays of text and are cast by the server: one plan whatever their size.
        key_source = _unnest({name: kinds[name] for name in shape.key})
        match = conjunction.join(sql.SQL("t.{0} = v.{0}").format(key) for key in keys)
        wanted = comma.join(sql.SQL("t.{}").format(name) for name in names)
        self.by_keys = sql.SQL("SELECT {} FROM {} AS v JOIN {} AS t ON {}").format(
            wanted, key_source, table, match
        )
        self.delete = sql.SQL("DELETE FROM {} AS t USING {} AS v WHERE {}").format(
            table, key_source, match
        )
        self.clear = sql.SQL("DELETE FROM {}").format(table)
        updates = comma.join(
            sql.SQL("{0} = excluded.{0}").format(sql.Identifier(n)) for n in shape.columns
        )
        self.upsert = sql.SQL(
            "INSERT INTO {} ({}) SELECT {} FROM {} AS v ON CONFLICT ({}) DO UPDATE SET {}"
        ).format(
            table, comma.join(names), comma.join(names), _unnest(kinds), comma.join(keys), updates
        )


def _unnest(kinds: Mapping[str, str]) -> sql.Composed:
    """`(SELECT a, b::bigint AS b FROM unnest(%s::text[], %s::text[]) AS u(a, b))`."""
    names = [sql.Identifier(name) for name in kinds]
    cast = [
        sql.SQL("{0}::{1} AS {0}").format(sql.Identifier(name), sql.SQL(_SQL_TYPES[kind]))
        for name, kind in kinds.items()
    ]
    comma = sql.SQL(", ")
    arrays = comma.join([sql.SQL("%s::text[]")] * len(names))
    return sql.SQL("(SELECT {} FROM unnest({}) AS u({}))").format(
        comma.join(cast), arrays, comma.join(names)
    )


class PgRows:
    """`Rows` inside one transaction: reads through a cache, writes buffered until `flush`."""

    def __init__(
        self,
        connection: psycopg.Connection,
        statements: Mapping[str, _Statements],
        cache: dict[str, dict[Key, Row | None]],
    ) -> None:
        self._connection, self._statements, self._cache = connection, statements, cache
        self._dirty: dict[str, set[Key]] = defaultdict(set)

    def get(self, table: str, key: Key) -> Row | None:
        rows = self._cache[table]
        if key not in rows:
            self.prefetch([(table, key)])
        row = rows[key]
        return None if row is None else dict(row)

    def put(self, table: str, key: Key, row: Row) -> None:
        shape = self._statements[table]
        assert len(key) == shape.key_size, (table, key)
        assert row.keys() == set(shape.columns), (table, row.keys() ^ set(shape.columns))
        self._cache[table][key] = dict(row)
        self._dirty[table].add(key)

    def delete(self, table: str, key: Key) -> None:
        self._cache[table][key] = None
        self._dirty[table].add(key)

    def scan(self, table: str, prefix: Key = ()) -> Iterator[tuple[Key, Row]]:
        # The server orders and merges: what is buffered for this table goes there first. It stays
        # in the transaction, so this is no commit boundary.
        self._flush_table(table)
        shape = self._statements[table]
        found = self._connection.execute(shape.by_prefix[len(prefix)], prefix).fetchall()
        return (_split(shape, values) for values in found)

    def prefetch(self, wanted: Iterable[tuple[str, Key]]) -> None:
        """Load rows into the cache, absent ones as absent: one query per table."""
        missing: dict[str, list[Key]] = defaultdict(list)
        for table, key in wanted:
            if key not in self._cache[table]:
                missing[table].append(key)
        for table, keys in missing.items():
            shape, rows = self._statements[table], self._cache[table]
            rows.update(dict.fromkeys(keys, None))
            for values in self._connection.execute(shape.by_keys, _arrays(keys, shape.key_size)):
                key, row = _split(shape, values)
                rows[key] = row

    def flush(self) -> None:
        """Write every buffered row, inside the transaction."""
        for table in list(self._dirty):
            self._flush_table(table)
        if sum(map(len, self._cache.values())) > MAX_CACHED_ROWS:
            self.forget()

    def clear(self) -> None:
        """Delete every row of every table."""
        self._dirty.clear()
        self.forget()
        for shape in self._statements.values():
            self._connection.execute(shape.clear)

    def forget(self) -> None:
        """Drop the cache; nothing may be buffered."""
        assert not any(self._dirty.values())
        for rows in self._cache.values():
            rows.clear()

    def _flush_table(self, table: str) -> None:
        dirty = self._dirty.pop(table, None)
        if not dirty:
            return
        shape, rows = self._statements[table], self._cache[table]
        gone = [key for key in dirty if rows[key] is None]
        if gone:
            self._connection.execute(shape.delete, _arrays(gone, shape.key_size))
        kept = [
            (*key, *(row[name] for name in shape.columns))
            for key in dirty
            if (row := rows[key]) is not None
        ]
        if kept:
            self._connection.execute(shape.upsert, _arrays(kept, shape.arity))


def _arrays(tuples: Sequence[tuple[Any, ...]], width: int) -> list[list[str | None]]:
    """Columns of the tuples as text; `None` stays null."""
    return [[None if t[n] is None else str(t[n]) for t in tuples] for n in range(width)]


def _split(shape: _Statements, values: Sequence[Any]) -> tuple[Key, Row]:
    plain = [int(v) if isinstance(v, Decimal) else v for v in values]
    key = tuple(plain[: shape.key_size])
    return key, dict(zip(shape.columns, plain[shape.key_size :], strict=True))


class PgBatch:
    """One open projector transaction; see `projections.runner.Batch`."""

    def __init__(
        self, connection: psycopg.Connection, rows: PgRows, position: int, version: int
    ) -> None:
        self._connection, self._rows = connection, rows
        self._position, self._version = position, version

    @property
    def rows(self) -> Rows:
        return self._rows

    @property
    def position(self) -> int:
        return self._position

    @property
    def version(self) -> int:
        return self._version

    def prefetch(self, wanted: Iterable[tuple[str, Key]]) -> None:
        self._rows.prefetch(wanted)

    def flush(self) -> None:
        self._rows.flush()

    def clear(self) -> None:
        self._rows.clear()
        self.advance(0, 0)

    def advance(self, position: int, version: int) -> None:
        self._position, self._version = position, version

    def finish(self) -> None:
        self._rows.flush()
        self._connection.execute(
            sql.SQL("UPDATE {} SET events = %s, version = %s").format(_POSITION),
            (self._position, self._version),
        )


_POSITION = sql.Identifier(SCHEMA, "position")


class PgRowStore:
    """Rows and position in one PostgreSQL database; see `projections.runner.RowStore`."""

    def __init__(self, pool: ConnectionPool, tables: Sequence[TableShape]) -> None:
        self._pool = pool
        self._statements = {table.name: _Statements(table) for table in tables}
        self._cache: dict[str, dict[Key, Row | None]] = {name: {} for name in self._statements}
        self._cached_at: tuple[int, int] | None = None
        self._one_batch = threading.Lock()

    @contextmanager
    def batch(self) -> Iterator[PgBatch | None]:
        """A transaction under the projector's lock; None where another session holds it."""
        with self._one_batch, _storage_errors(), self._pool.connection() as connection:
            with connection.transaction():
                connection.execute("SET LOCAL synchronous_commit = off")
                if not _value(connection, "SELECT pg_try_advisory_xact_lock(%s)", PROJECTOR_LOCK):
                    batch = None
                else:
                    batch = self._open(connection)
                # An exception from here on rolls back; the cache then holds rows that never were.
                self._cached_at = None
                yield batch
                if batch is not None:
                    batch.finish()
            if batch is not None:
                self._cached_at = (batch.position, batch.version)

    def position(self) -> int:
        """How many events the committed rows hold."""
        return self._stored(lambda c: int(_head(c)[0]))

    @contextmanager
    def snapshot(self) -> Iterator[Rows]:
        """All rows as of one moment, read-only and streamed."""
        with _storage_errors(), self._pool.connection() as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield _Snapshot(connection, self._statements)

    def _open(self, connection: psycopg.Connection) -> PgBatch:
        position, version = _head(connection)
        rows = PgRows(connection, self._statements, self._cache)
        if self._cached_at != (position, version):
            rows.forget()
        return PgBatch(connection, rows, position, version)

    def _stored(self, read: Any) -> int:
        with _storage_errors(), self._pool.connection() as connection:
            return int(read(connection))


class _Snapshot:
    """`Rows` that only reads, holding at most SCAN_BATCH_ROWS at a time."""

    def __init__(
        self, connection: psycopg.Connection, statements: Mapping[str, _Statements]
    ) -> None:
        self._connection, self._statements = connection, statements

    def get(self, table: str, key: Key) -> Row | None:
        return next((row for _, row in self.scan(table, key)), None)

    def put(self, table: str, key: Key, row: Row) -> None:
        raise AssertionError("a snapshot is read-only")

    def delete(self, table: str, key: Key) -> None:
        raise AssertionError("a snapshot is read-only")

    def scan(self, table: str, prefix: Key = ()) -> Iterator[tuple[Key, Row]]:
        shape = self._statements[table]
        with self._connection.cursor(name=f"scan_{table}") as cursor:
            cursor.itersize = SCAN_BATCH_ROWS
            cursor.execute(shape.by_prefix[len(prefix)], prefix)
            for values in cursor:
                yield _split(shape, values)


def _head(connection: psycopg.Connection) -> tuple[int, int]:
    row = connection.execute(sql.SQL("SELECT events, version FROM {}").format(_POSITION)).fetchone()
    assert row is not None, "migration 0020 inserts the position"
    return int(row[0]), int(row[1])


def _value(connection: psycopg.Connection, query: str, *values: object) -> Any:
    row = connection.execute(query, values).fetchone()
    return row[0] if row else None


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (psycopg.Error, PoolTimeout, PoolClosed) as error:
        raise StorageError(
            f"the projected rows cannot be reached: {str(error).strip()}; "
            "check DATABASE_URL and run `tributary doctor`"
        ) from error
