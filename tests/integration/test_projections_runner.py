"""The runner on a real PostgreSQL: any batch split, crashes, rebuilds, two runners, reads while
it works. `tests.projections_world.random_history` makes the logs."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from ledger.errors import StorageError
from ledger.ports import Rows
from ledger.store.rows import PgBatch, PgRowStore
from projections import runner as runner_module
from projections.base import Table
from projections.memory import MemoryRows
from projections.registry import FOLDS_VERSION, TABLES, digest_of, fold, read_entry
from projections.runner import Runner
from tests.projections_world import ListLog, World, actor, address, random_history

EVENTS = 400


@pytest.fixture(scope="module")
def history() -> list[bytes]:
    return random_history(7, EVENTS)


@pytest.fixture(scope="module")
def expected(history: list[bytes]) -> str:
    return digest_of(replayed(history))


def replayed(history: list[bytes]) -> MemoryRows:
    rows = MemoryRows(TABLES)
    for data in history:
        fold(rows, read_entry(data))
    return rows


@contextmanager
def open_pool(url: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(url, min_size=1, max_size=4, open=True) as pool:
        yield pool


@pytest.fixture
def pool(pg_url: str) -> Iterator[ConnectionPool]:
    with open_pool(pg_url) as pool:
        yield pool


@pytest.fixture
def store(pool: ConnectionPool) -> PgRowStore:
    return PgRowStore(pool, TABLES)


def test_the_migration_makes_the_tables_of_the_folds(pg_url: str) -> None:
    with psycopg.connect(pg_url) as connection:
        made = {shape for table in TABLES for shape in _columns(connection, table.name)}
        names = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'projections'"
        )
        assert {name for (name,) in names} == {table.name for table in TABLES} | {"position"}
    assert made == {shape for table in TABLES for shape in _shape(table)}


def _shape(table: Table) -> set[tuple[object, ...]]:
    types = {"text": "text", "int": "bigint", "wei": "numeric", "bool": "boolean"}
    names = list(table.key)
    found: set[tuple[object, ...]] = set()
    for name, column in {**table.key, **table.columns}.items():
        place = names.index(name) + 1 if name in names else 0
        by_byte = "C" if name in names and column.kind == "text" else None
        found.add((table.name, name, types[column.kind], column.nullable, place, by_byte))
    return found


def _columns(connection: psycopg.Connection, table: str) -> set[tuple[object, ...]]:
    """(table, column, type, nullable, place in the key or 0, collation)."""
    rows = connection.execute(
        """
        SELECT c.table_name, c.column_name, c.data_type, c.is_nullable = 'YES',
               coalesce(k.ordinal_position, 0), c.collation_name
        FROM information_schema.columns AS c
        LEFT JOIN information_schema.key_column_usage AS k
            USING (table_schema, table_name, column_name)
        WHERE c.table_schema = 'projections' AND c.table_name = %s
        """,
        [table],
    )
    return {tuple(row) for row in rows}


@pytest.mark.parametrize("batch_events", [1, 7, 64, 500])
def test_rows_do_not_depend_on_the_batch_split(
    store: PgRowStore, history: list[bytes], expected: str, batch_events: int
) -> None:
    runner = Runner(ListLog(history), store, batch_events=batch_events)
    assert runner.catch_up() == len(history) == runner.position()
    assert runner.digest() == expected


def test_every_row_is_the_one_a_replay_in_memory_gives(
    store: PgRowStore, history: list[bytes]
) -> None:
    Runner(ListLog(history), store).catch_up()
    rows = replayed(history)
    with store.snapshot() as live:
        for table in TABLES:
            assert list(live.scan(table.name)) == list(rows.scan(table.name)), table.name


def test_a_growing_log_is_followed(store: PgRowStore, history: list[bytes], expected: str) -> None:
    log = ListLog([])
    runner = Runner(log, store)
    for size in (1, 2, 3, 50, 51, 400, len(history)):
        log.stored = history[:size]
        assert runner.catch_up() == size
        assert runner.digest() == digest_of(replayed(history[:size])), size
    assert runner.step() == 0
    assert runner.digest() == expected


def test_a_rebuild_gives_the_same_rows(
    store: PgRowStore, history: list[bytes], expected: str
) -> None:
    runner = Runner(ListLog(history), store, batch_events=100)
    runner.catch_up()
    assert runner.rebuild() == len(history)
    assert runner.digest() == expected
    assert runner.position() == len(history)


def test_a_rebuild_mends_rows_that_someone_edited(
    pool: ConnectionPool, store: PgRowStore, history: list[bytes], expected: str
) -> None:
    runner = Runner(ListLog(history), store)
    runner.catch_up()
    with pool.connection() as connection:
        connection.execute("UPDATE projections.balances SET amount_wei = amount_wei + 1")
        connection.execute("DELETE FROM projections.edges")
        connection.execute("INSERT INTO projections.roles VALUES ('ed25519:x', 'governance', 5)")
    assert runner.digest() != expected
    runner.rebuild()
    assert runner.digest() == expected


def test_readers_see_whole_rows_while_a_rebuild_runs(
    pool: ConnectionPool, store: PgRowStore, history: list[bytes]
) -> None:
    Runner(ListLog(history), store).catch_up()
    log = ListLog(history, pause_s=0.02)
    rebuild = threading.Thread(target=Runner(log, store, batch_events=20).rebuild)
    rebuild.start()
    seen = 0
    while rebuild.is_alive():
        with pool.connection() as connection:
            connection.execute("SET LOCAL lock_timeout = '1s'")
            row = connection.execute(
                "SELECT (SELECT sum(amount_wei) FROM projections.balances),"
                " (SELECT count(*) FROM projections.edges),"
                " (SELECT events FROM projections.position)"
            ).fetchone()
        assert row == (0, len(history), len(history))
        seen += 1
    rebuild.join()
    assert seen > 5


def test_another_version_of_the_folds_rebuilds_by_itself(
    pool: ConnectionPool,
    store: PgRowStore,
    history: list[bytes],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = ListLog(history)
    Runner(log, store).catch_up()
    with pool.connection() as connection:
        connection.execute("DELETE FROM projections.edges")  # what the new version would add
    monkeypatch.setattr(runner_module, "FOLDS_VERSION", FOLDS_VERSION + 1)
    runner = Runner(log, store)
    assert runner.step() == len(history)
    assert runner.digest() == expected
    assert runner.step() == 0


class _Crash(Exception):
    pass


class _CrashingStore(PgRowStore):
    """Fails inside the transaction, after the rows were written and before the commit."""

    crash = False

    @contextmanager
    def batch(self) -> Iterator[PgBatch | None]:
        with super().batch() as batch:
            yield batch
            assert batch is not None
            batch.finish()
            if self.crash:
                raise _Crash


def test_a_crash_before_the_commit_leaves_the_old_rows_and_position(
    pool: ConnectionPool, history: list[bytes], expected: str
) -> None:
    store = _CrashingStore(pool, TABLES)
    runner = Runner(ListLog(history), store, batch_events=50)
    while runner.position() < len(history):
        position, before = runner.position(), runner.digest()
        store.crash = True
        with pytest.raises(_Crash):
            runner.step()
        assert (runner.position(), runner.digest()) == (position, before)
        store.crash = False
        assert runner.step()
    assert runner.digest() == expected


def test_a_crash_during_a_rebuild_leaves_the_old_rows(
    pool: ConnectionPool, history: list[bytes], expected: str
) -> None:
    store = _CrashingStore(pool, TABLES)
    runner = Runner(ListLog(history), store, batch_events=50)
    runner.catch_up()
    store.crash = True
    with pytest.raises(_Crash):
        runner.rebuild()
    assert (runner.position(), runner.digest()) == (len(history), expected)


CHILD = """
import pickle, sys, threading
from psycopg_pool import ConnectionPool
from ledger.store.rows import PgRowStore
from projections.registry import TABLES
from projections.runner import Runner
from tests.projections_world import ListLog
url, path = sys.argv[1:]
with ConnectionPool(url, min_size=1, max_size=2, open=True) as pool:
    log = ListLog(pickle.load(open(path, "rb")), pause_s=0.002)
    Runner(log, PgRowStore(pool, TABLES), batch_events=3).run(threading.Event())
