"""What was promised and what was delivered, on this machine's disk, until the ledger has it.

One file per API process and turn, `<id>.journal`, which its owner holds locked (flock) for as long
as it lives: whoever gets the lock knows that the owner is gone, however it ended. Records are
lines, `<CRC-32 of the JSON, 8 hex digits> <JSON>`:

    ["i", n, {...}]       answer n begins: all that recording it will need, prompt included
    ["d", n, tokens, "x"]  this text, and so many tokens in all, is about to leave
    ["o", n, {...}]       the whole answer was delivered, and the ledger owes it an event
    ["c", n]              settled, or nothing of it ever left

Each record is one write(2) without fsync, before what it is about is sent. So it survives the death
of this process by any signal, and not that of the machine: a power cut loses answers that were
under way, which then cost nothing and are in no ledger. A line that does not check (a torn tail, a
damaged disk) is skipped and logged; what stands around it counts.

Prompts are private: files are 0600 in a folder of 0700, and emptied when no answer is open.
"""

import fcntl
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog

from ledger.errors import StorageError, Unavailable

log = structlog.get_logger(__name__)

SUFFIX = ".journal"
MAX_FILE_BYTES = 64 * 2**20
"""Then a new file is begun; the old one goes when its last answer is settled."""
MAX_OPEN_FILES = 16
"""So MAX_OPEN_FILES * MAX_FILE_BYTES is about what answers under way may take on disk. Beyond it,
and only where the ledger could not be reached for long, no answer is begun."""


@dataclass(eq=False)
class _File:
    path: Path
    descriptor: int
    size: int = 0
    answers: int = 0
    begun: int = 0
    torn: bool = False
    """The last write was cut short (a full disk): the next one starts on a line of its own."""
    closed: bool = False
    """Given up at the end of this process. A thread that comes late must not write to a descriptor
    that is somebody else's by now."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """So that no record is written behind a torn one that is not known to be torn yet."""

    def write(self, record: bytes) -> None:
        """Raises StorageError; then this record is not in the journal, those before it are."""
        line = b"%08x %b\n" % (zlib.crc32(record), record)
        with self.lock:
            self._append(line)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            os.close(self.descriptor)

    def _append(self, line: bytes) -> None:
        if self.closed:
            raise StorageError(f"{self.path} is given up: this process ends; retry")
        if self.torn:
            line = b"\n" + line
        try:
            written = os.write(self.descriptor, line)
        except OSError as error:
            self.torn = True
            raise StorageError(f"cannot write {self.path}: {error.strerror}; retry") from error
        self.size += written
        self.torn = written < len(line)
        if self.torn:
            raise StorageError(f"{self.path} takes no more: is the disk full? retry")


class Intent:
    """One open answer in the journal. Its records are written in the order of the calls."""

    def __init__(self, journal: "Journal", file: _File, number: int) -> None:
        self._journal, self._file = journal, file
        self._head = b'["d",%d,' % number
        self._number = number
        self._open = True
        self.delivered = False
        """Whether anything of the answer, its id included, may have left."""

    def deliver(self, tokens: int, text_json: bytes) -> None:
        """`text_json` is the text as JSON; it may be sent when this returns."""
        self._file.write(b"%b%d,%b]" % (self._head, tokens, text_json))
        self.delivered = True

    def owe(self, ending: Mapping[str, Any]) -> None:
        """The client is told that the whole answer is his, and that its event will follow."""
        self._file.write(_json(["o", self._number, ending]))
        self.delivered = True

    def close(self) -> None:
        """Idempotent. A record that cannot be written is no loss: the event is in the ledger, and
        whoever settles the answer again finds it there."""
        if self._open:
            self._open = False
            with suppress(StorageError):
                self._file.write(b'["c",%d]' % self._number)
            self._journal.forget(self._file)


class Journal:
    """The files of this process. `begin` may be called by any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: list[_File] = []

    def begin(self, intent: Mapping[str, Any]) -> Intent:
        """Raises StorageError or Unavailable: then the answer must not begin."""
        record = _json(intent)
        with self._lock:
            file = self._current()
            file.answers += 1
            file.begun += 1
            number = file.begun
        try:
            file.write(b'["i",%d,%b]' % (number, record))
        except StorageError:
            self.forget(file)
            raise
        return Intent(self, file, number)

    def forget(self, file: _File) -> None:
        """One answer less; an idle file is emptied, or deleted where a newer one is in use."""
        with self._lock:
            file.answers -= 1
            if file.answers or file.closed:
                return
            if file is self._files[-1]:
                if file.size:
                    with suppress(OSError):
                        os.ftruncate(file.descriptor, 0)
                        file.size, file.torn = 0, False
            else:
                self._files.remove(file)
                _delete(file)

    def close(self) -> None:
        """Give the files up: what is open in them is for the next process to settle."""
        with self._lock:
            for file in self._files:
                if file.answers:
                    file.close()
                else:
                    _delete(file)
            self._files.clear()

    def _current(self) -> _File:
        if self._files and self._files[-1].size < MAX_FILE_BYTES:
            return self._files[-1]
        if len(self._files) >= MAX_OPEN_FILES:
            raise Unavailable(
                f"the journal of answers has {MAX_OPEN_FILES} files, MAX_OPEN_FILES, none of which "
                "could be settled: is the database away? retry later"
            )
        self._files.append(_create(self.folder))
        return self._files[-1]


