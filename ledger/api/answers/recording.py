"""An answer's event in the ledger: `inference.recorded` with `fee.charged`, or, where it broke off
by our fault, `inference.interrupted`. Blocking; for threads of the pool.

The event's id is the answer's, and the store holds each id once. So every function here may be
called again after a failure of unknown outcome, also by another process: it finds what is there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import fee_event_id
from ledger.api.answers.answer import Answer
from ledger.domain.envelope import Entry, decode_entry, leaf_hash
from ledger.domain.fees import FeePolicy
from ledger.errors import Conflict, PaymentRequired, Unavailable

if TYPE_CHECKING:
    from ledger.api.services import Services

MAX_RECORDINGS = 3
UNPAID = "unpaid"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Where the answer's event stands, and the log's signed receipt for it."""

    index: int
    receipt: dict[str, Any]


def record(box: "Services", answer: Answer) -> Recorded:
    """The whole answer and its fee, in one append. Raises PaymentRequired where the account cannot
    pay any more, Unavailable or Backpressure where the ledger could not be asked."""
    transcript = box.blobs.put(answer.transcript())
    inference = {
        **answer.body(transcript),
        "finish_reason": answer.finish_reason,
        "fee_wei": str(answer.fee_wei),
    }

    def events() -> list[bytes]:
        charge = _charge(answer, policy_of(box))
        fee_event = fee_event_id(box.settings.log_origin, answer.inference)
        return [
            box.sign("inference.recorded", inference, UUID(answer.inference)),
            box.sign("fee.charged", charge, fee_event),
        ]

    return _append(box, answer, transcript, events)


def interrupt(box: "Services", answer: Answer, reason: str) -> Recorded:
    """What was delivered of an answer that broke off. Costs nothing."""
    transcript = box.blobs.put(answer.transcript())
    body = {**answer.body(transcript), "reason": reason}
    return _append(
        box,
        answer,
        transcript,
        lambda: [box.sign("inference.interrupted", body, UUID(answer.inference))],
    )


def settle(box: "Services", answer: Answer, reason: str | None) -> None:
    """Whatever became of an answer, the ledger has it afterwards: once, and never in two ways."""
    if entry_of(box, answer.inference) is not None:
        return
    try:
        _settle(box, answer, reason)
    except Conflict:
        if entry_of(box, answer.inference) is None:
            raise
        # Another process was quicker, with another transcript: what it recorded stands.


def _settle(box: "Services", answer: Answer, reason: str | None) -> None:
    if reason is None:
        try:
            record(box, answer)
            return
        except PaymentRequired:
            reason = UNPAID
    interrupt(box, answer, reason)


def entry_of(box: "Services", inference: str) -> tuple[Entry, bytes] | None:
    """The event of an answer as it is stored, decoded and as it is."""
    id = UUID(inference)
    raw = box.entries.entries_of([id]).get(id)
    return (decode_entry(raw, verify=False), raw) if raw is not None else None


def recorded_as(box: "Services", entry: Entry, raw: bytes, *, fresh: bool = False) -> Recorded:
    receipt = box.receipts.issue(
        first_index=entry.index,
        leaf_hashes=[leaf_hash(raw)],
        recorded_at=entry.recorded_at,
        fresh=fresh,
    )
    return Recorded(index=entry.index, receipt=receipt)


def policy_of(box: "Services") -> FeePolicy:
    governance = box.ledger.load(Governance)
    if governance is None or governance.policy is None:
        raise Unavailable("no fee policy is in force; governance sets one with fee_policy.set")
    return governance.policy


def _append(
    box: "Services", answer: Answer, transcript: str, events: Callable[[], list[bytes]]
) -> Recorded:
    for last in range(MAX_RECORDINGS)[::-1]:
        try:
            first = box.ledger.append_all(events())[0]
        except Conflict:
            # Recorded before (a call that failed after its commit), or governance set a new fee
            # policy just now: split by that one.
            found = entry_of(box, answer.inference)
            if found is not None and found[0].envelope.body.get("transcript_sha256") == transcript:
                return recorded_as(box, *found)
            if found is not None or not last:
                raise
        else:
            receipt = box.receipts.issue(
                first_index=first.index,
                leaf_hashes=[first.leaf_hash],
                recorded_at=first.recorded_at,
                fresh=not first.replayed,
            )
            return Recorded(index=first.index, receipt=receipt)
    raise AssertionError("the last recording returns or raises")


def _charge(answer: Answer, policy: FeePolicy) -> dict[str, Any]:
    return {
        "account": answer.consumer,
        "inference": answer.inference,
        "adapter": answer.terms.adapter,
        "policy_version": policy.version,
        "amount_wei": str(answer.fee_wei),
        "owner": answer.terms.owner,
        **{f"{part}_wei": str(wei) for part, wei in policy.split(answer.fee_wei).items()},
    }
