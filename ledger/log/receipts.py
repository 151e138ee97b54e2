"""Receipts: signing the log's promises, and fetching from a log what they are held against.

A receipt is a function of what is stored and of the promise that was in force when it was stored:
both signatures are deterministic (RFC 8032, RFC 6979), so asking again gives the same bytes, and no
receipt has to be kept. How long the promise was is remembered in a small file (`Promises`): were
included_by computed from today's setting, shortening it would sign promises about the past that
nobody made and that may already be broken.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ledger.errors import ConfigError, Inconsistent, MalformedProof, StorageError
from ledger.files import write_durably
from ledger.log import tree
from ledger.log.sources import tile_reader
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.note import VerifierKey
from ledger.verify.receipt import (
    EvmSignature,
    Promise,
    Receipt,
    promise_bytes,
    receipt_json,
)
from ledger.verify.receipt_verdict import ReceiptVerdict, Shown, judge

PROMISES_FORMAT = "tributary/promises/v1"


class Promises:
    """Which promise was in force when: `[[since_us, promise_s], ...]`, ascending."""

    def __init__(self, terms: Sequence[tuple[int, int]]) -> None:
        assert terms
        assert terms[0][0] == 0
        self._since = [since for since, _ in terms]
        self._promise_s = [promise_s for _, promise_s in terms]

    @classmethod
    def open(cls, path: Path, promise_s: int, now: int) -> "Promises":
        """Read the file, and add today's setting when it is another one than the last.

        A crash before the write leaves the older terms, under which nothing was promised yet. Lost
        with its folder, the file starts anew: older events are then promised by today's setting.
        """
        terms = _read_terms(path)
        if not terms or terms[-1][1] != promise_s:
            # A clock that jumped back must not put the terms out of order.
            terms.append((max(now, terms[-1][0]) if terms else 0, promise_s))
            value = {"format": PROMISES_FORMAT, "terms": terms}
            try:
                write_durably(path, json.dumps(value).encode() + b"\n")
            except OSError as error:
                raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        return cls(terms)

    def included_by(self, recorded_at: int) -> int:
        """Until when the log promised a checkpoint for what it recorded at that time."""
        term = bisect_right(self._since, recorded_at) - 1
        return recorded_at + self._promise_s[max(term, 0)] * 1_000_000


class ReceiptIssuer:
    """Signs what the store says is recorded. Thread-safe; keeps nothing.

    `sign` is `LogSigner.sign_receipt`; `evm` repeats the promise for contracts, or is None while
    none are deployed. `signed_size` is the largest tree that the log's key had signed when this
    process started: an event recorded *now* below it comes from a database older than that
    signature, and its receipt would contradict the log.
    """

    def __init__(
        self,
        *,
        origin: str,
        sign: Callable[[bytes], bytes],
        promises: Promises,
        evm: Callable[[Promise], EvmSignature] | None = None,
        signed_size: int = 0,
    ) -> None:
        self._origin = origin
        self._sign = sign
        self._promises = promises
        self._evm = evm
        self._signed_size = signed_size

    def issue(
        self,
        *,
        first_index: int,
        leaf_hashes: Sequence[bytes],
        recorded_at: int,
        fresh: bool = False,
    ) -> dict[str, Any]:
        """The receipt, as JSON, of entries that stand together; `fresh` if appended just now.

        Raises Inconsistent when a fresh entry stands where the log has signed one already.
        """
        if fresh and first_index < self._signed_size:
            raise Inconsistent(
                f"the event was stored at index {first_index}, but this log's key has signed a "
                f"tree of {self._signed_size} entries: the database is older than that; restore "
                "the newer one",
                index=first_index,
            )
        promise = Promise(
            log=self._origin,
            first_index=first_index,
            leaf_hashes=tuple(leaf_hashes),
            recorded_at=recorded_at,
            included_by=self._promises.included_by(recorded_at),
        )
        signature = self._sign(promise_bytes(promise))
        evm = self._evm(promise) if self._evm else None
        return receipt_json(Receipt(promise=promise, sig=signature, evm=evm))


def hold_against(
    source: LogSource,
    receipt: Receipt,
    key: VerifierKey,
    *,
    now: int,
    policy: bytes | None = None,
) -> ReceiptVerdict:
    """`receipt_verdict.judge` on what the log shows now. `receipt` is verified under `key`."""
    note = source.read("checkpoint")
    checkpoint = open_checkpoint(note, key).checkpoint
    shown = shown_by(source, receipt, checkpoint)
    return judge(receipt, key, note=note, shown=shown, now=now, policy=policy)


def shown_by(source: LogSource, receipt: Receipt, checkpoint: Checkpoint) -> list[Shown]:
    """The leaves that a log shows at the promised indexes that `checkpoint` covers, with proofs.

    Nothing is verified here. Raises NotFound or Unavailable where files are missing, MalformedProof
    where they are too short.
    """
    promise, size = receipt.promise, checkpoint.size
    indexes = range(promise.first_index, min(size, promise.size))
    paths = {index: tree.inclusion_ranges(index, size) for index in indexes}
    leaves = [(index, index + 1) for index in indexes]
    ranges = sorted({*leaves, *(part for path in paths.values() for part in path)})
    try:
        hashes = tree.range_hashes(ranges, tile_reader(source, size))
    except StorageError as error:
        raise MalformedProof(f"the log's tiles are not those of a tree of {size}") from error
    known = dict(zip(ranges, hashes, strict=True))
    return [
        Shown(
            index=index,
            leaf=known[index, index + 1],
            proof=tuple(known[part] for part in paths[index]),
        )
        for index in indexes
    ]


def _read_terms(path: Path) -> list[tuple[int, int]]:
    try:
        value = json.loads(path.read_bytes())
        terms = [(int(since), int(promise_s)) for since, promise_s in value["terms"]]
        if value["format"] == PROMISES_FORMAT and terms and terms[0][0] == 0:
            return terms
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{path} does not say what this log promised when: restore it from a backup. Without it, "
        "receipts of older events would promise what today's setting says"
    )
