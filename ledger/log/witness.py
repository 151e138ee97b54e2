"""A witness: it cosigns trees of logs that it knows, and of each log only one history. No HTTP.

The rules are those of c2sp.org/tlog-witness, the signature that of c2sp.org/tlog-cosignature. What
makes a witness worth anything is its memory: the largest tree that it cosigned, per log. So it is

* one file per log, holding the checkpoint with the witness's own cosignature under it: a memory
  that was altered, or that is another witness's, does not verify and stops the witness;
* on disk before the cosignature leaves. A crash between the two leaves a tree that is remembered
  and a cosignature that nobody has: the log asks again, is told the size (409), and gets it;
* read from disk for each request, under a lock, never from a cache that a failed write would make
  wrong. A lock file keeps a second process off the folder.

Losing the file of a log, alone, makes the witness cosign that log from any state: back it up, and
restore the newest, never an older one.

Timestamps never go back: a clock that jumps back is waited for at the last timestamp. A smaller one
for a larger tree would make witness and log contradict themselves, provably.

The folder: `witness.key`, `lock`, `logs/<SHA-256 of the origin>/checkpoint`, `evidence/`.
"""

import fcntl
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nacl.signing import SigningKey

from ledger.errors import (
    BadSignature,
    ConfigError,
    MalformedProof,
    NotFound,
    StorageError,
    VerificationError,
)
from ledger.files import make_folder, write_durably
from ledger.log.add_checkpoint import (
    SIZE_TYPE,
    TEXT_TYPE,
    AddCheckpoint,
    checkpoint_path,
    format_cosignature,
    format_size,
    origin_hash,
    parse_request,
)
from ledger.log.kept_evidence import EvidenceFolder
from ledger.log.keyfile import ensure_signer_key
from ledger.ports import Clock
from ledger.verify.checkpoint import Checkpoint, parse_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.merkle import EMPTY_ROOT, verify_consistency
from ledger.verify.note import (
    COSIGNATURE,
    ED25519,
    Note,
    SignatureLine,
    VerifierKey,
    cosign_text,
    format_note,
    format_vkey,
    open_note,
    parse_note,
    valid_name,
    verify_note,
    vkey_of,
)

KEY_FILE, LOCK_FILE, LOGS_FOLDER, EVIDENCE_FOLDER = "witness.key", "lock", "logs", "evidence"
MAX_LOGS = 1_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnownLog:
    """A log that is cosigned: what its checkpoints' first line says, and a key that signs them.

    The key's name is the origin in most logs, not in all: Go's checksum database is one that isn't.
    A log may have several keys: one KnownLog each.
    """

    origin: str
    key: VerifierKey


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request gets: HTTP status, body and its media type."""

    status: int
    body: bytes
    type: str = TEXT_TYPE


@dataclass(frozen=True, kw_only=True)
class Cosigned:
    """The memory of one log: the largest tree cosigned, when (POSIX s), the note with the log's
    signatures and the witness's, and the same note as the log signed it."""

    head: Checkpoint
    timestamp: int
    note: bytes
    signed: bytes


@dataclass(frozen=True, kw_only=True)
class _Submitted:
    """A request that parses, about a log that is known, signed by one of its keys."""

    request: AddCheckpoint
    text: str
    head: Checkpoint
    signatures: tuple[SignatureLine, ...]
    key: VerifierKey

    @property
    def signed(self) -> bytes:
        """The note with the known signatures alone: one spelling, whatever else was sent."""
        return format_note(self.text, self.signatures)


