"""Two histories under one log key, in memory: what receipts are held against in tests.

`History` is a log of made-up entries with real tiles, checkpoints and signatures. `folder` writes
it as any mirror would serve it. Entries are any bytes after index and time; no events are needed.
"""

from collections.abc import Sequence
from pathlib import Path

from nacl.signing import SigningKey

from ledger.domain.canonical import canonical_json
from ledger.log.prover import Prover
from ledger.log.receipts import Promises, ReceiptIssuer
from ledger.log.sequencer import Sequencer
from ledger.log.serving import LogFiles
from ledger.log.signer import LogSigner
from ledger.ports import StoredCheckpoint
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.note import (
    COSIGNATURE,
    cosign_text,
    format_note,
    format_vkey,
    parse_note,
    vkey_of,
)
from ledger.verify.receipt import Receipt, parse_receipt
from ledger.verify.receipt_verdict import ReceiptVerdict, Shown, judge
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH, Tile, tile_path
from tests.fakes import MemoryEntryLog, MemoryTileStore

LOG = "ledger.example/receipts"
KEY = SigningKey(b"L" * 32)
VKEY = vkey_of(LOG, KEY)
RECORDED_AT = 1_700_000_000_000_000
PROMISE_S = 60
INCLUDED_BY = RECORDED_AT + PROMISE_S * 1_000_000
IN_TIME, LATE = INCLUDED_BY // 1_000_000, INCLUDED_BY // 1_000_000 + 1


class History:
    """A log with these entries, signed to its end."""

    def __init__(
        self, memory: Path, entries: Sequence[bytes], *, origin: str = LOG, key: SigningKey = KEY
    ) -> None:
        self.log, self.tiles = MemoryEntryLog(), MemoryTileStore()
        self.signer = LogSigner(origin=origin, key=key, state_path=memory / "signed.json")
        self.sequencer = Sequencer(
            log=self.log, tiles=self.tiles, signer=self.signer, clock=lambda: RECORDED_AT
        )
        self.issuer = ReceiptIssuer(
            origin=origin, sign=self.signer.sign_receipt, promises=Promises([(0, PROMISE_S)])
        )
        self.append(*entries)

    def append(self, *entries: bytes, recorded_at: int = RECORDED_AT) -> None:
        for entry in entries:
            self.log.append(entry, recorded_at=recorded_at)
        self.sequencer.step()

    @property
    def newest(self) -> StoredCheckpoint:
        found = self.tiles.latest()
        assert found is not None
        return found

    def receipt(self, first: int, stop: int | None = None) -> Receipt:
        leaves = self.log.leaf_hashes(first, stop or first + 1)
        issued = self.issuer.issue(first_index=first, leaf_hashes=leaves, recorded_at=RECORDED_AT)
        return parse_receipt(canonical_json(issued))

    def shown(self, receipt: Receipt, size: int | None = None) -> list[Shown]:
        promise, size = receipt.promise, size or self.newest.size
        indexes = range(promise.first_index, min(size, promise.size))
        proofs = Prover(self.tiles).inclusions(indexes, size)
        return [
            Shown(index=i, leaf=self.log.leaf_hashes(i, i + 1)[0], proof=tuple(proofs[i]))
            for i in indexes
        ]

    def judge(
        self, receipt: Receipt, *, now: int = INCLUDED_BY, policy: bytes | None = None,
        note: bytes | None = None,
    ) -> ReceiptVerdict:  # fmt: skip
        note = note or self.newest.note
        size = open_checkpoint(note, VKEY).checkpoint.size
        shown = self.shown(receipt, size)
        return judge(receipt, VKEY, note=note, shown=shown, now=now, policy=policy)

    def folder(self, path: Path) -> Path:
        files = LogFiles(log=self.log, tiles=self.tiles)
        return mirror(files, self.newest.size, self.signer.vkey_text, path)


def mirror(files: LogFiles, size: int, vkey: str, path: Path) -> Path:
    """A log's files as tlog-tiles has them, those of a tree of `size`, and its key."""
    level, names = 0, ["checkpoint"]
    while hashes := size >> (TILE_HEIGHT * level):
        names += [
            tile_path(Tile(level=level, n=n, width=min(TILE_WIDTH, hashes - n * TILE_WIDTH)))
            for n in range(-(-hashes // TILE_WIDTH))
        ]
        level += 1
    for name in names:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.serve_path(name)[0])
    (path / "vkey").write_text(f"{vkey}\n")
    return path


def entries(count: int, *, other: int | None = None) -> list[bytes]:
    """`count` entries; that at index `other` is another one than usual."""
    return [b"other" if n == other else f"entry {n}".encode() for n in range(count)]


def witness_key(name: str) -> SigningKey:
    return SigningKey(name.encode().ljust(32, b"w"))


def cosigned(note: bytes, **at: int) -> bytes:
    """The note with cosignatures of the named witnesses at those POSIX seconds."""
    parsed = parse_note(note)
    lines = [cosign_text(parsed.text, f"{n}.example", witness_key(n), t) for n, t in at.items()]
    return format_note(parsed.text, [*parsed.signatures, *lines])


def policy(k: int, *names: str) -> bytes:
    lines = [
        f"witness {n} {format_vkey(vkey_of(f'{n}.example', witness_key(n), COSIGNATURE))}"
        for n in names
    ]
    return "\n".join([*lines, f"group g {k} {' '.join(names)}", "quorum g", ""]).encode()
