"""`tributary up`: engines, then processes, then watching over both.

Engines that are not configured are ours: the embedded PostgreSQL, the development chain. They are
started here, since they must outlive a crash of any single process; Ray is started by the workers
process, and the API finds it through a file in the home. A process that ends is started again,
with a pause that doubles up to MAX_PAUSE_S. When the supervisor itself is killed, processes and
engines notice and stop; the next start adopts or ends whatever is left.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import uuid4

import httpx

from ledger import bootstrap
from ledger.aggregates.application import Ledger
from ledger.aggregates.governance import Governance, Identity
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.domain.ids import actor_of
from ledger.errors import ConfigError, Conflict, LedgerError, Unavailable
from ledger.processes.roles import FOLLOW_PARENT, ORPHAN_PATIENCE_S, PROCESSES_LOCK
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.recorder import system_clock

FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
STOP_TIMEOUT_S = 20.0
READY_TIMEOUT_S = 90.0
POLL_S = 0.2
DEV_CHAIN_FUNDS_WEI = 1_000_000 * 10**18
DEFAULT_POLICY = {
    "version": 1,
    "protocol_bps": 500,
    "owner_bps": 2_500,
    "operator_bps": 1_000,
    "contributors_bps": 6_000,
}

Say = Callable[[str, str], None]


@dataclass(kw_only=True)
class Process:
    """One role, started again when it ends. Its output goes to home/logs/<role>.log."""

    role: str
    environment: dict[str, str]
    log_path: Path
    child: "subprocess.Popen[bytes] | None" = None
    restarts: int = -1
    pause_s: float = FIRST_PAUSE_S
    start_at: float = 0.0
    started_at: float = 0.0
    ended_with: int | None = None
    """Exit code of the run before this one; None before the first end."""

    def start(self) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as sink:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "ledger.processes", self.role],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **self.environment, FOLLOW_PARENT: "1"},
                start_new_session=True,  # Ctrl-C is for the supervisor, which stops us in order
            )
        self.restarts += 1
        self.started_at = time.monotonic()

    def tend(self) -> bool:
        """Start again what ended; whether it was just started."""
        if self.child is not None and self.child.poll() is None:
            if time.monotonic() - self.started_at > MAX_PAUSE_S:
                self.pause_s = FIRST_PAUSE_S
            return False
        if self.child is not None and self.child.stdin:
            self.ended_with = self.child.returncode
            self.child.stdin.close()
            self.child = None
            self.start_at = time.monotonic() + self.pause_s
            self.pause_s = min(self.pause_s * 2, MAX_PAUSE_S)
        if time.monotonic() < self.start_at:
            return False
        self.start()
        return True

    def stop(self) -> None:
        if self.child is None:
            return
        self.child.terminate()
        try:
            self.child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        if self.child.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.child.stdin.close()


@dataclass(kw_only=True)
class Service:
    """A running service. `settings` are those of the processes, with every address filled in."""

    settings: Settings
    processes: dict[str, Process] = field(default_factory=dict)
    engines: list[Callable[[], None]] = field(default_factory=list)
    postgres: EmbeddedPostgres | None = None
    _tending: threading.Lock = field(default_factory=threading.Lock)

    def tend(self) -> list[str]:
        """One round of watching; the roles that were started again."""
        with self._tending:  # two threads would start two of what ended once
            for restore in self.engines:
                with contextlib.suppress(LedgerError):  # tried again in the next round
                    restore()
            return [p.role for p in self.processes.values() if p.tend()]

    def watch(self, stop: threading.Event, say: Say) -> None:
        """Tend until told to stop."""
        while not stop.wait(POLL_S):
            for role in self.tend():
                say(role, f"started again (see {self.processes[role].log_path})")

    def wait_ready(
        self, timeout_s: float = READY_TIMEOUT_S, stop: threading.Event | None = None
    ) -> bool:
        """Until the API answers /readyz with 200, or `stop` is set; whether it is ready."""
        stop = stop or threading.Event()
        deadline = time.monotonic() + timeout_s
        api = self.processes["api"]
        why = "it does not answer"
        while not stop.wait(POLL_S):
            self.tend()
            if api.ended_with == ConfigError.exit_code:  # it will end so each time
                raise ConfigError(f"the API does not start: {_last_reason(api.log_path)}")
            with contextlib.suppress(httpx.HTTPError, ValueError):
                answer = httpx.get(f"{self.settings.url}/readyz", timeout=5)
                if answer.status_code == 200:
                    return True
                why = str(answer.json().get("detail", why))
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the API is not ready after {timeout_s:.0f} s: {why}; see {api.log_path}"
                )
        return False

    def lives(self) -> bool:
        """Whether the API answers at all: then what keeps it from being ready may pass."""
        try:
            return httpx.get(f"{self.settings.url}/livez", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def running(
    settings: Settings, say: Say = lambda what, detail: None, roles: tuple[str, ...] | None = None
) -> Iterator[Service]:
    """The whole service, stopped in reverse order on the way out."""
    with ExitStack() as stack:
        stack.enter_context(_only_one(settings.root))
        _wait_for_orphans(settings.root)
        _end_old_ray(settings)
        _need_free_port(settings.host, settings.port)
        with bootstrap.log_cosigners(settings):
            pass  # a policy that cannot be used is said here, not by a process that never starts
        service = Service(settings=settings)
        _start_postgres(stack, service, say)
        _start_chain(stack, service, say)
        settings = service.settings
        open_ledger(settings)
        say("ledger", f"{settings.log_origin}, operator {_short(settings)}")
        for role in roles or ("api", "projector", "chain", "workers"):
            process = Process(
                role=role,
                environment=settings.environment(),
                log_path=settings.root / "logs" / f"{role}.log",
            )
            service.processes[role] = process
            stack.callback(process.stop)
            process.start()
            say(role, f"started, log {process.log_path}")
        yield service


def _start_postgres(stack: ExitStack, service: Service, say: Say) -> None:
    url = service.settings.database_url
    if url:
        say("database", "DATABASE_URL")
    else:
        server = stack.enter_context(EmbeddedPostgres(service.settings.root))
        service.postgres = server
        service.engines.append(lambda: _revive(server))
        url = server.url
        say("database", f"embedded PostgreSQL, data in {server.data_dir}")
    service.settings = service.settings.model_copy(update={"database_url": url})
    applied = migrate(url)
    if applied:
        say("migrations", ", ".join(applied))


def _revive(server: EmbeddedPostgres) -> None:
    if server.pid is None:
        server.start()


def _start_chain(stack: ExitStack, service: Service, say: Say) -> None:
    from ledger.processes.chain import deploy, dev_chain

    key_file = bootstrap.chain_key_file(service.settings)
    account = bootstrap.wallet_of(key_file)
    if service.settings.chain_rpc_url:
        say("chain", service.settings.chain_rpc_url)
    else:
        chain = stack.enter_context(dev_chain(service.settings))
        service.engines.append(lambda: None if chain.alive else _restart(chain))
        chain.fund(account.address, DEV_CHAIN_FUNDS_WEI)
        service.settings = service.settings.model_copy(
            update={"chain_rpc_url": chain.rpc_url, "dev_chain": True}
        )
        say("chain", f"development anvil at {chain.rpc_url}, id {chain.chain_id}")
    found = deploy(service.settings, key_file)
    say("contracts", f"CheckpointAnchor {found.anchor}, PayoutDistributor {found.distributor}")


def _restart(chain: "object") -> None:
    chain.start()  # type: ignore[attr-defined]


def open_ledger(settings: Settings) -> None:
    """Append the opening events that are missing: ledger, operator, fee policy, worker."""
    key = bootstrap.operator_key(settings)
    worker = bootstrap.ensure_key(settings.key_file(bootstrap.WORKER_KEY))
    worker_actor = actor_of(bytes(worker.verify_key))
    with bootstrap.store(settings) as box, bootstrap.application(box) as ledger:
        if ledger.load(Governance) is None:
            _append(ledger, key, "ledger.opened", {"name": settings.name})
        for signer, name in ((key, f"{settings.name} operator"), (worker, "worker")):
            if ledger.load(Identity, actor_of(bytes(signer.verify_key))) is None:
                _append(ledger, signer, "identity.registered", {"name": name})
        governance = ledger.need(Governance)
        if governance.policy is None:
            _append(ledger, key, "fee_policy.set", DEFAULT_POLICY)
        if not governance.has_role(worker_actor, "worker"):
            _append(ledger, key, "role.granted", {"member": worker_actor, "role": "worker"})


def _append(ledger: Ledger, key: "object", type: str, body: Mapping[str, object]) -> None:
    raw = sign_event(
        key,  # type: ignore[arg-type]
        type=type,
        log=ledger.log_origin,
        body=body,
        id=uuid4(),
        at=system_clock(),
    )
    ledger.append(raw)


def erase(home: Path) -> None:
    """Delete the state of a home, database included. Refuses a folder that is not a home."""
    if not home.exists():
        return
    if any(home.iterdir()) and not (home / "lock").exists():
        raise Conflict(f"{home} was not made by tributary: it is not deleted")
    with _only_one(home):
        EmbeddedPostgres(home).erase()
        shutil.rmtree(home)


@contextmanager
def _only_one(home: Path) -> Iterator[IO[str]]:
    """One supervisor per home; the kernel drops the lock with its holder."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(
                f"another `tributary up` runs on {home}; stop it, or set TRIBUTARY_HOME"
            ) from error
        yield file


