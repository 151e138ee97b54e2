"""How rows look in JSON: amounts as decimal strings (RFC 8259 numbers lose precision beyond 2^53 in
many readers), listings as `{"items", "next"}`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ledger.errors import NotFound

Found = Mapping[str, Any]


def plain(row: Found) -> dict[str, Any]:
    """A row for JSON; every `*_wei` becomes a string."""
    return {key: _value(key, value) for key, value in row.items()}


def page(rows: Sequence[Found], *, limit: int | None = None, cursor: str = "") -> dict[str, Any]:
    """A listing; `next` is the cursor column of the last row when there may be more."""
    items = [plain(row) for row in rows]
    more = limit is not None and cursor and len(items) == limit
    return {"items": items, "next": items[-1][cursor] if more else None}


def found(row: Found | None, what: str) -> dict[str, Any]:
    if row is None:
        raise NotFound(f"no {what} is recorded in this ledger (a new one may take a second)")
    return plain(row)


def _value(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list):
        return [_value(key, item) for item in value]
    if key.endswith("_wei") and value is not None:
        return str(value)
    return value
