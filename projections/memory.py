"""Rows in dictionaries: a whole replay without a database. Pure.

For auditors, who recompute every balance from raw entries with nothing installed, and for tests,
which hold the PostgreSQL rows against these.
"""

from collections.abc import Iterator, Sequence

from ledger.ports import Key, Row
from projections.base import Table


class MemoryRows:
    """The port `Rows` over one dictionary per table."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._shapes = {table.name: table for table in tables}
        self._rows: dict[str, dict[Key, Row]] = {table.name: {} for table in tables}

    def get(self, table: str, key: Key) -> Row | None:
        row = self._rows[table].get(key)
        return None if row is None else dict(row)

    def put(self, table: str, key: Key, row: Row) -> None:
        shape = self._shapes[table]
        assert len(key) == len(shape.key), (table, key)
        assert row.keys() == shape.columns.keys(), (table, row.keys() ^ shape.columns.keys())
        self._rows[table][key] = dict(row)

    def delete(self, table: str, key: Key) -> None:
        self._rows[table].pop(key, None)

    def scan(self, table: str, prefix: Key = ()) -> Iterator[tuple[Key, Row]]:
        size = len(prefix)
        for key in sorted(key for key in self._rows[table] if key[:size] == prefix):
            yield key, dict(self._rows[table][key])