def _wait_for_orphans(home: Path) -> None:
    """Until the processes of a killed supervisor have ended: they notice at once, and take some
    seconds. Two of a kind would do no harm, but the old API still holds the port."""
    deadline = time.monotonic() + 10 * ORPHAN_PATIENCE_S
    with (home / PROCESSES_LOCK).open("a") as file:
        while True:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise Conflict(
                    f"processes of an earlier `tributary up` on {home} do not end; find them with "
                    "`pgrep -f ledger.processes` and end them"
                )
            time.sleep(POLL_S)


def _end_old_ray(settings: Settings) -> None:
    """A killed supervisor's Ray outlives its processes by some seconds, actors and all."""
    from workers.ray_cluster import end_orphans

    end_orphans(bootstrap.workers_home(settings))


def _need_free_port(host: str, port: int) -> None:
    """Said here, where a person reads it, and before anything is started."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; end what listens there, or set "
                "TRIBUTARY_PORT to a free port"
            ) from error


def _last_reason(log: Path) -> str:
    """Why the process stopped, as `roles.main` logged it last."""
    with contextlib.suppress(OSError):
        for line in reversed(log.read_text(errors="replace").split("\n")[-20:]):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return str(json.loads(line)["why"])
    return f"see {log}"


def _short(settings: Settings) -> str:
    return actor_of(bytes(bootstrap.operator_key(settings).verify_key))[:24] + "…"
