"""The audit beside pymerkle's rebuild, and what bounds it.

    python -m tests.bench.bench_audit [ENTRIES] [SIGNED]

A log of ENTRIES events of some 350 bytes, audited in a database and as an exported folder, without
signatures; one of SIGNED events with them. Peer: pymerkle's InmemoryTree over the same entries,
already in memory. Bound: SHA-256 alone of the same entries and nodes, on one core. Imports stand in
functions: the audit's processes load this module again.
"""

import functools
import os
import platform
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

ENTRIES, SIGNED, PEER_ENTRIES = 1_000_000, 20_000, 200_000
STEP = 20_000


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES
    signed = int(sys.argv[2]) if len(sys.argv) > 2 else SIGNED
    from ledger.store.embedded import EmbeddedPostgres
    from tests.pg import temporary_home

    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with temporary_home() as home, EmbeddedPostgres(home) as server:
        large = fill(server.url, home / "large", size, with_signatures=False)
        print(f"{size:,} entries; entries/s{'of its CPU time':>33}", flush=True)
        for place in ("database", "folder"):
            for jobs in (1, 2):
                show(large, place, jobs=jobs)
        show(large, "folder", jobs=2, pymerkle=True)
        entries = some_entries(large, min(PEER_ENTRIES, size))
        print(f"{'pymerkle InmemoryTree alone':>46}{'':>12}{pymerkle_rate(entries):>16,.0f}")
        print(f"{'SHA-256 alone':>46}{'':>12}{hash_rate(entries):>16,.0f}")
        small = fill(server.url, home / "small", signed, with_signatures=True)
        print(f"{signed:,} signed entries; entries/s", flush=True)
        for place in ("database", "folder"):
            for jobs in (1, 2):
                show(small, place, jobs=jobs, signatures=True)
        show(small, "folder", jobs=1)


def fill(server: str, home: Path, size: int, *, with_signatures: bool) -> dict[str, Any]:
    """A database and a folder. Rows go in by COPY: making them is not what is measured."""
    from ledger.log.export import export_log
    from ledger.store.archive import restoring
    from ledger.store.migrate import migrate
    from tests.audit_world import Ledger
    from tests.pg import create_database

    url = create_database(server)
    migrate(url)
    home.mkdir()
    with restoring(url) as session:
        for start in range(0, size, STEP):
            session.add_events(rows(start, min(start + STEP, size), with_signatures))
        session.set_head(size, size)
    ledger = Ledger(url, home / "memory.json")
    ledger.checkpoint()
    began = time.monotonic()
    with ledger.source() as source:
        export_log(source, home / "log", ledger.signer.vkey)
    print(f"exported {size:,} entries at {size / (time.monotonic() - began):,.0f}/s", flush=True)
    ledger.close()
    return {"url": url, "folder": home / "log", "key": ledger.signer.vkey}


def rows(start: int, stop: int, with_signatures: bool) -> Iterator[Any]:
    from ledger.domain.envelope import decode_envelope, encode_entry, leaf_hash
    from ledger.domain.events import stream_of
    from tests.audit_world import event, unsigned
    from tests.unit.lineage_world import name

    for n in range(start, stop):
        raw = event(n) if with_signatures else unsigned(n)
        stream = UUID(int=n)
        if with_signatures:
            made = decode_envelope(raw)
            stream = stream_of(made.type, made.log, made.actor, made.body)
        leaf = leaf_hash(encode_entry(n, n, raw))
        id = UUID(name(f"event {n}"))
        yield stream, 1, "identity.registered", raw, n + 1, n, leaf, id


def show(
    log: dict[str, Any], place: str, *, jobs: int, signatures: bool = False, pymerkle: bool = False
) -> None:
    from ledger.log.audit import audit_log
    from ledger.log.audit_files import FilesOpener
    from ledger.log.audit_rows import RowsOpener
    from ledger.log.sources import FolderSource
    from ledger.store.archive import ArchiveOpener

    opener: Any = FilesOpener(open_source=functools.partial(FolderSource, log["folder"]))
    if place == "database":
        opener = RowsOpener(open_archive=ArchiveOpener(url=log["url"]))
    began = time.process_time()
    report = audit_log(opener, log["key"], signatures=signatures, pymerkle=pymerkle, jobs=jobs)
    cpu_s = time.process_time() - began
    assert report.ok, [str(finding) for finding in report.findings]
    extras = [word for word, on in (("signatures", signatures), ("pymerkle", pymerkle)) if on]
    what = f"audit of a {place}, {jobs} process{'es' if jobs > 1 else ''}"
    what += f", {' and '.join(extras)}" if extras else ""
    # Of one process, what a free core would give; PostgreSQL's own work is not in it.
    per_cpu = f"{report.entries / cpu_s:>16,.0f}" if jobs == 1 else ""
    print(f"{what:>46}{report.entries / report.seconds:>12,.0f}{per_cpu}", flush=True)


def some_entries(log: dict[str, Any], count: int) -> list[bytes]:
    from ledger.log.audit_files import FilesReader
    from ledger.log.sources import FolderSource
    from ledger.verify.checkpoint import open_checkpoint

    source = FolderSource(log["folder"])
    size = open_checkpoint(source.read("checkpoint"), log["key"]).checkpoint.size
    return FilesReader(source).strip(0, count, size).entries[:count]


def pymerkle_rate(entries: list[bytes]) -> float:
    from ledger.log.second_opinion import root_of_entries

    began = time.process_time()
    root_of_entries(entries)
    return len(entries) / (time.process_time() - began)


def hash_rate(entries: list[bytes]) -> float:
    began = time.process_time()
    for entry in entries:
        sha256(b"\x00" + entry).digest()
        sha256(entry[:65]).digest()
    return len(entries) / (time.process_time() - began)


if __name__ == "__main__":
    main()
