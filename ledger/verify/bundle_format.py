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

`tributary/lineage-bundle/v2` has two more lists, `disclosed` (rows that their contributor shows:
`disclosure`) and `payouts` (lines of payout trees: `payouts`), not both empty: a bundle that needs
neither is spelled as version 1, which every verifier reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import check_hash, check_uuid
from ledger.errors import LedgerError, MalformedProof, VerificationError
from ledger.verify.disclosure import DisclosedRow, read_disclosed, write_disclosed
from ledger.verify.encoding import decode_base64, encode_base64, parse_json, printable
from ledger.verify.fields import count_of, hash_of, list_of, object_of, text_of
from ledger.verify.merkle import MAX_CONSISTENCY_HASHES, MAX_INCLUSION_HASHES
from ledger.verify.payouts import PayoutLine, read_payouts, write_payouts

FORMAT = "tributary/lineage-bundle/v1"
FORMAT_V2 = "tributary/lineage-bundle/v2"
MAX_BUNDLE_BYTES = 64 * 2**20
MAX_ENTRIES = 20_000
MAX_BLOBS = 64

_FIELDS = ("format", "log", "vkey", "subject", "checkpoint", "entries", "hashes", "blobs", "l1")
_V2_FIELDS = (*_FIELDS, "disclosed", "payouts")
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
    disclosed: tuple[DisclosedRow, ...] = ()
    payouts: tuple[PayoutLine, ...] = ()

    @property
    def format(self) -> str:
        """The version that this bundle is spelled in: the second only where it needs it."""
        return FORMAT_V2 if self.disclosed or self.payouts else FORMAT


def parse_bundle(data: bytes) -> Bundle:
    """The parts of a bundle, each decoded; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise MalformedProof(f"a bundle has at most MAX_BUNDLE_BYTES = {MAX_BUNDLE_BYTES} bytes")
    try:
        bundle = _read(parse_json(data))
    except VerificationError:
        raise
    except LedgerError as error:
        raise MalformedProof(f"the file is no lineage bundle: {error}", **error.detail) from error
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
    value = {
        "format": bundle.format,
        "log": bundle.log,
        "vkey": bundle.vkey,
        "subject": str(bundle.subject),
        "checkpoint": bundle.checkpoint.decode(),
        "entries": entries,
        "hashes": [node.hex() for node in positions],
        "blobs": {name: encode_base64(blob) for name, blob in bundle.blobs.items()},
        "l1": l1,
    }
    if bundle.format == FORMAT_V2:
        value["disclosed"] = write_disclosed(bundle.disclosed)
        value["payouts"] = write_payouts(bundle.payouts)
    return canonical_json(value)


def _read(value: Any) -> Bundle:
    version = value.get("format") if isinstance(value, dict) else FORMAT
    if version not in (FORMAT, FORMAT_V2):
        raise MalformedProof(f"the format is neither {FORMAT} nor {FORMAT_V2}", field="format")
    second = version == FORMAT_V2
    fields = object_of(value, _V2_FIELDS if second else _FIELDS, "the bundle")
    nodes = list_of(fields["hashes"], None, "hashes")
    hashes = [hash_of(node, f"hashes[{n}]") for n, node in enumerate(nodes)]
    items = list_of(fields["entries"], MAX_ENTRIES, "entries")
    entries = tuple(_entry(item, n, hashes) for n, item in enumerate(items))
    if not entries:
        raise MalformedProof("entries must hold at least one", field="entries")
    for before, after in pairwise(entries):
        if before.index >= after.index:
            raise MalformedProof(
                f"entry {after.index} follows entry {before.index}: indexes must ascend",
                field="entries",
            )
    bundle = Bundle(
        log=text_of(fields["log"], "log"),
        vkey=text_of(fields["vkey"], "vkey"),
        subject=check_uuid(fields["subject"], "subject"),
        checkpoint=text_of(fields["checkpoint"], "checkpoint").encode(),
        entries=entries,
        blobs=_blobs(fields["blobs"]),
        l1=None if fields["l1"] is None else _anchored(fields["l1"]),
        disclosed=read_disclosed(fields["disclosed"]) if second else (),
        payouts=read_payouts(fields["payouts"]) if second else (),
    )
    if bundle.format != version:
        raise MalformedProof(
            f"a bundle without disclosed rows and payouts is spelled as {FORMAT}", field="format"
        )
    return bundle


def _entry(value: Any, n: int, hashes: Sequence[bytes]) -> BundledEntry:
    where = f"entries[{n}]"
    fields = object_of(value, _ENTRY_FIELDS, where)
    index = count_of(fields["index"], f"{where}.index")
    path = list_of(fields["proof"], MAX_INCLUSION_HASHES, f"{where}.proof")
    if not all(_is_position(at, len(hashes)) for at in path):
        raise MalformedProof(
            f"{where}.proof must hold positions in hashes, 0 to {len(hashes) - 1}",
            field=f"{where}.proof",
            entry=index,
        )
    data = decode_base64(text_of(fields["entry"], f"{where}.entry"), f"{where}.entry")
    return BundledEntry(index=index, entry=data, proof=tuple(hashes[at] for at in path))


def _blobs(value: Any) -> dict[str, bytes]:
    if not isinstance(value, dict) or len(value) > MAX_BLOBS:
        raise MalformedProof(f"blobs must be an object of at most {MAX_BLOBS}", field="blobs")
    return {
        check_hash(name, "blobs"): decode_base64(text_of(blob, "blobs"), f"blobs.{printable(name)}")
        for name, blob in value.items()
    }


def _anchored(value: Any) -> AnchoredCheckpoint:
    fields = object_of(value, _L1_FIELDS, "l1")
    nodes = list_of(fields["consistency"], MAX_CONSISTENCY_HASHES, "l1.consistency")
    if not isinstance(fields["section"], dict):
        raise MalformedProof("l1.section must be an object", field="l1.section")
    return AnchoredCheckpoint(
        checkpoint=text_of(fields["checkpoint"], "l1.checkpoint").encode(),
        consistency=tuple(hash_of(node, f"l1.consistency[{n}]") for n, node in enumerate(nodes)),
        section=fields["section"],
    )


def _is_position(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
