"""Verify a lineage bundle: everything about one event that a stranger needs, in one file. Pure.

`verify_bundle` is the procedure, six numbered steps (eight in version 2), that a verifier in
another language has to follow. The bytes are `bundle_format`'s, the proofs `merkle`'s, the
signatures `checkpoint`'s and `ledger.domain.envelope`'s, the graph `lineage`'s, shown rows
`disclosure`'s, payout lines `payouts`'s.
"""

from collections.abc import Sequence
from typing import Any

from ledger.domain.envelope import Entry, decode_entry, leaf_hash
from ledger.domain.events import check_body
from ledger.errors import (
    AnchorMismatch,
    BadSignature,
    Inconsistent,
    InvalidEvent,
    MalformedProof,
    VerificationError,
)
from ledger.verify.bundle_format import (
    FORMAT,
    FORMAT_V2,
    MAX_BUNDLE_BYTES,
    Bundle,
    BundledEntry,
    parse_bundle,
)
from ledger.verify.checkpoint import Checkpoint, OpenedCheckpoint, open_checkpoint
from ledger.verify.disclosure import check_disclosed
from ledger.verify.encoding import printable
from ledger.verify.lineage import Lineage, check_lineage
from ledger.verify.merkle import verify_consistency, verify_inclusion
from ledger.verify.note import VerifierKey, parse_vkey
from ledger.verify.payouts import check_payouts
from ledger.verify.policy import Policy
from ledger.verify.sentences import Found, say_l1, say_proven, say_trusted
from ledger.verify.sentences_v2 import (
    doubt_disclosed,
    doubt_payouts,
    facts_disclosed,
    facts_payouts,
    say_disclosed,
    say_payouts,
)
from ledger.verify.statement import Statement, check_fees, statements
from ledger.verify.subjects import count
from ledger.verify.verdict import Step, Verdict

__all__ = ["FORMAT", "FORMAT_V2", "MAX_BUNDLE_BYTES", "STEP_NAMES", "verify_bundle"]

STEP_NAMES = {
    1: "parse",
    2: "checkpoint signature",
    3: "inclusion",
    4: "events",
    5: "lineage",
    6: "L1 anchor",
    7: "disclosed rows",
    8: "payouts",
}
V1_STEPS = 6
"""A bundle of version 1 has no steps beyond these."""
NEEDS_KECCAK = "pip install 'tributary-ledger[l1]' to check it"


def verify_bundle(
    data: bytes,
    *,
    trusted_vkey: str | None = None,
    witness_vkeys: Sequence[str] = (),
    policy: Policy | None = None,
    require_l1: bool = False,
) -> Verdict:
    """Verify a bundle; the verdict says what was proven and what is left to trust.

    1. Parse: the bytes are one bundle in its one spelling, within the named limits.
    2. Checkpoint: the log's key (`trusted_vkey`, else the bundle's own) signed origin, size, root;
       where there is a `policy`, it names that key (if any) and its quorum of witnesses cosigned.
    3. Inclusion: every entry hashes up to that root at its index, and says that index itself.
    4. Events: every entry is a well-formed event of the catalogue, made for this log, signed by
       its actor.
    5. Lineage: every reference ends at an earlier entry of the bundle and both ends agree.
    6. L1: an EVM chain holds a checkpoint that this one extends or equals (skipped when the bundle
       has none or the libraries are missing, unless `require_l1`).
    7. Version 2, disclosed rows: each is that row of its contribution, and in a training manifest
       where the bundle has one.
    8. Version 2, payouts: each line is under the root that its period was closed with (skipped when
       a keccak library is missing).

    Raises a VerificationError that names what failed, in `detail["step"]` the step too. Nothing
    else, whatever `data` holds.
    """
    steps: list[Step] = []
    try:
        return _verify(data, steps, trusted_vkey, witness_vkeys, policy, require_l1=require_l1)
    except VerificationError as error:
        error.detail["step"] = len(steps) + 1
        raise


