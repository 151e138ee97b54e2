"""Signed events on their way to the ledger, kept on disk until it has answered.

Knows the client and files, no Ray and no engines. An envelope is signed once and stored before it
is sent, so what is sent again after a crash is the same bytes; ids are derived from what happened
(`ledger.domain.ids.derived_id`), so that the ledger holds each event once however often it is
sent. Hence exactly one `run.completed` per run.

One file per event, `<id>.json`. What a crash leaves:

- before the rename: a `.part` file, which nobody reads and the next `put` of that id replaces;
- after the rename, before or during the sending: the event; `replay` sends it (again);
- after the ledger's answer, before the removal: the same; the ledger answers "replayed".

An event that the ledger refuses for good (the run was cancelled meanwhile) moves to `refused/`
with the reason beside it, for people to look at. Several processes may work on one folder.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from ledger.client import Client
from ledger.domain.envelope import decode_envelope
from ledger.errors import Backpressure, Conflict, LedgerError, Unauthenticated, Unavailable

log = structlog.get_logger(__name__)

MAX_PENDING = 10_000
"""More events than this waiting means that the ledger is gone for long: refuse new work."""


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """An event that the ledger holds, at leaf `index`."""

    type: str
    id: UUID
    body: Mapping[str, Any]
    index: int


class Outbox:
    """`append` = sign, keep, send. `folder` is this outbox's own."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._client = client
        self.folder = folder
        self._refused = folder / "refused"
        self._refused.mkdir(parents=True, exist_ok=True)

    def append(self, type: str, body: Mapping[str, Any], *, id: UUID) -> int:
        """The event's leaf index. When the ledger does not answer, raises Unavailable and keeps
        the event for `replay`; what the ledger refuses is raised as it was refused."""
        return self._send(self.put(type, body, id=id)).index

    def put(self, type: str, body: Mapping[str, Any], *, id: UUID) -> Path:
        """Sign and keep an event, to be sent later. Replaces a kept one of the same id."""
        if len(self.pending()) >= MAX_PENDING:
            raise Backpressure(
                f"{MAX_PENDING} events wait for the ledger (MAX_PENDING); is it running?",
                retry_after_s=10,
            )
        raw = self._client.sign(type, body, id=id)
        path = self.folder / f"{id}.json"
        _write_durably(path, raw)
        return path

    def pending(self) -> list[Path]:
        """Kept events, oldest first."""
        found = [(_age(path), path) for path in self.folder.glob("*.json")]
        return [path for _, path in sorted(found)]

    def replay(self) -> list[Delivered]:
        """Send all that is kept, oldest first. What is refused is set aside and logged; raises
        Unavailable when the ledger does not answer, with the rest still kept."""
        delivered = []
        for path in self.pending():
            try:
                delivered.append(self._send(path))
            except (Unavailable, Backpressure, Unauthenticated):
                raise
            except FileNotFoundError:
                continue  # another process of ours sent it
            except LedgerError:
                continue  # set aside and logged by _send
        return delivered

    def _send(self, path: Path) -> Delivered:
        raw = path.read_bytes()
        event = decode_envelope(raw)
        try:
            index = int(self._client.append_raw(raw)["index"])
        except (Unavailable, Backpressure, Unauthenticated):
            raise
        except LedgerError as error:
            found = _replayed(error, event.id)
            if found is None:
                self._set_aside(path, error)
                raise
            index = found
        path.unlink(missing_ok=True)
        log.info("event delivered", type=event.type, id=str(event.id), index=index)
        return Delivered(type=event.type, id=event.id, body=event.body, index=index)

    def _set_aside(self, path: Path, error: LedgerError) -> None:
        log.warning("event refused", id=path.stem, error=error.slug, reason=error.message)
        (self._refused / f"{path.stem}.reason").write_text(f"{error.slug}: {error.message}\n")
        # FileNotFoundError: another process of ours sent it, and was refused as well.
        try:
            path.replace(self._refused / path.name)
        except FileNotFoundError:
            return


def _replayed(error: LedgerError, id: UUID) -> int | None:
    """The index of the event, where the ledger says that it has it already."""
    index = error.detail.get("index")
    if isinstance(error, Conflict) and error.detail.get("replayed") == str(id):
        return None if index is None else int(str(index))
    return None


def _write_durably(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name
