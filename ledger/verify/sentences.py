"""A verdict in plain words. Pure; decides nothing.

Each sentence of `say_proven` rests on a numbered step of `bundle.verify_bundle`; `say_trusted` says
what no step can show. Text written by strangers goes through `printable`.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ledger.domain.envelope import Entry
from ledger.domain.money import format_open
from ledger.verify.checkpoint import Checkpoint
from ledger.verify.encoding import printable
from ledger.verify.lineage import Lineage
from ledger.verify.note import Verified, VerifierKey

MAX_SHARES_SAID = 5


def say_proven(
    head: Checkpoint,
    key: VerifierKey,
    entries: int,
    lineage: Lineage,
    witnesses: Sequence[Verified],
    anchor: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """What the steps have shown."""
    origin = printable(head.origin)
    said = [
        f"The log {origin} signed a tree of {head.size} entries (key id {key.id.hex()}).",
        f"All {entries} entries of this bundle are in that tree, each at the index written in it.",
        "Every event was signed by its actor's key, for this log and no other.",
        *_say_lineage(lineage),
    ]
    for witness in witnesses:
        when = _time(witness.timestamp or 0)
        said.append(f"The witness {printable(witness.key.name)} saw the same tree at {when}.")
    if anchor:
        said.append(f"{say_l1(anchor)}.")
    return tuple(said)


def say_trusted(
    key: VerifierKey,
    lineage: Lineage,
    witnesses: Sequence[Verified],
    anchor: Mapping[str, Any] | None,
    *,
    own_key: bool,
) -> tuple[str, ...]:
    """What no step can show."""
    name = printable(key.name)
    said = []
    if own_key:
        said.append(f"That the key you gave is that of the log {name}.")
    else:
        said.append(
            f"The log's key came from the bundle itself: compare id {key.id.hex()} of {name} with "
            "one that you got elsewhere, or pass it with --key."
        )
    if not witnesses and not anchor:
        said.append(
            "No witness and no chain vouches for this tree: the log could have shown others "
            "another one."
        )
    elif not anchor:
        said.append("That the witnesses are independent of the log.")
    if anchor:
        said.append(
            f"That block {anchor['block_hash']} is on chain {anchor['chain_id']}, as the bundle "
            f"claims (no header names its chain), and that {anchor['contract']} is this log's "
            "anchor contract: ask a node that you trust."
        )
        if anchor["anchored_size"] <= lineage.subject.index:
            said.append(
                f"The chain holds the first {anchor['anchored_size']} entries; entry "
                f"{lineage.subject.index}, the subject, came after them."
            )
    if lineage.partial:
        said.append(
            f"That the rows used of {len(lineage.partial)} contributions belong to them: the run "
            "used only some, so the root over all their rows cannot be recomputed here."
        )
    said.append(
        "That the log let only those act who had the role for it, and what it recorded after "
        "these entries (a withdrawal, say)."
    )
    if lineage.run or lineage.inference:
        said.append(
            "That training, answer and attribution were computed as recorded: the bundle proves "
            "who recorded what and when, not the computation."
        )
    return tuple(said)


def say_l1(anchor: Mapping[str, Any]) -> str:
    """What the L1 proof shows; not the chain's number, which no header holds."""
    return (
        f"The EVM block {anchor['block_number']} of hash {anchor['block_hash']} holds the log's "
        f"first {anchor['anchored_size']} entries as this tree has them"
    )


def _say_lineage(lineage: Lineage) -> list[str]:
    subject = lineage.subject
    said = [
        f"The subject is entry {subject.index}, {subject.envelope.type} "
        f"{subject.envelope.id}, recorded {_time(subject.recorded_at // 1_000_000)} by the log's "
        f"clock, signed by {subject.envelope.actor}."
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
        said.append(_say_shares(lineage.attribution))
    if lineage.fee:
        body = lineage.fee.envelope.body
        said.append(
            f"The fee was {format_open(int(body['amount_wei']))}, of which "
            f"{format_open(int(body['contributors_wei']))} to contributors."
        )
    return said


def _say_shares(attribution: Entry) -> str:
    body = attribution.envelope.body
    shares = sorted(body["shares"], key=lambda s: (-s["ppm"], s["contributor"]))
    named = [f"{s['contributor'][:20]}… {s['ppm'] / 10_000:.2f} %" for s in shares]
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