def _verify(
    data: bytes,
    steps: list[Step],
    trusted_vkey: str | None,
    witness_vkeys: Sequence[str],
    policy: Policy | None,
    *,
    require_l1: bool,
) -> Verdict:
    # 1. Parse.
    bundle = parse_bundle(data)
    steps.append(_step(1, f"{bundle.format}, {len(data)} bytes"))

    # 2. Checkpoint signature and witnesses.
    key = _log_key(bundle, trusted_vkey, policy)
    known = [*map(parse_vkey, witness_vkeys), *(policy.keys if policy else ())]
    opened = open_checkpoint(
        bundle.checkpoint, key, origin=bundle.log, witnesses=dict.fromkeys(known)
    )
    head = opened.checkpoint
    quorum = _check_quorum(opened, policy)
    signed = f"{printable(key.name)} signed size {head.size}, root {head.root.hex()}"
    steps.append(_step(2, f"{signed}; {quorum}" if quorum else signed))

    # 3. Every entry under the root, at the index written inside it.
    for bundled in bundle.entries:
        _check_place(bundled, head)
    steps.append(_step(3, f"{len(bundle.entries)} entries lead to the root, each at its own index"))

    # 4. Every event: form, log, signature.
    entries = [_check_event(bundled, bundle.log) for bundled in bundle.entries]
    actors = len({entry.envelope.actor for entry in entries})
    steps.append(_step(4, f"{len(entries)} events signed by {actors} keys for this log"))

    # 5. Lineage.
    lineage = check_lineage(entries, bundle.blobs, bundle.subject)
    steps.append(_step(5, f"complete around {lineage.subject.envelope.type} {bundle.subject}"))

    # 6. L1.
    step, anchor = _check_l1(bundle, key, head, required=require_l1)
    steps.append(step)

    # 7 and 8. What version 2 adds.
    if bundle.format == FORMAT_V2:
        steps.append(_check_disclosed(bundle, lineage))
        steps.append(_check_payouts(bundle, lineage))

    found = Found(
        head=head,
        key=key,
        entries=len(entries),
        lineage=lineage,
        witnesses=opened.witnesses,
        anchor=anchor,
        own_key=trusted_vkey is not None or bool(policy and policy.logs),
        l1_unread=bundle.l1 is not None and anchor is None,
        fees=check_fees(entries),
        policy=quorum,
    )
    return _verdict(steps, bundle, found, statements(entries, bundle.payouts))


def _step(number: int, detail: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="ok", detail=detail)


def _log_key(bundle: Bundle, trusted_vkey: str | None, policy: Policy | None) -> VerifierKey:
    key = parse_vkey(bundle.vkey)
    if trusted_vkey is not None and parse_vkey(trusted_vkey.strip()) != key:
        raise BadSignature(
            f"the bundle is of the key {printable(bundle.vkey, 200)}, you trust "
            f"{printable(trusted_vkey, 200)}: another log's bundle, or a forged one",
            field="vkey",
        )
    if key.name != bundle.log:
        raise Inconsistent(
            f"the bundle is of the log {printable(bundle.log)!r}, its key is named "
            f"{printable(key.name)!r}: a log's key bears the log's origin",
            field="log",
        )
    if policy and policy.logs and key not in {log.key for log in policy.logs}:
        raise BadSignature(
            f"the bundle is of the key {printable(bundle.vkey, 200)}, which is none of the "
            f"{len(policy.logs)} logs of your policy: another log's bundle, or a forged one",
            field="vkey",
        )
    return key


def _check_quorum(opened: OpenedCheckpoint, policy: Policy | None) -> str | None:
    """What the policy's quorum has, in words; None without a policy or a quorum in it."""
    if policy is None or policy.quorum is None:
        return None
    keys = [witness.key for witness in opened.witnesses]
    policy.require(keys)
    return policy.shortfall(keys)


def _check_place(bundled: BundledEntry, head: Checkpoint) -> None:
    """Inclusion at the claimed index, and the same index inside the entry: see `merkle`."""
    try:
        verify_inclusion(
            index=bundled.index,
            size=head.size,
            leaf=leaf_hash(bundled.entry),
            proof=bundled.proof,
            root=head.root,
        )
    except VerificationError as error:
        raise type(error)(f"entry {bundled.index}: {error}", entry=bundled.index) from error
    written = int.from_bytes(bundled.entry[:8], "big")
    if written != bundled.index:
        raise Inconsistent(
            f"entry {bundled.index} says inside that it is entry {written}: it was moved",
            entry=bundled.index,
            field="index",
        )


