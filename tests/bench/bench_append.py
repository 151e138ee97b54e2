"""Durable signed appends per second over HTTP: the whole path, beside the stock recorder.

    python -m tests.bench.bench_append [--quick] [--profile FILE]

The server is what `tributary up` runs: the API process with its sequencer, on the embedded
PostgreSQL with its default settings (fsync and synchronous_commit on). The load generator
(append_load) is a process on the same machine; its events are signed before the clock starts. A
rate counts from the first request sent until a *signed checkpoint* that covers the last event has
been read back over HTTP: parsed, verified, decided, stored with fsync, answered with a receipt
(Ed25519 and EIP-712), integrated, signed, published.

What is appended, and which number is the headline. `identities` are the cheapest events: one
signature, one stream, no gate. `contributions` pass a gate each (who uploaded the rows? do the
rows in the blob have that root?). `mix`, the headline, is a third of each kind of work that a
contribution makes: a new identity, its contribution's record with a blob of its own, the review;
so every event names other aggregates than the one before, and a third of them are gated.

Peers: the stock recorder of `eventsourcing` on the same server, with no HTTP, no signature and no
log to keep, 64 threads; and what Tessera publishes for itself.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from eventsourcing.persistence import StoredEvent
from nacl.signing import SigningKey, VerifyKey

from ledger import bootstrap
from ledger.client import now_us
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.domain.ids import actor_of
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.processes.supervisor import open_ledger
from ledger.store.credentials import PostgresCredentials
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from tests.bench.append_load import Request
from tests.bench.bench_store import stock
from tests.bench.cpu import cpu_s, family_cpu_s
from tests.pg import temporary_home
from tests.service_world import free_port

CLIENTS = 64
BATCH = 100
RUNS = 3
LICENCE = "CC0-1.0"

# docs/performance.md of github.com/transparency-dev/tessera at 1029108, section "GCP Free Tier VM
# Instance" (POSIX storage, e2-micro): TreeSize delta 1587qps over 30s, observed time to integrate
# 1878 ms at most. Entries of the hammer tool: unsigned, checked by nobody, no fsync per request.
TESSERA_PER_S = 1_587
TESSERA_INCLUDED_S = 1.878


class World:
    """People, a datanet and uploaded rows, so that events can be signed that will be accepted."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.owner = SigningKey.generate()
        self.datanet = str(uuid4())

    def sign(self, key: SigningKey, type: str, body: Mapping[str, Any]) -> bytes:
        return sign_event(
            key, type=type, log=self.settings.log_origin, body=body, id=uuid4(), at=now_us()
        )

    def opening(self) -> list[bytes]:
        net = {
            "datanet": self.datanet, "name": "bench", "description": "", "licence": LICENCE,
            "reviewers": [],
        }  # fmt: skip
        return [self.identity(self.owner), self.sign(self.owner, "datanet.created", net)]

    def identity(self, key: SigningKey | None = None) -> bytes:
        return self.sign(key or SigningKey.generate(), "identity.registered", {"name": "bench"})

    def mixes(self, count: int) -> list[list[bytes]]:
        """[identity, contribution, review] of `count` new contributors."""
        with bootstrap.store(self.settings, name="bench") as box:
            credentials = PostgresCredentials(box.pool)
            return [self._mix(box, credentials) for _ in range(count)]

    def _mix(self, box: bootstrap.Store, credentials: PostgresCredentials) -> list[bytes]:
        key = SigningKey.generate()
        rows = [
            DataRow(prompt=f"Question {n}?", completion="An answer.", salt=os.urandom(16).hex())
            for n in range(2)
        ]
        blob = encode_rows(rows)
        name = box.blobs.put(blob)
        actor = actor_of(bytes(key.verify_key))
        credentials.record_upload(name, actor, len(blob), now_us())
        contribution = str(uuid4())
        recorded = {
            "contribution": contribution, "datanet": self.datanet, "licence": LICENCE,
            "rows_root": rows_root(rows).hex(), "rows_count": len(rows), "rows_sha256": name,
            "title": "two rows",
        }  # fmt: skip
        approved = {"contribution": contribution, "datanet": self.datanet, "note": ""}
        return [
            self.identity(key),
            self.sign(key, "contribution.recorded", recorded),
            self.sign(self.owner, "contribution.approved", approved),
        ]


