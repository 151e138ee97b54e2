"""The embedded PostgreSQL: one start, one stop, and every way in which a process may end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from ledger.errors import StorageError
from ledger.store import _host as host
from ledger.store import embedded as module
from ledger.store.embedded import EmbeddedPostgres
from tests.pg import FAST, temporary_home

ROOT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pathlib import Path
from ledger.store.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"}).start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def shared_home() -> Iterator[Path]:
    """initdb is the slow part: most tests share one cluster, each starts its own server."""
    with temporary_home() as path:
        yield path


@pytest.fixture
def home(shared_home: Path) -> Iterator[Path]:
    yield shared_home
    server = EmbeddedPostgres(shared_home)
    _until(lambda: server.pid is None)  # nothing that a test started is left


def _embedded(home: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(home, settings=FAST)


def _answer(server: EmbeddedPostgres) -> object:
    with psycopg.connect(server.url) as connection:
        return connection.execute("SELECT current_database()").fetchone()


def _until(condition: object, timeout_s: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _owner_process(home: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_start_is_idempotent_and_data_survives_a_stop(home: Path) -> None:
    with _embedded(home) as server:
        pid = server.pid
        assert pid is not None
        assert server.owned
        assert server.start().pid == pid
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    assert server.pid is None
    assert not _alive(pid)
    with _embedded(home) as server, psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    server.stop()  # a second stop is nothing


def test_it_listens_on_no_network_address_and_not_as_root(home: Path) -> None:
    with _embedded(home) as server:
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
            assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0
        assert server.data_dir.stat().st_mode & 0o777 == 0o700
        assert server._socket_dir.stat().st_mode & 0o777 == 0o700


def test_a_second_process_shares_the_server_and_does_not_stop_it(home: Path) -> None:
    owner = _owner_process(home)
    try:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        with _embedded(home) as server:
            assert not server.owned
            assert server.pid == pid
            assert _answer(server) == ("tributary",)
        assert _alive(pid)
    finally:
        owner.terminate()
        owner.wait()
    _until(lambda: not _alive(pid))


def test_sigkill_of_the_owner_ends_the_server(home: Path) -> None:
    owner = _owner_process(home)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    with _embedded(home) as server:  # at once: the old server may still be shutting down
        assert server.owned
        assert server.pid != pid
        assert _answer(server) == ("tributary",)
    assert not _alive(pid)


def test_a_guard_that_ends_while_a_start_waits_for_it_is_replaced(home: Path) -> None:
    """As one that gave up a server which kept dying: it still lived when `start` looked."""
    with _embedded(home) as server:
        pid, guard = server.pid, server._guard
        assert pid is not None
        assert guard is not None
        os.kill(guard.pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGINT)
        _until(lambda: server.pid is None)
        late = threading.Timer(0.3, os.kill, (guard.pid, signal.SIGKILL))
        late.start()
        try:
            server.start()
        finally:
            late.join(10)
        assert server.pid not in (None, pid)
        assert _answer(server) == ("tributary",)


def test_a_killed_guard_takes_the_server_along(home: Path) -> None:
    server = _embedded(home).start()
    pid = server.pid
    assert pid is not None
    assert server._guard is not None
    server._guard.kill()
    _until(lambda: not _alive(pid))
    server.start()
    assert _answer(server) == ("tributary",)
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_orphan_is_ended_by_the_next_start(home: Path) -> None:
    """A server that neither owner nor guard watches any more, as if both had been killed."""
    with _embedded(home) as first:
        data = first.data_dir
        user, folder = first._user, first._socket_dir
    orphan = subprocess.Popen(
        [
            str(host.find_binaries(data.parent, user) / "postgres"),
            *("-D", str(data)),
            *("-c", "listen_addresses="),
            *("-c", f"unix_socket_directories={folder}"),
        ],
        cwd=data,
        stderr=subprocess.DEVNULL,
        env=module._environment(),
        **user.popen(),
    )  # type: ignore[call-overload]
    _until(lambda: _embedded(home).pid == orphan.pid)
    with _embedded(home) as second:
        assert second.pid != orphan.pid
        assert orphan.wait(timeout=10) is not None
        assert _answer(second) == ("tributary",)


def test_a_pid_file_that_names_an_innocent_process_is_harmless(home: Path) -> None:
    with _embedded(home) as server:
        kept = (server.data_dir / "postmaster.pid").read_text()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        stale = server.data_dir / "postmaster.pid"
        stale.write_text(kept.replace(kept.split("\n")[0], str(bystander.pid), 1))
        with _embedded(home) as again:
            assert _answer(again) == ("tributary",)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_a_crashed_server_comes_back(home: Path, number: int) -> None:
    with _embedded(home) as server:
        pid = server.pid
        assert pid is not None
        os.kill(pid, number)
        _until(lambda: server.pid not in (None, pid))
        server.start()  # waits until it answers
        assert _answer(server) == ("tributary",)


def test_an_unfinished_initdb_is_done_again() -> None:
    with temporary_home() as home:
        server = _embedded(home)
        half = server.data_dir.with_name("data.new")
        with server:
            pass
        server.erase()
        assert not server.data_dir.exists()
        host.make_folder(half, server._user, 0o700)
        (half / "PG_VERSION").write_text("half")
        with server:
            assert _answer(server) == ("tributary",)
            with pytest.raises(StorageError, match="stop that first"):
                _erase_as_another(server)


def _erase_as_another(server: EmbeddedPostgres) -> None:
    EmbeddedPostgres(server.home).erase()


def test_a_home_made_under_a_strict_umask_is_reachable() -> None:
    with temporary_home() as home:
        before = os.umask(0o077)
        try:
            server = _embedded(home / "new" / "home")
            host.make_folder(server._base, server._user, 0o700)
        finally:
            os.umask(before)
        assert server._base == home / "new" / "home" / "postgres"
        assert _embedded(home / "new" / "home")._base == server._base


def test_a_long_home_gets_a_short_socket_folder(home: Path) -> None:
    long = EmbeddedPostgres(home / ("long" * 30))
    path = long._socket_dir / ".s.PGSQL.5432"
    assert len(os.fsencode(path)) <= host.MAX_SOCKET_PATH_BYTES


def test_a_broken_setting_is_reported_with_the_servers_words(home: Path) -> None:
    with pytest.raises(StorageError, match="no_such_setting"):
        EmbeddedPostgres(home, settings={"no_such_setting": "1"}).start()
    with _embedded(home) as server:
        assert server.owned


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes user")
def test_root_with_a_private_home_and_private_binaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under /root: data and binaries go to a folder that the server's user can reach."""
    tmp_path.chmod(0o700)
    with temporary_home() as elsewhere:
        monkeypatch.setattr(host, "ROOT_HOME", elsewhere)
        real = host.reachable
        monkeypatch.setattr(
            host, "reachable", lambda path, user: path.name != "postgres" and real(path, user)
        )
        with _embedded(tmp_path / "home") as server:
            assert elsewhere in server.data_dir.parents
            exe = Path(f"/proc/{server.pid}/exe").resolve()
            assert elsewhere in exe.parents
            assert _answer(server) == ("tributary",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes user")
def test_as_an_ordinary_user(home: Path) -> None:
    """The same code, run by somebody who is not root.

    The process gives up root after its imports, since our own Python may lie where only root
    reaches; the guard then needs another one.
    """
    pythons = [p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(p).exists()]
    if not pythons:
        pytest.skip("no Python that every user may run")
    code = """
import os, sys, encodings.idna
from pathlib import Path
from ledger.store.embedded import EmbeddedPostgres
import psycopg
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.executable = sys.argv[2]
with EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"}) as server:
    assert server._user.change is False
    with psycopg.connect(server.url) as connection:
        print(server.pid, Path(f"/proc/{server.pid}").stat().st_uid)
"""
    with temporary_home() as mine:
        os.chown(mine, 65534, 65534)
        done = subprocess.run(
            [sys.executable, "-c", code, str(mine), pythons[0]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        pid, uid = map(int, done.stdout.split())
        assert uid == 65534
        assert not _alive(pid)
