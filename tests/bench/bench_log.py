"""The log's proofs beside their peers: made cold by the server, verified offline, and the tree.

    python -m tests.bench.bench_log [LEAVES]

LEAVES is 1,000,000 by default. Four tables, each with what bounds it:

1. Integration: leaf hashes into tiles, beside pymerkle's InmemoryTree.
2. Proofs by the server, cold: PostgreSQL stopped and started, the asking process new, every proof
   at another random place. Once with the operating system's page cache as the restart left it, once
   with the database's files dropped from it. Beside it pymerkle's SqliteTree, also in new
   processes; it rebuilds the tree from all leaves for its first proof and has a cache after.
3. The files a log serves: checkpoint and hash tiles out of PostgreSQL, without HTTP.
4. Verification of `.tlog-proof` files (signature, path) by one thread, beside sigstore-python's
   own checkpoint and Merkle checks on the same proofs.

The peers are optional: without them their lines say so.
"""

import hashlib
import importlib.util
import os
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nacl.signing import SigningKey

from ledger.domain.envelope import leaf_hash, node_hash
from ledger.log import tree
from ledger.log.prover import Prover
from ledger.log.serving import LogFiles
from ledger.ports import StoredCheckpoint
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.tiles import PostgresTileStore
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.merkle import verify_consistency, verify_inclusion
from ledger.verify.note import format_note, sign_text, vkey_of
from ledger.verify.tiles import TILE_WIDTH, Tile, tile_path
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof, verify_tlog_proof
from tests.pg import create_database, temporary_home

LEAVES = 1_000_000
PEER_APPENDS = 50_000
BATCH = 16_384
COLD_PROOFS = 500
PEER_TREES = (100_000, 1_000_000)
VERIFIED = 2_000
ROUNDS = 5
ENTRY = b"e" * 600
ORIGIN = "bench.example/log"
KEY = SigningKey(hashlib.sha256(b"bench").digest())
VKEY = vkey_of(ORIGIN, KEY)

Tiles = dict[tree.TileId, bytes]


def leaves_of(count: int) -> list[bytes]:
    return [leaf_hash(b"%d" % n) for n in range(count)]


def rate(work: Callable[[], int], *, rounds: int = ROUNDS) -> float:
    """The best of some rounds, per second of this thread's processor time."""
    best = 0.0
    for _ in range(rounds):
        started = time.process_time()
        count = work()
        best = max(best, count / (time.process_time() - started))
    return best


