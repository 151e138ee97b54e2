"""One row's influence on one answer, small enough to send: an audit packet, checked offline. Pure.

An attribution commits to an index (one short integer vector for each row an adapter was trained on)
and to the answer's sketch (one more such vector). A row's score is their dot product times the
row's scale. So the two vectors, and the row's path to the index's root, prove that row's score, and
say nothing of any other row. The bytes are `packet_format`'s.

A packet alone ties a score to two hashes, `evidence_sha256` and `index_root`. A lineage bundle of
the answer ties those to a signed log: `check_packet` takes both. What neither shows: that sketch
and vectors came out of the model (`tributary attribution verify --weights --index` recomputes
them), and what the row earned (that takes every row's score).
"""

from dataclasses import dataclass
from hashlib import sha256

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import Entry, decode_entry
from ledger.errors import Inconsistent, LedgerError, MalformedProof, VerificationError
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import parse_bundle
from ledger.verify.encoding import decode_base64, printable
from ledger.verify.fields import hash_of, list_of, text_of
from ledger.verify.manifest import parse_manifest
from ledger.verify.merkle import leaf_hash, verify_inclusion
from ledger.verify.packet_format import (
    FORMAT,
    MAX_DIM,
    MAX_PACKET_BYTES,
    Packet,
    format_packet,
    parse_packet,
)
from ledger.verify.verdict import Step, Verdict

__all__ = [
    "FORMAT",
    "MAX_PACKET_BYTES",
    "STEP_NAMES",
    "Packet",
    "check_packet",
    "format_packet",
    "parse_packet",
]

SKETCH_MAGIC = b"tributary/attribution-sketch/v1\n"
LIMIT = 127
STEP_NAMES = {1: "parse", 2: "evidence", 3: "inclusion", 4: "score", 5: "bundle"}


def check_packet(
    data: bytes, *, bundle: bytes | None = None, trusted_vkey: str | None = None
) -> Verdict:
    """Recompute one row's score; the verdict says what that proves.

    1. Parse: the bytes are one packet in its one spelling, within the named limits.
    2. Evidence: the document hashes to `evidence_sha256`, and its sketch to the hash it gives.
    3. Inclusion: vector, scale and line are leaf `position` of the tree under `index_root`.
    4. Score: vector · sketch x scale is the packet's score, and the evidence's where it names the
       row.
    5. Bundle (skipped without one): it verifies (under `trusted_vkey`, where given), and its events
       name this evidence, this index, this row, and whose it is.

    Raises a VerificationError that names what failed, in `detail["step"]` the step too. Nothing
    else, whatever the bytes are.
    """
    steps: list[Step] = []
    try:
        return _check(data, bundle, trusted_vkey, steps)
    except VerificationError as error:
        error.detail["step"] = len(steps) + 1
        raise
    except LedgerError as error:
        raise MalformedProof(error.message, **error.detail, step=len(steps) + 1) from error


def _check(
    data: bytes, bundle: bytes | None, trusted_vkey: str | None, steps: list[Step]
) -> Verdict:
    # 1. Parse.
    packet = parse_packet(data)
    steps.append(_step(1, f"{FORMAT}, {len(data)} bytes"))

    # 2. The evidence and the sketch in it.
    sketch = _check_evidence(packet)
    steps.append(_step(2, f"hashes to {packet.evidence_sha256}; a sketch of {len(sketch)} entries"))

    # 3. The row under the index's root.
    verify_inclusion(
        index=packet.position,
        size=packet.rows,
        leaf=leaf_hash(packet.leaf),
        proof=packet.proof,
        root=bytes.fromhex(packet.index_root),
    )
    steps.append(_step(3, f"row {packet.position} of {packet.rows} under {packet.index_root}"))

    # 4. The score.
    named = _check_score(packet, sketch)
    steps.append(_step(4, f"{packet.score} = vector · sketch x {packet.scale}{named}"))

    # 5. What the log says.
    events = None
    if bundle is None:
        steps.append(_skip(5, "no bundle was given"))
    else:
        events = _check_bundle(packet, bundle, trusted_vkey)
        steps.append(_step(5, f"entries {events.attribution.index} and {events.completed.index}"))
    return _verdict(packet, steps, events, own_key=trusted_vkey is not None)


def _check_evidence(packet: Packet) -> list[int]:
    """The sketch's entries, once document and sketch have the hashes that are claimed."""
    found = sha256(canonical_json(dict(packet.evidence))).hexdigest()
    if found != packet.evidence_sha256:
        raise Inconsistent(
            f"the evidence hashes to {found}, not to {packet.evidence_sha256}: altered",
            field="evidence",
        )
    sketch = decode_base64(text_of(packet.evidence.get("sketch"), "evidence.sketch"), "the sketch")
    claimed = hash_of(packet.evidence.get("sketch_sha256"), "evidence.sketch_sha256")
    if sha256(sketch).digest() != claimed:
        raise Inconsistent(
            "the sketch does not have the hash that the evidence gives", field="evidence.sketch"
        )
    return _sketch_entries(sketch)


def _sketch_entries(sketch: bytes) -> list[int]:
    """Magic line, norm (u64), dim (u32), entries: docs/FORMATS.md, "Attribution index"."""
    start = len(SKETCH_MAGIC) + 12
    entries = sketch[start:]
    if (
        sketch[: len(SKETCH_MAGIC)] != SKETCH_MAGIC
        or sketch[start - 4 : start] != len(entries).to_bytes(4, "big")
        or not 1 <= len(entries) <= MAX_DIM
    ):
        raise MalformedProof("the evidence holds no sketch", field="evidence.sketch")
    return _signed(entries, "evidence.sketch")


