"""Payout trees, and the money's way on chain: deposit, release, propose, activate, claim.

The tree is OpenZeppelin's StandardMerkleTree over ["address", "uint256"], array layout included, so
that its JavaScript library loads `PayoutTree.dump` and gives the same proofs: leaves
keccak256(keccak256(abi.encode(account, cumulative))), sorted by hash, filling an array of 2n - 1
hashes from its end; node i is the hash of its children 2i + 1 and 2i + 2, the smaller first.
tests/vectors/payout_trees.json was made by that library.

Amounts are base units of the token, cumulative since the first period. Which accounts have earned
what is not decided here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eth_utils.crypto import keccak

from ledger.chain.client import ChainClient, Receipt
from ledger.chain.deploy import Deployments
from ledger.domain.ids import check_address, public_key_of
from ledger.errors import ChainError, InvalidEvent, NotFound

FORMAT = "standard-v1"
MAX_ACCOUNTS = 1_000_000
_WORD = 2**256


@dataclass(frozen=True, kw_only=True)
class PayoutTree:
    """Every account's cumulative amount under one root. Addresses are lower-case."""

    amounts: Mapping[str, int]
    tree: tuple[bytes, ...]
    positions: Mapping[str, int]

    @property
    def root(self) -> bytes:
        return self.tree[0]

    @cached_property
    def total(self) -> int:
        """The sum of all amounts: what `propose` commits to."""
        return sum(self.amounts.values())

    def amount(self, account: str) -> int:
        """What `account` has earned in all; NotFound when it is not in the tree."""
        amount = self.amounts.get(account.lower())
        if amount is None:
            raise NotFound(f"{account} is not in this payout tree: it has earned nothing so far")
        return amount

    def proof(self, account: str) -> tuple[bytes, ...]:
        """Sibling hashes from the account's leaf to the root, as `claim` takes them."""
        self.amount(account)
        index = self.positions[account.lower()]
        proof = []
        while index:
            proof.append(self.tree[index + 1 if index % 2 else index - 1])
            index = (index - 1) // 2
        return tuple(proof)

    def dump(self) -> dict[str, Any]:
        """StandardMerkleTree.dump(): JSON-able, amounts as decimal strings."""
        return {
            "format": FORMAT,
            "leafEncoding": ["address", "uint256"],
            "tree": ["0x" + node.hex() for node in self.tree],
            "values": [
                {"value": [account, str(amount)], "treeIndex": self.positions[account]}
                for account, amount in self.amounts.items()
            ],
        }


def payout_leaf(account: str, amount: int) -> bytes:
    """keccak256(bytes.concat(keccak256(abi.encode(account, amount))))."""
    word = bytes(12) + bytes.fromhex(check_address(account, "account")[2:])
    return keccak(keccak(word + amount.to_bytes(32, "big")))


def build_payout_tree(amounts: Mapping[str, int]) -> PayoutTree:
    """The tree over `amounts` (address -> cumulative base units), accounts in address order.

    Raises InvalidEvent for no accounts, an account given twice in other letter case, an amount
    below 0 or beyond 256 bits.
    """
    by_account = {check_address(a, "account").lower(): amounts[a] for a in sorted(amounts)}
    if not 0 < len(amounts) <= MAX_ACCOUNTS:
        raise InvalidEvent(f"a payout tree has 1 to MAX_ACCOUNTS = {MAX_ACCOUNTS} accounts")
    if len(by_account) != len(amounts):
        raise InvalidEvent("an account stands twice in the payout tree, in other letter case")
    for account, amount in by_account.items():
        if not 0 <= amount < _WORD:
            raise InvalidEvent(f"{account}: an amount is 0 to 2^256 - 1 base units, not {amount}")
    ordered = dict(sorted(by_account.items()))
    leaves = sorted((payout_leaf(account, amount), account) for account, amount in ordered.items())
    last = 2 * len(leaves) - 2
    tree = [b""] * (last + 1)
    positions = {}
    for k, (leaf, account) in enumerate(leaves):
        tree[last - k] = leaf
        positions[account] = last - k
    for i in reversed(range(len(leaves) - 1)):
        tree[i] = _pair(tree[2 * i + 1], tree[2 * i + 2])
    return PayoutTree(amounts=ordered, tree=tuple(tree), positions=positions)


def load_payout_tree(dump: Mapping[str, Any]) -> PayoutTree:
    """The tree of a dump, rebuilt from its values; InvalidEvent when its hashes differ."""
    try:
        rebuilt = build_payout_tree({v["value"][0]: int(v["value"][1]) for v in dump["values"]})
        same = dump["tree"] == ["0x" + node.hex() for node in rebuilt.tree]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidEvent(f"this is no dump of a StandardMerkleTree: {error}") from error
    if not same:
        raise InvalidEvent("the dump's hashes are not those of its values: it was changed")
    return rebuilt


def verify_payout(root: bytes, account: str, amount: int, proof: Iterable[bytes]) -> bool:
    """What the contract checks, for a reader without one."""
    node = payout_leaf(account, amount)
    for sibling in proof:
        node = _pair(node, sibling)
    return node == root


