"""Whether a log kept the promise of a receipt. Pure.

`judge` holds a receipt against what the log shows later:

* kept: each promised leaf is proven at its index under a checkpoint of the log.
* broken: (a) another leaf is proven at a promised index. Both statements carry the log's signature,
  so nothing else has to be trusted. Or (b) witnesses cosigned, after included_by, a checkpoint that
  is too small, and without them no quorum of the policy is left: had the log published in time
  through that quorum, one of them would have seen the larger tree. That rests on their clocks, and
  on the log publishing through them. Fewer late witnesses than that show nothing: anyone may hand
  an old checkpoint to a witness that has not met the newer one yet.
* pending: neither. A log's checkpoint carries no time, so `overdue` is this machine's clock and
  convinces nobody else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ledger.errors import Inconsistent, MalformedProof, NotIncluded
from ledger.verify.checkpoint import Checkpoint, OpenedCheckpoint, open_checkpoint
from ledger.verify.encoding import printable
from ledger.verify.merkle import HASH_BYTES, verify_inclusion
from ledger.verify.note import Verified, VerifierKey, format_vkey
from ledger.verify.policy import Policy, parse_policy
from ledger.verify.receipt import Promise, Receipt, format_receipt, verify_receipt
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof, verify_tlog_proof

FORMAT = "tributary/receipt-verdict/v1"

NOBODY = Policy(logs=(), witnesses=(), groups=(), quorum=None)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One leaf as a log shows it: `proof` runs from the leaf's sibling to the root's child."""

    index: int
    leaf: bytes
    proof: tuple[bytes, ...]


def check_inclusion(receipt: Receipt, shown: Shown, checkpoint: Checkpoint) -> bool:
    """Whether the leaf proven at `shown.index` is the promised one; False breaks the receipt.

    The position of a leaf follows from index and size alone, and the size is the checkpoint's: at
    one index of one tree only one leaf can be proven. Raises NotIncluded when nothing is proven.
    """
    promise = receipt.promise
    if not promise.first_index <= shown.index < promise.size:
        raise NotIncluded(f"the receipt promises nothing about index {shown.index}")
    verify_inclusion(
        index=shown.index,
        size=checkpoint.size,
        leaf=shown.leaf,
        proof=shown.proof,
        root=checkpoint.root,
    )
    return shown.leaf == promise.leaf_hashes[shown.index - promise.first_index]


def blocking_witnesses(
    receipt: Receipt, opened: OpenedCheckpoint, policy: Policy
) -> list[Verified]:
    """Witnesses whose cosignatures show that the promise was not kept in time; none if they do not.

    They saw no tree that covers the receipt until after included_by, and without them the rest of
    the policy's witnesses make no quorum.
    """
    promise = receipt.promise
    if opened.checkpoint.size >= promise.size or policy.quorum is None:
        return []
    late = [
        seen
        for seen in opened.witnesses
        if seen.key in policy.keys and (seen.timestamp or 0) * 1_000_000 > promise.included_by
    ]
    rest = [key for key in policy.keys if key not in {seen.key for seen in late}]
    return [] if policy.satisfied_by(rest) else late


@dataclass(frozen=True, kw_only=True)
class ReceiptVerdict:
    """What became of a promise. `evidence` are the items of an evidence file when it is broken."""

    state: Literal["kept", "pending", "broken"]
    says: str
    proven: tuple[str, ...]
    trusted: tuple[str, ...]
    facts: Mapping[str, Any]
    evidence: Mapping[str, bytes] | None = None

    def to_text(self, trusted: Sequence[str] | None = None) -> str:
        """For people; `trusted` stands in place of the verdict's own, if given."""
        left = self.trusted if trusted is None else trusted
        lines = [f"{self.state.upper()}: {self.says}", "", "Proven"]
        lines += [f"  + {line}" for line in self.proven]
        lines += ["", "Still to be trusted", *(f"  ? {line}" for line in left)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "state": self.state,
            "says": self.says,
            "proven": list(self.proven),
            "trusted": list(self.trusted),
            "facts": dict(self.facts),
        }