"""


def wait_for_backends(pg_url: str) -> None:
    """Until the server has noticed that a killed client is gone: its last commit counts or not."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND state <> 'idle' AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 10
    with psycopg.connect(pg_url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(query).fetchone()
            if row is None or row[0] == 0:
                return
            time.sleep(0.01)


def test_sigkill_between_and_within_batches_loses_and_doubles_nothing(
    pg_url: str, store: PgRowStore, history: list[bytes], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    path.write_bytes(pickle.dumps(history))
    runner = Runner(ListLog(history), store)
    stops = []
    for wait_s in (0.05, 0.11, 0.17, 0.23, 0.05):
        before = runner.position()
        child = subprocess.Popen([sys.executable, "-c", CHILD, pg_url, str(path)],
                                 cwd=Path(__file__).parents[2])  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while runner.position() == before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(wait_s)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        wait_for_backends(pg_url)
        stops.append(runner.position())
        assert runner.digest() == digest_of(replayed(history[: stops[-1]]))
    assert stops == sorted(stops)
    # A quick machine may finish before the last kill; the first ones must hit the work under way.
    assert len({stop for stop in stops if 0 < stop < len(history)}) >= 2, stops
    runner.catch_up()
    assert runner.digest() == expected


def test_two_runners_share_the_work_and_never_double_it(
    pg_url: str, history: list[bytes], expected: str
) -> None:
    stop = threading.Event()
    log = ListLog(history)
    with open_pool(pg_url) as one, open_pool(pg_url) as two:
        runners = [Runner(log, PgRowStore(p, TABLES), batch_events=9) for p in (one, two)]
        threads = [threading.Thread(target=runner.run, args=(stop,)) for runner in runners]
        for thread in threads:
            thread.start()
        assert runners[0].wait_for(len(history) - 1, 30)
        stop.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert runners[0].digest() == runners[1].digest() == expected


def test_a_second_projector_finds_the_lock_taken(
    pg_url: str, store: PgRowStore, history: list[bytes]
) -> None:
    with open_pool(pg_url) as pool:
        other = PgRowStore(pool, TABLES)
        with other.batch() as held:
            assert held is not None
            assert Runner(ListLog(history), store).step() == 0
        assert Runner(ListLog(history), store).step() > 0


def test_wait_for_reads_own_writes(store: PgRowStore, history: list[bytes]) -> None:
    log = ListLog(history[:100])
    runner, stop = Runner(log, store), threading.Event()
    thread = threading.Thread(target=runner.run, args=(stop,))
    assert not runner.wait_for(0, 0.05)
    thread.start()
    try:
        assert runner.wait_for(99, 10)
        assert not runner.wait_for(100, 0.05)
        log.stored = history[:101]
        assert runner.wait_for(100, 10)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_a_running_projector_survives_a_cut_connection(
    pg_url: str, store: PgRowStore, history: list[bytes], expected: str
) -> None:
    log = ListLog(history, pause_s=0.005)
    runner, stop = Runner(log, store, batch_events=10), threading.Event()
    thread = threading.Thread(target=runner.run, args=(stop,))
    thread.start()
    try:
        for _ in range(3):
            time.sleep(0.1)
            with psycopg.connect(pg_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        assert _eventually(runner, len(history))
    finally:
        stop.set()
        thread.join(10)
    assert runner.digest() == expected


def _eventually(runner: Runner, size: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if runner.wait_for(size - 1, 1):
                return True
        except StorageError:
            time.sleep(0.05)
    return False


def test_a_damaged_log_is_refused(store: PgRowStore, history: list[bytes]) -> None:
    runner = Runner(ListLog([*history[:5], history[7]]), store)
    with pytest.raises(StorageError, match="index 5"):
        runner.step()
    assert runner.position() == 0


def test_rows_hold_what_the_port_says(store: PgRowStore) -> None:
    """The contract of the port `Rows`, on memory and on PostgreSQL."""
    _contract(MemoryRows(TABLES))
    with store.batch() as batch:
        assert batch is not None
        _contract(batch.rows)
        batch.flush()
        assert batch.rows.get("balances", ("a", "x")) == {"amount_wei": 10**77}


def _contract(rows: Rows) -> None:
    assert rows.get("balances", ("a", "x")) is None
    rows.put("balances", ("a", "x"), {"amount_wei": 10**77})
    rows.put("balances", ("b", "x"), {"amount_wei": -1})
    rows.put("balances", ("a", "Y"), {"amount_wei": 0})
    rows.put("balances", ("ä", "x"), {"amount_wei": 1})
    row = rows.get("balances", ("a", "x"))
    assert row == {"amount_wei": 10**77}
    row["amount_wei"] = 5  # a copy: what a fold does to it stays with the fold
    assert rows.get("balances", ("a", "x")) == {"amount_wei": 10**77}
    keys = [key for key, _ in rows.scan("balances")]
    assert keys == [("a", "Y"), ("a", "x"), ("b", "x"), ("ä", "x")]
    assert [key for key, _ in rows.scan("balances", ("a",))] == [("a", "Y"), ("a", "x")]
    rows.delete("balances", ("a", "Y"))
    assert rows.get("balances", ("a", "Y")) is None
    assert [key for key, _ in rows.scan("balances", ("a",))] == [("a", "x")]
    rows.put("balances", ("a", "Y"), {"amount_wei": 3})
    rows.delete("balances", ("a", "Y"))
    rows.delete("balances", ("never", "was"))
    assert list(rows.scan("balances", ("a", "Y"))) == []
    with pytest.raises(AssertionError):
        rows.put("balances", ("a", "x"), {"amount": 1})
    with pytest.raises(AssertionError):
        rows.put("balances", ("a",), {"amount_wei": 1})


def test_a_nul_byte_reaches_postgresql_as_a_replacement(store: PgRowStore) -> None:
    world = World()
    world.open()
    # The gate refuses control characters today; a log from before must still project.
    world.add("identity.registered", actor(10), name="a-b")
    world.entries[-1] = world.entries[-1].replace(b'"a-b"', b'"a\\u0000b"')
    world.bind(actor(10), address(1))
    Runner(ListLog(world.entries), store).catch_up()
    with store.snapshot() as rows:
        row = rows.get("identities", (actor(10),))
    assert row is not None
    assert row["name"] == "a\ufffdb"
