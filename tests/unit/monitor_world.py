"""Logs for the monitor's tests: real keys, events, tiles and checkpoints, served from a dictionary
or written to a folder. A log may be told to lie in any way, and then signs what it lies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from nacl.signing import SigningKey

from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.errors import NotFound, Unavailable
from ledger.log import tree
from ledger.log.monitor import Monitor
from ledger.log.monitor_state import MonitorFolder
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.evidence import Evidence, parse_evidence
from ledger.verify.merkle import tree_root
from ledger.verify.note import (
    COSIGNATURE,
    VerifierKey,
    cosign_text,
    format_note,
    sign_text,
    vkey_of,
)
from ledger.verify.tiles import TILE_WIDTH, Tile, encode_entries, tile_path

LOG = "log.example/monitored"
LOG_KEY = SigningKey(b"the log's key".ljust(32, b"."))
OTHER_KEY = SigningKey(b"somebody else's".ljust(32, b"."))
ACTOR = SigningKey(b"an actor".ljust(32, b"."))
VKEY = vkey_of(LOG, LOG_KEY)
NOW_US = 1_750_000_000_000_000


def event(n: int, *, log: str = LOG, type: str = "identity.registered", **body: Any) -> bytes:
    """A signed envelope; the n-th of its kind."""
    return sign_event(
        ACTOR,
        type=type,
        log=log,
        body=body or {"name": f"name {n}"},
        id=UUID(int=(8 << 76) | (2 << 62) | n),
        at=NOW_US + n,
    )


def entry(n: int, *, index: int | None = None, at: int | None = None, **changes: Any) -> bytes:
    where = n if index is None else index
    return encode_entry(where, NOW_US + n if at is None else at, event(n, **changes))


_ENTRIES: list[bytes] = []


def entries(count: int) -> list[bytes]:
    """The first entries of an honest log; signed once per test run."""
    while len(_ENTRIES) < count:
        _ENTRIES.append(entry(len(_ENTRIES)))
    return _ENTRIES[:count]


def witness_key(n: int) -> tuple[SigningKey, VerifierKey]:
    key = SigningKey(f"witness {n}".encode().ljust(32, b"."))
    return key, vkey_of(f"witness.example/{n}", key, COSIGNATURE)


def checkpoint(
    size: int,
    root: bytes,
    *,
    key: SigningKey = LOG_KEY,
    origin: str = LOG,
    cosigned: Sequence[tuple[int, int]] = (),
) -> bytes:
    """A signed note; `cosigned` are (witness number, POSIX seconds)."""
    text = format_checkpoint(Checkpoint(origin=origin, size=size, root=root))
    lines = [sign_text(text, origin, key)]
    for n, at in cosigned:
        secret, known = witness_key(n)
        lines.append(cosign_text(text, known.name, secret, at))
    return format_note(text, lines)


def log_files(
    held: Sequence[bytes],
    *,
    note: bytes | None = None,
    leaves: Sequence[bytes] | None = None,
    **signing: Any,
) -> dict[str, bytes]:
    """Every file of a log of these entries. `leaves` are hashed instead where they are given."""
    hashes = [leaf_hash(e) for e in held] if leaves is None else list(leaves)
    files: dict[str, bytes] = {}
    for (level, n), data in tree.integrate(0, hashes, lambda wanted: {}).items():
        files[tile_path(Tile(level=level, n=n, width=len(data) // 32))] = data
    for at in range(0, len(held), TILE_WIDTH):
        bundle = held[at : at + TILE_WIDTH]
        path = tile_path(Tile(level=None, n=at // TILE_WIDTH, width=len(bundle)))
        files[path] = encode_entries(bundle)
    files["checkpoint"] = note or checkpoint(len(hashes), tree_root(hashes), **signing)
    return files


@dataclass
class DictSource:
    """A LogSource over a dictionary; `down` makes it unreachable after that many reads."""

    files: dict[str, bytes] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    down: int | None = None

    def read(self, path: str) -> bytes:
        if self.down is not None and len(self.reads) >= self.down:
            raise Unavailable("the log does not answer")
        self.reads.append(path)
        if path not in self.files:
            raise NotFound(f"no {path}")
        return self.files[path]


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """As a static log: the checkpoint last."""
    for path, data in sorted(files.items(), key=lambda item: item[0] == "checkpoint"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def monitor(source: Any, folder: Path, **options: Any) -> Monitor:
    return Monitor(
        source,
        MonitorFolder(folder, log=LOG, key=VKEY),
        log=LOG,
        key=VKEY,
        clock=lambda: NOW_US,
        sleep=lambda seconds: None,
        **options,
    )


def kept(folder: Path) -> list[Evidence]:
    return [parse_evidence(path.read_bytes()) for path in sorted((folder / "evidence").glob("*"))]
