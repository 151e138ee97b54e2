"""A contributor shows one row: offline, in a bundle that a stranger verifies, and no other row."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ledger.domain.envelope import node_hash
from ledger.domain.rows import DataRow, encode_rows, rows_root, tree_path, tree_root
from ledger.errors import InvalidEvent, MalformedProof, NotFound, NotIncluded, TooLarge
from ledger.log import disclose as room
from ledger.log.disclose import contributions_of, disclose
from ledger.verify.bundle import verify_bundle
from ledger.verify.merkle import verify_inclusion
from tests.unit.lineage_world import World, manifest, name, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world")).tell()
    world.checkpoint()
    return world


def shown(data: bytes) -> list[tuple[str, int]]:
    return [(item["contribution"], item["row"]) for item in json.loads(data)["disclosed"]]


@given(count=st.integers(1, 200), data=st.data())
def test_a_path_leads_to_the_root(count: int, data: st.DataObject) -> None:
    leaves = [bytes([n]) * 32 for n in range(count)]
    index = data.draw(st.integers(0, count - 1))
    path = tree_path(leaves, index)
    root = tree_root(leaves)
    verify_inclusion(index=index, size=count, leaf=leaves[index], proof=path, root=root)


def test_a_path_beyond_the_tree() -> None:
    assert tree_path([bytes(32)], 0) == []
    assert tree_path([bytes(32), bytes(32)], 1) == [bytes(32)]
    assert node_hash(bytes(32), bytes(32)) == tree_root([bytes(32), bytes(32)])
    for index in (-1, 2):
        with pytest.raises(IndexError):
            tree_path([bytes(32), bytes(32)], index)


@pytest.mark.parametrize(
    "subject",
    ["recorded ann", "run.completed", "adapter.published", "inference.recorded", "fee.charged"],
)
def test_a_row_is_shown_in_any_bundle_that_has_it(world: World, subject: str) -> None:
    data = disclose(world.bundle(subject), rows("ann"), [1])
    assert shown(data) == [(name("ann"), 1)]
    verdict = verify_bundle(data, trusted_vkey=world.vkey)
    assert any("prompt “ann 1?”" in line for line in verdict.proven)
    trained = verdict.facts["disclosed"][0]["runs"]
    assert trained == ([] if subject == "recorded ann" else [name("run")])


def test_no_other_row_is_in_the_bundle(world: World) -> None:
    data = disclose(world.bundle("adapter.published"), rows("ann"), [1])
    for n in (0, 2):
        other = rows("ann")[n]
        assert other.prompt.encode() not in data
        assert other.salt.encode() not in data
    assert rows("ann")[1].salt.encode() in data


def test_rows_are_added_to_those_shown_already(world: World) -> None:
    """By a second contributor, too; twice the same is once."""
    once = disclose(world.bundle("adapter.published"), rows("ann"), [2, 0, 2])
    assert shown(once) == [(name("ann"), 0), (name("ann"), 2)]
    assert disclose(once, rows("ann"), [0]) == once
    both = disclose(once, rows("ben"), [1])
    assert sorted(shown(both)) == shown(both)
    assert {who for who, _ in shown(both)} == {name("ann"), name("ben")}
    assert verify_bundle(both).steps[6].status == "ok"


def test_what_cannot_be_shown(world: World, tmp_path: Path) -> None:
    data = world.bundle("adapter.published")
    for numbers in ([3], [0, -1], []):
        with pytest.raises(InvalidEvent, match="rows are numbered 0 to 2"):
            disclose(data, rows("ann"), numbers)
    for strangers in (rows("eve"), rows("ann", 2), [*rows("ann"), *rows("ben")]):
        with pytest.raises(NotFound, match="no contribution of these rows"):
            disclose(data, strangers, [0])
    for hostile in (b"", b"{}", data[:-1]):
        with pytest.raises(MalformedProof):
            disclose(hostile, rows("ann"), [0])


def test_a_row_that_was_not_trained_on_is_not_shown_as_if(tmp_path: Path) -> None:
    whole = json.loads(manifest())
    some = [r for r in whole["rows"] if (r["contribution"], r["row"]) != (name("ben"), 2)]
    lies = {"run.completed": lambda body: {**body, "rows_count": 5}}
    world = World(tmp_path).tell(lies, training=manifest(rows=some))
    world.checkpoint()
    disclose(world.bundle("adapter.published"), rows("ben"), [0, 1])
    with pytest.raises(NotIncluded, match="no adapter here was trained on it"):
        disclose(world.bundle("adapter.published"), rows("ben"), [2])
    disclose(world.bundle("recorded ben"), rows("ben"), [2])


def test_the_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_DISCLOSED", 2)
    with pytest.raises(TooLarge, match="MAX_DISCLOSED = 2"):
        disclose(world.bundle("adapter.published"), rows("ann"), [0, 1, 2])


def test_contributions_of_a_bundle(world: World) -> None:
    assert contributions_of(world.bundle("recorded ben")) == [name("ben")]
    assert contributions_of(world.bundle("run.completed")) == [name("ann"), name("ben")]
    assert contributions_of(world.bundle("datanet.created")) == []


# --- the command ---


def tributary(home: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TRIBUTARY_HOME": str(home), "TRIBUTARY_API": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-m", "ledger.cli.main", "contribution", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def keep(home: Path, who: str, given: Sequence[DataRow]) -> Path:
    path = home / "rows" / f"{name(who)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(encode_rows(given))
    assert rows_root(given)
    return path


def test_the_command_needs_no_network(world: World, tmp_path: Path) -> None:
    bundle, to = tmp_path / "a.lineage.json", tmp_path / "shown.lineage.json"
    bundle.write_bytes(world.bundle("adapter.published"))
    missing = tributary(tmp_path, "disclose", bundle, "--row", 1, "--to", to)
    assert missing.returncode == 4
    assert "tributary contribution rows" in missing.stderr
    kept = keep(tmp_path, "ann", rows("ann"))
    done = tributary(tmp_path, "disclose", bundle, "--row", 2, "--row", 0, "--to", to)
    assert done.returncode == 0, done.stderr
    assert "shows rows 0, 2 and no other" in done.stdout
    assert shown(to.read_bytes()) == [(name("ann"), 0), (name("ann"), 2)]
    assert stat.S_IMODE(to.stat().st_mode) == 0o644
    verify_bundle(to.read_bytes())

    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_bytes(kept.read_bytes())
    keep(tmp_path, "ben", rows("ben"))
    which = tributary(tmp_path, "disclose", bundle, "--row", 1, "--to", to)
    assert (which.returncode, "--rows" in which.stderr) == (2, True)
    given = tributary(tmp_path, "disclose", bundle, "--row", 1, "--to", to, "--rows", elsewhere)
    assert given.returncode == 0
    assert shown(to.read_bytes()) == [(name("ann"), 1)]


def test_the_command_says_what_is_wrong(world: World, tmp_path: Path) -> None:
    bundle, to = tmp_path / "a.lineage.json", tmp_path / "shown.lineage.json"
    bundle.write_bytes(world.bundle("adapter.published"))
    keep(tmp_path, "ann", rows("ann"))
    for arguments, code, words in (
        ([bundle, "--row", 7, "--to", to], 2, "rows are numbered 0 to 2"),
        ([bundle, "--row", 1, "--to", bundle], 2, "is the bundle itself"),
        ([tmp_path / "none", "--row", 1, "--to", to], 4, "cannot read"),
        ([bundle, "--row", 1, "--to", tmp_path], 2, "cannot write"),
        ([bundle, "--row", 1, "--to", to, "--rows", bundle], 2, "a rows blob is"),
    ):
        done = tributary(tmp_path, "disclose", *arguments)
        assert (done.returncode, words in " ".join(done.stderr.split())) == (code, True), (
            done.stderr
        )
        assert "Traceback" not in done.stderr
    assert not to.exists()
