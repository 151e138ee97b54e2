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

import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, LiteralString, Protocol

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

_SQL_TYPES: Mapping[str, LiteralString] = {
    "text": "text",
    "int": "bigint",
    "wei": "numeric",
    "bool": "boolean",
}


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
    """The SQL of one table, composed once. Every name comes from our own table definitions."""

    def __init__(self, shape: TableShape) -> None:
        table = sql.Identifier(SCHEMA, shape.name)
        kinds = {name: column.kind for name, column in {**shape.key, **shape.columns}.items()}
        self.key_size = len(shape.key)
        self.columns = tuple(shape.columns)
        names, keys = _names(kinds), _names(shape.key)
        parts = {
            "table": table,
            "names": _COMMA.join(names),
            "keys": _COMMA.join(keys),
            "wanted": _COMMA.join(sql.SQL("t.{}").format(name) for name in names),
            "rows": _sent(kinds),
            "key_rows": _sent({name: kinds[name] for name in shape.key}),
            "match": _AND.join(sql.SQL("t.{0} = v.{0}").format(key) for key in keys),
            "updates": _COMMA.join(
                sql.SQL("{0} = excluded.{0}").format(name) for name in _names(shape.columns)
            ),
        }

        def compose(query: LiteralString, **more: sql.Composable) -> bytes:
            return sql.SQL(query).format(**parts, **more).as_bytes(None)

        self.by_prefix = [
            compose("SELECT {names} FROM {table} WHERE {given} ORDER BY {keys}", given=given)
            for given in (_equal(keys[:size]) for size in range(self.key_size + 1))
        ]
        self.by_keys = compose("SELECT {wanted} FROM {key_rows} AS v JOIN {table} AS t ON {match}")
        self.delete = compose("DELETE FROM {table} AS t USING {key_rows} AS v WHERE {match}")
        self.clear = compose("DELETE FROM {table}")
        self.upsert = compose(
            "INSERT INTO {table} ({names}) SELECT {names} FROM {rows} AS v"
            " ON CONFLICT ({keys}) DO UPDATE SET {updates}"
        )


_COMMA, _AND = sql.SQL(", "), sql.SQL(" AND ")


def _names(columns: Iterable[str]) -> list[sql.Identifier]:
    return [sql.Identifier(name) for name in columns]


def _equal(keys: Sequence[sql.Identifier]) -> sql.Composable:
    if not keys:
        return sql.SQL("true")
    return _AND.join(sql.SQL("{} = %s").format(key) for key in keys)


def _sent(kinds: Mapping[str, str]) -> sql.Composed:
    """`(SELECT r->>0 AS a, (r->>1)::bigint AS b FROM json_array_elements(%s::json) AS r)`: rows
    travel as one JSON array, one statement whatever their number. JSON numbers have no width here,
    so wei arrive as they are."""
    columns = [
        sql.SQL("(r->>{})::{} AS {}").format(
            sql.Literal(n), sql.SQL(_SQL_TYPES[kind]), sql.Identifier(name)
        )
        for n, (name, kind) in enumerate(kinds.items())
    ]
    return sql.SQL("(SELECT {} FROM json_array_elements(%s::json) AS r)").format(
        _COMMA.join(columns)
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
            for values in self._connection.execute(shape.by_keys, _json(keys)):
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
            self._connection.execute(shape.delete, _json(gone))
        kept = [
            (*key, *(row[name] for name in shape.columns))
            for key in dirty
            if (row := rows[key]) is not None
        ]
        if kept:
            self._connection.execute(shape.upsert, _json(kept))


def _json(rows: Sequence[Sequence[Any]]) -> tuple[str]:
    return (json.dumps(rows, separators=(",", ":"), ensure_ascii=False),)


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
