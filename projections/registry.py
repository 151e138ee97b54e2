"""All projections, in the order in which they fold one event. Pure.

The order matters in three places: `catalogue` asks `payouts` whose address a binding is, `usage`
asks `balances` whether a fee was posted, and `lineage` asks `catalogue` and `consent` whether a
contribution may be used. Raise FOLDS_VERSION whenever a fold or a table changes
what rows an old event gives: the runner then rebuilds by itself (one transaction, readers see the
old rows until it commits).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from ledger.domain.envelope import ENTRY_HEADER_BYTES, Entry, Envelope
from ledger.ports import Key, Rows
from projections import balances, catalogue, consent, lineage, payouts, usage
from projections.base import ANOMALIES, Projection, Table, anomaly

FOLDS_VERSION = 3

PROJECTIONS: tuple[Projection, ...] = (
    balances.PROJECTION,
    payouts.PROJECTION,
    catalogue.PROJECTION,
    consent.PROJECTION,
    usage.PROJECTION,
    lineage.PROJECTION,
)
TABLES: tuple[Table, ...] = (
    ANOMALIES,
    *(table for projection in PROJECTIONS for table in projection.tables),
)


def read_entry(data: bytes) -> Entry:
    """The entry of stored bytes, ready to fold.

    Parsed only: form, fields and signature were checked before the bytes were stored, and checking
    them again costs more than all folds together. Bytes from anywhere else go through
    `ledger.domain.envelope.decode_entry`.

    PostgreSQL text cannot hold U+0000, which JSON can: it is shown as U+FFFD, so that nobody can
    stop the projector with a title. The log keeps the bytes as they were signed.
    """
    raw = data[ENTRY_HEADER_BYTES:]
    value = json.loads(raw)
    body = value["body"]
    return Entry(
        index=int.from_bytes(data[:8], "big"),
        recorded_at=int.from_bytes(data[8:ENTRY_HEADER_BYTES], "big"),
        envelope=Envelope(
            type=value["type"],
            id=UUID(value["id"]),
            log=value["log"],
            at=value["at"],
            actor=value["actor"],
            body=_without_nul(body) if b"\\u0000" in raw else body,
            raw=raw,
        ),
    )


def fold(rows: Rows, entry: Entry) -> None:
    """Fold one event into every projection. Fold entries once, in index order, from index 0."""
    known = False
    for projection in PROJECTIONS:
        handler = projection.folds.get(entry.envelope.type)
        if handler is not None:
            handler(rows, entry)
            known = True
    if not known:
        # A newer program wrote it. Its FOLDS_VERSION differs from ours, so it will rebuild.
        message = f"this program does not know {entry.envelope.type}: upgrade, then rebuild"
        anomaly(rows, entry, "unknown_type", message)


def wants(entries: Iterable[Entry]) -> set[tuple[str, Key]]:
    """Rows that folding these entries is likely to read."""
    return {
        wanted
        for entry in entries
        for projection in PROJECTIONS
        if entry.envelope.type in projection.folds
        for wanted in projection.wants(entry)
    }


def digest_of(rows: Rows, tables: Sequence[Table] = TABLES) -> str:
    """SHA-256 (hex) over every row of every table, in name and key order."""
    state = hashlib.sha256()
    for table in sorted(tables, key=lambda t: t.name):
        for key, row in rows.scan(table.name):
            values = [table.name, *key, *(row[name] for name in table.columns)]
            state.update(json.dumps(values, separators=(",", ":")).encode() + b"\n")
    return state.hexdigest()


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    return value
