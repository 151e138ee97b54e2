"""Who is wrong, where a stored hash and the one that the entries give differ.

The signed root decides: one of the two hashes leads to it by the stored hashes around it (an
inclusion proof made of stored tiles). If the computed one does, the tile was changed; if the stored
one does, the entry was. If neither does, both were changed, or something above.
"""

from collections.abc import Iterator, Sequence

from ledger.errors import NotFound, StorageError, VerificationError
from ledger.log import tree
from ledger.log.audit_parts import Mismatch
from ledger.log.audit_read import LogReader
from ledger.log.findings import BrokenData, Finding, first_difference, wrong_byte_of_entry
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.merkle import verify_inclusion
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH


class Judge:
    """`changed` are the entries that were found to be not what was signed, `named` the findings
    that say so. `first_blamed` is the first entry whose bytes a wrong root may follow from."""

    def __init__(self, reader: LogReader, head: Checkpoint) -> None:
        self._reader = reader
        self._head = head
        self.changed: set[int] = set()
        self.named: list[Finding] = []
        self.first_blamed: int | None = None

    def tiles(self, mismatches: Sequence[Mismatch]) -> Iterator[Finding]:
        """A finding for each mismatch that does not follow from another one."""
        order = {"tile": 0, "leaf_hash": 1}
        for found in sorted(mismatches, key=lambda m: (order[m.kind], m.level, m.position)):
            low = found.position << (TILE_HEIGHT * found.level)
            high = (found.position + 1) << (TILE_HEIGHT * found.level)
            if any(low <= index < high for index in self.changed):
                continue
            if self._leads_to_root(found, found.computed):
                yield _changed_hash(found)
            elif found.level == 0 and self._leads_to_root(found, found.stored):
                self.changed.add(found.position)
                self._blame(found.position)
                finding = self._changed_entry(found)
                self.named.append(finding)
                yield finding
            elif found.kind == "leaf_hash":
                yield _changed_hash(found)
            elif self._leads_to_root(found, found.stored):
                self._blame(low)
                yield self._changed_together(found, low, high)
            else:
                self._blame(low)
                yield _undecided(found, low, high)

    def _blame(self, index: int) -> None:
        self.first_blamed = index if self.first_blamed is None else min(index, self.first_blamed)

    def _leads_to_root(self, found: Mismatch, node: bytes) -> bool:
        """Whether `node` in that place, with the stored hashes around it, gives the signed root."""
        height, size = TILE_HEIGHT * found.level, self._head.size
        first = found.position << height
        if first >= size:
            return False  # not signed for yet
        # Nodes of a level, the last one perhaps not full, are the leaves of the tree above them.
        ranges = tree.inclusion_ranges(first, size)[height:]
        try:
            verify_inclusion(
                index=found.position,
                size=-(-size // (1 << height)),
                leaf=node,
                proof=tree.range_hashes(ranges, self._stored) if ranges else [],
                root=self._head.root,
            )
        except (VerificationError, StorageError, NotFound):
            return False
        return True

    def _stored(self, wanted: Sequence[tree.TileId]) -> dict[tree.TileId, bytes]:
        found: dict[tree.TileId, bytes] = {}
        for level, n in wanted:
            for tile in self._reader.tiles(level, n, n + 1, self._head.size):
                found.setdefault((level, n), tile.data)  # the widest comes first
        return found

    def _changed_entry(self, found: Mismatch) -> Finding:
        """Which byte, if it is one."""
        index, size = found.position, self._head.size
        start = index - index % TILE_WIDTH
        stop = min(start + TILE_WIDTH, self._reader.length(size))
        try:
            entry = self._reader.strip(start, stop, size).entries[index - start]
            place = self._reader.place(index, size)
        except BrokenData as error:  # it was read a moment ago
            return error.finding
        wrong = wrong_byte_of_entry(entry, found.stored)
        where, at = place.at(wrong[0] if wrong else 0)
        says = f"entry {index} is not what was signed"
        if wrong:
            expected, had = f"0x{wrong[1]:02x}", f"0x{entry[wrong[0]]:02x}"
        else:
            expected, had = f"leaf hash {found.stored.hex()}", found.computed.hex()
            says += f", in more than one byte of the {len(entry)} from here"
        return Finding(
            kind="entry", where=where, offset=at, expected=expected, found=had, says=says,
            index=index,
        )  # fmt: skip

    def _changed_together(self, found: Mismatch, low: int, high: int) -> Finding:
        """Entries and the tiles right above them agree with each other alone."""
        where, at = self._reader.place(low, self._head.size).at(0)
        return Finding(
            kind="entry",
            where=where,
            offset=at,
            expected=f"{found.stored.hex()}, which {found.where} holds and the signed root proves",
            found=found.computed.hex(),
            says=f"entries {low} to {high - 1}, or some of them, are not what was signed, and the "
            "tiles below that one were changed with them",
        )


def _changed_hash(found: Mismatch) -> Finding:
    at = first_difference(found.computed, found.stored) or 0
    what = f"entry {found.position}"
    if found.level:
        what = f"node {found.position} of level {found.level}"
    return Finding(
        kind="tile" if found.kind == "tile" else "row",
        where=found.where,
        offset=found.offset,
        expected=f"0x{found.computed[at]:02x} (hash {found.computed.hex()})",
        found=f"0x{found.stored[at]:02x} (hash {found.stored.hex()})",
        says=f"the hash of {what} is not what the entries give",
    )


def _undecided(found: Mismatch, low: int, high: int) -> Finding:
    entries = f"entry {low}" if high - low == 1 else f"entries {low} to {high - 1}"
    return Finding(
        kind="tile",
        where=found.where,
        offset=found.offset,
        expected=f"{found.computed.hex()}, from {entries}",
        found=found.stored.hex(),
        says=f"the tile and {entries} differ and neither leads to the signed root: both were "
        "changed, or something above them was",
    )
