"""A log of real signed events on a real PostgreSQL, for tests of audit, export and import.

The events are of the catalogue and each is in its stream; nothing decides whether they may happen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from eventsourcing.persistence import StoredEvent

from ledger.domain.envelope import decode_envelope, sign_event
from ledger.domain.events import stream_of
from ledger.log.sequencer import Sequencer
from ledger.log.serving import LogFiles
from ledger.log.signer import LogSigner
from ledger.log.sources import StoreSource
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.recorder import GapFreeFactory
from ledger.store.tiles import PostgresTileStore
from tests.unit.lineage_world import NOW, ORIGIN, key, name

CALL = 500
"""Events per call of the recorder."""


def event(n: int, *, origin: str = ORIGIN, id: str | None = None) -> bytes:
    """The n-th of a row of signed events, each of its own identity."""
    who = f"person {n}"
    return sign_event(
        key(who),
        type="identity.registered",
        log=origin,
        body={"name": who},
        id=UUID(id or name(f"event {n}")),
        at=NOW + n,
    )


def unsigned(n: int) -> bytes:
    """The same with a signature that is none: for large logs, audited without signatures."""
    made = _TEMPLATE.replace(b"person 0", b"person %d" % n)
    return made.replace(name("event 0").encode(), name(f"event {n}").encode())


def anchored(n: int, size: int, root: bytes) -> bytes:
    body = {
        "size": size,
        "root": root.hex(),
        "chain_id": 1,
        "contract": "0x" + "11" * 20,
        "tx_hash": "0x" + f"{n:064x}",
        "block_number": n,
        "block_hash": "0x" + "22" * 32,
        "l1_sha256": "33" * 32,
    }
    return sign_event(
        key("operator"),
        type="checkpoint.anchored",
        log=ORIGIN,
        body=body,
        id=UUID(name(f"anchor {n}")),
        at=NOW + n,
    )


_TEMPLATE = event(0)


class Ledger:
    """One server's view of a database: it appends, signs, and serves files."""

    def __init__(self, url: str, memory: Path, clock: Callable[[], int] | None = None) -> None:
        self.url = url
        self.pool = connect(url)
        self.log = PostgresEntryLog(self.pool)
        self.tiles = PostgresTileStore(self.pool)
        self.signer = LogSigner(origin=ORIGIN, key=key("log"), state_path=memory)
        self._now = NOW
        self.clock = clock or self._tick
        self.sequencer = Sequencer(
            log=self.log, tiles=self.tiles, signer=self.signer, clock=self.clock
        )
        self._versions: dict[UUID, int] = {}

    def _tick(self) -> int:
        self._now += 1_000
        return self._now

    def append(self, raws: Sequence[bytes]) -> None:
        factory = GapFreeFactory.on(self.url, clock=self.clock)
        recorder = factory.application_recorder()
        try:
            for start in range(0, len(raws), CALL):
                recorder.insert_events([self._stored(raw) for raw in raws[start : start + CALL]])
        finally:
            factory.close()

    def _stored(self, raw: bytes) -> StoredEvent:
        e = decode_envelope(raw)
        stream = stream_of(e.type, e.log, e.actor, e.body)
        self._versions[stream] = self._versions.get(stream, 0) + 1
        return StoredEvent(stream, self._versions[stream], e.type, raw)

    def checkpoint(self) -> None:
        while self.sequencer.step():
            pass

    def grow(self, first: int, stop: int) -> None:
        self.append([event(n) for n in range(first, stop)])
        self.checkpoint()

    @contextmanager
    def source(self) -> Iterator[StoreSource]:
        files = LogFiles(log=self.log, tiles=self.tiles)
        yield StoreSource(files, vkey=self.signer.vkey_text)

    def close(self) -> None:
        self.log.close()
        self.pool.close()


def tell(ledger: Ledger, size: int, make: Callable[[int], bytes] = event) -> None:
    """`size` events and a checkpoint at every quarter; an anchor of each checkpoint but the last,
    right behind the next."""
    steps = [size // 4, size // 2, 3 * size // 4, size]
    at, anchor = 0, 0
    for stop in steps:
        before = ledger.tiles.latest()
        raws = []
        if before is not None and before.size:
            anchor += 1
            raws.append(anchored(anchor, before.size, before.root))
        raws += [make(n) for n in range(at + len(raws), stop)]
        ledger.append(raws)
        ledger.checkpoint()
        at = stop