def _pair(a: bytes, b: bytes) -> bytes:
    return keccak(a + b if a < b else b + a)


@dataclass(frozen=True, kw_only=True)
class PayoutState:
    """A root as the distributor holds it. `period` 0: none. `activatable_at` in seconds."""

    root: bytes
    total: int
    period: int
    log_size: int
    activatable_at: int


class Payouts:
    """Escrow, distributor and token of one deployment. Each call waits for its confirmations."""

    def __init__(self, client: ChainClient, deployments: Deployments) -> None:
        self._client = client
        self._distributor = client.contract("PayoutDistributor", deployments.distributor)
        self._escrow = client.contract("Escrow", deployments.escrow)
        self._token = client.contract("WOPEN", deployments.wopen)

    # Consumers

    def deposit(self, actor: str, amount: int) -> Receipt:
        """Prepay `amount` for a ledger account (`ed25519:<hex>`) from the client's address: wrap
        what the tokens do not cover, approve, deposit. Safe to repeat after a failure before the
        last of the three; each success is one more deposit."""
        short = amount - self.token_balance(self._client.address)
        if short > 0:
            self._send(self._token.functions.deposit(), value=short)
        spender = self._escrow.address
        allowed = self._client.call(self._token.functions.allowance(self._client.address, spender))
        if allowed < amount:
            self._send(self._token.functions.approve(spender, amount))
        return self._send(self._escrow.functions.deposit(public_key_of(actor), amount))

    # The operator

    def escrowed(self) -> int:
        """Deposited and not released yet."""
        return int(self._client.call(self._escrow.functions.available()))

    def released(self, period: int) -> int:
        return int(self._client.call(self._escrow.functions.released(period)))

    def release(self, period: int, amount: int) -> Receipt | None:
        """Move a period's fees to the distributor; None when that was done before."""
        done = self.released(period)
        if done == amount:
            return None
        if done:
            raise ChainError(
                f"period {period} was released with {done} base units, not {amount}: a period is "
                "released once; carry the difference into the next one"
            )
        return self._send(self._escrow.functions.release(period, amount))

    def propose(self, period: int, root: bytes, total: int, log_size: int) -> Receipt | None:
        """Propose a period's root; None when exactly that waits or is in force already."""
        for state in (self.pending(), self.active()):
            if state.period == period and (state.root, state.total, state.log_size) == (
                root,
                total,
                log_size,
            ):
                return None
        return self._send(self._distributor.functions.propose(period, root, total, log_size))

    def activate(self, period: int) -> Receipt | None:
        """Put a proposed root in force; None when it is. The window must be over."""
        if self.active().period == period:
            return None
        return self._send(self._distributor.functions.activate(period))

    def veto(self, period: int) -> Receipt:
        """As the guardian: drop the root that waits."""
        return self._send(self._distributor.functions.veto(period))

    def seconds_left(self) -> int:
        """Seconds until the waiting root may be activated; 0 when it may, or none waits."""
        return max(0, self.pending().activatable_at - self._client.now())

    def pending(self) -> PayoutState:
        return _state(self._client.call(self._distributor.functions.pending()))

    def active(self) -> PayoutState:
        return _state(self._client.call(self._distributor.functions.active()))

    # Contributors

    def claim(self, account: str, amount: int, proof: Sequence[bytes]) -> Receipt | None:
        """Pay `account` what the active tree owes it, whoever sends; None when nothing is owed."""
        if self.claimed(account) >= amount:
            return None
        account = self._checksummed(account)
        return self._send(self._distributor.functions.claim(account, amount, list(proof)))

    def claimed(self, account: str) -> int:
        """What `account` was paid in all, as the chain has it."""
        account = self._checksummed(account)
        return int(self._client.call(self._distributor.functions.claimed(account)))

    def total_claimed(self) -> int:
        return int(self._client.call(self._distributor.functions.totalClaimed()))

    def covered(self) -> int:
        """What was claimed so far and what the distributor holds, both as of one block: a claim
        between two reads would be counted in neither."""
        block = self._client.head()
        balance = self._token.functions.balanceOf(self._distributor.address)
        claimed = self._distributor.functions.totalClaimed()
        return int(self._client.call(balance, block)) + int(self._client.call(claimed, block))

    def token_balance(self, account: str) -> int:
        account = self._checksummed(account)
        return int(self._client.call(self._token.functions.balanceOf(account)))

    def _send(self, function: Any, *, value: int = 0) -> Receipt:
        receipt = self._client.send(function, value=value)
        self._client.settle()
        return receipt

    def _checksummed(self, address: str) -> str:
        from eth_utils.address import to_checksum_address

        return str(to_checksum_address(check_address(address, "address")))


def _state(found: Sequence[Any]) -> PayoutState:
    root, total, period, log_size, activatable_at = found
    return PayoutState(
        root=bytes(root),
        total=int(total),
        period=int(period),
        log_size=int(log_size),
        activatable_at=int(activatable_at),
    )
