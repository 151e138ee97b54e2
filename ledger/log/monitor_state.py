"""What a monitor remembers between two looks at a log: one file, written whole or not at all.

`tributary/monitor-state/v1`, canonical JSON: the last checkpoint that was verified (`head`), the
larger ones that were seen signed (`seen`), those that only witnesses showed and the log has not
reached yet (`ahead`), and the right edge of the tree that the monitor has
built itself out of the log's entries, `size` of them. The edge is at most 255 hashes a level, so
the file stays small however long the log grows, and it is all that is needed to go on: each new
checkpoint is checked by hashing new entries onto the edge.

What a crash leaves: the file as it was, so the next run reads some entries again. `seen` is written
before any entry is read, so a log cannot show a checkpoint, stop answering, and take it back.

Catching up with a long log takes minutes, so a second file of the same form, `progress.json`, holds
the tree on its way from `head` to the
largest seen. It is only a start for the next run: what it holds is
checked when the signed root is reached, and it is dropped after any alarm.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import ConfigError, LedgerError, StorageError
from ledger.files import PUBLIC, make_folder, write_durably
from ledger.log import tree
from ledger.log.sources import width_at
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.encoding import decode_base64, encode_base64
from ledger.verify.fields import count_of, list_of, object_of, text_of
from ledger.verify.merkle import HASH_BYTES
from ledger.verify.note import VerifierKey, format_vkey, parse_vkey
from ledger.verify.tiles import TILE_WIDTH, tiles_of

FORMAT = "tributary/monitor-state/v1"
STATE_FILE, PROGRESS_FILE = "monitor.json", "progress.json"
MAX_SEEN = 16
"""Checkpoints between `head` and the largest, when one run after the other is interrupted."""
MAX_AHEAD = 64
"""Checkpoints of witnesses that wait for the log to come to their size."""
LOCK_FILE, EVIDENCE_FOLDER = "lock", "evidence"
_FIELDS = (
    "format", "log", "vkey", "head", "seen", "ahead", "size", "edge", "recorded_at", "entries",
    "anchored", "last_ok",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A checkpoint whose signature the monitor has verified, and the note that it came in."""

    checkpoint: Checkpoint
    note: bytes


@dataclass(frozen=True, kw_only=True)
class MonitorState:
    """`seen` ascends by size; its last is the largest ever seen. `ahead` ascends too: checkpoints
    that witnesses cosigned, of trees that the log has not shown here yet. `edge` holds the partial
    tile of each level of the tree of `size` entries, by tile id; `recorded_at` (us) is the last
    entry's; `entries` counts those whose content was checked; `anchored` is the newest
    (size, root) of the contract that agreed; `last_ok` in us."""

    head: Signed | None = None
    seen: tuple[Signed, ...] = ()
    ahead: tuple[Signed, ...] = ()
    size: int = 0
    edge: Mapping[tree.TileId, bytes] = field(default_factory=dict)
    recorded_at: int = 0
    entries: int = 0
    anchored: tuple[int, bytes] | None = None
    last_ok: int = 0

    def read(self, wanted: Sequence[tree.TileId]) -> Mapping[tree.TileId, bytes]:
        """The edge as `ledger.log.tree` reads tiles."""
        return {id: self.edge[id] for id in wanted if id in self.edge}

    @property
    def root(self) -> bytes:
        """The root of the tree that was built so far."""
        return tree.root(self.size, self.read)


def seen_with(seen: Sequence[Signed], new: Signed) -> tuple[Signed, ...]:
    """`seen` and a checkpoint at least as large as the last. Where there are too many, the second
    newest goes: the first and the largest say most."""
    smaller = [old for old in seen if old.checkpoint.size < new.checkpoint.size]
    return (*smaller[: MAX_SEEN - 1], new)


def ahead_with(ahead: Sequence[Signed], new: Iterable[Signed]) -> tuple[Signed, ...]:
    """`ahead` and more, one a tree. Where there are too many the largest go: the log comes to the
    smaller ones sooner, and one that it does not extend is enough."""
    one_each = {(s.checkpoint.size, s.checkpoint.root): s for s in (*new, *ahead)}
    return tuple(one_each[tree] for tree in sorted(one_each))[:MAX_AHEAD]


def edge_of(size: int, tiles: Mapping[tree.TileId, bytes]) -> dict[tree.TileId, bytes]:
    """Out of `tiles`, those that a tree of `size` leaves partially."""
    wanted = [(t.level or 0, t.n) for t in tiles_of(size) if t.width < TILE_WIDTH]
    return {id: tiles[id] for id in wanted}


