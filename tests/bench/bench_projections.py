"""How fast the projector folds: `python -m tests.bench.bench_projections [events]`.

Two logs: answers only (inference, fee, attribution to 15 contributors on average: some 24 rows an
event) and the mixed history of the tests (with periods, claims, anomalies). On the embedded
PostgreSQL with its production settings, 500 events a transaction, then one at a time.
"""

import os
import platform
import random
import sys
import time
from collections.abc import Callable

from psycopg_pool import ConnectionPool

from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.rows import PgRowStore
from projections.registry import TABLES
from projections.runner import Runner
from tests.pg import temporary_home
from tests.projections_world import ListLog, World, actor, random_history, random_shares

CONTRIBUTORS = 30
SINGLE_EVENTS = 300


def answers(events: int) -> list[bytes]:
    choose, world = random.Random(1), World()
    people = [actor(n) for n in range(10, 10 + CONTRIBUTORS)]
    world.open()
    world.deposit(people[0], 10**15)
    adapter, run = world.new_id(), world.new_id()
    while len(world.entries) < events:
        inference = world.infer(people[0], adapter, 1_000)
        world.charge(people[0], adapter, inference, people[1], 1_000)
        world.attribute(adapter, run, inference, *random_shares(choose, people))
    return world.entries


def rate(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    done = work()
    return done / (time.perf_counter() - start)


def measure(name: str, history: list[bytes]) -> None:
    with temporary_home() as home, EmbeddedPostgres(home) as server:
        migrate(server.url)
        with ConnectionPool(server.url, min_size=1, max_size=3, open=True) as pool:
            log = ListLog(history[:-SINGLE_EVENTS])
            store = PgRowStore(pool, TABLES)
            runner = Runner(log, store)
            print(f"{name}: {rate(runner.catch_up):,.0f} events/s, {len(log.stored)} events")
            print(f"{name}: {rate(runner.rebuild):,.0f} events/s in a rebuild")
            start = time.perf_counter()
            runner.digest()
            print(f"{name}: digest in {time.perf_counter() - start:.2f} s")
            log.stored = history
            single, position = Runner(log, store, batch_events=1), runner.position()
            one_by_one = rate(lambda: single.catch_up() - position)
            print(f"{name}: {one_by_one:,.0f} events/s, one a transaction")


def main() -> None:
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure("answers", answers(events + SINGLE_EVENTS))
    measure("mixed", random_history(1, events + SINGLE_EVENTS))


if __name__ == "__main__":
    main()
