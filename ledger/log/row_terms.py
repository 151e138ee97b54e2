"""What a log says of the rows behind an attribution, read from the log itself. Pure.

An attribution is made under *terms*: which of its contributions were withdrawn, which rows were
split off a cluster, at some size of the log (docs/FORMATS.md, "Attribution evidence"). The worker
writes down the terms that the ledger told it; an auditor reads the entries, and believes neither.
Every entry up to that size is hashed, and the tree they make must be the beginning of the tree that
the log has signed, so that no withdrawal can be left out.
"""

from collections.abc import Collection, Iterator
from typing import Any

from ledger.domain.envelope import decode_entry, leaf_hash
from ledger.domain.events import check_body
from ledger.errors import Inconsistent, InvalidEvent
from ledger.log.frontier import Frontier
from ledger.log.sources import read_tile, tile_reader, width_at
from ledger.log.tree import consistency_ranges, range_hashes
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.merkle import verify_consistency
from ledger.verify.tiles import TILE_WIDTH, Tile, decode_entries

WITHDRAWN, SPLIT = "contribution.withdrawn", "cluster.split"
_MARKS = tuple(f'"{name}"'.encode() for name in (WITHDRAWN, SPLIT))


def read_terms(
    source: LogSource, size: int, head: Checkpoint, contributions: Collection[str]
) -> dict[str, Any]:
    """The terms of these contributions' rows after `size` entries of the log that signed `head`.

    In the form of evidence: `{"log_size","splits","withdrawn"}`, all sorted. Raises Inconsistent
    when the entries are not the beginning of the signed log or one of them is no event,
    MalformedProof when a file is not what tlog-tiles says, NotFound and Unavailable as the source
    does.
    """
    if size > head.size:
        raise Inconsistent(
            f"terms at size {size} are asked of a log that has signed {head.size} entries"
        )
    withdrawn: set[str] = set()
    splits: set[tuple[str, int]] = set()
    grown = Frontier()
    for entry in _entries(source, size, head.size):
        grown.append(leaf_hash(entry))
        for type, body in _told(entry, grown.size - 1):
            if body["contribution"] not in contributions:
                continue
            if type == WITHDRAWN:
                withdrawn.add(body["contribution"])
            else:
                splits.add((body["contribution"], body["row"]))
    ranges = consistency_ranges(size, head.size)
    verify_consistency(
        size1=size,
        size2=head.size,
        root1=grown.root(),
        root2=head.root,
        proof=range_hashes(ranges, tile_reader(source, head.size)) if ranges else [],
    )
    return {
        "log_size": size,
        "splits": [list(split) for split in sorted(splits)],
        "withdrawn": sorted(withdrawn),
    }


def _entries(source: LogSource, size: int, signed: int) -> Iterator[bytes]:
    """The first `size` entries; bundles are asked for as the signed tree has them."""
    for n in range(-(-size // TILE_WIDTH)):
        width = width_at(signed, 0, n)
        entries = decode_entries(read_tile(source, Tile(level=None, n=n, width=width)), width)
        yield from entries[: size - n * TILE_WIDTH]


def _told(entry: bytes, index: int) -> list[tuple[str, dict[str, Any]]]:
    """(type, body) when the entry is of a type that matters here; its signature is checked."""
    if not any(mark in entry for mark in _MARKS):  # spares parsing nearly all of them
        return []
    try:
        event = decode_entry(entry).envelope
        if event.type not in (WITHDRAWN, SPLIT):
            return []
        check_body(event.type, event.body)
    except InvalidEvent as error:
        raise Inconsistent(f"entry {index} of the log is no signed event: {error}") from error
    return [(event.type, dict(event.body))]
