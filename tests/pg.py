"""Real PostgreSQL for tests: one server per session, one fresh database per test or module.

The server is the embedded one, in a temporary folder, or that of TEST_DATABASE_URL (its user must
be allowed to create databases). Databases are copied from a template that holds every migration,
which takes some 30 ms.

Fixtures, shared through tests/conftest.py
    pg_server       url of the server's maintenance database (session)
    pg_url          url of a fresh, migrated database, dropped after the test
    pg_url_module   the same, for a whole module
    pg_empty_url    url of a fresh database without any table
    embedded        an EmbeddedPostgres of this module alone, whose tests may crash it at will
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate

# Tests crash the server process, never the machine: what reached the kernel survives.
FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB"}


@contextmanager
def temporary_home() -> Iterator[Path]:
    """A folder that an unprivileged server user can reach (pytest's tmp_path is 0700)."""
    home = Path(tempfile.mkdtemp(prefix="tributary-test-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def create_database(server: str, *, template: str = "template0") -> str:
    """Make a database and return its url (a libpq connection string)."""
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return make_conninfo(server, dbname=name)


def drop_database(server: str, url: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@contextmanager
def fresh_database(server: str, *, template: str = "template0") -> Iterator[str]:
    url = create_database(server, template=template)
    try:
        yield url
    finally:
        drop_database(server, url)


@pytest.fixture(scope="session")
def pg_server() -> Iterator[str]:
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    with temporary_home() as home, EmbeddedPostgres(home, settings=FAST) as server:
        yield server.url


@pytest.fixture(scope="session")
def pg_template(pg_server: str) -> Iterator[str]:
    """Name of the migrated template database."""
    with fresh_database(pg_server) as url:
        migrate(url)
        yield str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])


@pytest.fixture
def pg_url(pg_server: str, pg_template: str) -> Iterator[str]:
    with fresh_database(pg_server, template=pg_template) as url:
        yield url


@pytest.fixture(scope="module")
def pg_url_module(pg_server: str, pg_template: str) -> Iterator[str]:
    with fresh_database(pg_server, template=pg_template) as url:
        yield url


@pytest.fixture
def pg_empty_url(pg_server: str) -> Iterator[str]:
    with fresh_database(pg_server) as url:
        yield url


@pytest.fixture(scope="module")
def embedded() -> Iterator[EmbeddedPostgres]:
    with temporary_home() as home, EmbeddedPostgres(home, settings=FAST) as server:
        yield server
