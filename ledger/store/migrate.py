"""Database migrations: numbered plain SQL in migrations/, forward only, run by yoyo.

Each migration and its mark of being applied are one transaction, so that a crash leaves either
both or neither (yoyo's own `apply_one` takes two). A PostgreSQL advisory lock, which the server
drops when the connection ends, keeps two migrators apart; yoyo's lock row would outlive a killed
process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from yoyo import read_migrations
from yoyo.backends import get_backend_class
from yoyo.connections import DatabaseURI

from ledger.errors import ConfigError, StorageError

# Any constant; "trib" in ASCII, then 1 for migrations (postgres.py numbers the others).
MIGRATION_LOCK = 0x74726962_00000001


def migrations_dir() -> Path:
    """The folder of SQL files: beside `ledger/` in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "migrations", package / "_migrations"):
        if any(folder.glob("0001.*.sql")):
            return folder
    raise ConfigError(f"the migrations are neither beside nor inside {package}: reinstall")


def migrate(url: str) -> list[str]:
    """Apply what is pending, in order; the ids of the migrations that this call applied."""
    with _backend(url) as backend:
        applied = []
        for migration in _to_apply(backend):
            try:
                with backend.transaction():
                    migration.process_steps(backend, "apply")
                    backend.mark_one(migration)
            except psycopg.Error as error:
                raise StorageError(
                    f"migration {migration.id} failed and left nothing behind: {error}",
                    migration=migration.id,
                ) from error
            applied.append(str(migration.id))
        return applied


def pending(url: str) -> list[str]:
    """Ids of the migrations that `migrate` would apply. Changes nothing but yoyo's own tables."""
    with _backend(url) as backend:
        return [str(migration.id) for migration in _to_apply(backend)]


def _to_apply(backend: Any) -> list[Any]:
    return list(backend.to_apply(read_migrations(str(migrations_dir()))))


@contextmanager
def _backend(url: str) -> Iterator[Any]:
    """yoyo's psycopg 3 backend on any libpq URL or connection string, holding the lock."""
    try:
        options = {name: str(value) for name, value in conninfo_to_dict(url).items()}
        database = options.pop("dbname", None)
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, database, options)
        backend = get_backend_class("postgresql+psycopg")(uri, "_yoyo_migration")
        backend.init_database()
        backend.execute(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
        backend.ensure_internal_schema_updated()
    except psycopg.Error as error:
        raise StorageError(
            f"cannot reach PostgreSQL to migrate it: {str(error).strip()}; check DATABASE_URL"
        ) from error
    try:
        yield backend
    finally:
        backend.connection.close()
