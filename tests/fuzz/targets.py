"""Every parser of strangers' bytes: how to call it, what to start from, what it may raise."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import decode_entry, parse_envelope
from ledger.domain.events import check_body
from ledger.domain.login import verify_login
from ledger.domain.rows import decode_rows
from ledger.errors import Inconsistent, InvalidEvent, LedgerError, VerificationError
from ledger.log.add_checkpoint import parse_request
from ledger.log.records import format_records, parse_records
from ledger.ports import StoredCheckpoint
from ledger.verify.bundle import verify_bundle
from ledger.verify.checkpoint import open_checkpoint, parse_checkpoint
from ledger.verify.encoding import decode_base64, decode_decimal
from ledger.verify.evidence import check_evidence
from ledger.verify.evidence_entries import entry_fault
from ledger.verify.evidence_format import format_evidence, parse_evidence
from ledger.verify.l1 import verify_l1
from ledger.verify.manifest import parse_manifest
from ledger.verify.merkle import EMPTY_ROOT, verify_consistency, verify_inclusion
from ledger.verify.note import (
    format_note,
    format_vkey,
    open_note,
    parse_note,
    parse_skey,
    parse_vkey,
)
from ledger.verify.packet import check_packet, format_packet, parse_packet
from ledger.verify.policy import parse_policy
from ledger.verify.receipt import format_receipt, parse_receipt, verify_receipt
from ledger.verify.tiles import (
    decode_entries,
    encode_entries,
    parse_tile_path,
    tile_hashes,
    tile_path,
)
from ledger.verify.tlog_proof import (
    format_tlog_proof,
    parse_tlog_proof,
    verify_entry_proof,
    verify_tlog_proof,
)
from tests.fuzz import resign, samples
from tests.fuzz.samples import FOUND, NOW_US, ORIGIN, VKEY, WITNESS
from workers.attribution import evidence as attribution_evidence

Call = Callable[[bytes], object]
Errors = tuple[type[Exception], ...]

HOSTILE: Errors = (VerificationError,)
DOMAIN: Errors = (InvalidEvent,)


@dataclass(frozen=True, kw_only=True)
class Target:
    """`call` returns or raises one of `allowed`, whatever bytes it is fed."""

    name: str
    call: Call
    seeds: Callable[[], list[bytes]]
    allowed: Errors = HOSTILE

    def run(self, data: bytes) -> bool:
        """Whether the bytes were accepted. Any error but the designed ones passes through."""
        try:
            self.call(data)
        except self.allowed:
            return False
        return True

    def found(self) -> list[bytes]:
        """Inputs that once broke this parser."""
        folder = FOUND / self.name
        return [p.read_bytes() for p in sorted(folder.iterdir())] if folder.is_dir() else []


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def note(data: bytes) -> None:
    parsed = parse_note(data)
    assert format_note(parsed.text, parsed.signatures) == data, "a second spelling"
    open_note(data, [VKEY, WITNESS])


def vkey(data: bytes) -> None:
    assert format_vkey(parse_vkey(text(data))) == text(data)


def signed_text(data: bytes) -> None:
    """The log signs whatever this is."""
    if data.endswith(b"\n") and _is_text(data):
        open_checkpoint(samples.note(data.decode()), VKEY, witnesses=[WITNESS])


def _is_text(data: bytes) -> bool:
    try:
        return data.decode().encode() == data
    except UnicodeDecodeError:
        return False


def tlog_proof(data: bytes) -> None:
    assert format_tlog_proof(parse_tlog_proof(data)) == data, "a second spelling"
    verify_tlog_proof(data, samples.leaves()[3], VKEY, witnesses=[WITNESS])


def entry_proof(data: bytes) -> None:
    """A proof, four bytes of its length before it, and an entry."""
    cut = 4 + int.from_bytes(data[:4], "big")
    verify_entry_proof(data[4:cut], data[cut:], VKEY)


def entry_proofs() -> list[bytes]:
    proof = samples.proof(3, 20)
    return [len(proof).to_bytes(4, "big") + proof + samples.entries()[3]]


def tiles(data: bytes) -> None:
    assert tile_path(parse_tile_path(text(data))) == text(data)


def entry_bundle(data: bytes) -> None:
    width = data[0] + 1 if data else 1
    assert encode_entries(decode_entries(data[1:], width)) == data[1:]


def entry_bundles() -> list[bytes]:
    return [bytes([n - 1]) + encode_entries(samples.entries()[:n]) for n in (1, 2, 3, 20)] + [
        bytes([int(name) - 1]) + data
        for name, data in samples.shared_named("tessera-golden-log/tile/entries/*/*")
    ]


def hash_tile(data: bytes) -> None:
    tile_hashes(data[1:], data[0] + 1 if data else 1)


def proofs(data: bytes) -> None:
    """Two sizes and hashes, as both kinds of proof."""
    size1, size2 = int.from_bytes(data[:9], "big"), int.from_bytes(data[9:18], "big")
    hashes = [data[at : at + 32] for at in range(18, len(data), 32)]
    with suppress(VerificationError):
        verify_inclusion(index=size1, size=size2, leaf=bytes(32), proof=hashes, root=bytes(32))
    verify_consistency(size1=size1, size2=size2, root1=EMPTY_ROOT, root2=bytes(32), proof=hashes)


def bundle(data: bytes) -> None:
    verify_bundle(data, witness_vkeys=[format_vkey(WITNESS)])


def story(data: bytes) -> None:
    try:
        made = resign.bundle_of(data)
    except (LedgerError, KeyError, TypeError, ValueError, AttributeError, AssertionError,
            RecursionError, OverflowError):  # fmt: skip
        return  # no such bundle can be written
    verify_bundle(made, trusted_vkey=format_vkey(VKEY))


@cache
def stories() -> list[bytes]:
    return [resign.story_of(data) for data in samples.good_bundles()]


def evidence(data: bytes) -> None:
    parsed = parse_evidence(data)
    assert format_evidence(parsed) == data, "a second spelling"
    check_evidence(parsed)


def evidence_signed(data: bytes) -> None:
    check_evidence(resign.evidence_of(data))


def receipt(data: bytes) -> None:
    assert format_receipt(parse_receipt(data)) == data, "a second spelling"
    verify_receipt(data, VKEY)


def packet(data: bytes) -> None:
    assert format_packet(parse_packet(data)) == data, "a second spelling"
    check_packet(data)
    check_packet(data, bundle=samples.packet_bundle())


def attribution(data: bytes) -> None:
    assert attribution_evidence.parse(data).to_bytes() == data, "a second spelling"


def l1_section(data: bytes) -> None:
    """Any JSON value: a bundle's parser hands over an object, an evidence file's whatever it is."""
    try:
        section = resign.read_json(data)
    except (ValueError, LedgerError):
        return
    verify_l1(section, size=samples.l1_vector()["size"], root=samples.l1_root())


def event(data: bytes) -> None:
    value = parse_canonical(data)
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        body = value.get("body")
        if isinstance(body, dict):
            check_body(value["type"], body)


def records(data: bytes) -> None:
    parse_records(data, 0)


def record_files() -> list[bytes]:
    known = [
        StoredCheckpoint(size=n, root=bytes(32), note=samples.checkpoint(n), signed_at=NOW_US)
        for n in (1, 7, 20)
    ]
    return [format_records(known)]


def base64_line(data: bytes) -> None:
    with suppress(VerificationError):
        decode_decimal(text(data), "n")
    decode_base64(text(data), "x")


def one(sample: Callable[[], bytes]) -> Callable[[], list[bytes]]:
    return lambda: [sample()]


TARGETS = {
    target.name: target
    for target in (
        Target(name="note", call=note, seeds=lambda: [
            samples.checkpoint(7), *samples.shared_json("signed-note.json", "note_b64"),
            *samples.shared("tessera-golden-log/checkpoint.*"),
        ]),
        Target(name="vkey", call=vkey, seeds=samples.keys),
        Target(name="skey", call=lambda data: parse_skey(text(data)), seeds=samples.keys),
        Target(
            name="checkpoint",
            call=lambda data: parse_checkpoint(text(data)),
            seeds=lambda: [
                parse_note(samples.checkpoint(7)).text.encode(),
                *samples.shared_json("checkpoint-parse.json", "text"),
            ],
        ),
        Target(
            name="signed-checkpoint",
            call=signed_text,
            seeds=lambda: [parse_note(samples.checkpoint(7)).text.encode()],
        ),
        Target(name="tlog-proof", call=tlog_proof, seeds=lambda: [
            samples.proof(3, 20), samples.proof(299, 300),
            *samples.shared_json("tlog-proof.json", "text", "ok"),
        ]),
        Target(name="entry-proof", call=entry_proof, seeds=entry_proofs),
        Target(name="tile-path", call=tiles, seeds=lambda: [
            b"tile/0/x001/x234/067.p/5", b"tile/entries/000.p/17", b"tile/63/x001/000",
        ]),
        Target(name="entry-bundle", call=entry_bundle, seeds=entry_bundles),
        Target(name="hash-tile", call=hash_tile, seeds=lambda: [bytes(1 + 32), bytes(8193)]),
        Target(name="merkle", call=proofs, seeds=lambda: [
            (3).to_bytes(9, "big") + (7).to_bytes(9, "big") + bytes(96), bytes(18),
        ]),
        Target(name="base64", call=base64_line, seeds=lambda: [b"AAAA", b"AA==", b"12345"]),
        Target(name="bundle", call=bundle, seeds=samples.bundles),
        Target(name="story", call=story, seeds=stories),
        Target(name="manifest", call=parse_manifest, seeds=samples.manifests),
        Target(name="policy", call=parse_policy, seeds=lambda: [samples.POLICY]),
        Target(name="evidence", call=evidence, seeds=samples.all_evidence),
        Target(name="evidence-signed", call=evidence_signed, seeds=samples.all_evidence),
        Target(name="receipt", call=receipt, seeds=one(samples.receipt)),
        Target(name="packet", call=packet, seeds=samples.packets),
        Target(
            name="attribution-evidence",
            call=attribution,
            allowed=(InvalidEvent, Inconsistent),
            seeds=samples.attributions,
        ),
        Target(name="l1-section", call=l1_section, seeds=samples.l1_sections),
        Target(name="witness-request", call=parse_request, seeds=one(samples.request)),
        Target(name="records", call=records, seeds=record_files),
        Target(name="canonical", call=parse_canonical, allowed=DOMAIN, seeds=lambda: [
            samples.receipt(), *samples.events()[:5],
        ]),
        Target(
            name="envelope",
            call=lambda data: parse_envelope(data, log=ORIGIN),
            allowed=DOMAIN,
            seeds=lambda: [samples.entries()[0][16:]],
        ),
        Target(name="entry", call=decode_entry, allowed=DOMAIN, seeds=lambda: [
            samples.entries()[0],
        ]),
        Target(
            name="entry-fault",
            call=lambda data: entry_fault(data, ORIGIN),
            seeds=lambda: [samples.entries()[0]],
        ),
        Target(name="event", call=event, allowed=DOMAIN, seeds=samples.events),
        Target(name="rows", call=decode_rows, allowed=DOMAIN, seeds=one(samples.rows_blob)),
        Target(
            name="login",
            call=lambda data: verify_login(data, log=ORIGIN, now=NOW_US),
            allowed=(LedgerError,),
            seeds=one(samples.login),
        ),
    )
}  # fmt: skip
