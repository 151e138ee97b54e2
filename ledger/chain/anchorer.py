"""Anchors the log's checkpoints on chain, and proves that it did. Killable between any two steps.

The state lives in the contract, so there is nothing of ours to lose: each run reads (size, root)
from the chain and decides. `decide` is pure; `Anchorer.run` takes the steps in STEPS order:

    read      the anchored pair, after waiting for transactions that a killed run left in flight
    prove     consistency proof, last entry and its inclusion proof, from the log
    send      one transaction; killed after it, the next run finds the pair anchored
    confirm   wait for the block's confirmations; the development chain saves its state
    find      the Committed event: transaction, block, log index
    capture   header, account proof and storage proofs, checked by the offline verifier
    record    hand the AnchorRecord to the caller, who appends `checkpoint.anchored`

Killed before `record`, the next run sees an anchored size above the recorded one and resumes at
`confirm` without sending. `AnchorRecord.key` is the same each time, so the caller's append is
refused as a replay and not doubled if it was killed just after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol
from uuid import UUID

from hexbytes import HexBytes

from ledger.chain.client import ChainClient, event_topic
from ledger.chain.l1proof import L1Verifier, capture_recent
from ledger.domain.canonical import canonical_json
from ledger.domain.ids import derived_id, sha256_hex
from ledger.errors import ChainError, Inconsistent

STEPS = ("read", "prove", "send", "confirm", "find", "capture", "record")


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """What the contract holds: entries and their root; (0, zeros) before the first commit."""

    size: int
    root: bytes


@dataclass(frozen=True, kw_only=True)
class SignedCheckpoint:
    """A checkpoint that the log signed. `note` is the whole signed note."""

    size: int
    root: bytes
    note: bytes


class AnchorSource(Protocol):
    """What an anchorer asks of the log. Hashes are 32 bytes."""

    def latest(self) -> SignedCheckpoint | None:
        """The newest signed checkpoint; None while the log is empty."""
        ...

    def checkpoint(self, size: int) -> SignedCheckpoint:
        """The log's signed checkpoint of exactly that size, for a commit found after a crash."""
        ...

    def consistency_proof(self, size1: int, size2: int) -> Sequence[bytes]:
        """RFC 9162 section 2.1.4.1, 0 < size1 < size2."""
        ...

    def inclusion_proof(self, index: int, size: int) -> Sequence[bytes]:
        """RFC 9162 section 2.1.3.1."""
        ...

    def entry(self, index: int) -> bytes:
        """The whole log entry."""
        ...


@dataclass(frozen=True, kw_only=True)
class AnchorRecord:
    """One anchored checkpoint, as `checkpoint.anchored` tells it. `l1` is the verified section."""

    size: int
    root: bytes
    note: bytes
    chain_id: int
    contract: str
    tx_hash: bytes
    block_number: int
    block_hash: bytes
    log_index: int
    l1: dict[str, Any]

    @property
    def key(self) -> UUID:
        """The same for the same commit, however often a killed anchorer finds it."""
        return derived_id("anchor", self.chain_id, self.contract, self.size, self.tx_hash.hex())

    @property
    def l1_bytes(self) -> bytes:
        """The section as canonical JSON, for the blob store."""
        return canonical_json(self.l1)

    def event_body(self) -> dict[str, Any]:
        """The body of `checkpoint.anchored`."""
        return {
            "size": self.size,
            "root": self.root.hex(),
            "chain_id": self.chain_id,
            "contract": self.contract,
            "tx_hash": "0x" + self.tx_hash.hex(),
            "block_number": self.block_number,
            "block_hash": "0x" + self.block_hash.hex(),
            "l1_sha256": sha256_hex(self.l1_bytes),
        }


class Decision(Enum):
    """What is to be done about a newest checkpoint."""

    NOTHING = "anchored and recorded, or nothing to anchor"
    RECORD = "anchored by a run that was killed: record it, send nothing"
    COMMIT = "larger than what is anchored: send it"


def decide(anchored: Anchored, latest: SignedCheckpoint | None, recorded_size: int) -> Decision:
    """Pure. `recorded_size` is that of the last `checkpoint.anchored` event, 0 without one.

    A commit that is anchored and not recorded comes first, whatever else waits. Raises
    Inconsistent where chain and log contradict each other: nothing is sent then.
    """
    size = latest.size if latest else 0
    if anchored.size > size:
        raise Inconsistent(
            f"the chain holds size {anchored.size}, the log has signed {size}: the log lost "
            "entries, or it is the wrong log. Stop and restore it; nothing was sent"
        )
    if latest is not None and size == anchored.size and latest.root != anchored.root:
        raise Inconsistent(
            f"the chain holds root {anchored.root.hex()} for size {size}, the log signed "
            f"{latest.root.hex()}: the log was forked. Stop and investigate; nothing was sent"
        )
    if anchored.size > recorded_size:
        return Decision.RECORD
    return Decision.COMMIT if size > anchored.size else Decision.NOTHING