def line(name: str, *cells: str) -> None:
    print(f"{name:>44}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def per_second(value: float) -> str:
    return f"{value:,.0f}/s"


# --- 1. the tree ------------------------------------------------------------------------------


def grow(leaves: Sequence[bytes]) -> Tiles:
    tiles: Tiles = {}
    for size in range(0, len(leaves), BATCH):
        tiles.update(tree.integrate(size, leaves[size : size + BATCH], lambda wanted: tiles))
    return tiles


def bench_integration(leaves: Sequence[bytes]) -> Tiles:
    print("\n1. Tree integration alone")
    line("", "leaves/s")
    started = time.perf_counter()
    tiles = grow(leaves)
    ours = len(leaves) / (time.perf_counter() - started)
    line(f"ours, {len(leaves):,} leaves in batches of {BATCH:,}", per_second(ours))
    started = time.perf_counter()
    hashed = [leaf_hash(b"%d" % n) for n in range(PEER_APPENDS)]
    grow(hashed)
    with_leaves = PEER_APPENDS / (time.perf_counter() - started)
    line(f"ours with the leaf hashes, {PEER_APPENDS:,}", per_second(with_leaves))
    if importlib.util.find_spec("pymerkle"):
        import pymerkle

        peer = pymerkle.InmemoryTree(algorithm="sha256")
        started = time.perf_counter()
        for n in range(PEER_APPENDS):
            peer.append_entry(b"%d" % n)
        peer.get_root()
        line(
            f"pymerkle InmemoryTree, {PEER_APPENDS:,}",
            per_second(PEER_APPENDS / (time.perf_counter() - started)),
        )
    else:
        line("pymerkle is not installed")
    bound = node_hashes_per_second()
    line("bound: SHA-256 of one node per leaf", per_second(bound))
    print(f"   ours is at {ours / bound:.0%} of what hashlib alone allows here")
    return tiles


def node_hashes_per_second() -> float:
    node, count = b"\x01" + bytes(64), 300_000

    def work() -> int:
        for _ in range(count):
            hashlib.sha256(node).digest()
        return count

    return rate(work)


# --- 2. proofs, cold --------------------------------------------------------------------------


def bench_cold_proofs(size: int, root: bytes, tiles: Tiles) -> None:
    print(f"\n2. Proofs by the server at {size:,} leaves, cold after a restart (milliseconds)")
    line("", "first", "p50", "p99")
    with temporary_home() as home:
        with EmbeddedPostgres(home) as server:
            url = create_database(server.url)
            migrate(url)
            pool = connect(url)
            note = signed(size, root)
            PostgresTileStore(pool).publish(
                tiles,
                StoredCheckpoint(size=size, root=root, note=note, signed_at=0),
                expected_size=0,
            )
            pool.close()
            data = server.data_dir
        for evicted in (False, True):
            if evicted:
                drop_from_page_cache(data)
            with EmbeddedPostgres(home):
                ask_in_new_process("cold-proofs", url, "files not cached" if evicted else "")
        for leaves in PEER_TREES:
            if leaves <= size:
                bench_sqlite_tree(leaves)
        explain_cold_proofs()
        with EmbeddedPostgres(home):
            bench_files(url, size)


def explain_cold_proofs() -> None:
    print(
        "   bound: the path to a leaf needs about 630 of the tree's hashes made again from its\n"
        f"   tiles, {630_000 / node_hashes_per_second():.2f} ms of SHA-256, and one round trip "
        "to PostgreSQL\n"
        "   files not cached: PostgreSQL's files were dropped from the system's page cache\n"
        "   (posix_fadvise) while it was stopped; otherwise reads that miss its own cache end there"
    )


def drop_from_page_cache(folder: Path) -> None:
    """The kernel forgets the files' clean pages; PostgreSQL is stopped, so all of them are."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def ask_in_new_process(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.bench.bench_log", *arguments]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=300)


def cold_proofs(url: str, remark: str) -> None:
    """In a new process: what the first and the next proofs cost; then all of them are verified."""
    pool = connect(url)
    store = PostgresTileStore(pool)
    prover = Prover(store)
    rng = random.Random(os.urandom(8))
    remark = f" ({remark})" if remark else ""
    newest = store.latest()
    assert newest is not None
    size, root = newest.size, newest.root
    places = rng.sample(range(size), min(COLD_PROOFS, size))
    took, proofs = timed(lambda index: prover.inclusion(index, size), places)
    report(f"inclusion{remark}", took)
    olds = rng.sample(range(1, size), min(COLD_PROOFS, size - 1))
    took, consistent = timed(lambda old: prover.consistency(old, size), olds)
    report(f"consistency{remark}", took)
    for index, proof in zip(places, proofs, strict=True):
        leaf = leaf_hash(b"%d" % index)
        verify_inclusion(index=index, size=size, leaf=leaf, proof=proof, root=root)
    for old, proof in list(zip(olds, consistent, strict=True))[:50]:
        verify_consistency(size1=old, size2=size, root1=prover.root(old), root2=root, proof=proof)
    pool.close()


def timed(ask: Callable[[int], Any], arguments: Sequence[int]) -> tuple[list[float], list[Any]]:
    took, answers = [], []
    for argument in arguments:
        started = time.perf_counter()
        answers.append(ask(argument))
        took.append((time.perf_counter() - started) * 1_000)
    return took, answers


def report(name: str, took_ms: Sequence[float]) -> None:
    p50 = statistics.median(took_ms)
    p99 = sorted(took_ms)[len(took_ms) * 99 // 100]
    line(name, *(f"{value:.2f}" for value in (took_ms[0], p50, p99)))


def bench_sqlite_tree(leaves: int) -> None:
    if not importlib.util.find_spec("pymerkle"):
        line("pymerkle is not installed")
        return
    with temporary_home() as home:
        file = str(home / "tree.db")
        import pymerkle

        pymerkle.SqliteTree(file, algorithm="sha256").close()  # makes its table
        with sqlite3.connect(file) as database:
            database.executemany(
                "INSERT INTO leaf (entry, hash) VALUES (?, ?)",
                ((b"%d" % n, leaf_hash(b"%d" % n)) for n in range(leaves)),
            )
        database.close()
        ask_in_new_process("cold-peer", file, str(leaves))


def cold_peer(file: str, leaves: str) -> None:
    import pymerkle

    size = int(leaves)
    peer = pymerkle.SqliteTree(file, algorithm="sha256")
    places = random.Random(1).sample(range(size), 20)
    took, _ = timed(lambda index: peer.prove_inclusion(index + 1), places)
    report(f"pymerkle SqliteTree, {size:,}, inclusion", took)
    peer.close()


# --- 3. the log's files -----------------------------------------------------------------------


def bench_files(url: str, size: int) -> None:
    print("\n3. A log's files out of PostgreSQL, one thread, without HTTP")
    pool = connect(url)
    files = LogFiles(log=PostgresEntryLog(pool), tiles=PostgresTileStore(pool))
    full = size // TILE_WIDTH
    rng = random.Random(3)
    paths: Mapping[str, Callable[[], str]] = {
        "checkpoint": lambda: "checkpoint",
        "full hash tile": lambda: tile_path(Tile(level=0, n=rng.randrange(full))),
        "partial hash tile": lambda: tile_path(
            Tile(level=0, n=rng.randrange(full), width=rng.randrange(1, TILE_WIDTH))
        ),
    }
    for name, path in paths.items():
        count, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < 1.0:
            files.serve_path(path())
            count += 1
        line(name, per_second(count / took))
    pool.close()


# --- 4. verification --------------------------------------------------------------------------


def signed(size: int, root: bytes) -> bytes:
    text = format_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root))
    return format_note(text, [sign_text(text, ORIGIN, KEY)])


def bench_verification(size: int, root: bytes, leaves: Sequence[bytes], tiles: Tiles) -> None:
    print(f"\n4. Offline verification of single-entry proofs, {size:,} leaves, one core")
    line("", "verified/s")
    note = signed(size, root)
    rng = random.Random(7)
    proofs = []
    for index in rng.sample(range(size), min(VERIFIED, size)):
        ranges = tree.inclusion_ranges(index, size)
        path = tuple(tree.range_hashes(ranges, lambda wanted: tiles))
        proofs.append(TlogProof(index=index, proof=path, checkpoint=note))
    files = [(format_tlog_proof(proof), leaves[proof.index]) for proof in proofs]

    def whole() -> int:
        for data, leaf in files:
            verify_tlog_proof(data, leaf, VKEY)
        return len(files)

    def path_alone() -> int:
        for proof, (_, leaf) in zip(proofs, files, strict=True):
            verify_inclusion(index=proof.index, size=size, leaf=leaf, proof=proof.proof, root=root)
        return len(files)

    ours = rate(whole)
    line("ours: .tlog-proof file, signature, path", per_second(ours))
    line("ours: path alone", per_second(rate(path_alone)))
    bench_sigstore(proofs, root, size)
    bound = crypto_bound(len(proofs[0].proof))
    line("bound: one Ed25519 and the path's SHA-256", per_second(bound))
    print(f"   ours is at {ours / bound:.0%} of that bound; the rest is parsing, mostly base64")


def crypto_bound(depth: int) -> float:
    message = b"m" * 120
    signature = KEY.sign(message).signature
    node = bytes(32)

    def work() -> int:
        for _ in range(500):
            KEY.verify_key.verify(message, signature)
            for _ in range(depth):
                node_hash(node, node)
        return 500

    return rate(work)


def bench_sigstore(proofs: Sequence[TlogProof], root: bytes, size: int) -> None:
    """sigstore-python's two checks, its own code, on the same tree. Its proofs come already parsed,
    as protobuf JSON does it, so the parsing of a file is in our number and not in theirs."""
    if not importlib.util.find_spec("sigstore"):
        line("sigstore is not installed")
        return
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from sigstore._internal import merkle, trust
    from sigstore._internal.rekor import checkpoint

    key = Ed25519PublicKey.from_public_bytes(VKEY.public_key)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    models: Any = trust.common_v1  # type: ignore[attr-defined]
    its_key = models.PublicKey.model_construct(
        raw_bytes=der, key_details=models.PublicKeyDetails.PKIX_ED25519
    )
    keyring: Any = trust.Keyring([its_key])
    entries: list[Any] = [
        SimpleNamespace(
            _inner=SimpleNamespace(
                canonicalized_body=b"%d" % proof.index,
                log_id=SimpleNamespace(key_id=VKEY.id + bytes(28)),
                inclusion_proof=SimpleNamespace(
                    log_index=proof.index,
                    tree_size=size,
                    root_hash=root,
                    hashes=list(proof.proof),
                    checkpoint=SimpleNamespace(envelope=proof.checkpoint.decode()),
                ),
            )
        )
        for proof in proofs
    ]

    def merkle_alone() -> int:
        for entry in entries:
            merkle.verify_merkle_inclusion(entry)
        return len(entries)

    def whole() -> int:
        for entry in entries:
            merkle.verify_merkle_inclusion(entry)
            checkpoint.verify_checkpoint(keyring, entry)
        return len(entries)

    line("sigstore-python: checkpoint and path", per_second(rate(whole)))
    line("sigstore-python: path alone, leaf hash too", per_second(rate(merkle_alone)))


def main(leaf_count: int) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    leaves = leaves_of(leaf_count)
    tiles = bench_integration(leaves)
    root = tree.root(leaf_count, lambda wanted: tiles)
    bench_cold_proofs(leaf_count, root, tiles)
    bench_verification(leaf_count, root, leaves, tiles)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cold-proofs"]:
        cold_proofs(*sys.argv[2:4])
    elif sys.argv[1:2] == ["cold-peer"]:
        cold_peer(*sys.argv[2:4])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else LEAVES)