class Witness:
    """One witness key over the logs it knows. Thread-safe; open it with `open_witness`."""

    def __init__(
        self, *, folder: Path, name: str, key: SigningKey, logs: Iterable[KnownLog], clock: Clock
    ) -> None:
        self.vkey = vkey_of(name, key, COSIGNATURE)
        self.evidence = EvidenceFolder(folder / EVIDENCE_FOLDER, clock=clock)
        self._key = key
        self._folder = folder
        self._clock = clock
        self._logs = _by_origin(logs, self.vkey)
        self._turns = {origin: threading.Lock() for origin in self._logs}
        self._hashes = {origin_hash(origin): origin for origin in self._logs}
        for origin in self._logs:
            self.latest(origin)  # a memory that cannot be read is to be mended before the start

    @property
    def vkey_text(self) -> str:
        return format_vkey(self.vkey)

    @property
    def log_vkeys(self) -> dict[str, list[str]]:
        """The keys of each log that is known, as text, by origin."""
        return {origin: [format_vkey(key) for key in keys] for origin, keys in self._logs.items()}

    # --- the protocol ---

    def add_checkpoint(self, body: bytes) -> Answer:
        """Answer `POST add-checkpoint`, by the order of checks in the specification.

        Raises StorageError when the memory cannot be read or written: then nothing was cosigned.
        """
        # 1. The request and its checkpoint have the form (else 400).
        try:
            request = parse_request(body)
            note = parse_note(request.checkpoint)
            head = parse_checkpoint(note.text)
        except MalformedProof as error:
            return _refused(400, error.message)
        # 2. The origin is known (else 404).
        keys = self._logs.get(head.origin)
        if keys is None:
            return _refused(404, "this witness does not know that log")
        # 3. A key of that log signed (else 403); lines of other keys do not count.
        try:
            verified = verify_note(note, keys).verified
        except BadSignature as error:
            return _refused(403, error.message)
        # 4. The old size is not above the new one (else 400).
        if request.old_size > head.size:
            return _refused(400, f"the old size {request.old_size} is above {head.size}")
        submitted = _Submitted(
            request=request,
            text=note.text,
            head=head,
            signatures=tuple(_first_line(note, v.key) for v in verified),
            key=verified[0].key,
        )
        with self._turns[head.origin]:
            return self._advance(submitted)

    def _advance(self, new: _Submitted) -> Answer:
        latest = self.latest(new.head.origin)
        size = latest.head.size if latest else 0
        root = latest.head.root if latest else EMPTY_ROOT
        fork = new.head.size == size and new.head.root != root
        if fork and latest:
            self._keep_fork(latest, new)
        # 5. The log knows what was cosigned last (else 409 with that size).
        if new.request.old_size != size:
            return Answer(status=409, body=format_size(size), type=SIZE_TYPE)
        # 6. One size has one root (else 409; no size, so that no client tries again with it).
        if fork:
            return _refused(409, f"another root was cosigned at size {size}")
        # 7. The old tree is the beginning of the new one (else 422).
        try:
            verify_consistency(
                size1=size,
                size2=new.head.size,
                root1=root,
                root2=new.head.root,
                proof=new.request.proof,
            )
        except VerificationError as error:
            if latest:
                self._keep_bad_proof(latest, new)
            return _refused(422, error.message)
        # 8. Remember, then answer.
        return self._cosign(new, after=latest.timestamp if latest else 0)

    def _cosign(self, new: _Submitted, *, after: int) -> Answer:
        timestamp = max(self._clock() // 1_000_000, after, 1)
        line = cosign_text(new.text, self.vkey.name, self._key, timestamp)
        path = self._path(new.head.origin)
        try:
            write_durably(path, format_note(new.text, [*new.signatures, line]))
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}; nothing was cosigned. Free the "
                "disk or mend the folder's rights, then ask again"
            ) from error
        # A crash here leaves the tree remembered and its cosignature unsent; the log asks again.
        logger.info("cosigned", extra={"log": new.head.origin, "size": new.head.size})
        return Answer(status=200, body=format_cosignature(line))

    # --- the memory ---

    def latest(self, origin: str) -> Cosigned | None:
        """The largest tree of that log that was cosigned, None for none yet.

        Raises StorageError when the file is there and is not this witness's word on that log.
        """
        path = self._path(origin)
        try:
            data = path.read_bytes()
            opened = open_note(data, [self.vkey])
            head = parse_checkpoint(opened.text)
            if head.origin == origin:
                at = opened.verified[0].timestamp or 0
                signed = format_note(opened.text, opened.unverified)
                return Cosigned(head=head, timestamp=at, note=data, signed=signed)
            problem = f"it is about {printable(head.origin)}"
        except FileNotFoundError:
            return None
        except VerificationError as error:
            problem = error.message
        except OSError as error:
            problem = error.strerror or str(error)
        raise StorageError(
            f"{path} is not what this witness cosigned of {origin}: {problem}. Restore the newest "
            "copy together with the key; without it a fork could be cosigned"
        )

    def checkpoint(self, hashed: str) -> bytes:
        """The note cosigned last of the log whose origin has this SHA-256 (hex). NotFound."""
        origin = self._hashes.get(hashed)
        found = self.latest(origin) if origin is not None else None
        if found is None:
            raise NotFound("no checkpoint of such a log was cosigned here")
        return found.note

    def _path(self, origin: str) -> Path:
        return self._folder / LOGS_FOLDER / checkpoint_path(origin)

    # --- evidence ---

    def _keep_fork(self, latest: Cosigned, new: _Submitted) -> None:
        logger.critical("a log signed two trees of size %s: %s", new.head.size, new.head.origin)
        self.evidence.keep(
            "split-view",
            log=new.head.origin,
            key=new.key,
            says=f"asked to cosign another tree of size {new.head.size} than before",
            items={"checkpoint_1": latest.signed, "checkpoint_2": new.signed},
        )

    def _keep_bad_proof(self, latest: Cosigned, new: _Submitted) -> None:
        """Anyone can send a log's checkpoint with a wrong proof; what is shown, the judge says."""
        logger.error("a consistency proof of %s does not hold", new.head.origin)
        self.evidence.keep(
            "inconsistent",
            log=new.head.origin,
            key=new.key,
            says=f"asked to cosign size {new.head.size} after {latest.head.size} with this proof",
            items={
                "checkpoint_1": latest.signed,
                "checkpoint_2": new.signed,
                "consistency": b"".join(new.request.proof),
            },
        )


