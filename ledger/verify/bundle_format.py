"""The bytes of a lineage bundle: parse and write, believe nothing. Pure.

Format `tributary/lineage-bundle/v1` (docs/FORMATS.md), RFC 8785 canonical JSON::

    {"format": "tributary/lineage-bundle/v1",
     "log": <origin>, "vkey": <the log's public key>, "subject": <event id>,
     "checkpoint": <signed note>,
     "entries": [{"index": n, "entry": <base64>, "proof": [<position in hashes>, ...]}, ...],
     "hashes": [<hex>, ...],
     "blobs": {<sha256>: <base64>, ...},
     "l1": null | {"checkpoint": <signed note>, "consistency": [<hex>, ...], "section": {...}}}

Entries ascend by index. Proofs of neighbours share most of their hashes, so each hash stands once,
in the order of first use. One bundle has one spelling: a file that would be written differently is
refused, so nothing in it can be changed without being noticed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import check_hash, check_uuid
from ledger.errors import LedgerError, MalformedProof, VerificationError
from ledger.verify.encoding import decode_base64, encode_base64, printable
from ledger.verify.merkle import MAX_CONSISTENCY_HASHES, MAX_INCLUSION_HASHES

FORMAT = "tributary/lineage-bundle/v1"
MAX_BUNDLE_BYTES = 64 * 2**20
MAX_ENTRIES = 20_000
MAX_BLOBS = 64

_FIELDS = ("format", "log", "vkey", "subject", "checkpoint", "entries", "hashes", "blobs", "l1")
_ENTRY_FIELDS = ("index", "entry", "proof")
_L1_FIELDS = ("checkpoint", "consistency", "section")


@dataclass(frozen=True, kw_only=True)
class BundledEntry:
    """Entry bytes, the index they are claimed to stand at, and the way up to the root."""

    index: int
    entry: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class AnchoredCheckpoint:
    """The checkpoint that an EVM chain holds, how it leads to the bundle's own, and the proof that
    the chain holds it (`section`, read by `ledger.verify.l1`)."""

    checkpoint: bytes
    consistency: tuple[bytes, ...]
    section: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A parsed bundle. Nothing in it may be believed before `verify_bundle`."""

    log: str
    vkey: str
    subject: UUID
    checkpoint: bytes
    entries: tuple[BundledEntry, ...]
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    l1: AnchoredCheckpoint | None = None