def _create(folder: Path) -> _File:
    path = folder / f"{uuid4().hex}{SUFFIX}"
    hidden = path.with_suffix(".new")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(hidden, flags, 0o600)
        try:
            # Locked before it has its name: nobody takes it for a dead process's.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(path)
        except OSError:
            os.close(descriptor)
            hidden.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot make {path}: {error.strerror}; retry") from error
    return _File(path, descriptor)


def _delete(file: _File) -> None:
    with suppress(OSError):
        file.path.unlink()
    file.close()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


# --- what others left ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class Left:
    """An answer that its process did not settle. `ending` where all of it was delivered."""

    intent: dict[str, Any]
    text: str = ""
    tokens: int = 0
    delivered: bool = False
    ending: dict[str, Any] | None = None


@dataclass(kw_only=True)
class Abandoned:
    """The journal of a process that is gone, locked by us."""

    path: Path
    answers: list[Left] = field(default_factory=list)
    damaged: int = 0


@contextmanager
def adopted(path: Path) -> Iterator[Abandoned | None]:
    """A journal whose owner is gone, ours for the while; None where the owner lives, or where
    another process has settled it already. Raises StorageError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    try:
        yield read(path, descriptor) if _locked(path, descriptor) else None
    finally:
        os.close(descriptor)


def _locked(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Deleted, or in other hands, between our look and our lock.
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def read(path: Path, descriptor: int) -> Abandoned:
    """The answers that are still open. Damaged lines are counted, and said aloud."""
    found = Abandoned(path=path)
    answers: dict[int, Left] = {}
    with os.fdopen(os.dup(descriptor), "rb") as lines:
        for line in lines:
            if line == b"\n":
                continue
            try:
                _apply(answers, _checked(line))
            except (ValueError, KeyError, TypeError, IndexError):
                found.damaged += 1
    if found.damaged:
        log.error("journal_damaged", path=str(path), lines_skipped=found.damaged)
    found.answers = list(answers.values())
    return found


def _checked(line: bytes) -> list[Any]:
    record = line[9:-1]
    framed = line[8:9] == b" " and line.endswith(b"\n")
    if not framed or int(line[:8], 16) != zlib.crc32(record):
        raise ValueError("a damaged line")
    value = json.loads(record)
    if not isinstance(value, list):
        raise TypeError("no record")
    return value


def _apply(answers: dict[int, Left], record: list[Any]) -> None:
    match record:
        case ["i", int(n), dict(intent)]:
            answers[n] = Left(intent=intent)
        case ["d", int(n), int(tokens), str(text)]:
            left = answers[n]
            left.text += text
            left.tokens, left.delivered = tokens, True
        case ["o", int(n), dict(ending)]:
            answers[n].ending = ending
            answers[n].delivered = True
        case ["c", int(n)]:
            answers.pop(n, None)
        case _:
            raise ValueError("a record of another form")