class Server:
    """The API process and its PostgreSQL, and the CPU that each has used."""

    def __init__(self, settings: Settings, database: EmbeddedPostgres) -> None:
        self.settings = settings
        self.database = database
        log = (settings.root / "api.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ledger.processes", "api"],
            env={**os.environ, **settings.environment()},
            stdout=log,
            stderr=log,
        )
        self.http = httpx.Client(base_url=settings.url, timeout=30)
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.http.get("/livez").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None, (settings.root / "api.log").read_text()
            assert time.monotonic() < deadline, "the API did not start"
            time.sleep(0.1)

    def append(self, raw: bytes) -> int:
        found = self.http.post("/v1/events", content=raw)
        assert found.status_code == 201, found.text
        return int(found.json()["index"])

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds of (the API process, PostgreSQL with its children)."""
        postmaster = self.database.pid
        assert postmaster is not None
        return cpu_s(self.process.pid), family_cpu_s(postmaster)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def server() -> Iterator[Server]:
    with temporary_home() as home, EmbeddedPostgres(home) as database:
        settings = Settings(  # type: ignore[call-arg]
            home=home,
            DATABASE_URL=database.url,
            port=free_port(),
            log_origin="bench.example/log",
            requests_per_minute=1_000_000_000,
        )
        migrate(database.url)
        open_ledger(settings)
        deployed(settings)
        running = Server(settings, database)
        try:
            yield running
        finally:
            running.stop()


def deployed(settings: Settings) -> None:
    """As after `tributary up` has deployed its contracts: from then on receipts are signed for the
    chain too. No node is needed for that, only its number and the contract's address."""
    bootstrap.wallet_of(bootstrap.chain_key_file(settings))
    path = settings.root / "chain" / "addresses.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"chain_id": 31_337, "anchor": "0x" + "12" * 20}))


# --- one run ----------------------------------------------------------------------------------


def request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def singles(units: Sequence[Sequence[bytes]], clients: int) -> list[list[Request]]:
    """Lanes of one event per request; the events of a unit go down one lane, in order."""
    lanes: list[list[Request]] = [[] for _ in range(clients)]
    for n, unit in enumerate(units):
        lanes[n % clients] += [(request("/v1/events", raw), 1) for raw in unit]
    return lanes


def batches(units: Sequence[Sequence[bytes]], clients: int) -> list[list[Request]]:
    """Lanes of about BATCH events per request; the events of a unit go in one request."""
    lanes: list[list[Request]] = [[] for _ in range(clients)]
    a_request = BATCH // len(units[0])
    for n, at in enumerate(range(0, len(units), a_request)):
        raws = [raw for unit in units[at : at + a_request] for raw in unit]
        lanes[n % clients].append((request("/v1/events/batch", b"\n".join(raws)), len(raws)))
    return lanes


def load(running: Server, lanes: Sequence[Sequence[Request]]) -> dict[str, float]:
    """Run the load generator over `lanes`; rates, quantiles and CPU."""
    with tempfile.TemporaryDirectory() as folder:
        plan, result = Path(folder) / "plan", Path(folder) / "result"
        port = running.settings.port
        plan.write_bytes(pickle.dumps({"port": port, "lanes": lanes}))
        before = running.cpu_s()
        subprocess.run(
            [sys.executable, "-m", "tests.bench.append_load", str(plan), str(result)],
            check=True,
            timeout=300,
        )
        after = running.cpu_s()
        found = json.loads(result.read_text())
    return figures(found, api_s=after[0] - before[0], postgres_s=after[1] - before[1])


def figures(found: Mapping[str, Any], *, api_s: float, postgres_s: float) -> dict[str, float]:
    events = sum(r[4] for r in found["requests"])
    began = min(r[0] for r in found["requests"])
    covered = found["checkpoints"][-1][0]
    included = sorted(included_s(found))
    answered = sorted(r[1] - r[0] for r in found["requests"])
    return {
        "events": events,
        "per_s": events / (covered - began),
        "answer_p50_ms": 1e3 * quantile(answered, 0.5),
        "answer_p99_ms": 1e3 * quantile(answered, 0.99),
        "included_p50_ms": 1e3 * quantile(included, 0.5),
        "included_p99_ms": 1e3 * quantile(included, 0.99),
        "api_us": 1e6 * api_s / events,
        "postgres_us": 1e6 * postgres_s / events,
        "load_us": 1e6 * found["cpu_s"] / events,
        "cores": (api_s + postgres_s + found["cpu_s"]) / (covered - began),
    }


def included_s(found: Mapping[str, Any]) -> list[float]:
    """Per request: from sending it until a checkpoint that covers all its events was read."""
    times = []
    checkpoints, at = found["checkpoints"], 0
    for sent, _, _, index, events in sorted(found["requests"], key=lambda r: r[3]):
        while checkpoints[at][1] < index + events:
            at += 1
        times.append(checkpoints[at][0] - sent)
    return times


def quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# --- peers and bounds -------------------------------------------------------------------------