class Anchorer:
    """One log's anchorer. Not safe to run twice at once; two are harmless, though: the contract
    refuses or ignores the second commit."""

    def __init__(
        self,
        client: ChainClient,
        *,
        contract: str,
        first_block: int,
        source: AnchorSource,
        verify: L1Verifier,
        observe: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`verify` is `ledger.verify.l1.verify_l1`. `observe` is called with each step's name
        before it (logging, progress, tests)."""
        self._client = client
        self._contract = client.contract("CheckpointAnchor", contract)
        self._first_block = first_block
        self._source = source
        self._verify = verify
        self._observe = observe

    def anchored(self) -> Anchored:
        """The pair in the newest block, both parts from one block."""
        block = self._client.head()
        functions = self._contract.functions
        return Anchored(
            size=int(self._client.call(functions.size(), block)),
            root=bytes(self._client.call(functions.root(), block)),
        )

    def run(self, recorded_size: int) -> AnchorRecord | None:
        """One round. A record to append, or None when everything is anchored and recorded.

        After a RECORD round call again: a larger checkpoint may wait.
        """
        self._observe("read")
        self._client.wait_idle()
        anchored = self.anchored()
        latest = self._source.latest()
        decision = decide(anchored, latest, recorded_size)
        if decision is Decision.NOTHING:
            return None
        if decision is Decision.RECORD:
            checkpoint = self._source.checkpoint(anchored.size)
            if checkpoint.root != anchored.root:
                raise Inconsistent(
                    f"the chain holds root {anchored.root.hex()} for size {anchored.size}, the log "
                    f"has {checkpoint.root.hex()}: the log was forked. Stop and investigate"
                )
            return self._record(checkpoint)
        assert latest is not None
        self._commit(anchored, latest)
        return self._record(latest)

    def _commit(self, anchored: Anchored, latest: SignedCheckpoint) -> None:
        self._observe("prove")
        source = self._source
        consistency = source.consistency_proof(anchored.size, latest.size) if anchored.size else ()
        call = self._contract.functions.commit(
            latest.size,
            latest.root,
            list(consistency),
            source.entry(latest.size - 1),
            list(source.inclusion_proof(latest.size - 1, latest.size)),
        )
        self._observe("send")
        sent = self._client.broadcast(call)
        # A crash from here on leaves a transaction in flight or mined; `read` waits for it.
        self._observe("confirm")
        self._client.wait(sent)

    def _record(self, checkpoint: SignedCheckpoint) -> AnchorRecord:
        self._observe("find")
        log = self._confirmed(checkpoint)
        block_number = int(log["blockNumber"], 16)
        # What is recorded for ever must not be undone by a crash of a development node.
        self._client.settle()
        self._observe("capture")
        contract = str(self._contract.address)
        section = capture_recent(
            self._client,
            contract,
            size=checkpoint.size,
            root=checkpoint.root,
            committed_in=block_number,
            verify=self._verify,
        )
        self._observe("record")
        return AnchorRecord(
            size=checkpoint.size,
            root=checkpoint.root,
            note=checkpoint.note,
            chain_id=self._client.chain_id,
            contract=contract.lower(),
            tx_hash=bytes(HexBytes(log["transactionHash"])),
            block_number=block_number,
            block_hash=bytes(HexBytes(log["blockHash"])),
            log_index=int(log["logIndex"], 16),
            l1=section,
        )

    def _confirmed(self, checkpoint: SignedCheckpoint) -> Any:
        """The event once its block has its confirmations; a reorganisation may move it first."""
        log = self._committed(checkpoint)
        while True:
            self._client.wait_confirmed(int(log["blockNumber"], 16))
            again = self._committed(checkpoint)
            if again["blockHash"] == log["blockHash"]:
                return again
            log = again

    def _committed(self, checkpoint: SignedCheckpoint) -> Any:
        """The one Committed event of that size: the contract takes each size at most once."""
        topics = [
            "0x" + event_topic("CheckpointAnchor", "Committed").hex(),
            f"0x{checkpoint.size:064x}",
        ]
        logs = self._client.logs(
            [str(self._contract.address)], topics, self._first_block, self._client.head()
        )
        if not logs:
            raise ChainError(
                f"size {checkpoint.size} is anchored at {self._contract.address}, and the node "
                f"shows no Committed event for it from block {self._first_block} on: it does not "
                "keep logs that far back; use a full node"
            )
        return logs[-1]
