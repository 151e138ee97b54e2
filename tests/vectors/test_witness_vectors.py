"""A witness of other people's logs: one that Tessera built, and Go's checksum database."""

from pathlib import Path

import pytest

from ledger.log import tree
from ledger.log.add_checkpoint import AddCheckpoint, format_request, parse_cosignature
from ledger.log.witness import KnownLog, open_witness
from ledger.verify.note import parse_note, parse_vkey
from ledger.verify.tiles import Tile, tile_hashes, tile_path
from tests.vectors.shared import VECTORS, b64, load, needs_vectors
from tests.witness_world import NOW_S, Clock

pytestmark = needs_vectors
GOLDEN = VECTORS / "tessera-golden-log"


def request(old: int, size: int) -> bytes:
    """What Tessera would send: its own checkpoint, and a proof out of its own tiles."""
    proof: list[bytes] = []
    if 0 < old < size:
        data = (GOLDEN / tile_path(Tile(level=0, n=0, width=size))).read_bytes()
        stored = tree.integrate(0, tile_hashes(data, size), lambda wanted: {})
        ranges = tree.consistency_ranges(old, size)
        proof = tree.range_hashes(ranges, lambda wanted: stored)
    note = (GOLDEN / f"checkpoint.{size}").read_bytes()
    return format_request(AddCheckpoint(old_size=old, proof=tuple(proof), checkpoint=note))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 15])
def test_tesseras_log_is_cosigned_all_the_way(tmp_path: Path, step: int) -> None:
    key = parse_vkey((VECTORS / "tessera-golden-log.vkey").read_text().strip())
    known = [KnownLog(origin=key.name, key=key)]
    with open_witness(tmp_path, logs=known, clock=Clock(), name="w") as witness:
        old = 0
        for size in range(0, 16, step):
            answer = witness.add_checkpoint(request(old, size))
            assert answer.status == 200, (old, size, answer)
            text = parse_note((GOLDEN / f"checkpoint.{size}").read_bytes()).text
            assert parse_cosignature(answer.body, text, witness.vkey)[1] == NOW_S
            old = size


def test_gos_checksum_database_has_an_origin_that_is_not_its_keys_name(tmp_path: Path) -> None:
    vector = load("sum-golang-org-checkpoint.json")
    key = parse_vkey(vector["vkey"])
    note = b64(vector["note_b64"])
    body = format_request(AddCheckpoint(old_size=0, proof=(), checkpoint=note))
    assert vector["origin"] != key.name
    known = [KnownLog(origin=vector["origin"], key=key)]
    with open_witness(tmp_path / "w", logs=known, clock=Clock(), name="w") as witness:
        answer = witness.add_checkpoint(body)
        assert answer.status == 200
        parse_cosignature(answer.body, parse_note(note).text, witness.vkey)
        latest = witness.latest(vector["origin"])
        assert latest
        assert latest.head.size == int(vector["size"])
        assert latest.head.root == b64(vector["root_b64"])
    by_name = [KnownLog(origin=key.name, key=key)]
    with open_witness(tmp_path / "x", logs=by_name, clock=Clock(), name="w") as witness:
        assert witness.add_checkpoint(body).status == 404
