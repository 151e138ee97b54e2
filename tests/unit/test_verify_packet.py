"""Audit packets: one row's score, proven offline; altered anywhere, they prove nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from ledger.errors import (
    BadSignature,
    Inconsistent,
    MalformedProof,
    NotIncluded,
    VerificationError,
)
from ledger.verify.__main__ import main
from ledger.verify.encoding import encode_base64
from ledger.verify.packet import (
    MAX_PACKET_BYTES,
    SKETCH_MAGIC,
    STEP_NAMES,
    check_packet,
    format_packet,
    parse_packet,
)
from tests.unit.lineage_world import World, actor, name
from tests.unit.packet_world import ROW, PacketWorld

DIGITS = (b'"position":4', b'"rows":6')
"""What a packet alone cannot bind: a path of several trees, see ledger/verify/merkle.py."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PacketWorld:
    return PacketWorld(tmp_path_factory.mktemp("packets"))


def test_a_packet_proves_a_score(world: PacketWorld) -> None:
    data = world.bytes()
    verdict = check_packet(data)
    assert [step.status for step in verdict.steps] == ["ok"] * 4 + ["skipped"]
    assert [step.name for step in verdict.steps] == list(STEP_NAMES.values())
    assert verdict.facts["row"] == ROW
    assert verdict.facts["score"] == str(world.score(4))
    assert not verdict.facts["bound"]
    assert any("lineage bundle" in line for line in verdict.trusted)
    assert format_packet(parse_packet(data)) == data


def test_a_bundle_ties_it_to_the_log(world: PacketWorld) -> None:
    verdict = check_packet(world.bytes(), bundle=world.bundle, trusted_vkey=world.vkey)
    assert {step.status for step in verdict.steps} == {"ok"}
    assert verdict.facts["bound"]
    assert any("no copy" in line for line in verdict.proven)
    assert not any("log's key" in line for line in verdict.trusted)
    own = check_packet(world.bytes(), bundle=world.bundle)
    assert any("log's key" in line for line in own.trusted)
    copy = check_packet(world.bytes(5), bundle=world.bundle)
    assert any("copy of row 1" in line for line in copy.proven)


def test_every_row_has_a_packet(world: PacketWorld) -> None:
    for n in range(6):
        assert check_packet(world.bytes(n), bundle=world.bundle).facts["position"] == n


def test_any_altered_byte_is_refused_with_its_bundle(world: PacketWorld) -> None:
    data, bundle = world.bytes(), world.bundle
    check_packet(data, bundle=bundle)
    for at in range(len(data)):
        for bit in (1, 128):
            altered = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            with pytest.raises(VerificationError):
                check_packet(altered, bundle=bundle)


def test_any_altered_byte_is_refused_alone_but_for_two_counts(world: PacketWorld) -> None:
    """Position and size are claims until a bundle binds them, and the verdict says so."""
    data = world.bytes()
    free = {data.index(text) + len(text) - 1 for text in DIGITS}
    for at in range(len(data)):
        altered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            verdict = check_packet(altered)
        except VerificationError:
            continue
        assert at in free, data[at - 20 : at + 20]
        assert any("this is its row" in line for line in verdict.trusted)


def test_every_cut_is_refused(world: PacketWorld) -> None:
    data = world.bytes()
    for end in range(len(data)):
        with pytest.raises(MalformedProof):
            check_packet(data[:end])


def refused(data: bytes, error: type[VerificationError], step: int, **more: Any) -> None:
    with pytest.raises(error) as caught:
        check_packet(data, **more)
    assert caught.value.detail["step"] == step


def test_each_lie_fails_in_its_step(world: PacketWorld) -> None:
    """Consistent within itself wherever it can be: the liar writes what suits the lie."""
    evidence = {**world.evidence, "placebo": "0"}
    refused(world.bytes(evidence=evidence), Inconsistent, 2)
    other = {**world.evidence, "sketch_sha256": "00" * 32}
    hashed = sha256_hex(canonical_json(other))
    refused(world.bytes(evidence=other, evidence_sha256=hashed), Inconsistent, 2)
    refused(world.bytes(line={**world.lines[4], "contributor": actor("eve")}), NotIncluded, 3)
    refused(world.bytes(position=3), NotIncluded, 3)
    refused(world.bytes(scale=world.scales[4] + 1), NotIncluded, 3)
    refused(world.bytes(score=world.score(4) + 1), Inconsistent, 4)
    top = [{**row, "score": "1"} for row in world.evidence["top_rows"]]
    boast = {**world.evidence, "top_rows": top}
    hashed = sha256_hex(canonical_json(boast))
    refused(world.bytes(evidence=boast, evidence_sha256=hashed), Inconsistent, 4)


def test_a_sketch_of_another_form_is_refused(world: PacketWorld) -> None:
    good = SKETCH_MAGIC + bytes(8) + (24).to_bytes(4, "big")
    for sketch in (b"", good + bytes(23), good + b"\x80" * 24, b"x" + good[1:] + bytes(24)):
        evidence = {
            **world.evidence,
            "sketch": encode_base64(sketch),
            "sketch_sha256": sha256_hex(sketch),
        }
        data = world.bytes(evidence=evidence, evidence_sha256=sha256_hex(canonical_json(evidence)))
        refused(data, MalformedProof, 2)


