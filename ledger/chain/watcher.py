"""Reads our contracts' events off the chain, in chain order, each exactly once per cursor.

Only blocks with enough confirmations are read, which is what stands against reorganisations; a
cursor carries the hash of its block, so a deeper one is noticed and nothing is read past it. The
caller stores the cursor with what it made of the events, in one transaction; killed before that,
it gets the same events again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eth_abi.abi import decode
from hexbytes import HexBytes

from ledger.chain.artefacts import artefact
from ledger.chain.client import ChainClient, event_topic
from ledger.chain.deploy import Deployments
from ledger.domain.ids import actor_of
from ledger.errors import ChainError, InvalidEvent

MAX_BLOCKS_PER_QUERY = 2_000


@dataclass(frozen=True, kw_only=True)
class ChainEvent:
    """Where a log stands. `contract` is lower-case, as all addresses here."""

    contract: str
    block: int
    block_hash: bytes
    tx_hash: bytes
    log_index: int

    source: ClassVar[str]
    """The contract whose ABI has the event of this class's name."""


@dataclass(frozen=True, kw_only=True)
class Committed(ChainEvent):
    size: int
    root: bytes
    previous_size: int
    source: ClassVar[str] = "CheckpointAnchor"


@dataclass(frozen=True, kw_only=True)
class Deposited(ChainEvent):
    """`actor` is the ledger account, `sender` the address that paid."""

    actor: str
    sender: str
    amount: int
    deposit_id: int
    source: ClassVar[str] = "Escrow"


@dataclass(frozen=True, kw_only=True)
class Released(ChainEvent):
    period: int
    amount: int
    source: ClassVar[str] = "Escrow"


@dataclass(frozen=True, kw_only=True)
class Proposed(ChainEvent):
    period: int
    root: bytes
    total: int
    log_size: int
    activatable_at: int
    source: ClassVar[str] = "PayoutDistributor"


@dataclass(frozen=True, kw_only=True)
class Activated(ChainEvent):
    period: int
    root: bytes
    total: int
    log_size: int
    source: ClassVar[str] = "PayoutDistributor"


@dataclass(frozen=True, kw_only=True)
class Vetoed(ChainEvent):
    period: int
    root: bytes
    source: ClassVar[str] = "PayoutDistributor"


@dataclass(frozen=True, kw_only=True)
class Claimed(ChainEvent):
    account: str
    amount: int
    cumulative: int
    source: ClassVar[str] = "PayoutDistributor"


EVENTS: tuple[type[ChainEvent], ...] = (
    Committed,
    Deposited,
    Released,
    Proposed,
    Activated,
    Vetoed,
    Claimed,
)

# ABI names where ours differ.
_NAMES = {
    "previousSize": "previous_size",
    "account": "account",
    "from": "sender",
    "depositId": "deposit_id",
    "logSize": "log_size",
    "activatableAt": "activatable_at",
    "cumulativeAmount": "cumulative",
}


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """The last block read, whole, and its hash (None before the first one)."""

    block: int
    block_hash: bytes | None = None

    def __str__(self) -> str:
        return f"{self.block}:{self.block_hash.hex() if self.block_hash else ''}"

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """The inverse of str()."""
        block, _, digits = text.partition(":")
        try:
            return cls(block=int(block), block_hash=bytes.fromhex(digits) or None)
        except ValueError as error:
            raise InvalidEvent(f"{text!r} is no chain cursor: BLOCK:HASH") from error


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Events in chain order, and the cursor to store with them."""

    events: tuple[ChainEvent, ...]
    cursor: Cursor


class Watcher:
    """Reads the events of one deployment."""

    def __init__(self, client: ChainClient, deployments: Deployments) -> None:
        self._client = client
        self._first = deployments.block
        self._addresses = {
            "CheckpointAnchor": deployments.anchor,
            "Escrow": deployments.escrow,
            "PayoutDistributor": deployments.distributor,
        }
        self._kinds = {
            (self._addresses[kind.source].lower(), event_topic(kind.source, kind.__name__)): kind
            for kind in EVENTS
        }

    def start(self) -> Cursor:
        """Before the first block that can hold an event of ours."""
        return Cursor(block=self._first - 1)

    def poll(self, cursor: Cursor, *, max_blocks: int = MAX_BLOCKS_PER_QUERY) -> Batch:
        """What the next blocks hold, `max_blocks` of them at most. Never waits.

        The same cursor comes back when no further block is confirmed. Raises ChainError when the
        chain was reorganised below the cursor, or reset.
        """
        self._check(cursor)
        last = min(self._client.confirmed_head(), cursor.block + max_blocks)
        if last <= cursor.block:
            return Batch(events=(), cursor=cursor)
        # The hash first: should the chain change between the two calls, the next poll notices.
        block_hash = self._client.block_hash(last)
        logs = self._client.logs(
            list(self._addresses.values()),
            [["0x" + topic.hex() for _, topic in self._kinds]],
            cursor.block + 1,
            last,
        )
        events = tuple(event for log in logs if (event := self._event(log)) is not None)
        return Batch(events=events, cursor=Cursor(block=last, block_hash=block_hash))

    def _check(self, cursor: Cursor) -> None:
        if cursor.block_hash is None:
            return
        if cursor.block <= self._client.head():
            found = self._client.block_hash(cursor.block)
            if found == cursor.block_hash:
                return
            what = f"it is 0x{found.hex()} now"
        else:
            what = f"the chain ends at block {self._client.head()} now"
        raise ChainError(
            f"block {cursor.block} was 0x{cursor.block_hash.hex()} when it was read, {what}: a "
            f"reorganisation deeper than {self._client.confirmations} confirmations, or another "
            "chain. Nothing more is read; compare what was recorded with the chain",
            reset=True,
        )

    def _event(self, log: Mapping[str, Any]) -> ChainEvent | None:
        topics = [bytes(HexBytes(topic)) for topic in log["topics"]]
        kind = self._kinds.get((log["address"].lower(), topics[0]))
        if kind is None:
            return None  # one contract's event name at another one's address
        fields = _decode(kind, topics[1:], bytes(HexBytes(log["data"])))
        return kind(
            contract=log["address"].lower(),
            block=int(log["blockNumber"], 16),
            block_hash=bytes(HexBytes(log["blockHash"])),
            tx_hash=bytes(HexBytes(log["transactionHash"])),
            log_index=int(log["logIndex"], 16),
            **fields,
        )


def _decode(kind: type[ChainEvent], topics: Sequence[bytes], data: bytes) -> dict[str, Any]:
    (item,) = (
        i for i in artefact(kind.source).abi if i["type"] == "event" and i["name"] == kind.__name__
    )
    indexed = [i for i in item["inputs"] if i["indexed"]]
    plain = [i for i in item["inputs"] if not i["indexed"]]
    values = {
        **{i["name"]: decode([i["type"]], t)[0] for i, t in zip(indexed, topics, strict=True)},
        **dict(
            zip((i["name"] for i in plain), decode([i["type"] for i in plain], data), strict=True)
        ),
    }
    if kind is Deposited:
        values["actor"] = actor_of(values.pop("account"))
    return {
        _NAMES.get(name, name): value.lower() if isinstance(value, str) else value
        for name, value in values.items()
    }
