"""What the service tests share: `tributary up` as a process whose parts can be killed, clients that
append all the while, and the audit of what they left.

Processes are found through /proc by the home that they belong to, and killed by pid.
"""

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
from nacl.signing import SigningKey

from ledger import bootstrap
from ledger.chain import watcher
from ledger.chain.client import ChainClient
from ledger.chain.deploy import load_deployments
from ledger.chain.payouts import Payouts
from ledger.client import Client
from ledger.config import Settings, load_settings
from ledger.domain.envelope import Envelope, decode_entry, leaf_hash
from ledger.errors import Conflict, Unavailable
from ledger.log.prover import Prover
from ledger.ports import TileStore
from ledger.store.embedded import EmbeddedPostgres
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.merkle import verify_consistency
from ledger.verify.note import parse_vkey
from ledger.verify.tiles import Tile, decode_entries, tile_path, tiles_of
from ledger.verify.tlog_proof import verify_tlog_proof
from projections.memory import MemoryRows
from projections.registry import TABLES, digest_of, fold, read_entry
from workers.ray_cluster import _temp_folder

READY_S = 60.0
STOP_S = 40.0
POLL_S = 0.02
PAUSE_S = 0.3
WATCH_S = 1.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, condition: Callable[[], Any], timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(POLL_S)
    return found


def command_line(pid: int) -> str:
    """Empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


# --- the service ------------------------------------------------------------------------------


class Up:
    """`tributary up` on one home, and the pids of its parts."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.port = free_port()
        self.environment = {
            **os.environ,
            "TRIBUTARY_HOME": str(home),
            "TRIBUTARY_PORT": str(self.port),
            "TRIBUTARY_API": f"http://127.0.0.1:{self.port}",
            **environment,
        }
        self.output = home.parent / f"{home.name}.out"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> Settings:
        """Those of a process of this service."""
        found = load_settings(home=self.home, port=self.port)
        chain = (bootstrap.deployed(found) or {}).get("rpc_url")
        return found.model_copy(update={"chain_rpc_url": chain, "dev_chain": chain is not None})

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        with self.output.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from ledger.cli.main import main; main()", "up"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        assert self.process is not None
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, f"`tributary up` ended: {self.said()}"
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            return False

        until("readiness", ready, READY_S)

    def said(self) -> str:
        return self.output.read_text()

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Another `tributary ...` of the same home."""
        return subprocess.run(
            [sys.executable, "-c", "from ledger.cli.main import main; main()", *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=90,
        )

    def end(self, number: signal.Signals) -> int:
        """Signal the supervisor and wait for it; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def destroy(self) -> None:
        """Whatever happened: nothing of this home runs any more."""
        if self.process is not None and self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self.end(signal.SIGINT)
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    # --- its processes -----------------------------------------------------------------------

    @property
    def ray_folder(self) -> Path:
        """Where this home's Ray keeps its sessions: some of its processes name no other folder."""
        return _temp_folder(self.home / "workers" / "ray")

    def processes(self) -> dict[int, str]:
        """Command lines by pid of everything that belongs to the home: by environment, arguments
        or working folder. Zombies have none of them."""
        postgres = EmbeddedPostgres(self.home).data_dir
        folders = {str(folder) for folder in (self.home, postgres, self.ray_folder)}
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            pid = int(name)
            with suppress(OSError):
                about = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                line = command_line(pid)
                where = str(Path(f"/proc/{pid}/cwd").readlink())
                ours = pid not in (os.getpid(), os.getppid()) and line
                if ours and any(f in about or f in line or where == f for f in folders):
                    found[pid] = line.strip() or where
        return found

    def pid_of(self, part: str) -> int | None:
        """The process of a part: a role, `postgres`, `anvil`, `trainer`, `supervisor`."""
        if part == "postgres":
            return EmbeddedPostgres(self.home).pid
        if part == "supervisor":
            return self.process.pid if self.process else None
        marks = {"anvil": "anvil --host", "trainer": "ray::TrainerActor"}
        wanted = marks.get(part, f"-m ledger.processes {part}")
        return next((pid for pid, line in self.processes().items() if wanted in line), None)

    def kill(self, part: str) -> int:
        """SIGKILL to a part that runs; its pid."""
        pid = until(f"a process for {part}", lambda: self.pid_of(part), READY_S)
        os.kill(int(pid), signal.SIGKILL)
        return int(pid)


# --- clients ----------------------------------------------------------------------------------


