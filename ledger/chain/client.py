"""One EVM node over JSON-RPC, and the account that we send from. Knows no contract's meaning.

Every failure leaves as ChainError with a message for people; a contract's custom error is decoded
from its ABI and stands in `error.detail["error"]` (its name) and `["args"]`.

Nonces: none is remembered. Each broadcast asks the node for the pending count while it holds a
lock (a thread lock, and a file lock beside the key, so that two processes with one key do not
choose the same number). What a crash leaves is in the node's pool or on chain, and the next start
sees it there: `wait_idle` first, then look at the contract, then decide.

Fees are EIP-1559. A transaction that is not mined in time is sent again under its own nonce with
a higher fee, so at most one of the two can be mined.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import requests
from eth_abi.exceptions import DecodingError
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils.abi import function_abi_to_4byte_selector
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from hexbytes import HexBytes
from web3 import HTTPProvider, Web3
from web3.exceptions import (
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
    Web3ValueError,
)

from ledger.chain.artefacts import CONTRACTS, artefact
from ledger.errors import ChainError, ConfigError

RPC_TIMEOUT_S = 20.0
RECEIPT_TIMEOUT_S = 90.0
BUMP_AFTER_S = 30.0
POLL_S = 0.05
POLL_MAX_S = 1.0
NONCE_RETRIES = 3
GAS_MARGIN_PERCENT = 20
FEE_BUMP_PERCENT = 25
MIN_PRIORITY_FEE_WEI = 1


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A mined transaction. `gas_used` in gas units; logs as the node gave them."""

    tx_hash: bytes
    block_number: int
    block_hash: bytes
    gas_used: int
    contract: str | None
    logs: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A transaction handed to the node: everything needed to send it again with a higher fee."""

    hashes: tuple[bytes, ...]
    fields: Mapping[str, Any]
    label: str


def create_key(path: Path) -> str:
    """Write a new secp256k1 private key, readable by its owner alone; returns its address."""
    account = cast(LocalAccount, Account.create())
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(account.key.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return str(account.address)


def load_key(path: Path) -> LocalAccount:
    """The account of a key file: 64 hex digits, 0x allowed. ConfigError if it is anything else."""
    try:
        return cast(LocalAccount, Account.from_key(path.read_text().strip()))
    except OSError as error:
        raise ConfigError(f"cannot read the EVM key file {path}: {error.strerror}") from error
    except Exception:
        # The content is a secret: neither it nor the parser's words about it go any further.
        raise ConfigError(f"{path} must hold one private key as 64 hex digits") from None


class ChainClient:
    """A node, and optionally an account to send from. Safe to share between threads."""

    def __init__(
        self,
        rpc_url: str,
        *,
        key_file: Path | None = None,
        confirmations: int = 1,
        receipt_timeout_s: float = RECEIPT_TIMEOUT_S,
        save: Callable[[], None] | None = None,
    ) -> None:
        """`confirmations` counts the block itself: 1 is mined, 12 is eleven blocks on top.

        `save` is called by `settle`: a development chain writes its state to disk there.
        """
        assert confirmations >= 1
        self.rpc_url = rpc_url
        # For messages: a provider's key often stands in the path or the query.
        parts = urlsplit(rpc_url)
        self.node = f"{parts.scheme}://{parts.hostname}:{parts.port or 'default port'}"
        self.confirmations = confirmations
        self.receipt_timeout_s = receipt_timeout_s
        self._save = save
        self._w3 = Web3(HTTPProvider(rpc_url, request_kwargs={"timeout": RPC_TIMEOUT_S}))
        self._account = load_key(key_file) if key_file else None
        self._lock_path = key_file.with_name(key_file.name + ".lock") if key_file else None
        self._lock = threading.Lock()
        self._chain_id: int | None = None

    # Reading

    @property
    def chain_id(self) -> int:
        if self._chain_id is None:
            self._chain_id = int(self.rpc("eth_chainId"), 16)
        return self._chain_id

    @property
    def address(self) -> str:
        """The account that we send from, checksummed."""
        return str(self._sender().address)

    def rpc(self, method: str, *params: Any) -> Any:
        """The raw result of one call: hex strings, as the node wrote them."""
        with self._designed(method):
            answer = self._w3.provider.make_request(cast(Any, method), list(params))
        if "error" in answer:
            raise ChainError(
                f"the node at {self.node} refused {method}: {_error_text(answer['error'])}",
                method=method,
            )
        return answer.get("result")

    def head(self) -> int:
        """Number of the newest block."""
        return int(self.rpc("eth_blockNumber"), 16)

    def confirmed_head(self) -> int:
        """Number of the newest block with `confirmations`; -1 where there is none."""
        return self.head() - (self.confirmations - 1)

    def block(self, number: int | str) -> Mapping[str, Any]:
        """The header as JSON-RPC gives it, without transactions; ChainError if there is none."""
        block = self.rpc("eth_getBlockByNumber", _tag(number), False)
        if block is None:
            raise ChainError(f"the node at {self.node} has no block {number}; is it syncing?")
        return cast(Mapping[str, Any], block)

    def block_hash(self, number: int) -> bytes:
        return bytes(HexBytes(self.block(number)["hash"]))

    def now(self) -> int:
        """The chain's clock in seconds: when a block mined now would say it was mined."""
        return max(int(self.block("latest")["timestamp"], 16), int(time.time()))

    def code(self, address: str) -> bytes:
        return bytes(HexBytes(self.rpc("eth_getCode", to_checksum_address(address), "latest")))

    def balance(self, address: str) -> int:
        """Native coin, in wei."""
        return int(self.rpc("eth_getBalance", to_checksum_address(address), "latest"), 16)

    def contract(self, name: str, address: str) -> Any:
        """One of our contracts at `address`, as a web3 contract."""
        abi = cast(Any, list(artefact(name).abi))
        return self._w3.eth.contract(address=cast(Any, to_checksum_address(address)), abi=abi)

    def call(self, function: Any, block: int | str = "latest") -> Any:
        """Read from a bound contract function, such as `contract.functions.size()`."""
        with self._designed(_label(function)):
            return function.call(block_identifier=block)

    def logs(
        self, addresses: Sequence[str], topics: Sequence[Any], first: int, last: int
    ) -> list[Mapping[str, Any]]:
        """Logs of blocks first..last, both included, in chain order."""
        query = {
            "address": [to_checksum_address(a) for a in addresses],
            "topics": list(topics),
            "fromBlock": hex(first),
            "toBlock": hex(last),
        }
        found = self.rpc("eth_getLogs", query)
        return sorted(found, key=lambda g: (int(g["blockNumber"], 16), int(g["logIndex"], 16)))

    # Sending

    def send(self, function: Any, *, value: int = 0) -> Receipt:
        """Broadcast a bound contract function and wait until it is confirmed."""
        return self.wait(self.broadcast(function, value=value))

    def broadcast(self, function: Any, *, value: int = 0, nonce: int | None = None) -> Sent:
        """Hand a call to the node. The gas estimate runs first, so a call that would revert fails
        here, costs nothing, and names the contract's error."""
        label = _label(function)
        with self._designed(label):
            fields = function.build_transaction(
                {"from": self.address, "value": value, "gas": 0, "gasPrice": 0, "nonce": 0}
            )
        return self._broadcast(label, {"to": fields["to"], "data": fields["data"]}, value, nonce)

    def broadcast_creation(self, name: str, *arguments: Any, nonce: int | None = None) -> Sent:
        """Hand the creation of one of our contracts to the node."""
        compiled = artefact(name)
        abi = cast(Any, list(compiled.abi))
        factory = self._w3.eth.contract(abi=abi, bytecode=compiled.bytecode)
        data = factory.constructor(*arguments).data_in_transaction
        return self._broadcast(f"new {name}", {"data": data}, 0, nonce)

    def wait(self, sent: Sent) -> Receipt:
        """Wait until the transaction has `confirmations`; ChainError if it reverted or is late."""
        receipt = self._wait_mined(sent)
        self.wait_confirmed(receipt.block_number)
        again = self._receipt(receipt.tx_hash, sent.label)
        if again is None or again.block_hash != receipt.block_hash:
            # Reorganised away while we waited; the transaction is back in the pool or mined again.
            return self.wait(sent)
        return again

    def wait_confirmed(self, number: int) -> None:
        """Wait until block `number` has `confirmations`."""
        deadline = time.monotonic() + self.receipt_timeout_s
        for pause in _pauses():
            if self.confirmed_head() >= number:
                return
            if time.monotonic() > deadline:
                raise ChainError(
                    f"block {number} has not got {self.confirmations} confirmations in "
                    f"{self.receipt_timeout_s:.0f} s: does {self.node} still make blocks?"
                )
            time.sleep(pause)

    def wait_idle(self) -> None:
        """Wait until none of our transactions is in flight: a former process may have left one."""
        deadline = time.monotonic() + self.receipt_timeout_s
        for pause in _pauses():
            mined, pending = self.nonce("latest"), self.nonce("pending")
            if pending <= mined:
                return
            if time.monotonic() > deadline:
                raise ChainError(
                    f"{pending - mined} transactions of {self.address} are still not mined after "
                    f"{self.receipt_timeout_s:.0f} s: the first has nonce {mined}; wait, or "
                    f"replace it with a transaction of the same nonce and a higher fee"
                )
            time.sleep(pause)

    def nonce(self, block: str = "pending") -> int:
        return int(self.rpc("eth_getTransactionCount", self.address, block), 16)

    def settle(self) -> None:
        """Make what is confirmed survive a crash of the node, where the node needs help for it."""
        if self._save is not None:
            self._save()

    def _sender(self) -> LocalAccount:
        if self._account is None:
            raise ConfigError("this needs an EVM key: set CHAIN_KEY_FILE to a private key file")
        return self._account

    def _broadcast(
        self, label: str, fields: Mapping[str, Any], value: int, nonce: int | None
    ) -> Sent:
        complete = {
            **fields,
            "type": 2,
            "chainId": self.chain_id,
            "value": value,
            "gas": self._gas(label, fields, value),
            **self._fees(),
        }
        for attempt in range(NONCE_RETRIES):
            with self._exclusive():
                numbered = {**complete, "nonce": self.nonce() if nonce is None else nonce}
                try:
                    return Sent(hashes=(self._submit(numbered),), fields=numbered, label=label)
                except ChainError as error:
                    # Another user of this key was faster; with a fresh number it is a new try.
                    last = attempt == NONCE_RETRIES - 1
                    if last or nonce is not None or "nonce" not in error.message.lower():
                        raise
        raise AssertionError("unreachable")

    def _submit(self, fields: Mapping[str, Any]) -> bytes:
        signed = self._sender().sign_transaction(dict(fields))
        tx_hash = bytes(signed.hash)
        try:
            self.rpc("eth_sendRawTransaction", "0x" + bytes(signed.raw_transaction).hex())
        except ChainError as error:
            # The node has these very bytes: an answer was lost and the call repeated.
            if "already known" not in error.message and "already imported" not in error.message:
                raise
        return tx_hash

    def _gas(self, label: str, fields: Mapping[str, Any], value: int) -> int:
        request = {**fields, "from": self.address, "value": hex(value)}
        with self._designed(label):
            # Against the pending block: its clock is now, not that of the last block mined.
            answer = self._w3.provider.make_request(
                cast(Any, "eth_estimateGas"), [request, "pending"]
            )
        if "error" in answer:
            raise self._refusal(label, cast(Mapping[str, Any], answer["error"]))
        return int(str(answer["result"]), 16) * (100 + GAS_MARGIN_PERCENT) // 100

    def _fees(self) -> dict[str, int]:
        base_fee = int(self.block("latest").get("baseFeePerGas", "0x0"), 16)
        try:
            priority = int(self.rpc("eth_maxPriorityFeePerGas"), 16)
        except ChainError:
            priority = MIN_PRIORITY_FEE_WEI  # the method is optional for a node
        # Twice the base fee: six full blocks in a row can come before it is too little.
        return {"maxFeePerGas": 2 * base_fee + priority, "maxPriorityFeePerGas": priority}

    def _wait_mined(self, sent: Sent) -> Receipt:
        deadline = time.monotonic() + self.receipt_timeout_s
        bump_at = time.monotonic() + BUMP_AFTER_S
        for pause in _pauses():
            for tx_hash in sent.hashes:
                receipt = self._receipt(tx_hash, sent.label)
                if receipt is not None:
                    return receipt
            if time.monotonic() > deadline:
                break
            if time.monotonic() > bump_at:
                sent = self._bump(sent)
                bump_at = time.monotonic() + BUMP_AFTER_S
            time.sleep(pause)
        raise ChainError(
            f"{sent.label} was not mined in {self.receipt_timeout_s:.0f} s; it may still be. "
            f"Transactions: {', '.join('0x' + h.hex() for h in sent.hashes)}",
            tx_hash=sent.hashes[-1].hex(),
        )

    def _bump(self, sent: Sent) -> Sent:
        raised = {
            name: sent.fields[name] * (100 + FEE_BUMP_PERCENT) // 100 + 1
            for name in ("maxFeePerGas", "maxPriorityFeePerGas")
        }
        fields = {**sent.fields, **raised}
        try:
            return Sent(
                hashes=(*sent.hashes, self._submit(fields)), fields=fields, label=sent.label
            )
        except ChainError:
            return sent  # mined meanwhile (nonce too low), or the node wants a still higher fee

    def _receipt(self, tx_hash: bytes, label: str) -> Receipt | None:
        found = self.rpc("eth_getTransactionReceipt", "0x" + tx_hash.hex())
        if found is None or found.get("blockNumber") is None:
            return None
        if int(found["status"], 16) != 1:
            raise ChainError(
                f"{label} was mined in block {int(found['blockNumber'], 16)} and reverted: the "
                f"chain changed after the estimate. Read the contract and try again "
                f"(transaction 0x{tx_hash.hex()})",
                tx_hash=tx_hash.hex(),
            )
        return Receipt(
            tx_hash=tx_hash,
            block_number=int(found["blockNumber"], 16),
            block_hash=bytes(HexBytes(found["blockHash"])),
            gas_used=int(found["gasUsed"], 16),
            contract=found.get("contractAddress"),
            logs=tuple(found["logs"]),
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        assert self._lock_path is not None
        with self._lock, self._lock_path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file releases it

    @contextmanager
    def _designed(self, what: str) -> Iterator[None]:
        """Whatever web3 and the transport raise, as ChainError."""
        try:
            yield
        except ContractLogicError as error:
            raise self._refusal(what, {"message": str(error), "data": error.data}) from error
        except (requests.RequestException, TimeoutError, ConnectionError) as error:
            raise ChainError(
                f"no answer from the EVM node at {self.node} ({type(error).__name__}): is it "
                f"running, and is CHAIN_RPC_URL right?",
                method=what,
            ) from error
        except (Web3RPCError, TransactionNotFound, Web3ValueError, Web3Exception) as error:
            raise ChainError(f"{what} failed at {self.node}: {error}", method=what) from error

    def _refusal(self, label: str, error: Mapping[str, Any]) -> ChainError:
        decoded = decode_revert(error.get("data"))
        if decoded is None:
            return ChainError(f"{label} would fail: {_error_text(error)}", error=None)
        name, arguments = decoded
        shown = ", ".join(f"{key}={_show(value)}" for key, value in arguments.items())
        return ChainError(
            f"the contract refused {label}: {name}({shown})", error=name, args=arguments
        )


def decode_revert(data: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a custom error of ours (or of OpenZeppelin's within ours)."""
    from eth_abi.abi import decode

    if isinstance(data, Mapping):
        data = data.get("data")
    if not isinstance(data, str | bytes) or len(raw := bytes(HexBytes(data))) < 4:
        return None
    item = _errors().get(raw[:4])
    if item is None:
        return None
    try:
        values = decode([i["type"] for i in item["inputs"]], raw[4:])
    except DecodingError:
        return None
    names = [i["name"] for i in item["inputs"]]
    return item["name"], dict(zip(names, values, strict=True))


def _errors() -> dict[bytes, dict[str, Any]]:
    return {
        function_abi_to_4byte_selector(cast(Any, item)): item
        for name in CONTRACTS
        for item in artefact(name).abi
        if item["type"] == "error"
    }


def event_topic(contract: str, event: str) -> bytes:
    """topic0 of an event of ours: keccak256 of its signature."""
    for item in artefact(contract).abi:
        if item["type"] == "event" and item["name"] == event:
            types = ",".join(i["type"] for i in item["inputs"])
            return keccak(text=f"{event}({types})")
    raise AssertionError(f"{contract} has no event {event}")


def _pauses() -> Iterator[float]:
    pause = POLL_S
    while True:
        yield pause
        pause = min(POLL_MAX_S, pause * 1.5)


def _tag(number: int | str) -> str:
    return hex(number) if isinstance(number, int) else number


def _label(function: Any) -> str:
    return str(getattr(function, "fn_name", function))


def _show(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, Mapping) else str(error)