def _check_event(bundled: BundledEntry, log: str) -> Entry:
    """The entry: its envelope's form, `log` and signature checked, its body by the catalogue."""
    try:
        entry = decode_entry(bundled.entry, log=log)
        check_body(entry.envelope.type, entry.envelope.body)
    except InvalidEvent as error:
        name = error.detail.get("field")
        kind = {"sig": BadSignature, "log": Inconsistent}.get(str(name), MalformedProof)
        raise kind(f"entry {bundled.index}: {error}", entry=bundled.index, field=name) from error
    return entry


def _check_l1(
    bundle: Bundle, key: VerifierKey, head: Checkpoint, *, required: bool
) -> tuple[Step, dict[str, Any] | None]:
    if bundle.l1 is None:
        return _skip_l1("the bundle carries no L1 section", required), None
    anchored = open_checkpoint(bundle.l1.checkpoint, key, origin=bundle.log).checkpoint
    verify_consistency(
        size1=anchored.size,
        size2=head.size,
        root1=anchored.root,
        root2=head.root,
        proof=bundle.l1.consistency,
    )
    try:
        from ledger.verify.l1 import verify_l1

        facts = verify_l1(bundle.l1.section, size=anchored.size, root=anchored.root)
    except ImportError as error:
        return _skip_l1(
            f"a library is missing ({printable(str(error))}): {NEEDS_KECCAK}",
            required,
        ), None
    anchor = {**facts, "anchored_size": anchored.size}
    return _step(6, say_l1(anchor)), anchor


def _skip_l1(why: str, required: bool) -> Step:
    if required:
        raise AnchorMismatch(f"an L1 proof was required, but {why}", field="l1")
    return _skip(6, why)


def _check_disclosed(bundle: Bundle, lineage: Lineage) -> Step:
    if not bundle.disclosed:
        return _skip(7, "the bundle shows no row")
    check_disclosed(bundle.disclosed, lineage)
    manifests = len(lineage.manifests)
    rows = count(len(bundle.disclosed), "row")
    listed = (
        f"found in {count(manifests, 'training manifest')}"
        if manifests
        else "the bundle has no training manifest to find them in"
    )
    return _step(7, f"{rows} under the root that the contributor signed; {listed}")


def _check_payouts(bundle: Bundle, lineage: Lineage) -> Step:
    if not bundle.payouts:
        return _skip(8, "the bundle carries no payout line")
    try:
        check_payouts(bundle.payouts, lineage.closed)
    except ImportError as error:
        return _skip(8, f"a library is missing ({printable(str(error))}): {NEEDS_KECCAK}")
    return _step(8, f"{count(len(bundle.payouts), 'line')} under the roots of their periods")


def _skip(number: int, why: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="skipped", detail=why)


def _verdict(
    steps: Sequence[Step], bundle: Bundle, found: Found, accounts: Sequence[Statement]
) -> Verdict:
    lineage = found.lineage
    checked = steps[-1].status == "ok"  # in version 2 the last step is that of the payouts
    proven = [*say_proven(found), *say_disclosed(bundle.disclosed, lineage)]
    if checked:
        proven += say_payouts(accounts)
    return Verdict(
        steps=tuple(steps),
        proven=tuple(proven),
        trusted=(
            *say_trusted(found),
            *doubt_disclosed(bundle.disclosed, lineage),
            *doubt_payouts(accounts, checked=checked),
        ),
        facts={
            "log": bundle.log,
            "vkey": bundle.vkey,
            "subject": str(bundle.subject),
            "subject_type": lineage.subject.envelope.type,
            "subject_index": lineage.subject.index,
            "size": found.head.size,
            "root": found.head.root.hex(),
            "entries": [entry.index for entry in bundle.entries],
            "witnesses": [witness.key.name for witness in found.witnesses],
            "policy": found.policy,
            "l1": found.anchor,
            "disclosed": facts_disclosed(bundle.disclosed, lineage),
            "payouts": facts_payouts(accounts, checked=checked),
        },
    )
