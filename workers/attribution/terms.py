"""The terms of one attribution: what the ledger had said about the rows when an answer was asked.

An index is made once; what happens to its rows goes on. A contributor withdraws, or a reviewer
finds that two texts were no copies after all. Both are events. The terms gather what counts of
them at one size of the log, stand in the evidence of the attribution, and anyone recomputes them
from the events up to that size. Pure.

- `withdrawn`: the rows of these contributions earn nothing. Their weight is *unattributed*: what
  they taught is still in the adapter, and spreading it would pay others for it.
- `splits`: rows that speak for themselves although the index made them the copy of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ledger.domain.events import MAX_INTEGER
from ledger.domain.ids import check_uuid
from ledger.errors import InvalidEvent

MAX_TERMS = 100_000
"""Withdrawn contributions and split rows that the terms of one attribution may name, each."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """`log_size` entries of the log were read; `splits` names rows as (contribution, row)."""

    log_size: int = 0
    withdrawn: frozenset[str] = frozenset()
    splits: frozenset[tuple[str, int]] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Canonical JSON's form: everything sorted."""
        return {
            "log_size": self.log_size,
            "splits": [list(split) for split in sorted(self.splits)],
            "withdrawn": sorted(self.withdrawn),
        }

    @classmethod
    def from_dict(cls, value: object) -> "Terms":
        """Reads `to_dict`'s form, and the ledger's answer, which has more fields. Raises
        InvalidEvent for anything else."""
        if not isinstance(value, Mapping):
            raise InvalidEvent("terms must be an object with log_size, withdrawn and splits")
        size = value.get("log_size")
        if type(size) is not int or not 0 <= size <= MAX_INTEGER:
            raise InvalidEvent("terms.log_size must be a whole number of log entries")
        return cls(
            log_size=size,
            withdrawn=frozenset(_uuid(item) for item in _items(value, "withdrawn")),
            splits=frozenset(_split(item) for item in _items(value, "splits")),
        )


NO_TERMS = Terms()
"""Nothing withdrawn, nothing split: an index as it was built."""


def _items(value: Mapping[str, Any], field: str) -> Sequence[object]:
    items = value.get(field)
    if not isinstance(items, list) or len(items) > MAX_TERMS:
        raise InvalidEvent(f"terms.{field} must be a list of at most MAX_TERMS = {MAX_TERMS}")
    return items


def _uuid(value: object) -> str:
    return str(check_uuid(value, "terms.withdrawn"))


def _split(value: object) -> tuple[str, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or type(value[1]) is not int
        or not 0 <= value[1] <= MAX_INTEGER
    ):
        raise InvalidEvent("terms.splits must hold [contribution, row] pairs")
    return str(check_uuid(value[0], "terms.splits")), value[1]
