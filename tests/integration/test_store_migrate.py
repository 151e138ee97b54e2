"""Migrations on a real PostgreSQL: forward only, repeatable, and what `eventsourcing` expects."""

from pathlib import Path
from threading import Thread

import psycopg
import pytest
from eventsourcing.postgres import (
    PostgresAggregateRecorder,
    PostgresApplicationRecorder,
    PostgresDatastore,
)
from psycopg.conninfo import conninfo_to_dict

from ledger.errors import StorageError
from ledger.store import migrate as migrate_module
from ledger.store.migrate import migrate, migrations_dir, pending


def test_migrations_apply_once(pg_empty_url: str) -> None:
    files = sorted(path.stem for path in migrations_dir().glob("*.sql"))
    assert pending(pg_empty_url) == files
    assert migrate(pg_empty_url) == files
    assert pending(pg_empty_url) == []
    assert migrate(pg_empty_url) == []


def test_two_migrators_apply_each_migration_once(pg_empty_url: str) -> None:
    applied: list[str] = []
    threads = [Thread(target=lambda: applied.extend(migrate(pg_empty_url))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(applied) == sorted(path.stem for path in migrations_dir().glob("*.sql"))


def test_a_failing_migration_leaves_nothing(
    pg_empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0001.half.sql").write_text("CREATE TABLE half (a int);\nSELECT 1/0;\n")
    monkeypatch.setattr(migrate_module, "migrations_dir", lambda: tmp_path)
    with pytest.raises(StorageError, match=r"0001\.half"):
        migrate(pg_empty_url)
    with psycopg.connect(pg_empty_url) as connection:
        assert connection.execute("SELECT to_regclass('half')").fetchone() == (None,)
    assert pending(pg_empty_url) == ["0001.half"]


def test_unreachable_database_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="DATABASE_URL"):
        migrate("postgresql://nobody@127.0.0.1:1/none?connect_timeout=1")


def test_tables_are_what_eventsourcing_expects(pg_url: str) -> None:
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA theirs")
    options = {k: str(v) for k, v in conninfo_to_dict(pg_url).items()}
    with PostgresDatastore(
        dbname=options["dbname"],
        host=options["host"],
        port=options.get("port", "5432"),
        user=options["user"],
        password=options.get("password", ""),
        schema="theirs",
    ) as datastore:
        PostgresApplicationRecorder(datastore).create_table()
        PostgresAggregateRecorder(datastore, events_table_name="stored_snapshots").create_table()
    with psycopg.connect(pg_url) as connection:
        for table in ("stored_events", "stored_snapshots", "stored_event_uuid"):
            theirs = _columns(connection, "theirs", table)
            ours = _columns(connection, "public", table)
            assert theirs
            assert theirs.items() <= ours.items(), table
            assert _indexes(connection, "theirs", table) <= _indexes(connection, "public", table)


def _columns(connection: psycopg.Connection, schema: str, table: str) -> dict[str, object]:
    rows = connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull"
        " FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
        " JOIN pg_namespace s ON s.oid = c.relnamespace"
        " WHERE s.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped",
        [schema, table],
    )
    return {name: (type_, not_null) for name, type_, not_null in rows}


def _indexes(connection: psycopg.Connection, schema: str, table: str) -> set[tuple[str, str]]:
    rows = connection.execute(
        "SELECT indexname, replace(indexdef, schemaname || '.', '') FROM pg_indexes"
        " WHERE schemaname = %s AND tablename = %s",
        [schema, table],
    )
    return {(name, definition) for name, definition in rows}
