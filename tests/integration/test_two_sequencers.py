"""Two sequencers on one database, in processes of their own: one at a time, no fork, hand-over
within seconds, whether the first is killed, stopped, or loses its session.

Each has its own memory of what was signed, as on two machines with one key.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ledger.store import tiles
from tests.integration.test_log_postgres import Server, reach, stranger_checks, writing

STOPPED_S = tiles.SILENCE_S + 3.0
"""What PostgreSQL waits for a sign of life, the other's next try, and a loaded machine."""


class Process:
    """`Sequencer.run` in a child."""

    def __init__(self, url: str, memory: Path, arm: Callable[[], None] = lambda: None) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                arm()
                Server(url, memory).sequencer.run(threading.Event())
            finally:
                os._exit(3)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """SIGKILL, which also ends a stopped one."""
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def watcher(pg_url: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(pg_url, tmp_path / "watcher.json")
    yield server
    server.close()


def holders(url: str) -> list[int]:
    """Sessions that hold the sequencer's lock."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
        ).fetchall()
    return [int(pid) for (pid,) in rows]


def cut_session(url: str, process: Process) -> None:
    [session] = holders(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [session])


ENDS: dict[str, tuple[Callable[[str, Process], Any], float]] = {
    "killed": (lambda url, process: process.send(signal.SIGKILL), 3.0),
    "stopped": (lambda url, process: process.send(signal.SIGSTOP), STOPPED_S),
    "session cut": (cut_session, 3.0),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_other_takes_over(pg_url: str, tmp_path: Path, watcher: Server, how: str) -> None:
    end, within_s = ENDS[how]
    first = Process(pg_url, tmp_path / "a.json")
    second: Process | None = None
    try:
        with writing(pg_url, writers=2):
            reach(watcher, 10, within_s=10)
            second = Process(pg_url, tmp_path / "b.json")
            reach(watcher, watcher.log.size() + 10, within_s=10)
            assert not (tmp_path / "b.json").exists(), "it waits for the lock"
            end(pg_url, first)
            began = time.monotonic()
            reach(watcher, watcher.log.size() + 1, within_s=within_s)
            took_s = time.monotonic() - began
            if how == "stopped":
                first.send(signal.SIGCONT)  # in the belief that it is the one sequencer
            reach(watcher, watcher.log.size() + 100, within_s=10)
            assert len(holders(pg_url)) == 1
        print(f"{how}: a checkpoint of new entries after {took_s:.2f} s")
        assert stranger_checks(watcher, pg_url) > 100
    finally:
        first.end()
        if second is not None:
            second.end()


def test_stopped_within_its_transaction(
    pg_url: str, tmp_path: Path, watcher: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and checkpoint are written, the table is locked, the commit does not come."""
    monkeypatch.setattr(tiles, "SILENCE_S", 2.0)

    def arm() -> None:
        real = psycopg.Transaction.__exit__
        left = [5]

        def stop_before_commit(transaction: Any, *error: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(transaction, *error)

        psycopg.Transaction.__exit__ = stop_before_commit  # type: ignore[assignment,method-assign]

    first = Process(pg_url, tmp_path / "a.json", arm)
    second: Process | None = None
    try:
        with writing(pg_url, writers=2):
            os.waitpid(first.pid, os.WUNTRACED)
            size = watcher.log.size()
            second = Process(pg_url, tmp_path / "b.json")
            reach(watcher, size, within_s=STOPPED_S)
            first.send(signal.SIGCONT)  # its commit comes too late, and is refused
            reach(watcher, watcher.log.size() + 50, within_s=10)
        assert stranger_checks(watcher, pg_url) > size
    finally:
        first.end()
        if second is not None:
            second.end()


def test_an_idle_sequencer_keeps_its_lock(
    pg_url: str, tmp_path: Path, watcher: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heart beats while nothing is written, or while one step takes long."""
    monkeypatch.setattr(tiles, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(tiles, "SILENCE_S", 0.6)
    with watcher.tiles.sequencer_lock() as held:
        assert held
        sessions = holders(pg_url)
        time.sleep(1.3)
        assert holders(pg_url) == sessions
        while watcher.sequencer.step():
            pass
    assert holders(pg_url) == []
