"""The chain process: watch, settle, anchor. One loop, every step idempotent.

watch    deposits, proposals, activations, vetoes and claims become events; their ids are
         functions of (transaction, log index), so a re-read after a crash doubles nothing.
         The cursor is written after the appends: killed between, the same logs are read again.
settle   walks the period under way one step on: cutoff -> closed (payout tree from projected
         lines) -> proposed (escrow released, root proposed) -> activated (after the window).
         Every step first asks ledger and chain how far things are.
anchor   commits the newest checkpoint every `anchor_interval_s` while there is something new.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import structlog
from nacl.signing import SigningKey

from ledger.aggregates.application import Ledger
from ledger.aggregates.inferences import chain_event_id
from ledger.aggregates.periods import Anchors, Periods
from ledger.bootstrap import Store
from ledger.chain import watcher as seen
from ledger.chain.anchorer import Anchorer, AnchorRecord, SignedCheckpoint
from ledger.chain.client import ChainClient
from ledger.chain.deploy import Deployments, deploy_all
from ledger.chain.devchain import DevChain
from ledger.chain.payouts import Payouts, build_payout_tree
from ledger.config import Settings
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import decode_entry, sign_event
from ledger.domain.ids import derived_id
from ledger.errors import ConfigError, Conflict, LedgerError, NotFound, Unavailable
from ledger.log.prover import Prover
from ledger.ports import StoredCheckpoint
from ledger.store.recorder import system_clock
from ledger.verify.l1 import verify_l1

POLL_S = 0.4
RETRY_S = 2.0
SELF_ANCHOR_SCAN = 4

log = structlog.get_logger(__name__)


class LogSource:
    """What the anchorer asks of the log (`ledger.chain.anchorer.AnchorSource`)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prover = Prover(store.tiles)

    def latest(self) -> SignedCheckpoint | None:
        newest = self._store.tiles.latest()
        return _signed(newest) if newest and newest.size else None

    def checkpoint(self, size: int) -> SignedCheckpoint:
        found = self._store.tiles.checkpoint(size)
        if found is None:
            raise NotFound(f"the log has signed no checkpoint of size {size}")
        return _signed(found)

    def consistency_proof(self, size1: int, size2: int) -> Sequence[bytes]:
        return self._prover.consistency(size1, size2)

    def inclusion_proof(self, index: int, size: int) -> Sequence[bytes]:
        return self._prover.inclusion(index, size)

    def entry(self, index: int) -> bytes:
        entries = self._store.entries.entries(index, index + 1)
        if not entries:
            raise NotFound(f"the log has no entry {index}")
        return entries[0]


def _signed(checkpoint: StoredCheckpoint) -> SignedCheckpoint:
    return SignedCheckpoint(size=checkpoint.size, root=checkpoint.root, note=checkpoint.note)


