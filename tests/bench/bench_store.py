"""Appends per second: the stock recorder, ours, and ours behind group commit.

    python -m tests.bench.bench_store [SECONDS]

Embedded PostgreSQL with its default settings (fsync on), one event of 600 bytes per call, callers
are threads of one Python process. The stock recorder is `eventsourcing`'s own, on the same server
with the same pool.
"""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from uuid import uuid4

from eventsourcing.persistence import ApplicationRecorder, StoredEvent
from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore
from psycopg.conninfo import conninfo_to_dict

from ledger.log.appender import GroupCommit
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.recorder import MAX_POOL_SIZE, GapFreeFactory
from tests.pg import create_database, temporary_home

CALLERS = (1, 16, 64, 256)
STATE = b"x" * 600


def appends_per_second(recorder: ApplicationRecorder, callers: int, seconds: float) -> float:
    """`callers` threads append one event at a time until the time is over."""
    counts = [0] * callers
    deadline = time.monotonic() + seconds

    def call(n: int) -> None:
        while time.monotonic() < deadline:
            recorder.insert_events([StoredEvent(uuid4(), 1, "topic", STATE)])
            counts[n] += 1

    threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - started)


def stock(server: str) -> tuple[ApplicationRecorder, Callable[[], None]]:
    options = {k: str(v) for k, v in conninfo_to_dict(create_database(server)).items()}
    datastore = PostgresDatastore(
        options["dbname"], options["host"], "5432", options["user"], "", pool_size=MAX_POOL_SIZE
    )
    datastore.pool.timeout = 120
    recorder = PostgresApplicationRecorder(datastore)
    recorder.create_table()
    return recorder, datastore.close


def ours(server: str, *, grouped: bool) -> tuple[ApplicationRecorder, Callable[[], None]]:
    url = create_database(server)
    migrate(url)
    factory = GapFreeFactory.on(
        url, event_id_of=lambda event: uuid4(), decorate=GroupCommit if grouped else lambda r: r
    )
    factory.datastore.pool.timeout = 120
    return factory.application_recorder(), factory.close


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'events/s':>16}" + "".join(f"{n:>8} callers" for n in CALLERS))
    with temporary_home() as home, EmbeddedPostgres(home) as server:
        kinds: dict[str, Callable[[], tuple[ApplicationRecorder, Callable[[], None]]]] = {
            "stock": lambda: stock(server.url),
            "gap-free": lambda: ours(server.url, grouped=False),
            "group commit": lambda: ours(server.url, grouped=True),
        }
        for name, make in kinds.items():
            recorder, close = make()
            rates = [appends_per_second(recorder, n, seconds) for n in CALLERS]
            close()
            print(f"{name:>16}" + "".join(f"{rate:>16,.0f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
