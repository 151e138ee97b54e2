"""What the routes work with. `bootstrap` fills it; tests fill it with fakes of the same ports."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from fastapi import Request
from nacl.signing import SigningKey

from ledger.aggregates.application import Ledger
from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import Account
from ledger.api.inclusion import Inclusion
from ledger.config import Settings
from ledger.domain.envelope import sign_event
from ledger.errors import ComputeError, NotFound, PaymentRequired
from ledger.log.cosign import Cosigners
from ledger.log.prover import Prover
from ledger.log.receipts import ReceiptIssuer
from ledger.log.serving import LogFiles
from ledger.log.trained import TrainedOn
from ledger.ports import (
    BlobStore,
    Credentials,
    EntryLog,
    ServingEngine,
    StoredCheckpoint,
    TileStore,
)
from projections.queries import Queries

if TYPE_CHECKING:
    from ledger.api.answers.desk import Desk
    from ledger.api.auth import RateLimit


@dataclass(kw_only=True)
class Reservations:
    """Money promised to answers under way, so that parallel requests cannot overdraw an account.

    In memory: it dies with the process, and so do the answers that it covered. Two API processes
    on one ledger would not see each other's; the account aggregate still refuses the overdraft.
    """

    _held: dict[str, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def hold(self, account: str, amount_wei: int, prepaid_wei: Callable[[], int]) -> None:
        """Raises PaymentRequired unless the balance covers this and all that is held already.

        The amount is held before the balance is read. The other way round, an answer charged and
        released between the two would be missing from both.
        """
        with self._lock:
            before = self._held.get(account, 0)
            self._held[account] = before + amount_wei
        try:
            prepaid = prepaid_wei()
            if before + amount_wei > prepaid:
                raise PaymentRequired(
                    f"this answer may cost up to {amount_wei} wei; the prepaid balance is "
                    f"{prepaid} wei, of which {before} wei are held for answers under way; "
                    "deposit OPEN or lower max_tokens"
                )
        except BaseException:
            self.release(account, amount_wei)
            raise

    def release(self, account: str, amount_wei: int) -> None:
        with self._lock:
            left = self._held.get(account, 0) - amount_wei
            if left > 0:
                self._held[account] = left
            else:
                self._held.pop(account, None)

    def held_wei(self, account: str) -> int:
        with self._lock:
            return self._held.get(account, 0)


@dataclass(kw_only=True)
class Services:
    settings: Settings
    ledger: Ledger
    entries: EntryLog
    tiles: TileStore
    blobs: BlobStore
    credentials: Credentials
    queries: Queries
    log_files: LogFiles
    prover: Prover
    receipts: ReceiptIssuer
    inclusion: Inclusion
    bundle: Callable[..., bytes]
    """(leaf index, account=None, earnings=True) -> a lineage bundle."""
    payout_claim: Callable[[dict[str, Any], str], dict[str, Any]]
    vkey: str
    operator_key: SigningKey
    clock: Callable[[], int]
    rate_limit: "RateLimit"
    info: dict[str, Any]
    health: Callable[[], list[tuple[str, bool, str]]]
    projected: Callable[[], int]
    trained: TrainedOn
    answers: "Desk"
    serving: ServingEngine | None = None
    cosigners: Cosigners | None = None
    reservations: Reservations = field(default_factory=Reservations)

    def has_role(self, actor: str, role: str) -> bool:
        governance = self.ledger.load(Governance)
        return governance is not None and governance.has_role(actor, role)

    def prepaid_wei(self, actor: str) -> int:
        account = self.ledger.load(Account, actor)
        return account.prepaid_wei if account else 0

    def engine(self) -> ServingEngine:
        if self.serving is None:
            raise ComputeError("no serving engine is attached; start one with `tributary up`")
        return self.serving

    def checkpoint_covering(self, index: int) -> StoredCheckpoint:
        """The newest checkpoint, which must cover `index` (it is at most a second behind)."""
        newest = self.tiles.latest()
        if newest is None or newest.size <= index:
            raise NotFound(f"entry {index} is not in a checkpoint yet; retry in a second")
        return newest

    def read_json(self, sha256: str) -> Any:
        """A blob that holds JSON."""
        return json.loads(self.blobs.get(sha256))

    def sign(self, type: str, body: dict[str, Any], id: Any) -> bytes:
        """An event in the operator's name."""
        return sign_event(
            self.operator_key,
            type=type,
            log=self.settings.log_origin,
            body=body,
            id=id,
            at=self.clock(),
        )


async def services(request: Request) -> Services:
    box = request.app.state.services
    assert isinstance(box, Services)
    return box
