"""The port TileStore on PostgreSQL: tiles and signed checkpoints, published in one transaction.

Two guards against a forked log. `sequencer_lock` is an advisory lock of a connection of its own,
so that one process sequences at a time; while it is held, `publish` writes over that very
connection, so a sequencer whose lock was lost cannot publish. And `publish` itself compares the
newest stored checkpoint with the one the caller built on, under a table lock: even a process
that never asked for the lock cannot fork what is stored.

A sequencer that dies gives its lock back at once: the kernel closes the connection. One that hangs,
is stopped, or whose network is cut does not; so its session gives a sign of life every HEARTBEAT_S,
and PostgreSQL ends it after SILENCE_S without one. Locks, and a transaction that it had open, go
with the session.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import Connection

from ledger.errors import Conflict, StorageError
from ledger.ports import StoredCheckpoint
from ledger.store.postgres import Pool, lend, storage_error

# "trib" in ASCII, then 2 for the sequencer (migrate.py has 1).
SEQUENCER_LOCK = 0x74726962_00000002
HASH_BYTES = 32
MAX_TILE_BYTES = 256 * HASH_BYTES
MAX_TILE_LEVEL = 63
HEARTBEAT_S = 1.0
SILENCE_S = 5.0
"""The most that a sequencer which hangs can hold up the others."""

_COLUMNS = "size, root, note, signed_at"


class PostgresTileStore:
    """Tiles and checkpoints in the tables of 0002.log-tiles."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._sequencer: Connection[Any] | None = None

    def tile(self, level: int, n: int) -> bytes | None:
        return self.tiles([(level, n)]).get((level, n))

    def tiles(self, wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        with lend(self._pool) as connection:
            rows = connection.execute(
                "SELECT level, n, hashes FROM log_tiles"
                " JOIN unnest(%s::integer[], %s::bigint[]) AS wanted (level, n) USING (level, n)",
                [[level for level, _ in wanted], [n for _, n in wanted]],
                binary=True,
            ).fetchall()
        return {(level, n): bytes(hashes) for level, n, hashes in rows}

    def latest(self) -> StoredCheckpoint | None:
        with lend(self._pool) as connection:
            return _latest(connection)

    def checkpoint(self, size: int) -> StoredCheckpoint | None:
        with lend(self._pool) as connection:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM log_checkpoints WHERE size = %s",  # noqa: S608
                [size],
            ).fetchone()
        return _checkpoint(row)

    def checkpoints(self, low: int, high: int) -> list[StoredCheckpoint]:
        with lend(self._pool) as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM log_checkpoints"  # noqa: S608
                " WHERE size >= %s AND size < %s ORDER BY size",
                [low, high],
                binary=True,
            ).fetchall()
        return [found for row in rows if (found := _checkpoint(row)) is not None]

    def publish(
        self,
        tiles: Mapping[tuple[int, int], bytes],
        checkpoint: StoredCheckpoint,
        *,
        expected_size: int,
    ) -> None:
        """Store tiles and checkpoint, all or none.

        `expected_size` is the size of the newest stored checkpoint, 0 where there is none. Raises
        Conflict when it is another one, when the log would shrink or fork, or when a tile would
        change a hash that it already holds; StorageError when the sequencer's lock was lost. The
        checkpoint of the same size and root may be stored again, with more signatures.
        """
        for (level, n), hashes in tiles.items():
            assert 0 <= level <= MAX_TILE_LEVEL
            assert n >= 0
            assert 0 < len(hashes) <= MAX_TILE_BYTES
            assert len(hashes) % HASH_BYTES == 0
        assert len(checkpoint.root) == HASH_BYTES
        with self._publisher() as connection, connection.transaction():
            # Readers go on; a second publisher waits here and then fails the comparison.
            connection.execute("LOCK TABLE log_checkpoints IN SHARE ROW EXCLUSIVE MODE")
            check_successor(_latest(connection), checkpoint, expected_size)
            _put_tiles(connection, tiles)
            connection.execute(
                "INSERT INTO log_checkpoints (size, root, note, signed_at)"
                " VALUES (%s, %s, %s, %s) ON CONFLICT (size) DO UPDATE"
                " SET note = excluded.note, signed_at = excluded.signed_at",
                [checkpoint.size, checkpoint.root, checkpoint.note, checkpoint.signed_at],
            )

    @contextmanager
    def sequencer_lock(self) -> Iterator[bool]:
        """Yields whether this is now the one sequencer. Losing the connection loses the lock:
        `publish` then raises StorageError until the block is left and entered again."""
        url, options = self._pool.conninfo, self._pool.kwargs
        assert isinstance(url, str)
        assert isinstance(options, dict)
        try:
            connection: Connection[Any] = psycopg.connect(url, **options)
        except psycopg.Error as error:
            raise storage_error(error) from error
        try:
            try:
                row = connection.execute(
                    "SELECT pg_try_advisory_lock(%s)", [SEQUENCER_LOCK]
                ).fetchone()
            except psycopg.Error as error:
                raise storage_error(error) from error
            if row is None or not row[0]:
                yield False
                return
            with _signs_of_life(connection):
                self._sequencer = connection
                try:
                    yield True
                finally:
                    self._sequencer = None
        finally:
            with suppress(psycopg.Error):
                connection.close()  # which gives the lock back

    @contextmanager
    def _publisher(self) -> Iterator[Connection[Any]]:
        sequencer = self._sequencer
        if sequencer is None:
            with lend(self._pool) as connection:
                yield connection
            return
        try:
            yield sequencer
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise StorageError(
                "the connection that holds the sequencer's lock was lost, another process may "
                "sequence now: take the lock again and reload the latest checkpoint"
            ) from error
        except psycopg.Error as error:
            raise storage_error(error) from error


