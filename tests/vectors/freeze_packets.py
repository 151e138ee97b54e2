"""Make tests/vectors/packets: `python -m tests.vectors.freeze_packets`.

Packets come from fixed seeds, and a test holds the frozen files against this script. Frozen means
frozen: missing files are written, one that would come out differently stops it. The lineage bundle
beside them was made once: its choice of entries may grow (`ledger.log.bundle`).
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from ledger.errors import VerificationError
from ledger.verify.encoding import decode_base64, encode_base64
from ledger.verify.packet import SKETCH_MAGIC, check_packet
from tests.unit.lineage_world import actor
from tests.unit.packet_world import PacketWorld

FOLDER = Path(__file__).parent / "packets"
BUNDLE = "answer.lineage.json"
SUFFIX = ".packet.json"


def good(world: PacketWorld) -> dict[str, bytes]:
    return {"row": world.bytes(4), "copy": world.bytes(5), "first": world.bytes(0)}


def bad(world: PacketWorld) -> dict[str, bytes]:
    """Each with one thing wrong, and consistent otherwise wherever it can be."""

    def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
        value = copy.deepcopy(json.loads(world.bytes(4)))
        change(value)
        return canonical_json(value)

    def retold(change: Callable[[dict[str, Any]], object]) -> bytes:
        """Another evidence document, under its true hash."""

        def tell(value: dict[str, Any]) -> None:
            change(value["evidence"])
            value["evidence_sha256"] = sha256_hex(canonical_json(value["evidence"]))

        return changed(tell)

    def sketched(sketch: bytes) -> bytes:
        return retold(
            lambda e: e.update(sketch=encode_base64(sketch), sketch_sha256=sha256_hex(sketch))
        )

    def flipped(text: str, at: int) -> str:
        data = bytearray(decode_base64(text, "sample"))
        data[at] ^= 1
        return encode_base64(bytes(data))

    whole, numbers = world.bytes(4), SKETCH_MAGIC + bytes(8)
    return {
        # Form.
        "not-json": b"not a packet",
        "truncated": whole[:-1],
        "not-canonical": whole.replace(b'"rows":6', b'"rows": 6'),
        "other-version": changed(lambda v: v.update(format="tributary/attribution-packet/v2")),
        "unknown-field": changed(lambda v: v.update(note="")),
        "missing-field": changed(lambda v: v.pop("score")),
        "no-evidence": changed(lambda v: v.update(evidence=None)),
        "line-unknown-field": changed(lambda v: v["line"].update(text="private words")),
        "line-no-uuid": changed(lambda v: v["line"].update(contribution="ben")),
        "line-cluster-negative": changed(lambda v: v["line"].update(cluster=-1)),
        "vector-no-base64": changed(lambda v: v.update(vector="*")),
        "vector-empty": changed(lambda v: v.update(vector="")),
        "scale-too-large": changed(lambda v: v.update(scale=2**32)),
        "scale-negative": changed(lambda v: v.update(scale=-1)),
        "rows-none": changed(lambda v: v.update(rows=0)),
        "position-true": changed(lambda v: v.update(position=True)),
        "proof-in-part": changed(lambda v: v.update(proof=encode_base64(bytes(33)))),
        "proof-too-long": changed(lambda v: v.update(proof=encode_base64(bytes(32 * 64)))),
        "score-number": changed(lambda v: v.update(score=int(v["score"]) % 1_000)),
        "score-leading-zero": changed(lambda v: v.update(score="0" + v["score"])),
        # Evidence.
        "evidence-altered": changed(lambda v: v["evidence"].update(placebo="0")),
        "sketch-altered": retold(lambda e: e.update(sketch=flipped(e["sketch"], -1))),
        "sketch-no-magic": sketched(b"x" * 68),
        "sketch-of-another-length": sketched(numbers + (25).to_bytes(4, "big") + bytes(24)),
        "sketch-entry-minus-128": sketched(numbers + (24).to_bytes(4, "big") + b"\x80" * 24),
        # The path.
        "vector-altered": changed(lambda v: v.update(vector=flipped(v["vector"], 0))),
        "scale-altered": changed(lambda v: v.update(scale=v["scale"] + 1)),
        "line-contributor-altered": changed(lambda v: v["line"].update(contributor=actor("eve"))),
        "line-cluster-altered": changed(lambda v: v["line"].update(cluster=1)),
        "position-altered": changed(lambda v: v.update(position=3)),
        "position-beyond": changed(lambda v: v.update(position=6)),
        "proof-altered": changed(lambda v: v.update(proof=flipped(v["proof"], 40))),
        "proof-short": changed(
            lambda v: v.update(proof=encode_base64(decode_base64(v["proof"], "sample")[:-32]))
        ),
        "root-altered": changed(lambda v: v.update(index_root="00" * 32)),
        # The score.
        "sketch-shorter-than-row": sketched(numbers + (8).to_bytes(4, "big") + bytes(8)),
        "score-altered": changed(lambda v: v.update(score=str(int(v["score"]) + 1))),
        "score-of-the-evidence-altered": retold(
            lambda e: [row.update(score="1") for row in e["top_rows"]]
        ),
        # What only the bundle knows.
        "bundle-of-another-answer": retold(
            lambda e: e.update(inference="00000000-0000-4000-8000-000000000000")
        ),
        "bundle-names-other-evidence": retold(lambda e: e.update(placebo="0")),
    }


def make() -> dict[str, bytes]:
    """Every file of the folder by name, but for the bundle."""
    with tempfile.TemporaryDirectory() as folder:
        world = PacketWorld(Path(folder))
        if not (FOLDER / BUNDLE).exists():
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / BUNDLE).write_bytes(world.bundle)
    bundle = (FOLDER / BUNDLE).read_bytes()
    expected: dict[str, Any] = {"vkey": world.vkey, "good": {}, "bad": {}}
    files: dict[str, bytes] = {}
    for name, data in good(world).items():
        verdict = check_packet(data, bundle=bundle, trusted_vkey=world.vkey)
        facts = ("row", "score", "position", "cluster")
        expected["good"][name] = {fact: verdict.facts[fact] for fact in facts}
        files[f"{name}{SUFFIX}"] = data
    for name, data in bad(world).items():
        try:
            check_packet(data, bundle=bundle, trusted_vkey=world.vkey)
        except VerificationError as error:
            expected["bad"][name] = {"error": error.slug, "step": error.detail["step"]}
        else:
            raise AssertionError(f"{name} verifies")
        files[f"bad-{name}{SUFFIX}"] = data
    files["expected.json"] = (json.dumps(expected, indent=1, sort_keys=True) + "\n").encode()
    return files


def main() -> None:
    for name, data in make().items():
        path = FOLDER / name
        if not path.exists():
            path.write_bytes(data)
        elif path.read_bytes() != data:
            sys.exit(f"{path.name} is frozen, and would come out differently")


if __name__ == "__main__":
    main()
