"""The bytes of an evidence file: parse and write, believe nothing. Pure.

Format `tributary/evidence/v1` (docs/FORMATS.md), RFC 8785 canonical JSON::

    {"format": "tributary/evidence/v1", "kind": "split-view",
     "log": <origin>, "vkey": <the log's public key>,
     "found_at": <us>, "says": <one plain sentence>,
     "items": {<name>: <base64>, ...}}

What somebody saw a log (or its witnesses, or its anchor) do wrong, kept so that others can judge
it. `found_at` and `says` are the finder's words and nobody's signature covers them; `items` are
bytes as they were received, and `ledger.verify.evidence` says what those prove. Each kind has one
or more *shapes*: the names of items that it may carry, no more and no fewer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.errors import LedgerError, MalformedProof, VerificationError
from ledger.verify.encoding import decode_base64, encode_base64, printable
from ledger.verify.fields import count_of, object_of, text_of

FORMAT = "tributary/evidence/v1"
MAX_EVIDENCE_BYTES = 4 * 2**20
"""Two notes of the largest size that a note may have, and what base64 adds."""
MAX_SAYS_CHARS = 1_000
MAX_ORIGIN_CHARS = 128

_FIELDS = ("format", "kind", "log", "vkey", "found_at", "says", "items")
_PAIR = frozenset({"checkpoint_1", "checkpoint_2"})

SHAPES: Mapping[str, tuple[frozenset[str], ...]] = {
    "split-view": (_PAIR,),
    "rollback": (_PAIR,),
    "inconsistent": (
        _PAIR | {"nodes"},
        _PAIR | {"consistency"},
        _PAIR,
        frozenset({"checkpoint"}),
        frozenset({"checkpoint", "path", "served", "computed"}),
        frozenset({"entry", "leaf", "proof"}),
    ),
    "wrong-size": (frozenset({"entry", "proof"}), frozenset({"checkpoint", "path"})),
    "bad-entry": (
        frozenset({"entry", "proof"}),
        frozenset({"entry", "proof", "before", "before_proof"}),
    ),
    "misplaced-entry": (frozenset({"entry", "proof"}),),
    "broken-receipt": (
        frozenset({"receipt", "leaf", "proof"}),
        frozenset({"receipt", "checkpoint", "policy"}),
    ),
    "anchor-mismatch": (
        frozenset({"checkpoint", "anchor", "nodes"}),
        frozenset({"checkpoint", "anchor"}),
    ),
    "witness-conflict": (
        _PAIR | {"witness"},
        _PAIR | {"witness", "nodes"},
        frozenset({"checkpoint", "policy"}),
    ),
    "bad-checkpoint": (frozenset({"checkpoint"}),),
}
"""Every kind, and the sets of items that it may carry."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A parsed evidence file. Nothing in it may be believed before `check_evidence`.

    `log` is the origin, `vkey` the key under which the finder knew the log, `found_at` microseconds
    UTC by the finder's clock, `says` one line. `items` are raw bytes by name, as SHAPES has them.
    """

    kind: str
    log: str
    vkey: str
    found_at: int
    says: str
    items: Mapping[str, bytes]


def parse_evidence(data: bytes) -> Evidence:
    """The parts of an evidence file, decoded; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_EVIDENCE_BYTES:
        raise MalformedProof(
            f"an evidence file has at most MAX_EVIDENCE_BYTES = {MAX_EVIDENCE_BYTES} bytes"
        )
    try:
        return _read(parse_canonical(data))
    except VerificationError:
        raise
    except LedgerError as error:
        raise MalformedProof(f"the file is no {FORMAT}: {error}", **error.detail) from error


def format_evidence(evidence: Evidence) -> bytes:
    """The one spelling of an evidence file."""
    assert frozenset(evidence.items) in SHAPES[evidence.kind], (evidence.kind, set(evidence.items))
    assert one_line(evidence.says) == evidence.says
    data = canonical_json(
        {
            "format": FORMAT,
            "kind": evidence.kind,
            "log": evidence.log,
            "vkey": evidence.vkey,
            "found_at": evidence.found_at,
            "says": evidence.says,
            "items": {name: encode_base64(item) for name, item in evidence.items.items()},
        }
    )
    assert len(data) <= MAX_EVIDENCE_BYTES
    return data


def one_line(text: str) -> str:
    """Text as `says` may hold it: printable, one line, within the limit."""
    return printable(text, MAX_SAYS_CHARS)


def _read(value: Any) -> Evidence:
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise MalformedProof(f"the format is not {FORMAT}", field="format")
    fields = object_of(value, _FIELDS, "the evidence")
    kind = text_of(fields["kind"], "kind")
    if kind not in SHAPES:
        raise MalformedProof(
            f"the kind is {printable(kind)!r}, known are {', '.join(sorted(SHAPES))}", field="kind"
        )
    log = text_of(fields["log"], "log")
    if not 0 < len(log) <= MAX_ORIGIN_CHARS:
        raise MalformedProof(f"log must have 1 to {MAX_ORIGIN_CHARS} characters", field="log")
    says = text_of(fields["says"], "says")
    if not says or one_line(says) != says:
        raise MalformedProof(
            f"says must be one line of 1 to {MAX_SAYS_CHARS} printable characters", field="says"
        )
    return Evidence(
        kind=kind,
        log=log,
        vkey=text_of(fields["vkey"], "vkey"),
        found_at=count_of(fields["found_at"], "found_at"),
        says=says,
        items=_items(fields["items"], kind),
    )


def _items(value: Any, kind: str) -> dict[str, bytes]:
    if not isinstance(value, dict) or frozenset(value) not in SHAPES[kind]:
        shapes = "; or ".join(", ".join(sorted(shape)) for shape in SHAPES[kind])
        raise MalformedProof(f"items of {kind} must be: {shapes}", field="items")
    return {
        name: decode_base64(text_of(item, f"items.{name}"), f"items.{name}")
        for name, item in value.items()
    }
