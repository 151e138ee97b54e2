"""The log on a real PostgreSQL: writers, two servers, cut connections; a stranger checks all."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from ledger.domain.envelope import decode_envelope
from ledger.log import sequencer as room
from ledger.log.bundle import Bundler
from ledger.log.prover import Prover
from ledger.log.sequencer import Sequencer
from ledger.log.serving import LogFiles
from ledger.log.signer import LogSigner
from ledger.ports import StoredCheckpoint
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.recorder import GapFreeFactory
from ledger.store.rows import PgRowStore
from ledger.store.tiles import PostgresTileStore
from ledger.verify.bundle import verify_bundle
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import leaf_hash, tree_root, verify_consistency
from ledger.verify.tiles import decode_entries, tile_path, tiles_of
from projections.lineage_index import LineageIndex
from projections.registry import TABLES
from projections.runner import Runner
from tests.fakes import MemoryBlobStore
from tests.unit.lineage_world import ORIGIN, World, key, prove_payout


class Server:
    """One server process's view: its own connections, its own memory of what was signed."""

    def __init__(self, url: str, memory: Path) -> None:
        self.pool = connect(url)
        self.log = PostgresEntryLog(self.pool)
        self.tiles = PostgresTileStore(self.pool)
        self.signer = LogSigner(origin=ORIGIN, key=key("log"), state_path=memory)
        self.sequencer = Sequencer(
            log=self.log,
            tiles=self.tiles,
            signer=self.signer,
            clock=lambda: time.time_ns() // 1_000,
        )

    @contextmanager
    def sequencing(self) -> Iterator[threading.Event]:
        stop = threading.Event()
        thread = threading.Thread(target=self.sequencer.run, args=(stop,))
        thread.start()
        try:
            yield stop
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()

    def close(self) -> None:
        self.log.close()
        self.pool.close()


@pytest.fixture
def servers(pg_url: str, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    pair = Server(pg_url, tmp_path / "a.json"), Server(pg_url, tmp_path / "b.json")
    yield pair
    for server in pair:
        server.close()


@contextmanager
def writing(url: str, writers: int, pause_s: float = 0.002) -> Iterator[None]:
    """Writers of small entries, each on its own connections."""
    stop = threading.Event()

    def write() -> None:
        factory = GapFreeFactory.on(url, event_id_of=lambda event: None)
        recorder = factory.application_recorder()
        while not stop.wait(pause_s):
            try:
                recorder.insert_events([StoredEvent(uuid4(), 1, "t", uuid4().bytes)])
            except Exception:
                time.sleep(0.05)  # connections are cut in these tests
        factory.close()

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def reach(server: Server, size: int, within_s: float) -> StoredCheckpoint:
    began = time.monotonic()
    while (latest := server.tiles.latest()) is None or latest.size < size:
        assert time.monotonic() - began < within_s, f"no checkpoint of {size}: {latest}"
        time.sleep(0.01)
    return latest


def stranger_checks(server: Server, url: str) -> int:
    """Through the files alone: the whole log under its checkpoint; and every older checkpoint."""
    files = LogFiles(log=server.log, tiles=server.tiles)
    vkey = server.signer.vkey
    head = open_checkpoint(files.serve_path("checkpoint")[0], vkey).checkpoint
    leaves: list[bytes] = []
    edge = tiles_of(head.size)[0]
    for n in range(edge.n + 1):
        width = edge.width if n == edge.n else 256
        tile = type(edge)(level=None, n=n, width=width)
        entries = decode_entries(files.serve_path(tile_path(tile))[0], width)
        assert [int.from_bytes(e[:8], "big") for e in entries] == [*range(n * 256, n * 256 + width)]
        leaves += map(leaf_hash, entries)
    assert tree_root(leaves) == head.root
    with psycopg.connect(url) as connection:
        rows = connection.execute("SELECT note FROM log_checkpoints ORDER BY size").fetchall()
    heads = [open_checkpoint(bytes(note), vkey).checkpoint for (note,) in rows]
    prover = Prover(server.tiles)
    for old, new in pairwise(heads):
        verify_consistency(
            size1=old.size,
            size2=new.size,
            root1=old.root,
            root2=new.root,
            proof=prover.consistency(old.size, new.size),
        )
    return head.size


def test_checkpoints_follow_concurrent_writers_within_a_second(
    pg_url: str, servers: tuple[Server, Server]
) -> None:
    server, _ = servers
    with server.sequencing(), writing(pg_url, writers=4):
        for _ in range(5):
            size = server.log.wait(server.log.size(), 5)
            began = time.monotonic()
            reach(server, size, within_s=5)
            assert time.monotonic() - began < 1
            time.sleep(0.1)
    with server.sequencing():
        reach(server, server.log.size(), within_s=5)
    assert stranger_checks(server, pg_url) == server.log.size() > 50


def test_the_second_server_takes_over(
    pg_url: str, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "RETRY_S", 0.1)
    first, second = servers
    with writing(pg_url, writers=2), second.sequencing() as second_stop:
        reach(second, 10, within_s=5)
        with first.sequencing():
            second_stop.set()  # the first waits for the lock and gets it
            taken_over_at = first.log.size()
            reach(first, taken_over_at + 20, within_s=10)
        with second.sequencing():
            reach(second, first.log.size() + 20, within_s=10)
            with psycopg.connect(pg_url, autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            reach(second, first.log.size() + 20, within_s=20)
    assert first.sequencer.failure is None
    assert second.sequencer.failure is None
    assert stranger_checks(first, pg_url) > 50


def test_a_bundle_out_of_postgresql(
    pg_url: str, servers: tuple[Server, Server], tmp_path: Path
) -> None:
    world = World(tmp_path / "story").tell()
    raws = [entry[16:] for entry in world.log.entries(0, world.log.size())]
    factory = GapFreeFactory.on(pg_url)
    recorder = factory.application_recorder()
    for raw in raws:
        kind = decode_envelope(raw).type
        recorder.insert_events([StoredEvent(uuid4(), 1, kind, raw)])
    factory.close()
    server, _ = servers
    while server.sequencer.step():
        pass
    assert Runner(server.log, PgRowStore(server.pool, TABLES)).catch_up() == len(raws)
    blobs = MemoryBlobStore()
    blobs.blobs = world.blobs.blobs
    bundler = Bundler(
        log=server.log,
        tiles=server.tiles,
        blobs=blobs,
        index=LineageIndex(server.pool),
        vkey=server.signer.vkey,
        prove_payout=prove_payout,
    )
    data = bundler.bundle(world.index_of("attribution.recorded"))
    verdict = verify_bundle(data, trusted_vkey=server.signer.vkey_text)
    assert verdict.facts["size"] == len(raws)
