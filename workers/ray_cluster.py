"""The Ray cluster that the workers use: a local one that we start, or one that is there already.

Knows Ray's command line, files and pids; no training, serving or ledger. A local Ray listens on
127.0.0.1 alone, asks every client for a token, and keeps its files in a folder of its own.

State under `<home>/ray`, and who may change it
    owner.lock     flock(2) held by the process that owns the running Ray. The kernel drops it
                   however that process ends. Held elsewhere: we adopt that Ray, and leave it
                   running. Free while Ray processes of this home run: orphans, ended at the start.
    token          RAY_AUTH_TOKEN of this cluster, 64 hex digits, mode 0600, made once.
    cluster.json   where the running Ray answers; written by the owner, read by everyone else
                   (`find`), gone when the owner stopped it.
    ray.log        what `ray start` says. Ray's own logs: `logs`, a link into its folder in the
                   temporary directory (a Unix socket's path must be short, a home need not be).

`ray start --block` is the child of a small guard (`_ray_guard.py`), which ends it when the owner
is gone; the guard killed too, the next `start` ends what is left. Never `ray stop`: it would end
every Ray of the user.

A Ray driver whose cluster died may block for ever in Ray's own calls. So each goes through `call`,
which has a limit; a process where one was reached (`hung`) can join no cluster any more and should
end. Ray itself ends a driver that waits for a dead cluster for RECONNECT_S: the last resort, which
a service that looks after its cluster every second does not come to see.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from ledger.errors import ComputeError, ConfigError
from workers import _ray_guard
from workers.bounded import Hangs, bounded

log = structlog.get_logger(__name__)
T = TypeVar("T")

NAMESPACE = "tributary"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.1
OBJECT_STORE_BYTES = 128 * 2**20
"""Nothing large travels through Ray here: weights and rows go through files and blobs."""
MAX_TEMP_CHARS = 40
"""sockaddr_un.sun_path holds 103 usable bytes; Ray adds up to 62 of its own."""
JOIN_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 60.0
"""Of Ray's calls that have no limit of their own."""
RECONNECT_S = 120
_LOOPBACK = "127.0.0.1"
_QUIET = {"RAY_task_events_report_interval_ms": "0", "RAY_enable_metrics_collection": "0"}
"""No task events, no metrics from within Ray. Besides costing cores, a driver whose cluster died
waits for both, up to 20 s, before it can join the next one."""


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """How to reach a Ray cluster. `token_file` is None where the environment carries the token.

    `python` starts a job's entry point on the cluster's head.
    """

    address: str
    jobs_url: str
    token_file: str | None
    python: str

    def env(self) -> dict[str, str]:
        """What a process needs in its environment, before it imports Ray, to join the cluster."""
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.token_file}
        # On a loopback cluster, drivers must not pick another interface's address for themselves.
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        return {
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
            **_QUIET,
            # Its handler would end the process at SIGTERM, before ours can stop it in order.
            "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
            **({k: v for k, v in own.items() if v} if self.token_file else {}),
            **(loopback if self.address.startswith(_LOOPBACK) else {}),
        }


class AttachedRay:
    """A cluster that someone else runs: `RAY_ADDRESS` (host:port), its dashboard for jobs.

    The cluster's nodes need this package and the worker's home on a shared file system. Token
    authentication is the environment's: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN(_PATH).
    """

    def __init__(self, home: Path, address: str, jobs_url: str | None = None) -> None:
        self._file = _folder(home) / "cluster.json"
        url = jobs_url or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not url:
            raise ConfigError(
                f"RAY_ADDRESS is {address}, but where do its jobs go? Set RAY_API_SERVER_ADDRESS "
                "to the dashboard's URL, such as http://head:8265"
            )
        self.info = ClusterInfo(address=address, jobs_url=url, token_file=None, python="python")

    def start(self) -> Self:
        _write_json(self._file, asdict(self.info))
        return self

    def alive(self) -> bool:
        host, _, port = self.info.address.rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host, int(port)), timeout=2).close()
            return True
        return False

    def stop(self) -> None:
        """Forget it; it goes on running."""
        self._file.unlink(missing_ok=True)


