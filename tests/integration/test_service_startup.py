"""`tributary up` where something is in its way: said at once, with nothing left running."""

import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.pg import temporary_home
from tests.service_world import Up, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")

NOWHERE = "postgresql://ann:secret-word@127.0.0.1:1/none"


@pytest.fixture
def up() -> Iterator[Up]:
    with temporary_home() as folder:
        (folder / "home").mkdir(mode=0o755)
        service = Up(folder / "home")
        try:
            yield service
        finally:
            service.destroy()


def test_a_port_in_use_is_named_and_nothing_is_started(up: Up) -> None:
    with closing(socket.create_server(("127.0.0.1", up.port))):
        done = up.run("up")
    assert done.returncode == 8
    assert f"127.0.0.1:{up.port}" in done.stderr
    assert "TRIBUTARY_PORT" in done.stderr
    assert "Traceback" not in done.stderr
    assert up.processes() == {}
    assert not (up.home / "postgres").exists()


@pytest.mark.parametrize("command", ["up", "migrate", "projections status", "doctor"])
def test_a_database_that_is_not_there(up: Up, command: str) -> None:
    done = up.run(*command.split(), DATABASE_URL=NOWHERE)
    said = done.stdout + done.stderr
    assert done.returncode == 7
    assert "PostgreSQL" in said
    assert "127.0.0.1" in said
    assert "DATABASE_URL" in said
    assert "secret-word" not in said
    assert "Traceback" not in said
    assert up.processes() == {}


def test_a_chain_that_is_not_there(up: Up) -> None:
    done = up.run("up", CHAIN_RPC_URL="http://127.0.0.1:1")
    assert done.returncode == 7
    assert "no answer from the EVM node" in done.stderr
    assert up.processes() == {}, "the database that was started is stopped"


def test_a_setting_that_is_none(up: Up) -> None:
    done = up.run("up", TRIBUTARY_PORT="eighty")
    assert done.returncode == 8
    assert "port" in done.stderr
    assert "OPERATIONS" in done.stderr


@pytest.mark.parametrize(
    ("policy", "word"),
    [(None, "TRIBUTARY_WITNESS_POLICY"), ("no-such-file", "no-such-file"), ("junk", "junk")],
)
def test_a_witness_policy_that_cannot_be_used(up: Up, policy: str | None, word: str) -> None:
    (up.home / "junk").write_bytes(bytes(range(200)))
    settings = {} if policy is None else {"TRIBUTARY_WITNESS_POLICY": str(up.home / policy)}
    began = time.monotonic()
    done = up.run("up", TRIBUTARY_WITNESS_REQUIRED="1", **settings)
    assert done.returncode == 8
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30
    assert up.processes() == {}


def test_what_only_the_api_refuses_is_said_too(up: Up) -> None:
    """Its own words, at once, and not those of a wait that ran out."""
    (up.home / "log").mkdir()
    (up.home / "log/promises.json").write_text("no promises")
    done = up.run("up")
    assert done.returncode == 8
    assert "promises.json" in done.stderr
    assert up.processes() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts(up: Up, number: signal.Signals) -> None:
    up.launch()
    until("the first process", lambda: up.pid_of("api"), 30)
    assert up.end(number) == 0, up.said()
    assert "Ready." not in up.said()
    assert up.processes() == {}