@dataclass
class Acks:
    """Leaf indexes by event id, as the ledger told its clients. `with acks.heard():`."""

    known: dict[str, int] = field(default_factory=dict)
    doubted: int = 0
    """Appends whose fate the client did not learn at once."""

    paid: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Leaf index and fee in wei by inference, from the receipts of answers."""

    def take(self, event: str, index: int) -> None:
        before = self.known.setdefault(event, index)
        assert before == index, f"event {event} was acknowledged at {before} and at {index}"

    def take_receipt(self, receipt: Mapping[str, Any]) -> None:
        self.paid[receipt["inference"]] = int(receipt["index"]), int(receipt["fee_wei"])

    @contextmanager
    def heard(self) -> Iterator["Acks"]:
        """Every `Client` of this process reports here meanwhile."""
        real = Client.append_raw

        def append_raw(client: Client, raw: bytes) -> dict[str, Any]:
            try:
                answer = real(client, raw)
            except Conflict as error:
                if "replayed" in error.detail:
                    self.take(str(error.detail["replayed"]), int(str(error.detail["index"])))
                raise
            except Unavailable:
                self.doubted += 1
                raise
            self.take(answer["event"], answer["index"])
            return answer

        Client.append_raw = append_raw  # type: ignore[assignment,method-assign]
        try:
            yield self
        finally:
            Client.append_raw = real  # type: ignore[method-assign]


@dataclass
class Crowd:
    """Clients that append and read the checkpoint all the while: whatever is killed, something is
    in flight. Each repeats an append under the same event id until it is acknowledged."""

    url: str
    appended: int = 0
    checkpoints: dict[bytes, None] = field(default_factory=dict)
    failures: "queue.Queue[BaseException]" = field(default_factory=queue.Queue)

    @contextmanager
    def around(self, writers: int = 2) -> Iterator["Crowd"]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._guarded, args=(work, stop))
            for work in (*[self._write] * writers, self._watch)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if not self.failures.empty():
            raise self.failures.get()

    def _guarded(self, work: Callable[[threading.Event], None], stop: threading.Event) -> None:
        try:
            work(stop)
        except BaseException as error:
            self.failures.put(error)

    def _write(self, stop: threading.Event) -> None:
        with Client(self.url, key=SigningKey.generate()) as client:
            self._append(client, "identity.registered", {"name": "one of the crowd"})
            while not stop.wait(PAUSE_S):
                body = {
                    "datanet": str(uuid4()), "name": "small", "description": "",
                    "licence": "CC0-1.0", "reviewers": [],
                }  # fmt: skip
                self._append(client, "datanet.created", body)

    def _append(self, client: Client, type: str, body: dict[str, Any]) -> None:
        event = uuid4()
        deadline = time.monotonic() + READY_S
        while True:
            try:
                client.append(type, body, id=event)
                self.appended += 1
                return
            except Unavailable:
                assert time.monotonic() < deadline, "the API did not come back"
                time.sleep(PAUSE_S)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(WATCH_S):
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.url}/log/checkpoint", timeout=10)
                if answer.status_code == 200:
                    self.checkpoints[answer.content] = None


# --- the audit --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Log:
    """The whole log as an outsider downloads it."""

    note: bytes
    head: Checkpoint
    vkey: str
    entries: list[bytes]
    events: list[Envelope]

    def of(self, type: str) -> list[Envelope]:
        return [event for event in self.events if event.type == type]

    def count(self, type: str, by: str) -> Counter[str]:
        return Counter(str(event.body[by]) for event in self.of(type))


def download(url: str) -> Log:
    """Checkpoint and entries over HTTP, as any tlog-tiles client has them; signatures check."""
    with Client(url) as client:
        vkey = client.get_bytes("/log/vkey").decode().strip()
        note = client.get_bytes("/log/checkpoint")
        head = open_checkpoint(note, parse_vkey(vkey)).checkpoint
        entries: list[bytes] = []
        while len(entries) < head.size:
            width = min(256, head.size - len(entries))
            tile = Tile(level=None, n=len(entries) // 256, width=width)
            entries += decode_entries(client.get_bytes(f"/log/{tile_path(tile)}"), width)
    decoded = [decode_entry(entry, log=head.origin) for entry in entries]
    assert [entry.index for entry in decoded] == list(range(head.size)), "indexes are dense"
    times = [entry.recorded_at for entry in decoded]
    assert times == sorted(times)
    events = [entry.envelope for entry in decoded]
    assert len({event.id for event in events}) == len(events), "no event twice"
    return Log(note=note, head=head, vkey=vkey, entries=entries, events=events)


def audit_tree(url: str, log: Log, seen: list[bytes], settings: Settings) -> int:
    """Every entry's inclusion proof, the independent root of every checkpoint that was ever seen,
    and consistency between every two of them; how many pairs."""
    import pymerkle

    key = parse_vkey(log.vkey)
    with Client(url) as client:
        for index, entry in enumerate(log.entries):
            proof, _ = verify_tlog_proof(
                client.get_bytes(f"/log/proof/{index}"), leaf_hash(entry), key
            )
            assert proof.index == index
    heads = {log.head.size: log.head}
    for note in seen:
        head = open_checkpoint(note, key).checkpoint
        assert heads.setdefault(head.size, head) == head, "one size, two roots: a fork"
    oracle = pymerkle.InmemoryTree(algorithm="sha256")
    for size, entry in enumerate(log.entries, start=1):
        oracle.append_entry(entry)
        if size in heads:
            assert oracle.get_root() == heads[size].root, f"the root of {size} raw entries"
    pairs = [(a, b) for a in sorted(heads) for b in sorted(heads) if 0 < a < b]
    with bootstrap.store(settings, pool_size=1, name="audit") as box:
        prover = Prover(cast(TileStore, _Tiles(box.tiles, log.head.size)))
        for a, b in pairs:
            proof_ab = prover.consistency(a, b)
            verify_consistency(
                size1=a, size2=b, root1=heads[a].root, root2=heads[b].root, proof=proof_ab
            )
    return len(pairs)


class _Tiles:
    """All tiles of a tree, read at once: thousands of proofs need each of them."""

    def __init__(self, store: TileStore, size: int) -> None:
        wanted = [(tile.level or 0, n) for tile in tiles_of(size) for n in range(tile.n + 1)]
        self._tiles = store.tiles(wanted)

    def tiles(self, wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        return {id: self._tiles[id] for id in wanted}


def audit_events(log: Log, acks: Acks) -> None:
    """Nothing lost, nothing doubled."""
    where = {str(event.id): index for index, event in enumerate(log.events)}
    lost = {event: index for event, index in acks.known.items() if where.get(event) != index}
    assert not lost, "acknowledged events are where the ledger said"
    for inference, (index, fee_wei) in acks.paid.items():
        body = log.events[index].body
        assert (body["inference"], body["fee_wei"]) == (inference, str(fee_wei))
    runs = log.count("run.requested", "run")
    ends = log.count("run.completed", "run") + log.count("run.failed", "run")
    assert ends == runs, "one terminal event a run"
    inferences = log.count("inference.recorded", "inference")
    assert set(inferences.values()) <= {1}
    assert log.count("fee.charged", "inference") == inferences, "one fee an inference"
    assert log.count("attribution.recorded", "inference") == inferences, "attributed once"


def audit_money(log: Log, settings: Settings) -> dict[str, int]:
    """Rows against a replay of the downloaded entries, ledger against chain; the totals. While
    nobody appends."""
    with bootstrap.store(settings, pool_size=2, name="audit") as box:
        runner = bootstrap.projection_runner(box)
        assert runner.catch_up() == log.head.size, "somebody appends"
        replayed = MemoryRows(TABLES)
        for entry in log.entries:
            fold(replayed, read_entry(entry))
        assert runner.digest() == digest_of(replayed), "rows are what the entries fold to"
        assert box.queries.anomalies() == []
        assert box.queries.unexplained_claims() == []
        totals = box.queries.totals()
        assert sum(totals.values()) == 0, totals
        addresses = {str(event.body["address"]) for event in log.of("payout.claimed")}
        paid = {a: sum(int(row["paid_wei"]) for row in box.queries.payees(a)) for a in addresses}
    client = ChainClient(str(settings.chain_rpc_url))
    deployments = load_deployments(client, settings.root / "chain", origin=settings.log_origin)
    assert deployments is not None
    payouts = Payouts(client, deployments)
    assert paid == {address: payouts.claimed(address) for address in addresses}
    assert totals.get("paid", 0) == sum(paid.values()) == payouts.total_claimed()
    watch = watcher.Watcher(client, deployments)
    on_chain = watch.poll(watch.start(), max_blocks=10**6).events
    for kind, type in _TOLD.items():
        told = sorted(str(event.body["tx_hash"]) for event in log.of(type))
        assert told == sorted("0x" + e.tx_hash.hex() for e in on_chain if isinstance(e, kind)), type
    roots = {e.size: e.root.hex() for e in on_chain if isinstance(e, watcher.Committed)}
    assert roots == {e.body["size"]: e.body["root"] for e in log.of("checkpoint.anchored")}
    return totals


_TOLD: dict[type[watcher.ChainEvent], str] = {
    watcher.Deposited: "deposit.recorded",
    watcher.Claimed: "payout.claimed",
    watcher.Proposed: "payout.proposed",
    watcher.Activated: "payout.activated",
    watcher.Committed: "checkpoint.anchored",
}
"""What the chain shows, and the event that tells of it: one each, none too many."""
