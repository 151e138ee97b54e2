"""What every projection is made of: table shapes, folds by event type, anomalies. Pure.

A projection turns events into rows and nothing else. It may touch `ledger.domain` and the port
`Rows`; it never sees a database, a clock or the network, so that a replay from zero gives the same
rows, byte for byte, wherever it runs.

A stored event is a fact: a fold cannot refuse it, and one bad event must not stop the ledger. What
the rules of money or order do not allow (a fee beyond the prepaid balance, a period cut off twice)
therefore moves nothing and leaves a row in `anomalies`, which `tributary doctor` and the console
show. Assertions are for our own mistakes only; they do stop the runner, because rows computed by a
broken fold would be worse than late ones.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.envelope import Entry
from ledger.ports import Key, Row, Rows

KINDS = ("text", "int", "wei", "bool")

Fold = Callable[[Rows, Entry], None]
Wants = Callable[[Entry], Iterable[tuple[str, Key]]]


@dataclass(frozen=True, kw_only=True)
class Column:
    """`kind` is one of KINDS; 'wei' is an unbounded integer, 'int' has 64 bits."""

    kind: str
    nullable: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a projection. Key columns come first and are never null."""

    name: str
    key: Mapping[str, Column]
    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        for column in (*self.key.values(), *self.columns.values()):
            assert column.kind in KINDS, column


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Tables and the folds that keep them, by event type.

    `wants` names rows that the fold of an event is likely to read. The runner fetches those of a
    whole batch at once; a forgotten one costs a round trip, never correctness.
    """

    name: str
    tables: tuple[Table, ...]
    folds: Mapping[str, Fold]
    wants: Wants


def table(name: str, *, key: str, columns: str) -> Table:
    """`table("balances", key="owner:text bucket:text", columns="amount_wei:wei")`, `?` nullable."""
    return Table(name=name, key=_columns(key), columns=_columns(columns))


def _columns(spec: str) -> dict[str, Column]:
    found = {}
    for part in spec.split():
        name, _, kind = part.partition(":")
        found[name] = Column(kind=kind.removesuffix("?"), nullable=kind.endswith("?"))
    return found


ANOMALIES = table(
    "anomalies", key="index:int n:int", columns="at:int type:text code:text message:text"
)


def anomaly(rows: Rows, entry: Entry, code: str, message: str) -> None:
    """Record that the event at this index asked for something the rules do not allow."""
    n = sum(1 for _ in rows.scan(ANOMALIES.name, (entry.index,)))
    row = {
        "at": entry.recorded_at,
        "type": entry.envelope.type,
        "code": code,
        "message": message,
    }
    rows.put(ANOMALIES.name, (entry.index, n), row)


def change(rows: Rows, entry: Entry, name: str, key: Key, /, **changes: Any) -> Row | None:
    """Update columns of an existing row; the row as it was, else None and an anomaly."""
    row = rows.get(name, key)
    if row is None:
        anomaly(rows, entry, "unknown_subject", f"no row {key} in {name}: nothing to change")
        return None
    rows.put(name, key, {**row, **changes})
    return row


def nothing(entry: Entry) -> Iterable[tuple[str, Key]]:
    """A `wants` without hints."""
    return ()
