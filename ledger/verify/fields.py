"""Fields of parsed JSON, each checked as it is taken out. Pure.

Every function returns the value in its inner form or raises MalformedProof, whose `detail["field"]`
names the place (`entries[3].proof`). What JSON itself may be is `ledger.domain.canonical`'s.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ledger.domain.ids import check_hash
from ledger.errors import MalformedProof
from ledger.verify.encoding import printable

MAX_UNKNOWN_SAID = 10


def object_of(value: Any, fields: Iterable[str], where: str) -> dict[str, Any]:
    """An object with exactly these fields."""
    expected = set(fields)
    if not isinstance(value, dict) or value.keys() != expected:
        have = sorted(value) if isinstance(value, dict) else []
        missing = sorted(expected.difference(have))
        unknown = [printable(name) for name in have if name not in expected][:MAX_UNKNOWN_SAID]
        raise MalformedProof(
            f"{where} must be an object with exactly {', '.join(sorted(expected))}: missing "
            f"{missing or 'none'}, unknown {unknown or 'none'}",
            field=where,
        )
    return value


def list_of(value: Any, limit: int | None, where: str) -> list[Any]:
    """A list of at most `limit` items (None: as many as the file holds)."""
    if not isinstance(value, list) or (limit is not None and len(value) > limit):
        most = "" if limit is None else f" of at most {limit} items"
        raise MalformedProof(f"{where} must be a list{most}", field=where)
    return value


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedProof(f"{where} must be a string", field=where)
    return value


def count_of(value: Any, where: str, *, low: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise MalformedProof(f"{where} must be an integer from {low}", field=where)
    return value


def hash_of(value: Any, where: str) -> bytes:
    """32 bytes from 64 hex digits; InvalidEvent (by `check_hash`), which names the field."""
    return bytes.fromhex(check_hash(value, where))


def check_ascending(keys: Iterable[Any], where: str) -> None:
    """Each key greater than the one before: one order, and nothing twice."""
    for n, (before, after) in enumerate(pairwise(keys), 1):
        if before >= after:
            raise MalformedProof(
                f"{where}[{n}] does not come after {where}[{n - 1}]: items must ascend and none "
                "may stand twice",
                field=where,
            )