def stock_per_s(database: str, *, batch: int, seconds: float) -> float:
    """Events/s of the stock recorder: CLIENTS threads, durable, nothing but storing."""
    recorder, close = stock(database)
    state, counts = b"x" * 600, [0] * CLIENTS
    deadline = time.monotonic() + seconds

    def call(n: int) -> None:
        while time.monotonic() < deadline:
            recorder.insert_events([StoredEvent(uuid4(), 1, "t", state) for _ in range(batch)])
            counts[n] += batch

    threads = [threading.Thread(target=call, args=(n,)) for n in range(CLIENTS)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(counts) / (time.monotonic() - started)
    close()
    return rate


def per_s(call: Callable[[], object], seconds: float = 1.0) -> float:
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        call()
        count += 1
    return count / (time.monotonic() - started)


def bounds(folder: Path) -> dict[str, float]:
    """What the machine allows, one core: durable 8 KiB writes and Ed25519 verifications per s."""
    key = SigningKey.generate()
    message = b"x" * 500
    signature, public = key.sign(message).signature, bytes(key.verify_key)
    path = folder / "fsync"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)

    def write() -> None:
        os.write(descriptor, b"x" * 8192)
        os.fdatasync(descriptor)

    rates = {
        "fsync_per_s": per_s(write),
        "ed25519_per_s": per_s(lambda: VerifyKey(public).verify(message, signature)),
    }
    os.close(descriptor)
    path.unlink()
    return rates


# --- the table --------------------------------------------------------------------------------

LINE = (
    "{name:>22} {per_s:>8,.0f} {answer_p50_ms:>8.0f} {answer_p99_ms:>8.0f} {included_p50_ms:>9.0f}"
    " {included_p99_ms:>9.0f} {api_us:>8.0f} {postgres_us:>9.0f} {load_us:>7.0f} {cores:>6.2f}"
)
HEAD = (
    f"{'':>22} {'events/s':>8} {'answer':>8} {'':>8} {'included':>9} {'':>9}"
    f" {'CPU us an event':>26}\n"
    f"{'':>22} {'':>8} {'p50 ms':>8} {'p99 ms':>8} {'p50 ms':>9} {'p99 ms':>9}"
    f" {'API':>8} {'postgres':>9} {'load':>7} {'cores':>6}"
)


def median(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The run whose rate is the median."""
    return dict(sorted(runs, key=lambda run: run["per_s"])[len(runs) // 2])


def measure(
    running: Server, name: str, make: Callable[[], list[list[Request]]], runs: int
) -> list[dict[str, float]]:
    """`runs` runs, and the line of the median one. Plans are made while no clock runs."""
    found = [load(running, make()) for _ in range(runs)]
    rates = ", ".join(f"{run['per_s']:,.0f}" for run in found)
    print(LINE.format(name=name, **median(found)) + f"   runs {rates}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the events, one run")
    parser.add_argument("--only", help="runs whose name holds this")
    parser.add_argument("--profile", type=Path, help="py-spy's raw stacks of the API process")
    options = parser.parse_args()
    scale, runs = (10, 1) if options.quick else (1, RUNS)
    few, many = 6_400 // scale, 24_000 // scale
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; {CLIENTS} clients")
    results: dict[str, Any] = {}
    with server() as running:
        world = World(running.settings)
        for raw in world.opening():
            running.append(raw)
        plans: dict[str, Callable[[], list[list[Request]]]] = {
            "mix": lambda: singles(world.mixes(few // 3), CLIENTS),
            "identities": lambda: singles([[world.identity()] for _ in range(few)], CLIENTS),
            f"mix, batches of {BATCH}": lambda: batches(world.mixes(many // 3), CLIENTS // 4),
            f"identities, batches of {BATCH}": lambda: batches(
                [[world.identity()] for _ in range(many)], CLIENTS // 4
            ),
        }
        load(running, singles(world.mixes(200), CLIENTS))  # warm: caches, connections, plans
        print(HEAD)
        with profiled(running.process.pid, options.profile):
            for name, make in plans.items():
                if options.only and options.only not in name:
                    continue
                results[name] = measure(running, name, make, runs)
        limits = bounds(running.settings.root)
        peers = {
            f"stock recorder, {n} a call": stock_per_s(
                running.database.url, batch=n, seconds=5 / (4 if options.quick else 1)
            )
            for n in (1, BATCH)
        }
    for name, rate in peers.items():
        print(f"{name:>22} {rate:>8,.0f}   storing alone: no HTTP, no signature, no log")
    print(f"{'Tessera, published':>22} {TESSERA_PER_S:>8,}   included max {TESSERA_INCLUDED_S} s")
    print(
        "cores: how many the three kept busy together; at all there are, the CPU is the bound.\n"
        f"bounds, one core: {limits['fsync_per_s']:,.0f} fdatasync/s, "
        f"{limits['ed25519_per_s']:,.0f} Ed25519 verifications/s; load after "
        f"{os.getloadavg()[0]:.1f}"
    )
    print(json.dumps({"runs": results, "peers": peers, "bounds": limits}, indent=2))


@contextmanager
def profiled(pid: int, path: Path | None) -> Iterator[None]:
    """py-spy beside the runs, where asked for."""
    if path is None:
        yield
        return
    spy = Path(sys.executable).with_name("py-spy")
    command = [str(spy), "record", "--pid", str(pid), "--rate", "200", "--format", "raw"]
    process = subprocess.Popen(
        [*command, "--gil", "--output", str(path)], stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(2)
        process.wait(20)


if __name__ == "__main__":
    main()
