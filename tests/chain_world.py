"""What the chain tests share: RFC 9162 by its recursive definitions, a log of small entries, and a
module-wide anvil with our contracts on it. Slow and plain on purpose: it is the oracle."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ledger.chain.anchorer import SignedCheckpoint
from ledger.chain.client import ChainClient, create_key
from ledger.chain.deploy import Deployments, deploy_all
from ledger.chain.devchain import DevChain

ORIGIN = "log.example/chain-tests"
RICH_WEI = 10**24


def entry_of(index: int, text: str = "entry") -> bytes:
    """A log entry's header (index, recorded_at) and a little text."""
    return index.to_bytes(8, "big") + (10**15 + index).to_bytes(8, "big") + text.encode()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def split(count: int) -> int:
    """The largest power of two smaller than `count`."""
    return 1 << (count - 1).bit_length() - 1


def root_of(leaves: Sequence[bytes]) -> bytes:
    """MTH, section 2.1.1."""
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return node(root_of(leaves[:k]), root_of(leaves[k:]))


def path_of(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH, section 2.1.3.1."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if index < k:
        return [*path_of(index, leaves[:k]), root_of(leaves[k:])]
    return [*path_of(index - k, leaves[k:]), root_of(leaves[:k])]


def proof_of(size1: int, leaves: Sequence[bytes], *, complete: bool = True) -> list[bytes]:
    """PROOF, section 2.1.4.1."""
    if size1 == len(leaves):
        return [] if complete else [root_of(leaves)]
    k = split(len(leaves))
    if size1 <= k:
        return [*proof_of(size1, leaves[:k], complete=complete), root_of(leaves[k:])]
    return [*proof_of(size1 - k, leaves[k:], complete=False), root_of(leaves[:k])]


@dataclass
class SmallLog:
    """An AnchorSource over entries that tests append."""

    entries: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, size: int, text: str = "entry") -> "SmallLog":
        return cls().grow(size, text)

    def grow(self, size: int, text: str = "entry") -> "SmallLog":
        self.entries += [entry_of(i, text) for i in range(len(self.entries), size)]
        return self

    def leaves(self, size: int) -> list[bytes]:
        return [hashlib.sha256(b"\x00" + e).digest() for e in self.entries[:size]]

    def root(self, size: int) -> bytes:
        return root_of(self.leaves(size))

    def latest(self) -> SignedCheckpoint | None:
        return self.checkpoint(len(self.entries)) if self.entries else None

    def checkpoint(self, size: int) -> SignedCheckpoint:
        return SignedCheckpoint(size=size, root=self.root(size), note=b"note %d" % size)

    def consistency_proof(self, size1: int, size2: int) -> list[bytes]:
        return proof_of(size1, self.leaves(size2))

    def inclusion_proof(self, index: int, size: int) -> list[bytes]:
        return path_of(index, self.leaves(size))

    def entry(self, index: int) -> bytes:
        return self.entries[index]


@dataclass(frozen=True, kw_only=True)
class World:
    """A running chain, a funded client, and our contracts."""

    chain: DevChain
    client: ChainClient
    deployments: Deployments
    folder: Path

    @property
    def key_file(self) -> Path:
        return self.folder / "owner.key"


def new_client(chain: DevChain, key_file: Path, *, confirmations: int = 1) -> ChainClient:
    """A client with its own funded key."""
    if not key_file.exists():
        create_key(key_file)
    client = ChainClient(
        chain.rpc_url,
        key_file=key_file,
        confirmations=confirmations,
        receipt_timeout_s=20,
        save=chain.save,
    )
    chain.fund(client.address, RICH_WEI)
    return client


def new_world(chain: DevChain, folder: Path, *, window_s: int = 100) -> World:
    client = new_client(chain, folder / "owner.key")
    deployments = deploy_all(client, folder, origin=ORIGIN, challenge_window_s=window_s)
    return World(chain=chain, client=client, deployments=deployments, folder=folder)
