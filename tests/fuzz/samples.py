"""Valid inputs of every kind, signed with keys that everybody knows, the same in every run."""

import base64
import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

from nacl.signing import SigningKey

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.domain.login import sign_login
from ledger.domain.rows import DataRow, encode_rows
from ledger.log import tree
from ledger.log.add_checkpoint import AddCheckpoint, format_request
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.evidence_format import Evidence, format_evidence
from ledger.verify.merkle import tree_root
from ledger.verify.note import (
    COSIGNATURE,
    cosign_text,
    format_note,
    format_skey,
    format_vkey,
    sign_text,
    vkey_of,
)
from ledger.verify.receipt import (
    CONTEXT,
    EvmSignature,
    Promise,
    Receipt,
    format_receipt,
    promise_bytes,
)
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof

VECTORS = Path(__file__).parents[1] / "vectors"
SHARED = Path(__file__).parents[2].parent / "shared" / "vectors"
FOUND = Path(__file__).parent / "found"

ORIGIN = "fuzz.example/log"
LOG_KEY = SigningKey(sha256(b"fuzz log").digest())
WITNESS_KEY = SigningKey(sha256(b"fuzz witness").digest())
ACTOR_KEY = SigningKey(sha256(b"fuzz actor").digest())
VKEY = vkey_of(ORIGIN, LOG_KEY)
WITNESS = vkey_of("witness.example", WITNESS_KEY, COSIGNATURE)
NOW_US = 1_700_000_000_000_000
LEAVES = 300

ROWS = [DataRow(prompt=f"{n}?", completion=f"{n}.", salt=f"{n:032x}") for n in range(3)]
POLICY = (
    f"log {format_vkey(VKEY)} https://fuzz.example/log\n# one of two\n"
    f"witness w1 {format_vkey(WITNESS)}\n"
    f"witness w2 {format_vkey(vkey_of('w2.example', ACTOR_KEY, COSIGNATURE))} http://w2\n"
    "group g 1 w1 w2\nquorum g\n"
).encode()


@cache
def entries() -> tuple[bytes, ...]:
    return tuple(
        encode_entry(
            n,
            NOW_US + n,
            sign_event(
                ACTOR_KEY,
                type="identity.registered",
                log=ORIGIN,
                body={"name": f"name {n}"},
                id=UUID(int=(n << 80) | (4 << 76) | (8 << 60)),
                at=NOW_US,
            ),
        )
        for n in range(LEAVES)
    )


@cache
def leaves() -> tuple[bytes, ...]:
    return tuple(leaf_hash(entry) for entry in entries())


def path(ranges: list[tuple[int, int]]) -> tuple[bytes, ...]:
    tiles = tree.integrate(0, leaves(), lambda wanted: {})
    return tuple(tree.range_hashes(ranges, lambda wanted: tiles))


def note(text: str) -> bytes:
    """Any text, signed by the log and its witness."""
    lines = [
        sign_text(text, ORIGIN, LOG_KEY),
        cosign_text(text, "witness.example", WITNESS_KEY, NOW_US // 1_000_000),
    ]
    return format_note(text, lines)


def checkpoint(size: int, root: bytes | None = None) -> bytes:
    true = tree_root(leaves()[:size])
    return note(format_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root or true)))


def proof(index: int, size: int) -> bytes:
    found = TlogProof(
        index=index, proof=path(tree.inclusion_ranges(index, size)), checkpoint=checkpoint(size)
    )
    return format_tlog_proof(found)


def receipt(first: int = 3, count: int = 2) -> bytes:
    promise = Promise(
        log=ORIGIN,
        first_index=first,
        leaf_hashes=leaves()[first : first + count],
        recorded_at=NOW_US,
        included_by=NOW_US + 10_000_000,
    )
    evm = EvmSignature(
        chain_id=1, contract="0x" + "11" * 20, signer="0x" + "22" * 20, sig=bytes(65)
    )
    sig = LOG_KEY.sign(CONTEXT + promise_bytes(promise)).signature
    return format_receipt(Receipt(promise=promise, sig=sig, evm=evm))


def evidence(kind: str, **items: bytes) -> bytes:
    return format_evidence(
        Evidence(
            kind=kind,
            log=ORIGIN,
            vkey=format_vkey(VKEY),
            found_at=NOW_US,
            says="a sample",
            items=items,
        )
    )


