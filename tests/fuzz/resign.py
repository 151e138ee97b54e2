"""Hostile content under valid signatures: a log or a contributor that lies, with the keys to do so.

Without this a mutated bundle ends at its first broken signature, and nothing behind that is tried.
"""

import base64
import json
from hashlib import sha256
from typing import Any
from uuid import UUID

from nacl.signing import SigningKey

from ledger.domain.canonical import _check_nesting, canonical_json
from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.domain.ids import actor_of
from ledger.errors import LedgerError, VerificationError
from ledger.log import tree
from ledger.verify.bundle_format import Bundle, BundledEntry, format_bundle
from ledger.verify.disclosure import read_disclosed
from ledger.verify.evidence_format import Evidence, parse_evidence
from ledger.verify.note import format_vkey, parse_note
from ledger.verify.payouts import read_payouts
from ledger.verify.receipt import CONTEXT, Receipt, format_receipt, parse_receipt, promise_bytes
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof, parse_tlog_proof
from tests.fuzz.samples import LOG_KEY, ORIGIN, VKEY, checkpoint, note

MAX_INDEX = 2_000


def story_of(bundle: bytes) -> bytes:
    """What a bundle tells, as JSON without hashes and signatures, its actors under keys of ours."""
    value = json.loads(bundle)
    events = []
    for item in value["entries"]:
        raw = base64.b64decode(item["entry"])
        event = json.loads(raw[16:])
        events.append(
            {name: event[name] for name in ("type", "id", "actor", "body")}
            | {"index": item["index"]}
        )
    text = canonical_json(
        {
            "subject": value["subject"],
            "events": events,
            "blobs": value["blobs"],
            "disclosed": value.get("disclosed", []),
            "payouts": value.get("payouts", []),
        }
    )
    for actor in {event["actor"] for event in events}:
        text = text.replace(actor.encode(), actor_of(bytes(_key(actor).verify_key)).encode())
    told = json.loads(text)
    for event, before in zip(told["events"], events, strict=True):
        event["actor"] = before["actor"]  # the name of the key that signs; see `_key`
    return canonical_json(told)


def _key(name: object) -> SigningKey:
    return SigningKey(sha256(str(name).encode("utf-8", "replace")).digest())


def read_json(data: bytes) -> Any:
    """Any JSON that is not nested deeper than ours may be. The library's reader trusts the
    interpreter's recursion limit, which web3 raises beyond what the C stack holds."""
    _check_nesting(data)
    return json.loads(data)


def bundle_of(story: bytes) -> bytes:
    """The story as a bundle in which every signature and every proof is right.

    Raises LedgerError, KeyError, TypeError, ValueError, AttributeError or AssertionError for what
    cannot be written as a bundle at all; those are this tool's, no parser's.
    """
    told: dict[str, Any] = _named_by_content(read_json(story))
    raw: dict[int, bytes] = {}
    for event in told["events"]:
        index = int(event["index"])
        if not 0 <= index < MAX_INDEX:
            raise ValueError("an index that this tool does not build")
        envelope = sign_event(
            _key(event["actor"]),
            type=event["type"],
            log=ORIGIN,
            body=event["body"],
            id=UUID(event["id"]),
            at=0,
        )
        raw[index] = encode_entry(index, 0, envelope)
    size = max(raw) + 1
    leaves = [leaf_hash(raw.get(n, b"another")) for n in range(size)]
    tiles = tree.integrate(0, leaves, lambda wanted: {})
    root = tree.root(size, lambda wanted: tiles)
    entries = tuple(
        BundledEntry(
            index=index,
            entry=raw[index],
            proof=tuple(
                tree.range_hashes(tree.inclusion_ranges(index, size), lambda wanted: tiles)
            ),
        )
        for index in sorted(raw)
    )
    return format_bundle(
        Bundle(
            log=ORIGIN,
            vkey=format_vkey(VKEY),
            subject=UUID(told["subject"]),
            checkpoint=checkpoint(size, root),
            entries=entries,
            blobs=told["blobs"],
            disclosed=read_disclosed(told["disclosed"]),
            payouts=read_payouts(told["payouts"]),
        )
    )


def _named_by_content(told: dict[str, Any]) -> dict[str, Any]:
    """A changed blob gets the name it then has, in the events too: whoever lies names it right."""
    blobs = {name: base64.b64decode(blob) for name, blob in told["blobs"].items()}
    events = json.dumps(told["events"])
    for name, blob in blobs.items():
        if len(name) == 64:
            events = events.replace(name, sha256(blob).hexdigest())
    named = {sha256(blob).hexdigest(): blob for blob in blobs.values()}
    return {**told, "events": json.loads(events), "blobs": named}


def evidence_of(data: bytes) -> Evidence:
    """Evidence whose notes, proofs and receipts log and witness signed, whatever they say.

    Raises VerificationError where the file is none.
    """
    found = parse_evidence(data)
    items = {name: _signed(item) for name, item in found.items.items()}
    return Evidence(
        kind=found.kind,
        log=ORIGIN,
        vkey=format_vkey(VKEY),
        found_at=found.found_at,
        says=found.says,
        items=items,
    )


def _signed(item: bytes) -> bytes:
    try:
        proof = parse_tlog_proof(item)
        again = note(parse_note(proof.checkpoint).text)
        return format_tlog_proof(
            TlogProof(index=proof.index, proof=proof.proof, checkpoint=again, extra=proof.extra)
        )
    except VerificationError:
        pass
    try:
        return note(parse_note(item).text)
    except VerificationError:
        pass
    try:
        receipt = parse_receipt(item)
    except LedgerError:
        return item
    sig = LOG_KEY.sign(CONTEXT + promise_bytes(receipt.promise)).signature
    return format_receipt(Receipt(promise=receipt.promise, sig=sig, evm=receipt.evm))
