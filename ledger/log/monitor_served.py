"""A foreign log's files as a signed checkpoint's tree must have them, and hashes out of them.

A missing file stops the look with an alarm. Hashes for proofs are None where the log does not serve
what they need; whoever asks for them compares what comes out with a signed root.
"""

import time
from collections.abc import Callable
from typing import NoReturn

from ledger.errors import NotFound, StorageError, VerificationError
from ledger.log import tree
from ledger.log.monitor_findings import Findings
from ledger.log.monitor_state import Signed
from ledger.log.sources import read_tile, tile_reader, width_at
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.tiles import Tile, decode_entries, tile_path
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof

READ_ATTEMPTS = 3
"""Of a file that should be there, or a checkpoint that does not open (yet)."""
REREAD_PAUSE_S = 1.0


class Served:
    """A log's files as the tree of a signed checkpoint must have them, and hashes out of them."""

    def __init__(
        self,
        source: LogSource,
        findings: Findings,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source = source
        self._findings = findings
        self._sleep = sleep

    def file(self, tile: Tile, target: Signed) -> bytes:
        """A file that the target's tree must have; the look stops when it is not to be had."""
        wrong = ""
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                self._sleep(REREAD_PAUSE_S)
            try:
                return read_tile(self._source, tile)
            except (NotFound, VerificationError) as error:
                wrong = str(error)
        return self._missing(tile, target, wrong)

    def bundle(self, n: int, target: Signed) -> list[bytes]:
        """The entries of bundle `n`, as many as the target's tree has there."""
        width = width_at(target.checkpoint.size, 0, n)
        tile = Tile(level=None, n=n, width=width)
        try:
            return decode_entries(self.file(tile, target), width)
        except VerificationError as error:
            return self._missing(tile, target, str(error))

    def _missing(self, tile: Tile, target: Signed, wrong: str) -> NoReturn:
        path = tile_path(tile)
        size = target.checkpoint.size
        self._findings.stop(
            "wrong-size",
            f"the log signed {size} entries and does not hand out {path}: {wrong}",
            {"checkpoint": target.note, "path": path.encode()},
        )

    def nodes(self, old: Checkpoint, new: Checkpoint) -> list[bytes] | None:
        """The hashes that lead to both trees (`ledger.verify.evidence.prefix_roots`)."""
        if not 0 < old.size < new.size:
            return None
        ranges = tree.consistency_ranges(old.size, new.size)
        if old.size & (old.size - 1) == 0:  # one whole subtree, which RFC 9162 leaves out
            ranges = [(0, old.size), *ranges]
        return self._hashes(ranges, new.size)

    def path(self, index: int, size: int) -> list[bytes] | None:
        """The inclusion proof of a leaf."""
        return self._hashes(tree.inclusion_ranges(index, size), size)

    def proof(self, index: int, target: Signed) -> bytes | None:
        """The same as a tlog-proof file."""
        path = self.path(index, target.checkpoint.size)
        if path is None:
            return None
        return format_tlog_proof(TlogProof(index=index, proof=tuple(path), checkpoint=target.note))

    def leaf(self, index: int, size: int) -> bytes | None:
        found = self._hashes([(index, index + 1)], size)
        return found[0] if found else None

    def _hashes(self, ranges: list[tuple[int, int]], size: int) -> list[bytes] | None:
        try:
            return tree.range_hashes(ranges, tile_reader(self._source, size))
        except (NotFound, StorageError, VerificationError):
            return None