class ChainService:
    """`observe` is called before each step with its name (tests kill the process there)."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        ledger: Ledger,
        key: SigningKey,
        client: ChainClient,
        deployments: Deployments,
        observe: Callable[[str], None] = lambda step: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._ledger = ledger
        self._key = key
        self._client = client
        self._deployments = deployments
        self._observe = observe
        self._payouts = Payouts(client, deployments)
        self._watcher = seen.Watcher(client, deployments)
        self._anchorer = Anchorer(
            client,
            contract=deployments.anchor,
            first_block=deployments.block,
            source=LogSource(store),
            verify=verify_l1,
            observe=observe,
        )
        # One cursor per deployment: after a chain was replaced, reading starts over.
        name = f"cursor-{deployments.chain_id}-{deployments.escrow.lower()}"
        self._cursor_path = settings.root / "chain" / name
        self._anchor_due = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; engines that are down are waited out."""
        while not stop.is_set():
            pause = POLL_S
            for step in (self.watch, self.settle, self.anchor_when_due):
                try:
                    step()
                except (Unavailable, NotFound) as error:
                    log.warning("chain_waits", step=step.__name__, why=error.message)
                    pause = RETRY_S
                except LedgerError as error:
                    log.error("chain_refused", step=step.__name__, why=error.message)
                    pause = RETRY_S
            stop.wait(pause)

    # --- watch --------------------------------------------------------------------------------

    def watch(self) -> int:
        """Append what the chain shows since the cursor; the number of chain events read."""
        cursor = self._read_cursor()
        batch = self._watcher.poll(cursor)
        if batch.cursor != cursor:
            # What is recorded for ever must not be undone by a crash of a development node.
            self._client.settle()
        for event in batch.events:
            self._observe("chain_event")
            self._take(event)
        if batch.cursor != cursor:
            self._observe("cursor")
            _write(self._cursor_path, str(batch.cursor))
        return len(batch.events)

    def _take(self, event: seen.ChainEvent) -> None:
        made = _event_of(event, self._client.chain_id)
        if made is None:
            return
        name, body = made
        event_id = chain_event_id(
            _ID_WORD[name],
            self._client.chain_id,
            _hex(event.tx_hash),
            event.log_index,
        )
        try:
            self._append(name, body, event_id)
        except Conflict as error:
            if error.detail.get("replayed") != str(event_id):
                # Not ours to undo: the chain did it. The log of this process keeps it.
                log.error("chain_event_refused", event=name, why=error.message, **_where(event))

    def _read_cursor(self) -> seen.Cursor:
        try:
            return seen.Cursor.parse(self._cursor_path.read_text().strip())
        except FileNotFoundError:
            return self._watcher.start()

    # --- settle -------------------------------------------------------------------------------

    def settle(self) -> str | None:
        """Take the period under way one step on; the step's name, or None."""
        periods = self._ledger.load(Periods)
        if periods is None:
            return None
        row = self._store.queries.period(periods.period)
        if row is None:
            return None  # the projector has not seen the cutoff yet
        step = {"cutoff": self._close, "closed": self._propose, "proposed": self._activate}.get(
            periods.status
        )
        return step(periods.period, row) if step else None

    def _close(self, period: int, row: dict[str, Any]) -> str | None:
        lines = self._store.queries.cumulative_lines(period)
        tree = build_payout_tree(dict(lines))
        sha256 = self._store.blobs.put(canonical_json(tree.dump()))
        body = {
            "period": period,
            "log_size": int(row["cutoff_index"]) + 1,
            "root": _hex(tree.root),
            "total_wei": str(tree.total),
            "accounts": len(tree.amounts),
            "tree_sha256": sha256,
        }
        self._observe("close")
        self._append_once("period.closed", body, period)
        return "closed"

    def _propose(self, period: int, row: dict[str, Any]) -> str | None:
        if row["root"] is None:
            return None  # closed, but not projected yet
        total = int(row["total_wei"])
        # What earlier releases left over (a vetoed period) counts; a crash after the release too.
        missing = total - self._payouts.covered()
        if missing > 0:
            self._observe("release")
            self._payouts.release(period, missing)
        self._observe("propose")
        self._payouts.propose(period, bytes.fromhex(row["root"][2:]), total, int(row["log_size"]))
        return "proposed"  # the watcher appends payout.proposed

    def _activate(self, period: int, row: dict[str, Any]) -> str | None:
        if self._payouts.pending().period != period or self._payouts.seconds_left():
            return None
        self._observe("activate")
        self._payouts.activate(period)
        return "activated"

    # --- anchor -------------------------------------------------------------------------------

    def anchor_when_due(self) -> AnchorRecord | None:
        if time.monotonic() < self._anchor_due:
            return None
        record = self.anchor()
        self._anchor_due = time.monotonic() + self._settings.anchor_interval_s
        return record

    def anchor(self) -> AnchorRecord | None:
        """Commit the newest checkpoint and record it, unless only our own anchors are new."""
        anchors = self._ledger.load(Anchors)
        recorded = anchors.size if anchors else 0
        if self._nothing_new(recorded):
            return None
        record = self._anchorer.run(recorded)
        if record is None:
            return None
        self._store.blobs.put(record.l1_bytes)
        self._observe("anchored")
        try:
            self._append("checkpoint.anchored", record.event_body(), record.key)
        except Conflict as error:
            if error.detail.get("replayed") != str(record.key):
                raise
        log.info("anchored", size=record.size, root=record.root.hex(), tx=_hex(record.tx_hash))
        return record

    def _nothing_new(self, recorded: int) -> bool:
        """An anchor is an event too: anchoring it alone would never end."""
        if recorded == 0 or self._anchorer.anchored().size > recorded:
            return False
        entries = self._store.entries.entries(recorded, recorded + SELF_ANCHOR_SCAN)
        types = {decode_entry(entry, verify=False).envelope.type for entry in entries}
        return types <= {"checkpoint.anchored"} and len(entries) < SELF_ANCHOR_SCAN

    # --- appending ----------------------------------------------------------------------------

    def _append_once(self, name: str, body: dict[str, Any], period: int) -> None:
        event_id = derived_id(name, self._settings.log_origin, period)
        try:
            self._append(name, body, event_id)
        except Conflict as error:
            if error.detail.get("replayed") != str(event_id):
                raise

    def _append(self, name: str, body: dict[str, Any], event_id: UUID) -> None:
        raw = sign_event(
            self._key,
            type=name,
            log=self._settings.log_origin,
            body=body,
            id=event_id,
            at=system_clock(),
        )
        self._ledger.append(raw)


