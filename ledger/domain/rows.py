"""Rows of a contribution and their commitment. Pure.

A row is `{"completion","prompt","salt"}`, all strings; the salt is 16 random bytes in hex and
keeps a hash from being guessed. Its leaf is SHA-256(0x00 || canonical JSON), and the
contribution's `rows_root` is the RFC 9162 section 2.1.1 tree over them in order, so a contributor
can prove one row without showing the others. The rows travel as one blob, canonical JSON
`{"rows":[...]}`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.envelope import leaf_hash, node_hash
from ledger.domain.events import MAX_ROWS_PER_CONTRIBUTION
from ledger.errors import InvalidEvent, TooLarge

MAX_PROMPT_CHARS = 8_000
MAX_COMPLETION_CHARS = 8_000
MAX_ROWS_BLOB_BYTES = 64 * 2**20
SALT_HEX_CHARS = 32


@dataclass(frozen=True, kw_only=True)
class DataRow:
    prompt: str
    completion: str
    salt: str

    @property
    def hash(self) -> bytes:
        """32-byte salted leaf hash."""
        fields = {"prompt": self.prompt, "completion": self.completion, "salt": self.salt}
        return leaf_hash(canonical_json(fields))


def check_row(value: object, where: str) -> DataRow:
    if not isinstance(value, Mapping) or value.keys() != {"prompt", "completion", "salt"}:
        raise InvalidEvent(f"{where} must have exactly prompt, completion and salt")
    for field, limit in (
        ("prompt", MAX_PROMPT_CHARS),
        ("completion", MAX_COMPLETION_CHARS),
        ("salt", SALT_HEX_CHARS),
    ):
        if not isinstance(value[field], str) or not 0 < len(value[field]) <= limit:
            raise InvalidEvent(f"{where}.{field} must be a string of 1 to {limit} characters")
    if not value["completion"].strip():
        raise InvalidEvent(f"{where}.completion is blank")
    if len(value["salt"]) != SALT_HEX_CHARS or set(value["salt"]) - set("0123456789abcdef"):
        raise InvalidEvent(f"{where}.salt must be {SALT_HEX_CHARS} lower-case hex digits")
    return DataRow(prompt=value["prompt"], completion=value["completion"], salt=value["salt"])


def encode_rows(rows: Sequence[DataRow]) -> bytes:
    """The blob of a contribution."""
    return canonical_json(
        {"rows": [{"prompt": r.prompt, "completion": r.completion, "salt": r.salt} for r in rows]}
    )


def decode_rows(blob: bytes) -> list[DataRow]:
    """Parse and check a rows blob; raises InvalidEvent that names the row."""
    if len(blob) > MAX_ROWS_BLOB_BYTES:
        raise TooLarge(f"a rows blob is at most MAX_ROWS_BLOB_BYTES = {MAX_ROWS_BLOB_BYTES}")
    value: Any = parse_canonical(blob)
    if (
        not isinstance(value, dict)
        or value.keys() != {"rows"}
        or not isinstance(value["rows"], list)
    ):
        raise InvalidEvent('a rows blob is {"rows":[...]}')
    if not 0 < len(value["rows"]) <= MAX_ROWS_PER_CONTRIBUTION:
        raise InvalidEvent(f"a contribution has 1 to {MAX_ROWS_PER_CONTRIBUTION} rows")
    return [check_row(row, f"rows[{n}]") for n, row in enumerate(value["rows"])]


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162 section 2.1.1 Merkle tree hash of 32-byte leaf hashes; SHA-256("") of none."""
    if not leaves:
        return sha256(b"").digest()
    level = list(leaves)
    # Pairing neighbours and carrying an odd last node up gives the RFC's left-heavy tree.
    while len(level) > 1:
        paired = [node_hash(level[n], level[n + 1]) for n in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0]


def tree_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The hashes that lead from leaf `index` to `tree_root`, its sibling first (RFC 9162 section
    2.1.3.1). Raises IndexError beyond the leaves."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    level, path = list(leaves), []
    while len(level) > 1:
        if index ^ 1 < len(level):  # the odd last node of a level has no sibling: it is carried up
            path.append(level[index ^ 1])
        paired = [node_hash(level[n], level[n + 1]) for n in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
        index >>= 1
    return path


def rows_root(rows: Sequence[DataRow]) -> bytes:
    return tree_root([row.hash for row in rows])
