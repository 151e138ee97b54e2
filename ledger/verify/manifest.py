"""The training manifest: exactly which rows made an adapter. Pure.

Canonical JSON, written by the trainer and named by `run.completed` through its SHA-256. What this
room reads of it (docs/FORMATS.md has the rest)::

    {"v": 1, "rows": [{"contribution": <uuid>, "row": n, "row_hash": <hex>}, ...],
     "base_sha256": <hex>, "adapter_sha256": <hex>, "config_sha256": <hex>, "steps": n, ...}

A row may say more (`tokens`: how many it had in training); lineage rests on these three. `row_hash`
is the salted leaf hash of row n of that contribution (`ledger.domain.rows`), so a
contribution of which the manifest has every row is bound to its own `rows_root`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.ids import check_hash, check_uuid
from ledger.domain.rows import tree_root
from ledger.errors import InvalidEvent, MalformedProof
from ledger.verify.encoding import parse_json

VERSION = 1
MAX_MANIFEST_ROWS = 200_000
SUMMARY_FIELDS = ("base_sha256", "adapter_sha256", "config_sha256", "steps")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`rows` maps contribution id to row number to 32-byte row hash; `summary` has the fields of
    SUMMARY_FIELDS as they stand."""

    rows: Mapping[str, Mapping[int, bytes]]
    rows_count: int
    summary: Mapping[str, Any]


def parse_manifest(blob: bytes) -> Manifest:
    """Raises MalformedProof that names what is wrong."""
    try:
        return _read(parse_json(blob))
    except InvalidEvent as error:
        raise MalformedProof(f"no training manifest: {error}") from error


def _read(value: Any) -> Manifest:
    if not isinstance(value, dict) or value.get("v") != VERSION or value["v"] is True:
        raise MalformedProof(f"no training manifest of version {VERSION}")
    missing = [name for name in ("rows", *SUMMARY_FIELDS) if name not in value]
    items = value.get("rows")
    if missing or not isinstance(items, list) or not 0 < len(items) <= MAX_MANIFEST_ROWS:
        raise MalformedProof(
            f"a training manifest has 1 to {MAX_MANIFEST_ROWS} rows and {SUMMARY_FIELDS}; missing "
            f"here: {missing or 'none'}"
        )
    rows: dict[str, dict[int, bytes]] = {}
    for n, item in enumerate(items):
        contribution, number, row_hash = _row(item, f"rows[{n}]")
        of_one = rows.setdefault(contribution, {})
        if number in of_one:
            raise MalformedProof(f"rows[{n}] repeats row {number} of contribution {contribution}")
        of_one[number] = row_hash
    summary = {name: value[name] for name in SUMMARY_FIELDS}
    return Manifest(rows=rows, rows_count=len(items), summary=summary)


def _row(item: Any, where: str) -> tuple[str, int, bytes]:
    if not isinstance(item, dict) or not item.keys() >= {"contribution", "row", "row_hash"}:
        raise MalformedProof(f"{where} must have contribution, row and row_hash")
    number = item["row"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise MalformedProof(f"{where}.row must be an integer from 0")
    contribution = str(check_uuid(item["contribution"], f"{where}.contribution"))
    return contribution, number, bytes.fromhex(check_hash(item["row_hash"], f"{where}.row_hash"))


def rows_match(rows: Mapping[int, bytes], recorded: Mapping[str, Any]) -> bool | None:
    """Whether these rows are those that `contribution.recorded` (its body) committed to.

    None when only some of the contribution's rows are here: its root cannot be recomputed then.
    """
    count = recorded["rows_count"]
    if max(rows) >= count:
        return False
    if len(rows) < count:
        return None
    return bool(tree_root([rows[n] for n in range(count)]).hex() == recorded["rows_root"])