def _check_score(packet: Packet, sketch: list[int]) -> str:
    vector = _signed(packet.vector, "vector")
    if len(vector) != len(sketch):
        raise Inconsistent(
            f"the row has {len(vector)} entries, the sketch {len(sketch)}: not of one index",
            field="vector",
        )
    score = sum(a * b for a, b in zip(vector, sketch, strict=True)) * packet.scale
    if score != packet.score:
        raise Inconsistent(f"the score is {score}, not {packet.score}", field="score")
    for name in ("top_rows", "against"):
        for row in list_of(packet.evidence.get(name, []), None, f"evidence.{name}"):
            if isinstance(row, dict) and row.get("row") == packet.row_id:
                said = row.get("contributor"), row.get("score")
                if said != (packet.line["contributor"], str(score)):
                    raise Inconsistent(
                        f"the evidence's {name} give this row another score or contributor",
                        field=f"evidence.{name}",
                    )
                return f"; the evidence has it among its {name}"
    return ""


@dataclass(frozen=True, kw_only=True)
class _Events:
    attribution: Entry
    completed: Entry
    recorded: Entry
    vkey: str


def _check_bundle(packet: Packet, data: bytes, trusted_vkey: str | None) -> _Events:
    """The bundle's events about this answer, its run and this row's contribution, all agreeing."""
    verify_bundle(data, trusted_vkey=trusted_vkey)
    bundle = parse_bundle(data)
    entries = [decode_entry(bundled.entry, verify=False) for bundled in bundle.entries]
    attribution = _only(entries, "attribution.recorded", "inference", packet.evidence["inference"])
    run = attribution.envelope.body["run"]
    completed = _only(entries, "run.completed", "run", run)
    recorded = _only(entries, "contribution.recorded", "contribution", packet.line["contribution"])
    said, made = attribution.envelope.body, completed.envelope.body
    rows = parse_manifest(bundle.blobs[made["manifest_sha256"]]).rows
    listed = rows.get(packet.line["contribution"], {}).get(packet.line["index"], b"").hex()
    for what, have, want in (
        ("evidence_sha256", packet.evidence_sha256, said["evidence_sha256"]),
        ("evidence.index_sha256", packet.evidence["index_sha256"], said["index_sha256"]),
        ("evidence.method", packet.evidence["method"], said["method"]),
        ("index_root", packet.index_root, made["index_root"]),
        ("rows", packet.rows, made["rows_count"]),
        ("line.row_hash", packet.line["row_hash"], listed),
        ("line.contributor", packet.line["contributor"], recorded.envelope.actor),
        ("line.registered_index", packet.line["registered_index"], recorded.index),
    ):
        if have != want:
            raise Inconsistent(
                f"{what} is {printable(str(have))}; the log says {printable(str(want))}", field=what
            )
    return _Events(
        attribution=attribution, completed=completed, recorded=recorded, vkey=bundle.vkey
    )


def _only(entries: list[Entry], type: str, field: str, value: object) -> Entry:
    for entry in entries:
        if entry.envelope.type == type and entry.envelope.body[field] == value:
            return entry
    raise Inconsistent(
        f"the bundle has no {type} of {field} {printable(str(value))}: it is another answer's",
        field="bundle",
    )


def _verdict(
    packet: Packet, steps: list[Step], events: _Events | None, *, own_key: bool
) -> Verdict:
    answer = printable(str(packet.evidence["inference"]))
    row = f"row {packet.row_id} of {packet.line['contributor']}"
    proven = [
        f"On the answer {answer}, {row} has the score {packet.score}, by the sketch in the "
        f"evidence {packet.evidence_sha256} and the index under {packet.index_root}."
    ]
    trusted = [
        "That the sketch is that of the answer, and the row's vector that of its text: "
        "`tributary attribution verify --weights --index` recomputes both."
    ]
    if events is None:
        trusted += [
            "That the log names this evidence and this index: give the answer's lineage bundle.",
            f"That the index has {packet.rows} rows and this is its row {packet.position}.",
        ]
    else:
        copy = packet.line["cluster"] != packet.position
        proven += [
            f"The log recorded that evidence (entry {events.attribution.index}) and that index "
            f"(entry {events.completed.index}), and the row is one the adapter was trained on, "
            f"signed for by its contributor (entry {events.recorded.index}).",
            f"The index counts the row as a copy of row {packet.line['cluster']}: it earns nothing "
            "of its own, unless an appeal split it off."
            if copy
            else "The row stands for itself in the index: it is no copy of another.",
        ]
        if not own_key:
            trusted.append(f"That the log's key is {printable(events.vkey, 200)}.")
    return Verdict(
        steps=tuple(steps),
        proven=tuple(proven),
        trusted=tuple(trusted),
        facts={
            "inference": packet.evidence["inference"],
            "row": packet.row_id,
            "contributor": packet.line["contributor"],
            "score": str(packet.score),
            "position": packet.position,
            "cluster": packet.line["cluster"],
            "evidence_sha256": packet.evidence_sha256,
            "index_root": packet.index_root,
            "bound": events is not None,
        },
    )  # fmt: skip


def _signed(entries: bytes, where: str) -> list[int]:
    numbers = [byte - 256 if byte > LIMIT else byte for byte in entries]
    if min(numbers) < -LIMIT:
        raise MalformedProof(f"{where}: an entry is -128; expected -127 to 127", field=where)
    return numbers


def _step(number: int, detail: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="ok", detail=detail)


def _skip(number: int, why: str) -> Step:
    return Step(number=number, name=STEP_NAMES[number], status="skipped", detail=why)
