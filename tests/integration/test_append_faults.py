"""Appending while things break: two API processes on one database, and one or the store killed.

The processes are the real ones, `ledger.processes api`, each with a home of its own as on two
machines: the same keys, their own memory of what was signed. Senders do what an honest sender does:
they send the same bytes again, to either server, until one of them answers. In the end every event
stands in the log once, where its answers said; every checkpoint extends the one before.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from nacl.signing import SigningKey

from ledger.client import now_us
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.domain.ids import actor_of
from ledger.log.prover import Prover
from ledger.processes.supervisor import open_ledger
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.tiles import PostgresTileStore
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import leaf_hash, tree_root, verify_consistency
from ledger.verify.note import parse_vkey
from tests.pg import FAST, temporary_home
from tests.service_world import free_port

pytestmark = pytest.mark.timeout(240)

LOG = "faults.example/log"
HANDOVER_S = 10.0
SENDERS = 6


class Server:
    """An API process with its sequencer."""

    def __init__(self, home: Path, database: EmbeddedPostgres) -> None:
        self.settings = Settings(  # type: ignore[call-arg]
            home=home,
            DATABASE_URL=database.url,
            port=free_port(),
            log_origin=LOG,
            requests_per_minute=10**9,
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.settings.url

    def start(self) -> None:
        with (self.settings.root / "api.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ledger.processes", "api"],
                env={**os.environ, **self.settings.environment()},
                stdout=log,
                stderr=log,
            )
        until(self.answers, within_s=60)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()

    def checkpoint_size(self) -> int:
        found = httpx.get(f"{self.url}/log/checkpoint", timeout=10)
        return int(found.text.split("\n")[1]) if found.status_code == 200 else -1


class Pair:
    """Two servers on one database, and everything that was answered."""

    def __init__(self, folder: Path, database: EmbeddedPostgres) -> None:
        self.database = database
        self.servers = [Server(folder / name, database) for name in ("a", "b")]
        migrate(database.url)
        first, second = self.servers
        open_ledger(first.settings)
        first.start()  # makes the log's key, and is the sequencer
        shutil.copytree(first.settings.root / "keys", second.settings.root / "keys")
        second.start()
        self.operator = SigningKey(bytes.fromhex(first.settings.key_file("operator").read_text()))
        self.acks: dict[int, tuple[bytes, str]] = {}
        self._lock = threading.Lock()

    def sign(self, key: SigningKey, type: str, body: dict[str, Any]) -> bytes:
        return sign_event(key, type=type, log=LOG, body=body, id=uuid4(), at=now_us())

    def post(self, server: Server, raw: bytes) -> httpx.Response:
        answer = httpx.post(f"{server.url}/v1/events", content=raw, timeout=30)
        if answer.status_code in (200, 201):
            self.acknowledge(raw, answer.json())
        return answer

    def acknowledge(self, raw: bytes, told: dict[str, Any]) -> None:
        with self._lock:
            before = self.acks.setdefault(told["index"], (raw, told["leaf_hash"]))
        assert before == (raw, told["leaf_hash"]), "one index was promised twice"

    def insist(self, raw: bytes, first: int = 0) -> dict[str, Any]:
        """Send the same bytes to one server after the other until they are taken."""
        deadline = time.monotonic() + 60
        turn = first
        while time.monotonic() < deadline:
            try:
                answer = self.post(self.servers[turn % 2], raw)
                if answer.status_code in (200, 201):
                    return dict(answer.json())
                assert answer.status_code in (429, 503), answer.text
            except httpx.HTTPError:
                pass
            turn += 1
            time.sleep(0.05)
        raise AssertionError("nobody took the event within 60 s")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with temporary_home() as folder, EmbeddedPostgres(folder / "pg", settings=FAST) as database:
        for name in ("a", "b"):
            (folder / name).mkdir()
        made = Pair(folder, database)
        try:
            yield made
        finally:
            for server in made.servers:
                server.stop()


def until(holds: Callable[[], bool], *, within_s: float) -> float:
    """Seconds until `holds()`."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s, f"not within {within_s} s"
        time.sleep(0.05)
    return time.monotonic() - began