@contextmanager
def _signs_of_life(connection: Connection[Any]) -> Iterator[None]:
    """Meanwhile the server ends this session when it falls silent. Beats of a thread of its own,
    since growing a tree or waiting for witnesses may take long."""
    over = threading.Event()

    def beat() -> None:
        # A lost session is for `publish` to report.
        with suppress(psycopg.OperationalError, psycopg.InterfaceError):
            while not over.wait(HEARTBEAT_S):
                with suppress(psycopg.errors.InFailedSqlTransaction):
                    connection.execute("SELECT 1")

    try:
        for setting in ("idle_session_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(f"SET {setting} = {int(SILENCE_S * 1_000)}")
    except psycopg.Error as error:
        raise storage_error(error) from error
    beats = threading.Thread(target=beat, name="sequencer-heartbeat", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join(SILENCE_S)


def _latest(connection: Connection[Any]) -> StoredCheckpoint | None:
    return _checkpoint(
        connection.execute(
            f"SELECT {_COLUMNS} FROM log_checkpoints ORDER BY size DESC LIMIT 1"  # noqa: S608
        ).fetchone()
    )


def _checkpoint(row: Any) -> StoredCheckpoint | None:
    if row is None:
        return None
    size, root, note, signed_at = row
    return StoredCheckpoint(size=size, root=bytes(root), note=bytes(note), signed_at=signed_at)


def check_successor(
    latest: StoredCheckpoint | None, checkpoint: StoredCheckpoint, expected_size: int
) -> None:
    size = latest.size if latest is not None else 0
    if size != expected_size:
        raise Conflict(
            f"the newest stored checkpoint has size {size}, not {expected_size}: another "
            "sequencer published; reload it and integrate from there"
        )
    if checkpoint.size < size:
        raise Conflict(f"a checkpoint of size {checkpoint.size} would shrink the log of {size}")
    if latest is not None and checkpoint.size == size and checkpoint.root != latest.root:
        raise Conflict(f"size {size} is signed with another root: this would fork the log")


def _put_tiles(connection: Connection[Any], tiles: Mapping[tuple[int, int], bytes]) -> None:
    """Insert, or extend to the right; a tile never changes a hash that it holds."""
    stored = connection.execute(
        "INSERT INTO log_tiles AS t (level, n, hashes)"
        " SELECT * FROM unnest(%s::integer[], %s::bigint[], %s::bytea[])"
        " ON CONFLICT (level, n) DO UPDATE SET hashes = excluded.hashes"
        " WHERE substring(excluded.hashes FOR octet_length(t.hashes)) = t.hashes",
        [[level for level, _ in tiles], [n for _, n in tiles], list(tiles.values())],
    ).rowcount
    if stored != len(tiles):
        raise Conflict(
            f"{len(tiles) - stored} of {len(tiles)} tiles contradict what is stored: the tree "
            "was built from other leaves; rebuild it from the stored leaf hashes"
        )