def test_a_leaf_is_cut_at_one_place(world: PacketWorld) -> None:
    """Vector, scale and line stand behind one another: moving the cut keeps the leaf's bytes, and
    would give another score, if the vector did not need the sketch's length."""
    packet = world.packet()
    raw = packet.vector + packet.scale.to_bytes(4, "big")
    moved = world.bytes(vector=raw[:-5], scale=int.from_bytes(raw[-5:-1], "big"))
    refused(moved, NotIncluded, 3)


def test_the_bundle_must_be_of_this_answer(world: PacketWorld, tmp_path: Path) -> None:
    stranger = World(tmp_path / "stranger").tell()
    stranger.checkpoint()
    data = world.bytes()
    refused(data, Inconsistent, 5, bundle=stranger.bundle("attribution.recorded"))
    refused(data, Inconsistent, 5, bundle=world.world.bundle("run.completed"))
    refused(data, MalformedProof, 5, bundle=b"{}")
    refused(data, BadSignature, 5, bundle=world.bundle, trusted_vkey=_other_key(tmp_path))


def _other_key(tmp_path: Path) -> str:
    return World(tmp_path / "other", origin="ledger.example/other").vkey


LIES: dict[str, dict[str, Any]] = {
    "index of more rows": {"extra": 1},
    "evidence of another index": {"evidence": {"index_sha256": "2d" * 32}},
    "evidence of another method": {"evidence": {"method": "better/v9"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_what_the_log_says_otherwise_is_refused(lie: str, tmp_path: Path) -> None:
    """The packet holds alone; the log's events say something else."""
    world = PacketWorld(tmp_path, **LIES[lie])
    check_packet(world.bytes())
    refused(world.bytes(), Inconsistent, 5, bundle=world.bundle)


@pytest.mark.parametrize("field", ["row_hash", "contributor", "registered_index"])
def test_a_row_under_a_false_name_is_refused(field: str, tmp_path: Path) -> None:
    """An index whose worker wrote its own name over ben's row."""

    class Robbed(PacketWorld):
        def _lines(self, extra: int) -> list[dict[str, Any]]:
            lines = super()._lines(extra)
            false = {"row_hash": "0" * 64, "contributor": actor("ann"), "registered_index": 1}
            lines[4][field] = false[field]
            return lines

    world = Robbed(tmp_path)
    check_packet(world.bytes())
    with pytest.raises(Inconsistent, match=field):
        check_packet(world.bytes(), bundle=world.bundle)


BAD: dict[str, dict[str, Any]] = {
    "format": {"format": "tributary/attribution-packet/v2"},
    "more": {"note": ""},
    "vector empty": {"vector": ""},
    "vector spelled otherwise": {"vector": "AB=="},
    "scale too large": {"scale": 2**32},
    "proof in part": {"proof": encode_base64(bytes(33))},
    "proof too long": {"proof": encode_base64(bytes(32 * 64))},
    "score as a number": {"score": 1},
    "score with a plus": {"score": "+1"},
    "score too long": {"score": "1" * 27},
    "line of less": {"line": {}},
    "evidence of nothing": {"evidence": {}},
    "evidence is a list": {"evidence": []},
    "rows none": {"rows": 0},
    "rows true": {"rows": True},
    "no hash": {"index_root": name("x")},
}


@pytest.mark.parametrize("case", BAD)
def test_another_form_is_refused(case: str, world: PacketWorld) -> None:
    value = {**json.loads(world.bytes()), **BAD[case]}
    refused(canonical_json(value), MalformedProof, 1)


def test_size_is_bounded() -> None:
    refused(b" " * (MAX_PACKET_BYTES + 1), MalformedProof, 1)


def test_the_pynacl_only_command_reads_packets(
    world: PacketWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, packet = tmp_path / "answer.lineage.json", tmp_path / "row.packet.json"
    bundle.write_bytes(world.bundle)
    packet.write_bytes(world.bytes())
    assert main([str(bundle), "--packet", str(packet), "--key", world.vkey]) == 0
    said = capsys.readouterr().out
    assert said.startswith("VERIFIED")
    assert f"has the score {world.score(4)}" in said
    packet.write_bytes(world.bytes(score=0))
    assert main([str(bundle), "--packet", str(packet)]) == 1
    assert "step 4, score" in capsys.readouterr().err
    assert main([str(bundle), "--packet", str(tmp_path / "none")]) == 4


def test_a_packet_of_100_000_rows_is_small(tmp_path: Path) -> None:
    """At 1,024 entries, twenty rows named, 17 hashes of path: what is sent by mail."""
    world = PacketWorld(tmp_path, dim=1_024, extra=99_994)
    data = world.bytes(70_000)
    assert len(world.evidence["top_rows"]) == len(world.evidence["against"]) == 10
    assert len(parse_packet(data).proof) == 17
    assert check_packet(data).facts["position"] == 70_000
    assert len(data) <= 8_192, len(data)
