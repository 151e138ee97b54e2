"""Fixtures that every test may use. The PostgreSQL ones are described in tests/pg.py."""

import faulthandler

import pytest

from tests.pg import (  # noqa: F401
    embedded,
    pg_empty_url,
    pg_server,
    pg_template,
    pg_url,
    pg_url_module,
)

EXIT_S = 60.0
"""Between the last test and the end of the process: threads to join, engines to stop."""


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A run whose process does not end shows where it stands, and fails."""
    faulthandler.dump_traceback_later(EXIT_S, exit=True, file=2)
