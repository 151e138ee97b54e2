"""Deployment of our contracts, once: deployments.json remembers what stands where.

Order of writes per contract: the intent (nonce, and the address that follows from it) goes to disk,
then the transaction is sent, then the result goes to disk. A crash before the send leaves an intent
whose address has no code: sent again. A crash after it leaves one whose address has code or will
have: adopted. So a contract is never deployed twice.

A later run checks chain id, genesis hash and the code at every address, and says so clearly when
the chain was reset under the file.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from rlp import encode

from ledger.chain.artefacts import CONTRACTS, artefact
from ledger.chain.client import ChainClient
from ledger.domain.ids import check_address, sha256_hex
from ledger.errors import ChainError, ConfigError, LedgerError

FILE_NAME = "deployments.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Deployments:
    """Our contracts on one chain. Addresses are checksummed; `block` is where reading starts."""

    chain_id: int
    genesis_hash: str
    block: int
    origin: str
    wopen: str
    distributor: str
    escrow: str
    anchor: str
    outdated: tuple[str, ...] = ()
    """Contracts whose sources changed since: what stands on chain is the older code."""


def deploy_all(
    client: ChainClient,
    folder: Path,
    *,
    origin: str,
    challenge_window_s: int,
    guardian: str | None = None,
    committer: str | None = None,
    token: str | None = None,
) -> Deployments:
    """Find our contracts through `folder`/deployments.json, or deploy those that are missing.

    The sending account becomes the owner, and guardian and committer unless others are named.
    `token` names an existing ERC-20 instead of a new WOPEN. Raises ChainError when the chain is
    not the one in the file, ConfigError when the file is for another log.
    """
    path = folder / FILE_NAME
    state = _load(path, client, origin)
    owner = client.address
    if token is not None and "WOPEN" not in state["contracts"]:
        state["contracts"]["WOPEN"] = _adopted(client, token)
        _write(path, state)

    def stand(name: str, arguments: Callable[[], tuple[Any, ...]]) -> str:
        return _stand(client, path, state, name, arguments)

    wopen = stand("WOPEN", tuple)
    distributor = stand(
        "PayoutDistributor", lambda: (wopen, challenge_window_s, guardian or owner, owner)
    )
    escrow = stand("Escrow", lambda: (wopen, distributor, owner))
    anchor = stand(
        "CheckpointAnchor",
        lambda: (bytes.fromhex(sha256_hex(origin.encode())), committer or owner, owner),
    )
    client.settle()
    return _deployments(state, wopen, distributor, escrow, anchor)


def load_deployments(client: ChainClient, folder: Path, *, origin: str) -> Deployments | None:
    """What stands, checked against the chain; None when not everything is deployed yet."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    state = _load(path, client, origin)
    contracts = state["contracts"]
    if any("code_hash" not in contracts.get(name, {}) for name in CONTRACTS):
        return None
    addresses = (_check_code(client, path, name, contracts[name]) for name in CONTRACTS)
    return _deployments(state, *addresses)


def _deployments(
    state: Mapping[str, Any], wopen: str, distributor: str, escrow: str, anchor: str
) -> Deployments:
    contracts = state["contracts"]
    return Deployments(
        chain_id=state["chain_id"],
        genesis_hash=state["genesis_hash"],
        block=min(contracts[name]["block"] for name in CONTRACTS),
        origin=state["origin"],
        wopen=wopen,
        distributor=distributor,
        escrow=escrow,
        anchor=anchor,
        outdated=tuple(
            name
            for name in CONTRACTS
            if contracts[name]["creation_sha256"] not in (None, _creation_sha256(name))
        ),
    )


def _load(path: Path, client: ChainClient, origin: str) -> dict[str, Any]:
    chain_id, genesis_hash = client.chain_id, "0x" + client.block_hash(0).hex()
    if not path.exists():
        return {
            "format": FORMAT,
            "chain_id": chain_id,
            "genesis_hash": genesis_hash,
            "origin": origin,
            "contracts": {},
        }
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        if state["format"] != FORMAT or not isinstance(state["contracts"], dict):
            raise ValueError("another format")
        was = {name: state[name] for name in ("chain_id", "genesis_hash", "origin")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a deployments file ({error}); move it away") from error
    if was["origin"] != origin:
        raise ConfigError(
            f"{path} belongs to the log {was['origin']!r}, this is {origin!r}: one anchor contract "
            "serves one log; use another state folder"
        )
    if (was["chain_id"], was["genesis_hash"]) != (chain_id, genesis_hash):
        raise _was_reset(
            path,
            f"chain {was['chain_id']} with genesis {was['genesis_hash']} was deployed to, "
            f"{client.node} is chain {chain_id} with genesis {genesis_hash}",
        )
    return state


def _stand(
    client: ChainClient,
    path: Path,
    state: dict[str, Any],
    name: str,
    arguments: Callable[[], tuple[Any, ...]],
) -> str:
    """The address of contract `name`, deployed now unless it stands."""
    entry = state["contracts"].get(name)
    if entry is not None and "code_hash" in entry:
        return _check_code(client, path, name, entry)
    client.wait_idle()  # a transaction of a killed run may be on its way
    if entry is None or not client.code(entry["address"]):
        nonce = client.nonce()
        entry = {"address": _created_address(client.address, nonce), "nonce": nonce}
        state["contracts"][name] = entry
        _write(path, state)
        # A crash here: no code at that address; the next run sends it.
        sent = client.broadcast_creation(name, *arguments(), nonce=nonce)
        # A crash here: the next run finds the code and adopts it.
        entry["block"] = client.wait(sent).block_number
    code = client.code(entry["address"])
    if not code:
        raise ChainError(f"{name} was mined and left no code at {entry['address']}; deploy again")
    entry = {
        "address": entry["address"],
        # Adopted after a crash: the exact block is unknown, and reading from 0 misses nothing.
        "block": entry.get("block", 0),
        "code_hash": "0x" + keccak(code).hex(),
        "creation_sha256": _creation_sha256(name),
    }
    state["contracts"][name] = entry
    _write(path, state)
    return str(entry["address"])


def _adopted(client: ChainClient, token: str) -> dict[str, Any]:
    address = to_checksum_address(check_address(token, "token"))
    code = client.code(address)
    if not code:
        raise ConfigError(f"there is no contract at the token address {address}")
    return {
        "address": address,
        "block": client.head(),
        "code_hash": "0x" + keccak(code).hex(),
        "creation_sha256": None,
    }


def _check_code(client: ChainClient, path: Path, name: str, entry: Mapping[str, Any]) -> str:
    code = client.code(entry["address"])
    if "0x" + keccak(code).hex() != entry["code_hash"]:
        found = "other code" if code else "no code"
        raise _was_reset(path, f"{name} should stand at {entry['address']}, and {found} is there")
    return str(entry["address"])


def _was_reset(path: Path, what: str) -> LedgerError:
    return ChainError(
        f"the chain was reset under {path}: {what}. Point CHAIN_RPC_URL at the old chain, or move "
        "that file away to deploy anew; anchors and payouts of the old chain do not move along",
        reset=True,
    )


def _created_address(sender: str, nonce: int) -> str:
    """Yellow paper 7: the low 20 bytes of keccak256(RLP(sender, nonce))."""
    number = nonce.to_bytes((nonce.bit_length() + 7) // 8, "big")
    return str(to_checksum_address(keccak(encode([bytes.fromhex(sender[2:]), number]))[12:]))


def _creation_sha256(name: str) -> str:
    return sha256_hex(artefact(name).bytecode)


def _write(path: Path, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(state, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