def judge(
    receipt: Receipt,
    key: VerifierKey,
    *,
    note: bytes,
    shown: Sequence[Shown],
    now: int,
    policy: bytes | None = None,
) -> ReceiptVerdict:
    """Hold a receipt, already verified under `key`, against a checkpoint and leaves under it.

    `note` is the checkpoint, `shown` the promised indexes that it covers, `now` this machine's
    clock in microseconds, `policy` a policy file that names this log's witnesses. Raises what
    `open_checkpoint`, `parse_policy` and `check_inclusion` raise, and NotIncluded when a covered
    index is not shown.
    """
    known = parse_policy(policy) if policy is not None else NOBODY
    opened = open_checkpoint(note, key, witnesses=known.keys)
    for leaf in shown:
        if not check_inclusion(receipt, leaf, opened.checkpoint):
            return _contradicted(receipt, note, opened, leaf)
    late = blocking_witnesses(receipt, opened, known)
    if late:
        return _too_late(receipt, note, opened, late, policy or b"")
    promise, size = receipt.promise, opened.checkpoint.size
    covered = range(promise.first_index, min(size, promise.size))
    missing = set(covered) - {leaf.index for leaf in shown}
    if missing:
        raise NotIncluded(f"the checkpoint covers entry {min(missing)}, and no proof of it is here")
    return _kept(receipt, opened) if size >= promise.size else _pending(receipt, opened, now)


def _facts(receipt: Receipt, opened: OpenedCheckpoint, **more: Any) -> dict[str, Any]:
    promise, head = receipt.promise, opened.checkpoint
    return {
        "log": promise.log,
        "first_index": promise.first_index,
        "count": len(promise.leaf_hashes),
        "included_by": promise.included_by,
        "size": head.size,
        "root": head.root.hex(),
        **more,
    }


def _entries(promise: Promise) -> str:
    last = promise.size - 1
    return (
        f"entry {last}"
        if last == promise.first_index
        else f"entries {promise.first_index} to {last}"
    )


def _key_trust(promise: Promise) -> str:
    return f"That the key is that of the log {printable(promise.log)}."


def _signed(promise: Promise) -> str:
    return (
        f"The log promised {_entries(promise)} in a checkpoint by {_say_time(promise.included_by)}."
    )


def _kept(receipt: Receipt, opened: OpenedCheckpoint) -> ReceiptVerdict:
    promise, size = receipt.promise, opened.checkpoint.size
    in_time = [
        seen
        for seen in opened.witnesses
        if (seen.timestamp or 0) * 1_000_000 <= promise.included_by
    ]
    proven = [_signed(promise), f"Its tree of {size} entries holds them exactly as promised."]
    trusted = [_key_trust(promise)]
    if in_time:
        first = min(in_time, key=lambda seen: seen.timestamp or 0)
        name = printable(first.key.name)
        when = _say_time((first.timestamp or 0) * 1_000_000)
        proven.append(f"The witness {name} saw that tree at {when}: in time.")
        trusted.append(f"The clock of the witness {name}.")
    else:
        trusted.append("That it was published in time: a log's checkpoint says no time.")
    trusted.append("That others are shown the same tree: compare checkpoints, ask witnesses.")
    return ReceiptVerdict(
        state="kept",
        says=f"the log holds {_entries(promise)} as it promised",
        proven=tuple(proven),
        trusted=tuple(trusted),
        facts=_facts(receipt, opened, in_time=bool(in_time)),
    )


def _pending(receipt: Receipt, opened: OpenedCheckpoint, now: int) -> ReceiptVerdict:
    promise, size = receipt.promise, opened.checkpoint.size
    overdue = now > promise.included_by
    says = f"the newest checkpoint seen has {size} entries, {promise.size} are needed; "
    says += (
        f"by this machine's clock the promise ended at {_say_time(promise.included_by)}"
        if overdue
        else f"the log has until {_say_time(promise.included_by)}"
    )
    trusted = [_key_trust(promise)]
    if overdue:
        trusted.append(
            "This machine's clock, and that this is the newest checkpoint: to convince others, a "
            "witness's cosignature after that time is needed."
        )
    return ReceiptVerdict(
        state="pending",
        says=says,
        proven=(_signed(promise),),
        trusted=tuple(trusted),
        facts=_facts(receipt, opened, overdue=overdue),
    )