def followed(path: Path) -> VerifierKey | None:
    """The key that the monitor of that folder has followed so far; ConfigError when damaged."""
    try:
        value = object_of(parse_canonical((path / STATE_FILE).read_bytes()), _FIELDS, "the state")
        return parse_vkey(text_of(value["vkey"], "vkey"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path / STATE_FILE}: {error.strerror}") from error
    except LedgerError as error:
        raise ConfigError(f"{path / STATE_FILE} is damaged: {error}") from error


class MonitorFolder:
    """The folder of one monitor of one log: its state, its lock, its evidence."""

    def __init__(self, path: Path, *, log: str, key: VerifierKey) -> None:
        self.path = path
        self.evidence = path / EVIDENCE_FOLDER
        self._log = log
        self._key = key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held by one process; ConfigError where another has it."""
        make_folder(self.path)
        descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, PUBLIC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another monitor works in {self.path}; give each its own --state"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def evidence_files(self) -> int:
        """How many there are already."""
        return len(list(self.evidence.glob("*.json")))

    def load(self) -> MonitorState:
        """The state; a fresh one where there is none yet. ConfigError when it is damaged, or about
        another log or key."""
        return self._load(STATE_FILE) or MonitorState()

    def progress(self, state: MonitorState, size: int) -> MonitorState:
        """A tree on the way from the state to `size` entries, or the state itself."""
        found = self._load(PROGRESS_FILE)
        if found is None or found.head != state.head or not state.size < found.size <= size:
            return state
        same = {name: getattr(state, name) for name in ("seen", "ahead", "anchored", "last_ok")}
        return replace(found, **same)

    def save_progress(self, state: MonitorState) -> None:
        self._write(PROGRESS_FILE, state)

    def drop_progress(self) -> None:
        (self.path / PROGRESS_FILE).unlink(missing_ok=True)

    def _load(self, name: str) -> MonitorState | None:
        path = self.path / name
        try:
            return self._read(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except ConfigError:
            raise
        except LedgerError as error:
            raise ConfigError(
                f"{path} is damaged ({error}): bring it back from a backup, or remove it and start "
                "anew, which forgets what the log has shown so far"
            ) from error

    def save(self, state: MonitorState) -> None:
        """Durable when this returns. StorageError."""
        self._write(STATE_FILE, state)

    def _write(self, name: str, state: MonitorState) -> None:
        anchored = state.anchored and {"size": state.anchored[0], "root": state.anchored[1].hex()}
        value = {
            "format": FORMAT,
            "log": self._log,
            "vkey": format_vkey(self._key),
            "head": state.head and encode_base64(state.head.note),
            "seen": [encode_base64(seen.note) for seen in state.seen],
            "ahead": [encode_base64(ahead.note) for ahead in state.ahead],
            "size": state.size,
            "edge": {str(level): tile.hex() for (level, _), tile in state.edge.items()},
            "recorded_at": str(state.recorded_at),
            "entries": state.entries,
            "anchored": anchored,
            "last_ok": state.last_ok,
        }
        try:
            write_durably(self.path / name, canonical_json(value), mode=PUBLIC)
        except OSError as error:
            raise StorageError(
                f"cannot write the state in {self.path}: {error.strerror}"
            ) from error

    def _read(self, data: bytes) -> MonitorState:
        value = object_of(parse_canonical(data), _FIELDS, "the state")
        if value["format"] != FORMAT:
            raise ConfigError(f"{self.path / STATE_FILE} is no {FORMAT}")
        if (value["log"], value["vkey"]) != (self._log, format_vkey(self._key)):
            raise ConfigError(
                f"{self.path} follows the log {value['log']!r} under the key {value['vkey']!r}, "
                "not this one: give each log its own --state. If the log changed its key, that is "
                "itself a reason for alarm"
            )
        size = count_of(value["size"], "size")
        state = MonitorState(
            head=None if value["head"] is None else self._signed(value["head"]),
            seen=tuple(self._signed(note) for note in list_of(value["seen"], MAX_SEEN, "seen")),
            ahead=tuple(self._signed(note) for note in list_of(value["ahead"], MAX_AHEAD, "ahead")),
            size=size,
            edge=_edge(value["edge"], size),
            recorded_at=_time(value["recorded_at"]),
            entries=count_of(value["entries"], "entries"),
            anchored=_anchored(value["anchored"]),
            last_ok=count_of(value["last_ok"], "last_ok"),
        )
        root = state.root  # StorageError when a tile is missing
        if state.head and state.head.checkpoint.size == size and state.head.checkpoint.root != root:
            raise StorageError("the edge does not lead to the root of the head")
        return state

    def _signed(self, value: Any) -> Signed:
        note = decode_base64(text_of(value, "head"), "head")
        opened = open_checkpoint(note, self._key, origin=self._log)
        return Signed(checkpoint=opened.checkpoint, note=note)


def _edge(value: Any, size: int) -> dict[tree.TileId, bytes]:
    levels = {t.level or 0: t for t in tiles_of(size) if t.width < TILE_WIDTH}
    fields = object_of(value, [str(level) for level in levels], "edge")
    edge = {}
    for level, tile in levels.items():
        data = _hex(fields[str(level)], f"edge.{level}")
        if len(data) != width_at(size, level, tile.n) * HASH_BYTES:
            raise StorageError(f"edge.{level} has {len(data)} bytes")
        edge[level, tile.n] = data
    return edge


def _anchored(value: Any) -> tuple[int, bytes] | None:
    if value is None:
        return None
    fields = object_of(value, ("size", "root"), "anchored")
    return count_of(fields["size"], "anchored.size"), _hex(fields["root"], "anchored.root")


def _time(value: Any) -> int:
    text = text_of(value, "recorded_at")  # a u64: JSON's integers end sooner
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise StorageError("recorded_at is no decimal")
    return int(text)


def _hex(value: Any, where: str) -> bytes:
    try:
        return bytes.fromhex(text_of(value, where))
    except ValueError as error:
        raise StorageError(f"{where} is not hex") from error
