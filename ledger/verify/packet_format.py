"""The bytes of an audit packet: parse and write, believe nothing. Pure.

Format `tributary/attribution-packet/v1` (docs/FORMATS.md), RFC 8785 canonical JSON::

    {"format": "tributary/attribution-packet/v1",
     "evidence": {...}, "evidence_sha256": <hex>,
     "index_root": <hex>, "rows": n, "position": n,
     "vector": <base64>, "scale": n, "line": {...}, "proof": <base64>,
     "score": <decimal>}

`evidence` is the attribution's evidence document as it stands: canonical JSON inside canonical JSON
keeps its bytes, so it still hashes to its name. `line` is the row's line of `rows.jsonl`, likewise.
`proof` is the hashes of the RFC 9162 path behind one another, the leaf's sibling first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import check_actor, check_uuid
from ledger.errors import LedgerError, MalformedProof, VerificationError
from ledger.verify.encoding import decode_base64, encode_base64, parse_json
from ledger.verify.fields import count_of, hash_of, object_of, text_of
from ledger.verify.merkle import HASH_BYTES, MAX_INCLUSION_HASHES

FORMAT = "tributary/attribution-packet/v1"
MAX_PACKET_BYTES = 17 * 2**20
"""Evidence is at most 16 MiB, nearly all of it withdrawn contributions. A usual packet has 8 KB."""
MAX_DIM = 65_536
MAX_SCALE = 2**32 - 1
MAX_SCORE_CHARS = 26

_FIELDS = ("format", "evidence", "evidence_sha256", "index_root", "rows", "position", "vector",
           "scale", "line", "proof", "score")  # fmt: skip
_LINE_FIELDS = ("contribution", "index", "row_hash", "contributor", "registered_index", "cluster")


@dataclass(frozen=True, kw_only=True)
class Packet:
    """A parsed packet. Nothing in it may be believed before `check_packet`.

    `position` is the row's place among the index's `rows` rows; `vector` (dim,) signed bytes.
    """

    evidence: Mapping[str, Any]
    evidence_sha256: str
    index_root: str
    rows: int
    position: int
    vector: bytes
    scale: int
    line: Mapping[str, Any]
    proof: tuple[bytes, ...]
    score: int

    @property
    def row_id(self) -> str:
        """`<contribution>/<row number>`, as evidence names rows."""
        return f"{self.line['contribution']}/{self.line['index']}"

    @property
    def leaf(self) -> bytes:
        """What the index's tree holds at `position`: vector, scale (u32 big-endian), line."""
        return self.vector + self.scale.to_bytes(4, "big") + canonical_json(dict(self.line))


def format_packet(packet: Packet) -> bytes:
    """The one spelling of a packet."""
    return canonical_json(
        {
            "format": FORMAT,
            "evidence": dict(packet.evidence),
            "evidence_sha256": packet.evidence_sha256,
            "index_root": packet.index_root,
            "rows": packet.rows,
            "position": packet.position,
            "vector": encode_base64(packet.vector),
            "scale": packet.scale,
            "line": dict(packet.line),
            "proof": encode_base64(b"".join(packet.proof)),
            "score": str(packet.score),
        }
    )


def parse_packet(data: bytes) -> Packet:
    """The parts of a packet; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_PACKET_BYTES:
        raise MalformedProof(f"a packet has at most MAX_PACKET_BYTES = {MAX_PACKET_BYTES} bytes")
    try:
        packet = _read(parse_json(data))
        spelled = format_packet(packet)
    except VerificationError:
        raise
    except LedgerError as error:
        raise MalformedProof(f"the file is no audit packet: {error}", **error.detail) from error
    if spelled != data:
        raise MalformedProof("the packet is not in its one spelling")
    return packet


def _read(value: Any) -> Packet:
    fields = object_of(value, _FIELDS, "the packet")
    if fields["format"] != FORMAT:
        raise MalformedProof(f"the format is not {FORMAT}", field="format")
    scale = count_of(fields["scale"], "scale")
    vector = decode_base64(text_of(fields["vector"], "vector"), "vector")
    if scale > MAX_SCALE or not 1 <= len(vector) <= MAX_DIM:
        raise MalformedProof(f"a row has 1 to {MAX_DIM} entries and a scale below 2^32")
    return Packet(
        evidence=_evidence(fields["evidence"]),
        evidence_sha256=hash_of(fields["evidence_sha256"], "evidence_sha256").hex(),
        index_root=hash_of(fields["index_root"], "index_root").hex(),
        rows=count_of(fields["rows"], "rows", low=1),
        position=count_of(fields["position"], "position"),
        vector=vector,
        scale=scale,
        line=_line(fields["line"]),
        proof=_proof(fields["proof"]),
        score=_score(fields["score"]),
    )


def _evidence(value: Any) -> dict[str, Any]:
    """Only what this room reads of it; the hash binds the rest."""
    if not isinstance(value, dict):
        raise MalformedProof("evidence must be an object", field="evidence")
    check_uuid(value.get("inference"), "evidence.inference")
    hash_of(value.get("index_sha256"), "evidence.index_sha256")
    text_of(value.get("method"), "evidence.method")
    return value


def _line(value: Any) -> dict[str, Any]:
    line = object_of(value, _LINE_FIELDS, "line")
    check_uuid(line["contribution"], "line.contribution")
    check_actor(line["contributor"], "line.contributor")
    hash_of(line["row_hash"], "line.row_hash")
    for name in ("index", "registered_index", "cluster"):
        count_of(line[name], f"line.{name}")
    return line


def _proof(value: Any) -> tuple[bytes, ...]:
    data = decode_base64(text_of(value, "proof"), "proof")
    if len(data) % HASH_BYTES or len(data) > HASH_BYTES * MAX_INCLUSION_HASHES:
        raise MalformedProof(
            f"proof must be at most {MAX_INCLUSION_HASHES} hashes of {HASH_BYTES} bytes",
            field="proof",
        )
    return tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES))


def _score(value: Any) -> int:
    text = text_of(value, "score")
    try:
        score = int(text) if len(text) <= MAX_SCORE_CHARS else None
    except ValueError:
        score = None
    if score is None or str(score) != text:
        raise MalformedProof("score must be an integer as a decimal string", field="score")
    return score