def all_evidence() -> list[bytes]:
    """One of every kind and shape; most show nothing wrong, which is for the judges to say."""
    old, new, fork = checkpoint(7), checkpoint(20), checkpoint(7, sha256(b"fork").digest())
    nodes = b"".join(path(tree.consistency_ranges(7, 20)))
    pair = {"checkpoint_1": old, "checkpoint_2": new}
    anchor = {
        "chain_id": 1, "contract": "0x" + "11" * 20, "size": 7, "root": "ab" * 32, "section": None
    }  # fmt: skip
    witness = format_vkey(WITNESS).encode()
    moved = encode_entry(9, NOW_US, entries()[4][16:])
    single = format_tlog_proof(
        TlogProof(index=0, proof=(), checkpoint=checkpoint(1, leaf_hash(moved)))
    )
    tile = b"".join(leaves()[:7])
    return [
        evidence("split-view", checkpoint_1=old, checkpoint_2=fork),
        evidence("rollback", **pair),
        evidence("inconsistent", **pair),
        evidence("inconsistent", **pair, nodes=nodes),
        evidence("inconsistent", **pair, consistency=nodes),
        evidence("inconsistent", checkpoint=old),
        evidence(
            "inconsistent", checkpoint=old, path=b"tile/0/000.p/7", served=tile[::-1], computed=tile
        ),
        evidence("inconsistent", entry=entries()[3], leaf=bytes(32), proof=proof(3, 7)),
        evidence("wrong-size", entry=entries()[6], proof=proof(6, 7)),
        evidence("wrong-size", checkpoint=old, path=b"tile/0/000.p/7"),
        evidence("bad-entry", entry=moved, proof=single),
        evidence(
            "bad-entry", entry=entries()[4], proof=proof(4, 7),
            before=entries()[3], before_proof=proof(3, 7),
        ),
        evidence("misplaced-entry", entry=moved, proof=single),
        evidence("broken-receipt", receipt=receipt(), leaf=bytes(32), proof=proof(3, 20)),
        evidence("broken-receipt", receipt=receipt(), checkpoint=old, policy=POLICY),
        evidence("anchor-mismatch", checkpoint=new, anchor=canonical_json(anchor)),
        evidence("anchor-mismatch", checkpoint=new, anchor=canonical_json(anchor), nodes=nodes),
        evidence("witness-conflict", **pair, witness=witness),
        evidence("witness-conflict", **pair, witness=witness, nodes=nodes),
        evidence("witness-conflict", checkpoint=old, policy=POLICY),
        evidence("bad-checkpoint", checkpoint=note("no checkpoint\n")),
    ]  # fmt: skip


# --- other inputs ---


def keys() -> list[bytes]:
    return [
        format_vkey(VKEY).encode(),
        format_vkey(WITNESS).encode(),
        format_skey(ORIGIN, LOG_KEY).encode(),
    ]


def bundles() -> list[bytes]:
    """The frozen ones, good and bad."""
    return [path.read_bytes() for path in sorted((VECTORS / "bundles").rglob("*.lineage.json"))]


def good_bundles() -> list[bytes]:
    found = []
    for folder in sorted((VECTORS / "bundles").iterdir()):
        good = json.loads((folder / "expected.json").read_bytes())["good"]
        found += [(folder / f"{name}.lineage.json").read_bytes() for name in good]
    return found


def packets() -> list[bytes]:
    return [path.read_bytes() for path in sorted((VECTORS / "packets").glob("*.packet.json"))]


@cache
def packet_bundle() -> bytes:
    return (VECTORS / "packets" / "answer.lineage.json").read_bytes()


def attributions() -> list[bytes]:
    """The evidence in a good packet, an older one, and one of an answer that nobody attributed."""
    second = json.loads((VECTORS / "packets" / "row.packet.json").read_bytes())["evidence"]
    later = ("against", "spans", "terms")
    first = {name: value for name, value in second.items() if name not in later}
    nobody = {"v": 1, "method": "none/v1", "reason": "the answer is blank"}
    return [canonical_json(value) for value in (second, {**first, "v": 1}, nobody)]


def manifests() -> list[bytes]:
    blobs = {blob for data in good_bundles() for blob in json.loads(data)["blobs"].values()}
    raw = sorted(base64.b64decode(blob) for blob in blobs)
    return [blob for blob in raw if blob.startswith(b'{"adapter_sha256"')]


def events() -> list[bytes]:
    """`{"body":..., "type":...}` of every sort of event in the frozen bundles."""
    found: dict[str, Any] = {}
    for data in good_bundles():
        for entry in json.loads(data)["entries"]:
            event = json.loads(base64.b64decode(entry["entry"])[16:])
            found[event["type"]] = {"body": event["body"], "type": event["type"]}
    return [canonical_json(event) for event in found.values()]


@cache
def l1_vector() -> Any:
    return json.loads((VECTORS / "l1_section.json").read_bytes())


def l1_root() -> bytes:
    return bytes.fromhex(l1_vector()["root"])


def l1_sections() -> list[bytes]:
    return [canonical_json(l1_vector()["section"])]


def rows_blob() -> bytes:
    return encode_rows(ROWS)


def login() -> bytes:
    return sign_login(ACTOR_KEY, log=ORIGIN, at=NOW_US, label="x")


def request() -> bytes:
    nodes = path(tree.consistency_ranges(7, 20))
    return format_request(AddCheckpoint(old_size=7, proof=nodes, checkpoint=checkpoint(20)))


def shared(pattern: str) -> list[bytes]:
    """Public vectors, where they are on this machine."""
    return [data for _, data in shared_named(pattern)]


def shared_named(pattern: str) -> list[tuple[str, bytes]]:
    found = sorted(SHARED.glob(pattern))
    return [(path.name, path.read_bytes()) for path in found if path.is_file()]


def shared_json(name: str, field: str, key: str = "cases") -> list[bytes]:
    if not (SHARED / name).is_file():
        return []
    found = [case[field] for case in json.loads((SHARED / name).read_bytes())[key]]
    return [base64.b64decode(v) if field.endswith("b64") else v.encode() for v in found]
