"""Fixtures that every test may use. The PostgreSQL ones are described in tests/pg.py."""

from tests.pg import (  # noqa: F401
    embedded,
    pg_empty_url,
    pg_server,
    pg_template,
    pg_url,
    pg_url_module,
)
