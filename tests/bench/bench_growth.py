"""What an append costs as the log grows: the same work on it and, in turns, on a small log.

    python -m tests.bench.bench_growth [LARGEST] [MEASURED]

The log is filled to each size inside PostgreSQL (rows of FILL_BYTES with true leaf hashes, which no
one reads as events) and sequenced. Then MEASURED signed events take the real path: `Ledger` in
appends of BATCH, a sequencer step for every TURN of them (integrate, sign, publish). The small log
(never above 10^5 entries, same server) gets as many, turn by turn, so that what else the machine
does weighs on both alike. At last inclusion and consistency proofs at random places, each by a
prover that has nothing in memory. Embedded PostgreSQL, fsync on.

Flat means: the large log costs what the small one costs. The bytes of WAL grow once the indexes are
so large that hardly two appends between two of PostgreSQL's checkpoints touch the same page: ids
are random, and each first touch logs the page whole.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import psycopg
from nacl.signing import SigningKey

from ledger import bootstrap
from ledger.aggregates.application import Ledger
from ledger.client import now_us
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.log.prover import Prover
from ledger.log.sequencer import Sequencer
from ledger.processes.supervisor import open_ledger
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from tests.bench.cpu import family_cpu_s
from tests.pg import create_database, temporary_home

LARGEST = 1_000_000
MEASURED = 20_000
BATCH = 100
PROOFS = 200
FILL_BYTES = 200
FILL_CHUNK = 250_000
TURN = 1_000
MAX_RATIO = 1.5
"""An append to the largest log may cost so many times the CPU of one to a small log."""

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
        connection.execute("CHECKPOINT")  # or the fill's pages are written while we measure


def seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


class Instance:
    """A log, and what was spent on it so far."""

    def __init__(self, settings: Settings, box: bootstrap.Store, server: EmbeddedPostgres) -> None:
        self.box = box
        self.log_origin = settings.log_origin
        self.spent_s = self.step_s = self.cpu_s = 0.0
        self.wal_bytes = 0
        self._server = server
        self._sequencer = Sequencer(
            log=box.entries,
            tiles=box.tiles,
            signer=bootstrap.log_signer(settings),
            clock=now_us,
        )

    def sequence(self) -> None:
        while self._sequencer.step():
            pass

    def signed(self, count: int) -> list[bytes]:
        return [
            sign_event(
                SigningKey.generate(),
                type="identity.registered",
                log=self.log_origin,
                body={"name": "growth"},
                id=uuid4(),
                at=now_us(),
            )
            for _ in range(count)
        ]

    def turn(self, ledger: Ledger, raws: Sequence[bytes]) -> None:
        """Append them and sequence; counts what it costs."""
        wal, cpu = self._wal(), self._cpu()
        started = time.monotonic()
        for at in range(0, len(raws), BATCH):
            ledger.append_all(raws[at : at + BATCH])
        appended = time.monotonic()
        self.sequence()
        self.step_s += time.monotonic() - appended
        self.spent_s += appended - started
        self.cpu_s += self._cpu() - cpu
        self.wal_bytes += self._wal() - wal

    def proof_ms(self) -> tuple[float, float]:
        """Median milliseconds of an inclusion and of a consistency proof, cold."""
        size = self.box.entries.size()
        inclusion, consistency = [], []
        for _ in range(PROOFS):
            index, old = random.randrange(size), random.randrange(1, size)
            inclusion.append(seconds(partial(Prover(self.box.tiles).inclusion, index, size)))
            consistency.append(seconds(partial(Prover(self.box.tiles).consistency, old, size)))
        return 1e3 * statistics.median(inclusion), 1e3 * statistics.median(consistency)

    def _cpu(self) -> float:
        postgres = self._server.pid
        assert postgres is not None
        return time.process_time() + family_cpu_s(postgres)

    def _wal(self) -> int:
        with psycopg.connect(self.box.url, autocommit=True) as connection:
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        return int(row[0])


@contextmanager
def instance(server: EmbeddedPostgres, home: Path) -> Iterator[Instance]:
    """A fresh log on a database of its own."""
    settings = Settings(  # type: ignore[call-arg]
        home=home, DATABASE_URL=create_database(server.url), log_origin="growth.example/log"
    )
    home.mkdir()
    migrate(settings.database_url or "")
    open_ledger(settings)
    with bootstrap.store(settings, name="growth") as box:
        yield Instance(settings, box, server)


def measure(large: Instance, small: Instance, size: int, measured: int) -> float:
    """Both logs through `measured` appends, and the line about them; the ratio of their CPU."""
    fill(large.box.url, size - measured)
    large.sequence()
    with ExitStack() as open_ledgers:
        pairs = [
            (one, open_ledgers.enter_context(bootstrap.application(one.box)), one.signed(measured))
            for one in (large, small)
        ]
        for one, ledger, _ in pairs:
            ledger.append_all(one.signed(BATCH))  # connections, prepared statements
            one.sequence()
            one.spent_s = one.step_s = one.cpu_s = 0.0
            one.wal_bytes = 0
        for at in range(0, measured, TURN):
            for one, ledger, raws in pairs:
                one.turn(ledger, raws[at : at + TURN])
    ratio = large.cpu_s / small.cpu_s
    figures = LINE.format(
        size=size,
        append=1e6 * large.spent_s / measured,
        step=1e6 * large.step_s / measured,
        cpu=1e6 * large.cpu_s / measured,
        wal=large.wal_bytes / measured,
        ratio=ratio,
        time=large.spent_s / small.spent_s,
        proofs=large.proof_ms(),
    )
    print(figures, flush=True)
    return ratio


HEAD = (
    "                an entry:                                  beside a small log:"
    "         a proof, cold, p50:\n"
    "     entries   append us    step us     CPU us  WAL bytes       CPU, times  time, times"
    "  inclusion ms  consistency ms"
)
LINE = (
    "{size:>12,} {append:>11.0f} {step:>10.1f} {cpu:>10.0f} {wal:>10,.0f} {ratio:>16.2f}"
    " {time:>12.2f} {proofs[0]:>13.2f} {proofs[1]:>15.2f}"
)


def run(home: Path, largest: int, measured: int) -> int:
    sizes = [10**power for power in range(4, 10) if 10**power <= largest]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before\n{HEAD}", flush=True)
    ratio = 0.0
    with (
        EmbeddedPostgres(home) as server,
        instance(server, home / "large") as large,
        instance(server, home / "small") as small,
    ):
        for size in sizes:
            ratio = measure(large, small, size, min(measured, size // 2))
    print(f"load {os.getloadavg()[0]:.1f} after")
    return int(ratio > MAX_RATIO)


def main(largest: int = LARGEST, measured: int = MEASURED) -> int:
    with temporary_home() as home:
        return run(home, largest, measured)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