class LocalRay:
    """One Ray on this machine; `with LocalRay(home) as ray: connect(ray.info)`.

    `num_cpus` is what Ray schedules by, not a limit. Errors are ComputeError.
    """

    def __init__(
        self,
        home: Path,
        *,
        num_cpus: int | None = None,
        object_store_bytes: int = OBJECT_STORE_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.folder = _folder(home)
        self.temp = _temp_folder(self.folder)
        self._num_cpus = num_cpus or max(2, os.cpu_count() or 2)
        self._object_store_bytes = object_store_bytes
        self._start_timeout_s = start_timeout_s
        self._lock_fd: int | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._info: ClusterInfo | None = None

    @property
    def info(self) -> ClusterInfo:
        if self._info is None:
            raise ComputeError("this local Ray is not running; call start() first")
        return self._info

    @property
    def address(self) -> str:
        return self.info.address

    @property
    def jobs_url(self) -> str:
        return self.info.jobs_url

    def env(self) -> dict[str, str]:
        return self.info.env()

    @property
    def owned(self) -> bool:
        """Whether this object started the Ray (and will stop it), rather than adopted it."""
        return self._lock_fd is not None

    def alive(self) -> bool:
        if self._guard is not None:
            return self._guard.poll() is None
        return self._info is not None and _port_open(self._info.address)

    def start(self) -> Self:
        """Start Ray, or adopt the one that another process of ours runs. Idempotent."""
        if self.alive():
            return self
        self.stop()  # a Ray of ours that died by itself: start over
        deadline = time.monotonic() + self._start_timeout_s
        while not self._try_own():
            found = find(self.folder.parent)
            if found is not None and _port_open(found.address):
                self._info = found
                return self
            if time.monotonic() > deadline:
                raise ComputeError(
                    f"another process holds {self.folder}/owner.lock, yet its Ray does not "
                    f"answer; see {self.folder}/ray.log, end that process"
                )
            time.sleep(POLL_S)
        try:
            _ray_guard.end_within(str(self.temp))  # what a killed owner with a killed guard left
            self._launch(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, *, erase: bool = False) -> None:
        """End our Ray by its pids; an adopted one is left alone. Idempotent. `erase` deletes
        Ray's temporary folder with its logs too."""
        self._info = None
        if self._lock_fd is None:
            return
        (self.folder / "cluster.json").unlink(missing_ok=True)
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            try:
                self._guard.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            self._guard = None
        _ray_guard.end_within(str(self.temp))
        if erase:
            shutil.rmtree(self.temp, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- the owner's work ----------------------------------------------------------------------

    def _try_own(self) -> bool:
        fd = os.open(self.folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return False
        self._lock_fd = fd
        return True

    def _launch(self, deadline: float) -> None:
        shutil.rmtree(self.temp, ignore_errors=True)  # sessions of earlier runs
        _private_folder(self.temp)
        # A guard ends what belongs to its own start: one that is late, its owner killed and
        # another Ray started meanwhile, must not end that one.
        place = self.temp / f"start-{secrets.token_hex(4)}"
        place.mkdir()
        token = _token_file(self.folder)
        dashboard = f"{_LOOPBACK}:{_free_port()}"
        log = self.folder / "ray.log"
        log.write_bytes(b"")
        guard = [sys.executable, "-I", "-S", _ray_guard.__file__]
        self._guard = subprocess.Popen(
            [*guard, str(log), str(place), *self._command(dashboard)],
            stdin=subprocess.PIPE,
            env=_cluster_environment(token),
            cwd=place,
            start_new_session=True,
        )
        address_file = self.temp / "r" / "ray_current_cluster"
        # Ray writes the address once GCS, dashboard and raylet are up.
        while not (address_file.exists() and _port_open(dashboard)):
            self._check_start(log, deadline)
            time.sleep(POLL_S)
        self._info = ClusterInfo(
            address=address_file.read_text().strip(),
            jobs_url=f"http://{dashboard}",
            token_file=str(token),
            python=sys.executable,
        )
        link = self.folder / "logs"
        link.unlink(missing_ok=True)
        link.symlink_to(self.temp / "r" / "session_latest" / "logs")
        _write_json(self.folder / "cluster.json", asdict(self._info))

    def _command(self, dashboard: str) -> list[str]:
        host, _, port = dashboard.rpartition(":")
        options = {
            "port": 0,
            "node-ip-address": _LOOPBACK,
            "dashboard-host": host,
            "dashboard-port": port,
            "dashboard-agent-listen-port": 0,
            # The default is a fixed range, which a second Ray on the machine would share.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": self._num_cpus,
            "object-store-memory": self._object_store_bytes,
            # Ray makes it writable for everybody; the folder around it is ours alone.
            "temp-dir": self.temp / "r",
            "include-log-monitor": "false",
            "log-color": "false",
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        run = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        return [*run, "--disable-usage-stats", *flags]

    def _check_start(self, log: Path, deadline: float) -> None:
        assert self._guard is not None
        ended = self._guard.poll()
        if ended is None and time.monotonic() < deadline:
            return
        tail = log.read_text(errors="replace")[-2_000:]
        how = f"ended with status {ended}" if ended is not None else "did not get ready in time"
        raise ComputeError(f"the local Ray {how}; the end of {log}: {tail}")


def without_client_server(params: object, head: bool) -> None:
    """RAY_START_HOOK: no Ray Client server. We have no use for it, and its port is fixed."""
    params.ray_client_server_port = None  # type: ignore[attr-defined]


def open_cluster(
    home: Path, *, address: str | None = None, num_cpus: int | None = None
) -> LocalRay | AttachedRay:
    """The cluster at `address` (RAY_ADDRESS), or a local one; not started yet."""
    if address:
        return AttachedRay(home, address)
    return LocalRay(home, num_cpus=num_cpus)


def end_orphans(home: Path) -> int:
    """End what is left of this home's local Ray when nobody owns it; how many processes.

    Its guard does the same, some seconds after its owner was killed. A new service must not begin
    beside the old one's actors, so it does not wait for that.
    """
    ray = LocalRay(home)
    if not ray._try_own():
        return 0
    try:
        return _ray_guard.end_within(str(ray.temp))
    finally:
        ray.stop()


def find(home: Path) -> ClusterInfo | None:
    """The cluster that the worker service of this home uses now, or None."""
    try:
        value = json.loads((Path(home).absolute() / "ray" / "cluster.json").read_text())
        return ClusterInfo(**value)
    except (OSError, ValueError, TypeError):
        return None


def prepare(info: ClusterInfo) -> None:
    """Set this process up for the cluster, connecting nothing yet: the token, and loopback."""
    # Not RAY_ADDRESS: that is for people to set, and what we start must not take ours for it.
    wanted = {k: v for k, v in info.env().items() if k != "RAY_ADDRESS"}
    with _preparing:  # also because Ray cannot be imported by two threads at once
        changed = any(os.environ.get(name) != value for name, value in wanted.items())
        os.environ.update(wanted)
        import ray.job_submission
        from ray._private import ray_constants

        if not changed:
            return
        # Ray reads these when it is imported, which may have happened before, and keeps them. Its
        # own tests of token authentication change them so; Ray is pinned to one minor version.
        raylet: Any = ray._raylet
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
        if info.address.startswith(_LOOPBACK):
            ray_constants.ENABLE_RAY_CLUSTER = False
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


_preparing = threading.Lock()
_connecting = threading.Lock()
_connected: str | None = None
_hung: str | None = None


def hung() -> str | None:
    """What did not return in this process, or None. After that it should end, by `os._exit`."""
    return _hung


def call(what: str, work: Callable[[], T], limit_s: float = CALL_TIMEOUT_S) -> T:
    """A call of Ray that may block for ever, with a limit. Raises `bounded.Hangs`, and from then on
    at once."""
    global _hung
    if _hung is not None:
        raise Hangs(f"{_hung} still hangs in this process; start it again")
    try:
        return bounded(what, work, limit_s)
    except Hangs as error:
        log.error("ray hangs", what=what, limit_s=limit_s)
        _hung = what
        _forget_exit()
        raise error


def _forget_exit() -> None:
    """Ray would shut down once more when the interpreter ends, and hang there again."""
    import ray

    atexit.unregister(ray.shutdown)


def connect(info: ClusterInfo) -> None:
    """Make this process a driver of the cluster; again after the cluster changed. Idempotent.

    Raises ComputeError when the cluster does not answer, `bounded.Hangs` when Ray does not return.
    """
    global _connected
    with _connecting:
        prepare(info)
        import ray

        if ray.is_initialized():
            if _connected == info.address:
                return
            call("ray.shutdown", ray.shutdown, LEAVE_TIMEOUT_S)
        _connected = None
        if not _port_open(info.address):
            raise ComputeError(f"no Ray answers at {info.address}; is the worker service running?")
        try:
            # On a thread that is not the main one: there Ray would take SIGTERM for itself.
            call("ray.init", lambda: _join(info), JOIN_TIMEOUT_S)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ComputeError(f"cannot join the Ray at {info.address}: {error}") from error
        _connected = info.address


def _join(info: ClusterInfo) -> None:
    import ray

    # It warns that it did not take SIGTERM.
    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)
    ray.init(
        address=info.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
    )


def must_answer() -> None:
    """Raises ComputeError when the cluster that this process joined is gone."""
    if _connected is None or not _port_open(_connected):
        raise ComputeError("Ray died; run the command again, it goes on where it stood")


def disconnect() -> None:
    """Leave the cluster, if that is possible within LEAVE_TIMEOUT_S (see `hung`). Idempotent."""
    global _connected
    with _connecting:
        if _connected is not None:
            import ray

            with contextlib.suppress(Hangs):
                call("ray.shutdown", ray.shutdown, LEAVE_TIMEOUT_S)
        _connected = None


def _cluster_environment(token: Path) -> Mapping[str, str]:
    """The environment that every process of the cluster inherits."""
    root = str(Path(__file__).resolve().parents[1])
    # Workers must find this very package; `-m` and a job's own folder are no help there.
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **inherited,
        "PYTHONPATH": path,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray puts a node on the machine's outer interface, even when told 127.0.0.1, unless it
        # believes that clusters cannot span machines.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_START_HOOK": "workers.ray_cluster.without_client_server",
        # Idle Python workers cost seconds of both cores at the start, and memory later.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Ray would run all of its workers at 15: serving goes first, and what may wait gives way
        # by itself (`actors.give_way`).
        "RAY_worker_niceness": "0",
        **_QUIET,
    }


def _folder(home: Path) -> Path:
    folder = Path(home).absolute() / "ray"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _temp_folder(folder: Path) -> Path:
    """`<temporary directory>/tributary-ray-<uid>-<hash of the home>`, short and always the same."""
    base = tempfile.gettempdir()
    name = f"trb-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:10]}"
    if len(base) + 1 + len(name) > MAX_TEMP_CHARS:
        base = "/tmp"  # noqa: S108 - the folder in it is ours alone, checked below
    return Path(base) / name


def _private_folder(path: Path) -> None:
    """Make a folder only we can enter; refuse one that somebody else put there."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ComputeError(f"{path} is not a folder of ours with mode 0700: remove it")


def _token_file(folder: Path) -> Path:
    path = folder / "token"
    if not path.exists():
        part = folder / f".token.{os.getpid()}"
        part.touch(mode=0o600)
        part.write_text(secrets.token_hex(32))
        part.replace(path)
    return path


def _free_port() -> int:
    """A port that is free now. Ray cannot be asked to choose the dashboard's itself and tell; a
    collision in the moment between fails the start, which the caller repeats."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _port_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value))
    part.replace(path)