class Senders:
    """Threads that insist on events of their own, alternating between the servers."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.sent = [0] * SENDERS
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(SENDERS)]

    def _run(self, n: int) -> None:
        try:
            while not self._stop.is_set():
                raw = self.pair.sign(SigningKey.generate(), "identity.registered", {"name": "x"})
                self.pair.insist(raw, first=self.sent[n] + n)
                self.sent[n] += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> "Senders":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
        assert not self.errors, self.errors[0]


def audit(pair: Pair) -> int:
    """The whole log, from its tables: entries, acknowledgements, tree, every checkpoint."""
    vkey = parse_vkey(httpx.get(f"{pair.servers[0].url}/log/vkey", timeout=10).text.strip())
    with connect(pair.database.url) as pool:
        log, tiles = PostgresEntryLog(pool), PostgresTileStore(pool)
        entries = log.entries(0, log.size())
        with psycopg.connect(pair.database.url) as connection:
            rows = connection.execute("SELECT note FROM log_checkpoints ORDER BY size").fetchall()
        heads = [open_checkpoint(bytes(note), vkey).checkpoint for (note,) in rows]
        prover = Prover(tiles)
        for old, new in pairwise(heads):
            proof = prover.consistency(old.size, new.size)
            verify_consistency(
                size1=old.size, size2=new.size, root1=old.root, root2=new.root, proof=proof
            )
    assert [int.from_bytes(entry[:8], "big") for entry in entries] == list(range(len(entries)))
    times = [int.from_bytes(entry[8:16], "big") for entry in entries]
    assert times == sorted(times)
    assert len({entry[16:] for entry in entries}) == len(entries), "an event stands there twice"
    for index, (raw, leaf) in pair.acks.items():
        assert entries[index][16:] == raw
        assert leaf_hash(entries[index]).hex() == leaf
    newest = heads[-1]
    assert tree_root([leaf_hash(entry) for entry in entries[: newest.size]]) == newest.root
    return len(entries)


def test_each_server_sees_at_once_what_the_other_has_stored(pair: Pair) -> None:
    """Decisions rest on what is in the log, not on what the process has in memory."""
    a, b = pair.servers
    for n in range(12):
        here, there = (a, b) if n % 2 else (b, a)
        key = SigningKey.generate()
        net = {
            "datanet": str(uuid4()), "name": "n", "description": "", "licence": "CC0-1.0",
            "reviewers": [],
        }  # fmt: skip
        too_early = pair.post(there, pair.sign(key, "datanet.created", net))
        assert too_early.status_code == 404, "and `there` has it in memory that nobody has that key"
        registered = pair.sign(key, "identity.registered", {"name": "n"})
        assert pair.post(here, registered).status_code == 201
        assert pair.post(there, pair.sign(key, "datanet.created", net)).status_code == 201
        again = pair.sign(key, "identity.registered", {"name": "n"})
        assert pair.post(there, again).status_code == 409
        assert pair.post(there, registered).status_code == 200, "the same bytes are a success"


def test_a_role_taken_on_one_server_is_gone_on_the_other(pair: Pair) -> None:
    """The role stands in one stream and the run in another: no collision would tell."""
    a, b = pair.servers
    worker, run = SigningKey.generate(), requested_run(pair)
    role = {"member": actor_of(bytes(worker.verify_key)), "role": "worker"}
    for attempt, (here, there) in enumerate(((a, b), (b, a), (a, b)), 1):
        start = {"run": run, "attempt": attempt, "submission_id": "s"}
        assert pair.post(here, pair.sign(pair.operator, "role.granted", role)).status_code == 201
        assert pair.post(there, pair.sign(worker, "run.started", start)).status_code == 201
        assert pair.post(here, pair.sign(pair.operator, "role.revoked", role)).status_code == 201
        start["attempt"] = attempt + 1
        assert pair.post(there, pair.sign(worker, "run.started", start)).status_code == 403


def requested_run(pair: Pair) -> str:
    server = pair.servers[0]
    base = httpx.get(f"{server.url}/v1/info", timeout=10).json()["base_model"]
    net, run = str(uuid4()), str(uuid4())
    created = {
        "datanet": net, "name": "n", "description": "", "licence": "CC0-1.0", "reviewers": [],
    }  # fmt: skip
    requested = {
        "run": run, "name": "r", "datanets": [net], "base_model": base["digest"],
        "base_id": base["id"], "config": {},
    }  # fmt: skip
    for type, body in (("datanet.created", created), ("run.requested", requested)):
        answer = pair.post(server, pair.sign(pair.operator, type, body))
        assert answer.status_code == 201, answer.text
    return run


def test_of_two_servers_asked_at_once_one_wins(pair: Pair) -> None:
    """The same stream, the same moment: exactly one of two contradicting events is stored."""
    for _ in range(15):
        key = SigningKey.generate()
        raws = [pair.sign(key, "identity.registered", {"name": name}) for name in ("one", "two")]
        statuses: list[int] = []
        barrier = threading.Barrier(2)

        def send(
            server: Server,
            raw: bytes,
            barrier: threading.Barrier = barrier,
            statuses: list[int] = statuses,
        ) -> None:
            barrier.wait(10)
            statuses.append(pair.post(server, raw).status_code)

        threads = [
            threading.Thread(target=send, args=(server, raw))
            for server, raw in zip(pair.servers, raws, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(statuses) == [201, 409]


def test_a_killed_sequencer_is_replaced_within_seconds(pair: Pair) -> None:
    first, second = pair.servers
    with Senders(pair) as senders:
        until(lambda: sum(senders.sent) > 30, within_s=30)
        size = second.checkpoint_size()
        first.kill()
        took_s = until(lambda: second.checkpoint_size() > size, within_s=HANDOVER_S)
        until(lambda: second.checkpoint_size() > size + 30, within_s=30)
        first.start()
        until(first.answers, within_s=60)
        size = first.checkpoint_size()
        second.kill()  # now the other way round: the first one comes back with an old memory
        until(lambda: first.checkpoint_size() > size, within_s=HANDOVER_S)
        second.start()
    assert took_s < HANDOVER_S
    settled(pair)


def test_postgresql_killed_under_load_loses_nothing(pair: Pair) -> None:
    with Senders(pair) as senders:
        for _ in range(2):
            done = sum(senders.sent)
            until(lambda done=done: sum(senders.sent) > done + 30, within_s=30)  # type: ignore[misc]
            pid = pair.database.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: pair.database.pid != pid, within_s=30)  # type: ignore[misc]
            pair.database.start()
        done = sum(senders.sent)
        until(lambda: sum(senders.sent) > done + 30, within_s=30)
    settled(pair)


def settled(pair: Pair) -> None:
    """A checkpoint covers all that was acknowledged, and everything fits together."""
    last = max(pair.acks)
    for server in pair.servers:
        until(lambda server=server: server.checkpoint_size() > last, within_s=20)  # type: ignore[misc]
    assert audit(pair) > last
