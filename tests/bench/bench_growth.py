"""What an append costs as the log grows: the same work at every size, side by side.

    python -m tests.bench.bench_growth [LARGEST] [MEASURED]

The log is filled to each size inside PostgreSQL (rows of FILL_BYTES with true leaf hashes, which no
one reads as events) and sequenced. Then MEASURED signed events take the real path: `Ledger` in
appends of BATCH, one sequencer step over them (integrate, sign, publish), and inclusion and
consistency proofs at random places, each by a prover that has nothing in memory. Embedded
PostgreSQL, fsync on.

Flat means: the last line is like the first. The status says so by CPU time (ours and PostgreSQL's,
append and step together), which other programs on the machine do not change. The bytes of WAL
grow until the indexes are so large that hardly two appends between two of PostgreSQL's checkpoints
touch the same page: ids are random, and each first touch logs the page whole.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import psycopg
from nacl.signing import SigningKey

from ledger import bootstrap
from ledger.client import now_us
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.log.prover import Prover
from ledger.log.sequencer import Sequencer
from ledger.processes.supervisor import open_ledger
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from tests.bench.cpu import family_cpu_s
from tests.pg import temporary_home

LARGEST = 1_000_000
MEASURED = 20_000
BATCH = 100
PROOFS = 200
FILL_BYTES = 200
FILL_CHUNK = 250_000
MAX_RATIO = 1.5
"""An append at the largest size may cost so many times that of the smallest, noise included."""

FILL = """
WITH head AS (
    UPDATE log_head SET size = size + %(count)s RETURNING size - %(count)s AS first, recorded_at
)
INSERT INTO stored_events (originator_id, originator_version, topic, state,
                           notification_id, recorded_at, leaf_hash, event_id)
SELECT gen_random_uuid(), 1, 'fill', state, first + n, recorded_at,
       sha256('\\x00'::bytea || int8send(first + n - 1) || int8send(recorded_at) || state),
       gen_random_uuid()
FROM head, generate_series(1, %(count)s) AS n,
     LATERAL (SELECT convert_to(rpad(n::text, %(bytes)s, 'x'), 'UTF8') AS state) AS made
"""


def fill(url: str, size: int) -> None:
    """Grow the log to `size` entries."""
    with psycopg.connect(url, autocommit=True) as connection:
        while True:
            row = connection.execute("SELECT size FROM log_head").fetchone()
            assert row is not None
            missing = size - int(row[0])
            if missing <= 0:
                break
            count = min(missing, FILL_CHUNK)
            connection.execute(FILL, {"count": count, "bytes": FILL_BYTES})
        connection.execute("ANALYZE stored_events")


def seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


class Instance:
    def __init__(self, settings: Settings, box: bootstrap.Store) -> None:
        self.settings = settings
        self.box = box
        self.sequencer = Sequencer(
            log=box.entries,
            tiles=box.tiles,
            signer=bootstrap.log_signer(settings),
            clock=now_us,
        )

    def sequence(self) -> None:
        while self.sequencer.step():
            pass

    def signed(self, count: int) -> list[bytes]:
        return [
            sign_event(
                SigningKey.generate(),
                type="identity.registered",
                log=self.settings.log_origin,
                body={"name": "growth"},
                id=uuid4(),
                at=now_us(),
            )
            for _ in range(count)
        ]

    def append(self, raws: list[bytes]) -> None:
        """Append them all, by a ledger that has nothing in memory but its last batch."""
        with bootstrap.application(self.box) as ledger:
            for at in range(0, len(raws), BATCH):
                ledger.append_all(raws[at : at + BATCH])

    def wal_bytes(self) -> int:
        with psycopg.connect(self.box.url, autocommit=True) as connection:
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        return int(row[0])

    def proof_ms(self) -> tuple[float, float]:
        """Median milliseconds of an inclusion and of a consistency proof, cold."""
        size = self.box.entries.size()
        inclusion, consistency = [], []
        for _ in range(PROOFS):
            index, old = random.randrange(size), random.randrange(1, size)
            inclusion.append(seconds(partial(Prover(self.box.tiles).inclusion, index, size)))
            consistency.append(seconds(partial(Prover(self.box.tiles).consistency, old, size)))
        return 1e3 * statistics.median(inclusion), 1e3 * statistics.median(consistency)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Per entry, or per proof."""

    append_us: float
    step_us: float
    cpu_us: float
    wal_bytes: float
    inclusion_ms: float
    consistency_ms: float


def measure(instance: Instance, server: EmbeddedPostgres, size: int, measured: int) -> Cost:
    """What it costs at `size` entries."""
    fill(server.url, size - measured)
    instance.sequence()
    raws = instance.signed(measured)
    postgres = server.pid
    assert postgres is not None
    wal, cpu = instance.wal_bytes(), time.process_time() + family_cpu_s(postgres)
    append_s = seconds(lambda: instance.append(raws))
    step_s = seconds(instance.sequence)
    cpu_s = time.process_time() + family_cpu_s(postgres) - cpu
    wal = instance.wal_bytes() - wal
    inclusion_ms, consistency_ms = instance.proof_ms()
    return Cost(
        append_us=1e6 * append_s / measured,
        step_us=1e6 * step_s / measured,
        cpu_us=1e6 * cpu_s / measured,
        wal_bytes=wal / measured,
        inclusion_ms=inclusion_ms,
        consistency_ms=consistency_ms,
    )


HEAD = (
    "                an entry:                                  a proof, cold, p50:\n"
    "     entries   append us    step us     CPU us  WAL bytes  inclusion ms  consistency ms"
)
LINE = (
    "{size:>12,} {0.append_us:>11.0f} {0.step_us:>10.1f} {0.cpu_us:>10.0f} {0.wal_bytes:>10,.0f}"
    " {0.inclusion_ms:>13.2f} {0.consistency_ms:>15.2f}"
)


def run(home: Path, largest: int, measured: int) -> int:
    sizes = [10**power for power in range(4, 10) if 10**power <= largest]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before\n{HEAD}", flush=True)
    costs = []
    with EmbeddedPostgres(home) as server:
        settings = Settings(  # type: ignore[call-arg]
            home=home, DATABASE_URL=server.url, log_origin="growth.example/log"
        )
        migrate(server.url)
        open_ledger(settings)
        with bootstrap.store(settings, name="growth") as box:
            instance = Instance(settings, box)
            for size in sizes:
                costs.append(measure(instance, server, size, min(measured, size // 2)))
                print(LINE.format(costs[-1], size=size), flush=True)
    ratio = costs[-1].cpu_us / costs[0].cpu_us
    print(f"CPU of an entry at {sizes[-1]:,} over that at {sizes[0]:,}: {ratio:.2f}")
    print(f"load {os.getloadavg()[0]:.1f} after")
    return int(ratio > MAX_RATIO)


def main(largest: int = LARGEST, measured: int = MEASURED) -> int:
    with temporary_home() as home:
        return run(home, largest, measured)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