def _contradicted(
    receipt: Receipt, note: bytes, opened: OpenedCheckpoint, shown: Shown
) -> ReceiptVerdict:
    promise, size = receipt.promise, opened.checkpoint.size
    promised = promise.leaf_hashes[shown.index - promise.first_index]
    says = (
        f"the log promised leaf {promised.hex()} at index {shown.index}, and its signed tree of "
        f"{size} entries holds {shown.leaf.hex()} there"
    )
    proof = TlogProof(index=shown.index, proof=shown.proof, checkpoint=note)
    return ReceiptVerdict(
        state="broken",
        says=says,
        proven=(_signed(promise), f"Its tree holds another entry at index {shown.index}."),
        trusted=(_key_trust(promise),),
        facts=_facts(receipt, opened, index=shown.index, leaf=shown.leaf.hex()),
        evidence={
            "receipt": format_receipt(receipt),
            "leaf": shown.leaf,
            "proof": format_tlog_proof(proof),
        },
    )


def _too_late(
    receipt: Receipt,
    note: bytes,
    opened: OpenedCheckpoint,
    late: Sequence[Verified],
    policy_text: bytes,
) -> ReceiptVerdict:
    promise, size = receipt.promise, opened.checkpoint.size
    names = ", ".join(sorted(printable(seen.key.name) for seen in late))
    since = min(seen.timestamp or 0 for seen in late) * 1_000_000
    return ReceiptVerdict(
        state="broken",
        says=(
            f"the log promised a tree of {promise.size} entries by "
            f"{_say_time(promise.included_by)}; at {_say_time(since)} the largest that {names} had "
            f"seen has {size}, and without them there is no quorum"
        ),
        proven=(_signed(promise), f"At {_say_time(since)}, {names} cosigned a tree of {size}."),
        trusted=(
            _key_trust(promise),
            f"The clock of {names}, and that they are this log's witnesses "
            f"({', '.join(format_vkey(seen.key) for seen in late)}).",
            "That the log publishes only what a quorum of these witnesses has cosigned.",
        ),
        facts=_facts(receipt, opened, witnesses=[format_vkey(seen.key) for seen in late]),
        evidence={
            "receipt": format_receipt(receipt),
            "checkpoint": note,
            "policy": policy_text,
        },
    )


# --- evidence ---


def recheck_broken(items: Mapping[str, bytes], key: VerifierKey) -> ReceiptVerdict:
    """Prove once more, from the items of an evidence file alone, that `key`'s log broke its word.

    Raises VerificationError when they do not prove it. `trusted` of the verdict says what it rests
    on: with a policy among the items, on witnesses that the reader has to know.
    """
    match set(items):
        case names if names == {"receipt", "leaf", "proof"}:
            return _recheck_contradiction(items, key)
        case names if names == {"receipt", "checkpoint", "policy"}:
            return _recheck_lateness(items, key)
    raise MalformedProof(
        "a broken receipt is shown by receipt, leaf and proof, or by receipt, checkpoint and policy"
    )


def _recheck_contradiction(items: Mapping[str, bytes], key: VerifierKey) -> ReceiptVerdict:
    receipt = verify_receipt(items["receipt"], key)
    if len(items["leaf"]) != HASH_BYTES:
        raise MalformedProof(f"leaf is a hash of {HASH_BYTES} bytes")
    proof, opened = verify_tlog_proof(items["proof"], items["leaf"], key)
    if proof.extra is not None:
        raise MalformedProof("the proof has an extra line, which nothing authenticates")
    shown = Shown(index=proof.index, leaf=items["leaf"], proof=proof.proof)
    if check_inclusion(receipt, shown, opened.checkpoint):
        raise Inconsistent(f"the log holds at index {proof.index} what it promised: nothing broken")
    return _contradicted(receipt, proof.checkpoint, opened, shown)


def _recheck_lateness(items: Mapping[str, bytes], key: VerifierKey) -> ReceiptVerdict:
    receipt = verify_receipt(items["receipt"], key)
    policy = parse_policy(items["policy"])
    opened = open_checkpoint(items["checkpoint"], key, witnesses=policy.keys)
    late = blocking_witnesses(receipt, opened, policy)
    if not late:
        raise Inconsistent(
            "the cosignatures do not show that the promised tree was late: nothing broken is proven"
        )
    return _too_late(receipt, items["checkpoint"], opened, late, items["policy"])


def _say_time(at_us: int) -> str:
    """UTC to the second; hostile numbers come back as they are."""
    try:
        return datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"microsecond {at_us}"