def parse_bundle(data: bytes) -> Bundle:
    """The parts of a bundle, each decoded; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise MalformedProof(f"a bundle has at most MAX_BUNDLE_BYTES = {MAX_BUNDLE_BYTES} bytes")
    try:
        bundle = _read(parse_canonical(data))
    except VerificationError:
        raise
    except LedgerError as error:
        raise MalformedProof(f"the file is no {FORMAT}: {error}", **error.detail) from error
    if format_bundle(bundle) != data:
        raise MalformedProof(
            "the bundle is not in its one spelling: hashes must stand once, in the order of first "
            "use by the proofs"
        )
    return bundle


def format_bundle(bundle: Bundle) -> bytes:
    """The one spelling of a bundle."""
    positions: dict[bytes, int] = {}
    entries = [
        {
            "index": bundled.index,
            "entry": encode_base64(bundled.entry),
            "proof": [positions.setdefault(node, len(positions)) for node in bundled.proof],
        }
        for bundled in bundle.entries
    ]
    l1 = bundle.l1 and {
        "checkpoint": bundle.l1.checkpoint.decode(),
        "consistency": [node.hex() for node in bundle.l1.consistency],
        "section": bundle.l1.section,
    }
    return canonical_json(
        {
            "format": FORMAT,
            "log": bundle.log,
            "vkey": bundle.vkey,
            "subject": str(bundle.subject),
            "checkpoint": bundle.checkpoint.decode(),
            "entries": entries,
            "hashes": [node.hex() for node in positions],
            "blobs": {name: encode_base64(blob) for name, blob in bundle.blobs.items()},
            "l1": l1,
        }
    )


def _read(value: Any) -> Bundle:
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise MalformedProof(f"the format is not {FORMAT}", field="format")
    fields = _object(value, _FIELDS, "the bundle")
    hashes = [_hash(node, f"hashes[{n}]") for n, node in enumerate(_list(fields["hashes"], None))]
    items = _list(fields["entries"], MAX_ENTRIES, "entries")
    entries = tuple(_entry(item, n, hashes) for n, item in enumerate(items))
    if not entries:
        raise MalformedProof("entries must hold at least one", field="entries")
    for before, after in pairwise(entries):
        if before.index >= after.index:
            raise MalformedProof(
                f"entry {after.index} follows entry {before.index}: indexes must ascend",
                field="entries",
            )
    return Bundle(
        log=_text(fields["log"], "log"),
        vkey=_text(fields["vkey"], "vkey"),
        subject=check_uuid(fields["subject"], "subject"),
        checkpoint=_text(fields["checkpoint"], "checkpoint").encode(),
        entries=entries,
        blobs=_blobs(fields["blobs"]),
        l1=None if fields["l1"] is None else _anchored(fields["l1"]),
    )


def _entry(value: Any, n: int, hashes: Sequence[bytes]) -> BundledEntry:
    where = f"entries[{n}]"
    fields = _object(value, _ENTRY_FIELDS, where)
    index = fields["index"]
    if not _is_integer(index) or index < 0:
        raise MalformedProof(f"{where}.index must be an integer from 0", field=f"{where}.index")
    path = _list(fields["proof"], MAX_INCLUSION_HASHES, f"{where}.proof")
    if not all(_is_integer(at) and 0 <= at < len(hashes) for at in path):
        raise MalformedProof(
            f"{where}.proof must hold positions in hashes, 0 to {len(hashes) - 1}",
            field=f"{where}.proof",
            entry=index,
        )
    data = decode_base64(_text(fields["entry"], f"{where}.entry"), f"{where}.entry")
    return BundledEntry(index=index, entry=data, proof=tuple(hashes[at] for at in path))


def _blobs(value: Any) -> dict[str, bytes]:
    if not isinstance(value, dict) or len(value) > MAX_BLOBS:
        raise MalformedProof(f"blobs must be an object of at most {MAX_BLOBS}", field="blobs")
    return {
        check_hash(name, "blobs"): decode_base64(_text(blob, "blobs"), f"blobs.{printable(name)}")
        for name, blob in value.items()
    }


def _anchored(value: Any) -> AnchoredCheckpoint:
    fields = _object(value, _L1_FIELDS, "l1")
    nodes = _list(fields["consistency"], MAX_CONSISTENCY_HASHES, "l1.consistency")
    if not isinstance(fields["section"], dict):
        raise MalformedProof("l1.section must be an object", field="l1.section")
    return AnchoredCheckpoint(
        checkpoint=_text(fields["checkpoint"], "l1.checkpoint").encode(),
        consistency=tuple(_hash(node, f"l1.consistency[{n}]") for n, node in enumerate(nodes)),
        section=fields["section"],
    )


def _object(value: Any, fields: Iterable[str], where: str) -> dict[str, Any]:
    expected = set(fields)
    if not isinstance(value, dict) or value.keys() != expected:
        have = sorted(value) if isinstance(value, dict) else []
        missing = sorted(expected.difference(have))
        unknown = [printable(name) for name in have if name not in expected][:10]
        raise MalformedProof(
            f"{where} must be an object with exactly {', '.join(sorted(expected))}: missing "
            f"{missing or 'none'}, unknown {unknown or 'none'}",
            field=where,
        )
    return value


def _list(value: Any, limit: int | None, where: str = "hashes") -> list[Any]:
    if not isinstance(value, list) or (limit is not None and len(value) > limit):
        raise MalformedProof(f"{where} must be a list of at most {limit} items", field=where)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedProof(f"{where} must be a string", field=where)
    return value


def _hash(value: Any, where: str) -> bytes:
    return bytes.fromhex(check_hash(value, where))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
