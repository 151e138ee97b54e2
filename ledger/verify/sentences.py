"""A verdict in plain words. Pure; decides nothing.

Each sentence of `say_proven` rests on a numbered step of `bundle.verify_bundle`; `say_trusted` says
what no step can show. Text written by strangers goes through `printable`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ledger.domain.accrual import attribution
from ledger.domain.envelope import Entry
from ledger.domain.money import format_open
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.encoding import printable
from ledger.verify.lineage import Lineage
from ledger.verify.note import Verified, VerifierKey
from ledger.verify.statement import Fees
from ledger.verify.subjects import count, say_about

MAX_SHARES_SAID = 5
MAX_ODD_SAID = 5


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the steps found, for the sentences. `anchor` has the facts of the L1 step, None where
    it was skipped; `own_key` says that the log's key did not come from the bundle; `l1_unread` that
    an L1 section was there and skipped; `policy` is what the reader's witness policy asked for and
    got."""

    head: Checkpoint
    key: VerifierKey
    entries: int
    lineage: Lineage
    witnesses: Sequence[Verified]
    anchor: Mapping[str, Any] | None
    own_key: bool
    l1_unread: bool
    fees: Fees
    policy: str | None = None


def say_proven(found: Found) -> tuple[str, ...]:
    """What the steps have shown."""
    origin = printable(found.head.origin)
    said = [
        f"The log {origin} signed a tree of {found.head.size} entries (key id "
        f"{found.key.id.hex()}).",
        f"All {found.entries} entries of this bundle are in that tree, each at the index written "
        "in it.",
        "Every event was signed by its actor's key, for this log and no other.",
        *_say_lineage(found.lineage),
    ]
    for witness in found.witnesses:
        when = _time(witness.timestamp or 0)
        said.append(f"The witness {printable(witness.key.name)} saw the same tree at {when}.")
    if found.policy:
        said.append(f"Enough witnesses saw it for the policy you gave: {found.policy}.")
    if found.anchor:
        said.append(f"{say_l1(found.anchor)}.")
    if found.fees.as_policy:
        fees = count(found.fees.as_policy, "fee")
        said.append(f"What became of {fees} is as the fee policy in this bundle says.")
    return tuple(said)


def say_trusted(found: Found) -> tuple[str, ...]:
    """What no step can show."""
    name = printable(found.key.name)
    said = []
    if found.own_key:
        said.append(f"That the key you gave is that of the log {name}.")
    else:
        said.append(
            f"The log's key came from the bundle itself: compare id {found.key.id.hex()} of {name} "
            "with one that you got elsewhere, or pass it with --key."
        )
    said += _doubt_others(found)
    if "tx_hash" in found.lineage.subject.envelope.body:
        body = found.lineage.subject.envelope.body
        said.append(
            f"That transaction {body['tx_hash']} is on chain {body['chain_id']} and did what the "
            "event says: ask a node that you trust."
        )
    if found.fees.unknown:
        fees = count(found.fees.unknown, "fee")
        said.append(f"How {fees} had to be split: the fee policy is not in this bundle.")
    said += [
        f"Why the fee of entry {index} is not split as the fee policy in this bundle says."
        for index in found.fees.odd[:MAX_ODD_SAID]
    ]
    if found.lineage.partial:
        said.append(
            f"That the rows used of {len(found.lineage.partial)} contributions belong to them: the "
            "run used only some, so the root over all their rows cannot be recomputed here."
        )
    said.append(
        "That the log let only those act who had the role for it, and what it recorded after "
        "these entries (a withdrawal, say)."
    )
    if found.lineage.inference or found.lineage.manifests:
        said.append(
            "That training, answer and attribution were computed as recorded: the bundle proves "
            "who recorded what and when, not the computation."
        )
    return tuple(said)


def _doubt_others(found: Found) -> list[str]:
    """Whether others were shown the same log."""
    anchor = found.anchor
    if anchor is None:
        unread = ["What the L1 section shows: it was not checked here (step 6 says why)."]
        alone = (
            "No witness and no chain vouches for this tree: the log could have shown others "
            "another one."
        )
        independent = "That the witnesses are independent of the log, and of each other."
        return [independent if found.witnesses else alone, *(unread if found.l1_unread else ())]
    said = [
        f"That block {anchor['block_hash']} is on chain {anchor['chain_id']}, as the bundle "
        f"claims (no header names its chain), and that {anchor['contract']} is this log's "
        "anchor contract: ask a node that you trust."
    ]
    if anchor["anchored_size"] <= found.lineage.subject.index:
        said.append(
            f"The chain holds the first {anchor['anchored_size']} entries; entry "
            f"{found.lineage.subject.index}, the subject, came after them."
        )
    return said


def say_l1(anchor: Mapping[str, Any]) -> str:
    """What the L1 proof shows; not the chain's number, which no header holds."""
    return (
        f"The EVM block {anchor['block_number']} of hash {anchor['block_hash']} holds the log's "
        f"first {anchor['anchored_size']} entries as this tree has them"
    )


def _say_lineage(lineage: Lineage) -> list[str]:
    subject = lineage.subject
    said = [
        f"This bundle is about entry {subject.index}, {subject.envelope.type} "
        f"{subject.envelope.id}, which says: {say_about(subject)}. It was signed by "
        f"{subject.envelope.actor} and recorded {_time(subject.recorded_at // 1_000_000)} by the "
        "log's clock."
    ]
    if lineage.inference and lineage.adapter:
        said.append(
            f"The answer of inference {lineage.inference.envelope.body['inference']} is recorded "
            f"as given by the adapter {lineage.adapter.envelope.body['model']}."
        )
    if lineage.run:
        bound = "" if lineage.partial else "; the rows are those that the contributors signed for"
        people = {entry.envelope.actor for entry in lineage.contributions.values()}
        said.append(
            f"Its training run {lineage.run.envelope.body['run']} used {lineage.rows_count} rows "
            f"of {len(lineage.contributions)} approved contributions by {len(people)} "
            f"contributors, all of them in this bundle{bound}."
        )
    if lineage.attribution:
        said.append(_say_shares(lineage.attribution, lineage.fee))
    if lineage.fee:
        body = lineage.fee.envelope.body
        said.append(
            f"The fee was {format_open(int(body['amount_wei']))}, of which "
            f"{format_open(int(body['contributors_wei']))} to contributors."
        )
    return said


def _say_shares(attributed: Entry, fee: Entry | None) -> str:
    """Shares, largest first, and what each came to where the fee is known."""
    body = attributed.envelope.body
    pool_wei = int(fee.envelope.body["contributors_wei"]) if fee else 0
    paid = {p.owner: p.amount_wei for p in attribution(body, pool_wei)[1::2]}
    shares = sorted(body["shares"], key=lambda s: (-s["ppm"], s["contributor"]))
    named = [
        f"{s['contributor'][:20]}… {s['ppm'] / 10_000:.2f} %"
        + (f" ({format_open(paid[s['contributor']])})" if fee else "")
        for s in shares
    ]
    if len(named) > MAX_SHARES_SAID:
        named = [*named[:MAX_SHARES_SAID], f"{len(shares) - MAX_SHARES_SAID} more"]
    named.append(f"unattributed {body['unattributed_ppm'] / 10_000:.2f} %")
    return f"The attribution recorded for it: {', '.join(named)}."


def _time(posix_s: int) -> str:
    """UTC to the second; hostile numbers come back as they are."""
    try:
        return datetime.fromtimestamp(posix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"time {posix_s}"
