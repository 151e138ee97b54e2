"""One evidence file before its judge: the items under the log's key, and what was found. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ledger.errors import Inconsistent, MalformedProof
from ledger.verify.checkpoint import Checkpoint, OpenedCheckpoint, open_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.note import VerifierKey
from ledger.verify.tiles import TILE_HEIGHT, TILE_WIDTH, parse_tile_path
from ledger.verify.tlog_proof import parse_tlog_proof, verify_tlog_proof


@dataclass(kw_only=True)
class Finding:
    """What the judge of one kind found. `testimony` is what only the finder vouches for; none means
    that the evidence is conclusive."""

    proven: list[str]
    testimony: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An evidence file under the key that it is judged by."""

    log: str
    key: VerifierKey
    items: Mapping[str, bytes]

    def open(self, name: str, *witnesses: VerifierKey) -> OpenedCheckpoint:
        return open_checkpoint(self.items[name], self.key, origin=self.log, witnesses=witnesses)

    def head(self, name: str = "checkpoint") -> Checkpoint:
        return self.open(name).checkpoint

    def included(self, proof: str, leaf: bytes) -> tuple[int, Checkpoint]:
        """The index at which the signed tree of the tlog-proof item holds this leaf hash."""
        if parse_tlog_proof(self.items[proof]).extra is not None:
            raise MalformedProof(f"items.{proof} has an extra line, which nothing authenticates")
        found, opened = verify_tlog_proof(self.items[proof], leaf, self.key, origin=self.log)
        return found.index, opened.checkpoint

    def path_under(self, head: Checkpoint) -> str:
        """The path item, a file that the log of a tree of that size must have."""
        try:
            path = self.items["path"].decode("ascii")
        except UnicodeDecodeError as error:
            raise MalformedProof("items.path names no file of a log") from error
        tile = parse_tile_path(path)
        if tile.n * TILE_WIDTH + tile.width > head.size >> (TILE_HEIGHT * (tile.level or 0)):
            raise Inconsistent(f"a tree of {head.size} has no {path}: nothing is wrong here")
        return path


def signed(case: Case, *heads: Checkpoint) -> list[str]:
    name = printable(case.log)
    return [f"The log {name} signed size {head.size}, root {head.root.hex()}." for head in heads]


def sizes(*heads: Checkpoint) -> dict[str, Any]:
    return {"sizes": [h.size for h in heads], "roots": [h.root.hex() for h in heads]}
