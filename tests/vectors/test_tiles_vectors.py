"""Tile names, and a whole log that Tessera built, verified file by file at every size."""

from itertools import combinations_with_replacement

import pytest

from ledger.errors import MalformedProof
from ledger.log import tree
from ledger.verify import merkle
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.note import parse_vkey
from ledger.verify.tiles import (
    TILE_WIDTH,
    Tile,
    decode_entries,
    encode_entries,
    parse_tile_path,
    tile_hashes,
    tile_path,
    tiles_of,
)
from tests.vectors.shared import VECTORS, load, needs_vectors

pytestmark = needs_vectors
GOLDEN = VECTORS / "tessera-golden-log"
SIZES = range(16)


def test_paths_of_go_sumdb_without_their_height() -> None:
    for path, fields in load("tile-paths.json")["sumdb_with_height"]:
        ours = "tile/" + path.split("/", 2)[2]
        if fields is None:
            with pytest.raises(MalformedProof):
                parse_tile_path(ours)
            continue
        height, level, n, width = fields
        tile = Tile(level=level, n=n, width=TILE_WIDTH if width == 1 << height else width)
        assert parse_tile_path(ours) == tile
        assert tile_path(tile) == ours


def test_paths_and_shapes_of_c2sp() -> None:
    c2sp = load("tile-paths.json")["c2sp"]
    assert tile_path(Tile(level=0, n=1234067)) == "tile/0/" + c2sp["index 1234067"]
    shape = c2sp["tree_size_70000"]
    assert tiles_of(70_000) == [
        Tile(level=0, n=shape["level0_full"], width=shape["level0_partial_width"]),
        Tile(level=1, n=shape["level1_full"], width=shape["level1_partial_width"]),
        Tile(level=2, n=0, width=shape["level2_partial_width"]),
    ]
    assert tiles_of(256) == [Tile(level=0, n=0), Tile(level=1, n=0, width=1)]


def head(size: int | None) -> Checkpoint:
    key = parse_vkey((VECTORS / "tessera-golden-log.vkey").read_text().strip())
    name = "checkpoint" if size is None else f"checkpoint.{size}"
    return open_checkpoint((GOLDEN / name).read_bytes(), key).checkpoint


def leaves(size: int) -> list[bytes]:
    if size == 0:
        return []
    path = tile_path(Tile(level=0, n=0, width=size))
    return tile_hashes((GOLDEN / path).read_bytes(), size)


@pytest.mark.parametrize("size", SIZES)
def test_golden_log_at_every_size(size: int) -> None:
    checkpoint = head(size)
    assert checkpoint.size == size
    assert merkle.tree_root(leaves(size)) == checkpoint.root
    if size:
        path = tile_path(Tile(level=None, n=0, width=size))
        data = (GOLDEN / path).read_bytes()
        entries = decode_entries(data, size)
        assert [merkle.leaf_hash(entry) for entry in entries] == leaves(size)
        assert encode_entries(entries) == data
        with pytest.raises(MalformedProof):
            decode_entries(data, size - 1)
        with pytest.raises(MalformedProof):
            decode_entries(data[:-1], size)


def test_golden_log_only_grows() -> None:
    def read(wanted: object) -> dict[tuple[int, int], bytes]:
        return {(0, 0): b"".join(leaves(15))}

    assert head(None) == head(15)
    for old, new in combinations_with_replacement(SIZES, 2):
        proof = tree.range_hashes(tree.consistency_ranges(old, new), read)
        merkle.verify_consistency(
            size1=old, size2=new, root1=head(old).root, root2=head(new).root, proof=proof
        )