_ID_WORD = {
    "deposit.recorded": "deposit",
    "payout.claimed": "claim",
    "payout.proposed": "payout.proposed",
    "payout.activated": "payout.activated",
    "payout.vetoed": "payout.vetoed",
}


def _event_of(event: seen.ChainEvent, chain_id: int) -> tuple[str, dict[str, Any]] | None:
    """The ledger event that a chain event becomes; None for those that need none."""
    where = {
        "chain_id": chain_id,
        "contract": event.contract,
        "tx_hash": _hex(event.tx_hash),
        "block_number": event.block,
    }
    match event:
        case seen.Deposited():
            amount = {"account": event.actor, "amount_wei": str(event.amount)}
            return "deposit.recorded", {**amount, **where, "log_index": event.log_index}
        case seen.Claimed():
            paid = {"amount_wei": str(event.amount), "cumulative_wei": str(event.cumulative)}
            body = {"address": event.account, **paid, **where, "log_index": event.log_index}
            return "payout.claimed", body
        case seen.Proposed():
            return "payout.proposed", {"period": event.period, "root": _hex(event.root), **where}
        case seen.Activated():
            return "payout.activated", {"period": event.period, "root": _hex(event.root), **where}
        case seen.Vetoed():
            return "payout.vetoed", {"period": event.period, **where}
    return None


def _where(event: seen.ChainEvent) -> dict[str, Any]:
    return {"tx": _hex(event.tx_hash), "block": event.block, "log_index": event.log_index}


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# --- wiring -----------------------------------------------------------------------------------


def dev_chain(settings: Settings) -> DevChain:
    """The development chain of this home, not started."""
    return DevChain(settings.root / "chain" / "dev")


def running_dev_chain(settings: Settings) -> DevChain:
    """The same, where the service runs it: for saving its state and its faucet."""
    chain = dev_chain(settings)
    chain.port = urlsplit(settings.chain_rpc_url or "").port or 0
    return chain


def chain_client(settings: Settings, key_file: Path | None) -> ChainClient:
    if settings.chain_rpc_url is None:
        raise ConfigError("no chain: set CHAIN_RPC_URL, or start everything with `tributary up`")
    save = None
    if settings.dev_chain:
        save = running_dev_chain(settings).save
    return ChainClient(
        settings.chain_rpc_url,
        key_file=key_file,
        confirmations=settings.chain_confirmations,
        save=save,
    )


def deploy(settings: Settings, key_file: Path) -> Deployments:
    """Deploy what is missing, and write the addresses where the API and the CLI read them."""
    client = chain_client(settings, key_file)
    folder = settings.root / "chain"
    found = deploy_all(
        client,
        folder,
        origin=settings.log_origin,
        challenge_window_s=settings.challenge_window_s,
    )
    addresses = asdict(found)
    addresses.pop("outdated")
    addresses["development"] = settings.dev_chain
    if settings.dev_chain:  # another node's URL may hold a provider's key, and this file is public
        addresses["rpc_url"] = settings.chain_rpc_url
    _write(folder / "addresses.json", json.dumps(addresses, indent=2))
    return found


def build(
    settings: Settings,
    store: Store,
    ledger: Ledger,
    key: SigningKey,
    key_file: Path,
    observe: Callable[[str], None] = lambda step: None,
) -> ChainService:
    return ChainService(
        settings=settings,
        store=store,
        ledger=ledger,
        key=key,
        client=chain_client(settings, key_file),
        deployments=deploy(settings, key_file),
        observe=observe,
    )