@contextmanager
def open_witness(
    folder: Path, *, logs: Iterable[KnownLog], clock: Clock, name: str | None = None
) -> Iterator[Witness]:
    """The witness of a folder, which is made with a new key on the first start.

    Raises ConfigError when another process has the folder, when the key file is not usable, or when
    a key of `logs` cannot be a log's; StorageError when the folder cannot be written.
    """
    with witness_key(folder, name=name) as (found, key):
        yield Witness(folder=folder, name=found, key=key, logs=logs, clock=clock)


@contextmanager
def witness_key(folder: Path, *, name: str | None = None) -> Iterator[tuple[str, SigningKey]]:
    """Name and key of the folder's witness, with the folder locked against other processes."""
    if name is not None and not valid_name(name):
        raise ConfigError(f"the name {name!r} must have no spaces and no plus sign")
    try:
        make_folder(folder)
        lock = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise StorageError(f"cannot use {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process runs the witness of {folder}: two would cosign two histories"
            ) from error
        yield ensure_signer_key(folder / KEY_FILE, name=name)


def _by_origin(logs: Iterable[KnownLog], own: VerifierKey) -> dict[str, tuple[VerifierKey, ...]]:
    found: dict[str, tuple[VerifierKey, ...]] = {}
    for log in logs:
        if log.key.type != ED25519:
            raise ConfigError(f"the key of {log.origin} is no log's: expected type 0x01 (Ed25519)")
        if log.key.public_key == own.public_key:
            raise ConfigError(f"{log.origin} has this witness's own key: that proves nothing")
        found[log.origin] = (*found.get(log.origin, ()), log.key)
    if len(found) > MAX_LOGS:
        raise ConfigError(f"a witness knows at most MAX_LOGS = {MAX_LOGS} logs")
    return found


def _first_line(note: Note, key: VerifierKey) -> SignatureLine:
    return next(line for line in note.signatures if (line.name, line.key_id) == (key.name, key.id))


def _refused(status: int, message: str) -> Answer:
    return Answer(status=status, body=f"{message}\n".encode())
