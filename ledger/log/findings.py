"""What an audit found wrong, to the byte. Pure.

A hash says that bytes differ, not which. Where one byte is off, trying all single changes finds it:
`one_byte_off` does that within a bound, so that a finding can name the byte and its right value.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from ledger.verify.encoding import printable

MAX_TRIED_BYTES = 2_000_000_000
"""Bytes hashed at most in search of one wrong byte: some seconds."""
MAX_TRIED_NOTES = 20_000
"""Signature checks at most, for the same: about a second."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong. `where` is a file's path, or a table's row and column; `offset` the
    first wrong byte in it (None: the thing as a whole). `index` is the entry it is about."""

    kind: str
    where: str
    offset: int | None
    expected: str
    found: str
    says: str
    index: int | None = None

    def __str__(self) -> str:
        place = self.where if self.offset is None else f"{self.where}, byte {self.offset}"
        return printable(
            f"{place}: {self.says}; expected {self.expected}, found {self.found}", limit=2_000
        )

    def json(self) -> dict[str, Any]:
        return asdict(self)


class BrokenData(Exception):
    """A stretch of the log cannot be read as entries. Inside the audit only."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding

    def __reduce__(self) -> tuple[type["BrokenData"], tuple[Finding]]:
        return BrokenData, (self.finding,)


def first_difference(left: bytes, right: bytes) -> int | None:
    """Where two byte strings part; None where they are equal."""
    if left == right:
        return None
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


def byte_at(data: bytes, at: int) -> str:
    return f"0x{data[at]:02x}" if at < len(data) else "the end"


def wrong_byte_of_entry(entry: bytes, leaf: bytes) -> tuple[int, int] | None:
    """(offset, right value) when changing one byte of `entry` makes its leaf hash `leaf`."""
    tries = MAX_TRIED_BYTES // max(len(entry), 1)
    hasher = sha256(b"\x00")
    prefix, hashed = hasher, 0
    for at, value in _changes(entry, tries):
        if at != hashed:
            # Changes come by offset within a round, so the hash of what stands before goes along.
            if at < hashed:
                prefix, hashed = sha256(b"\x00"), 0
            prefix = prefix.copy()
            prefix.update(entry[hashed:at])
            hashed = at
        trial = prefix.copy()
        trial.update(bytes([value]) + entry[at + 1 :])
        if trial.digest() == leaf:
            return at, value
    return None


def one_byte_off(data: bytes, right: Callable[[bytes], bool]) -> tuple[int, int] | None:
    """(offset, right value) when changing one byte of `data` satisfies `right`."""
    for at, value in _changes(data, MAX_TRIED_NOTES):
        if right(data[:at] + bytes([value]) + data[at + 1 :]):
            return at, value
    return None


def _changes(data: bytes, limit: int) -> Iterator[tuple[int, int]]:
    """Single bits first, then the other values."""
    if len(data) * 8 > limit:
        return
    bits = [1 << n for n in range(8)]
    for at, byte in enumerate(data):
        for bit in bits:
            yield at, byte ^ bit
    if len(data) * 255 > limit:
        return
    others = [mask for mask in range(1, 256) if mask not in bits]
    for at, byte in enumerate(data):
        for mask in others:
            yield at, byte ^ mask
