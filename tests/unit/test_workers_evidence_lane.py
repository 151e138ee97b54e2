"""The evidence lane against the workers' API: whose words, and what happens when rows go away."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import sha256_hex
from tests.actors import ANN, BEN, EVE, OWNER
from tests.workers_api import FACTS, WorkersApi, write_key
from workers import evidence_lane
from workers.attribution.evidence import Evidence, parse
from workers.evidence_lane import REFRESH_S, RETRY_S, EvidenceLane
from workers.link import WorkerClient

PHRASE = "the heron of Vadso counts its feathers at midnight"
ANSWER = f"As I recall, {PHRASE}, and then it sleeps."


class World:
    """A run over four contributions, two of which hold PHRASE, and an index over their rows."""

    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api, self.cache, self.now = api, folder / "cache", 0.0
        self.client = WorkerClient(api.url, write_key(folder))
        self.net = api.datanet()
        self.first = api.contribute(self.net, FACTS[EVE], EVE)
        self.ann = api.contribute(self.net, [("Who?", "Nobody."), ("What?", PHRASE)], ANN)
        self.ben = api.contribute(self.net, [(f"Is it so that {PHRASE}?", "Yes.")], BEN)
        self.late = api.contribute(self.net, [("Say it", PHRASE)], BEN)
        self.run = api.run(api.request_run([self.net]))
        rows = [(self.first, n) for n in range(len(FACTS[EVE]))]
        self.index = self.put_index([*rows, (self.ann, 0), (self.ann, 1), (self.ben, 0)])

    def put_index(self, rows: list[tuple[str, int]]) -> str:
        lines = b"".join(canonical_json({"contribution": c, "index": n}) + b"\n" for c, n in rows)
        stamp = {"bytes": len(lines), "sha256": self.api.put(lines)}
        return self.api.put(canonical_json({"files": {"rows.jsonl": stamp}}))

    def lane(self) -> EvidenceLane:
        return EvidenceLane(self.client, self.cache, clock=lambda: self.now)

    def withdraw(self, contribution: str) -> None:
        body = {"contribution": contribution, "datanet": self.net, "reason": "mine"}
        self.api.do(ANN, "contribution.withdrawn", body)

    def folder(self) -> Path:
        return self.cache / "spans" / self.index


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with WorkersApi() as api:
        yield World(api, tmp_path)


def sources(document: dict[str, Any] | None) -> list[tuple[str, int]]:
    assert document is not None
    return [(row["contribution"], row["row"]) for s in document["spans"] for row in s["rows"]]


def test_names_the_indexed_rows_alone(world: World) -> None:
    document = world.lane().document(world.run, world.index, ANSWER)
    assert document is not None
    (span,) = document["spans"]
    assert ANSWER[span["start"] : span["end"]] == PHRASE
    assert span["rows"] == [
        {"contribution": c, "row": n, "contributor": who.id, "licence": "CC0-1.0"}
        for c, n, who in ((world.ann, 1, ANN), (world.ben, 0, BEN))
    ]  # and not the late one, which no index has
    evidence = Evidence(
        inference="00000000-0000-4000-8000-000000000001", method="ekfac-lora/v1",
        index_sha256=world.index, sketch=b"sketch", scores_sha256="ab" * 32, placebo=1,
        spans=document,
    )  # fmt: skip
    assert PHRASE.encode() not in evidence.to_bytes()
    assert parse(evidence.to_bytes()) == evidence
    nothing = world.lane().document(world.run, world.index, "Nobody wrote this down before me.")
    assert nothing is not None
    assert nothing["none"] is True


def test_repeated_calls_ask_nobody(world: World) -> None:
    lane = world.lane()
    first = lane.document(world.run, world.index, ANSWER)
    before = world.api.requests
    assert lane.document(world.run, world.index, ANSWER) == first
    assert world.lane().document(world.run, world.index, ANSWER) == first  # from the folder
    assert world.api.requests == before


def test_few_indexes_stay_open_and_on_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_lane, "MAX_OPEN", 1)
    monkeypatch.setattr(evidence_lane, "MAX_KEPT", 2)
    other = world.put_index([(world.late, 0)])
    third = world.put_index([(world.first, 0)])
    lane = world.lane()
    for _ in range(2):
        assert sources(lane.document(world.run, world.index, ANSWER))[0] == (world.ann, 1)
        assert sources(lane.document(world.run, other, ANSWER)) == [(world.late, 0)]
        assert lane.document(world.run, third, ANSWER) is not None
        assert len(list((world.cache / "spans").iterdir())) == 2


@pytest.mark.parametrize("name", ["tokens.u32", "manifest.json", "words.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_folder_is_built_again(world: World, name: str, damage: str) -> None:
    first = world.lane().document(world.run, world.index, ANSWER)
    path = world.folder() / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert world.lane().document(world.run, world.index, ANSWER) == first
    assert path.read_bytes() == data


def test_withdrawn_text_leaves_the_disk(world: World) -> None:
    lane = world.lane()
    assert sources(lane.document(world.run, world.index, ANSWER))[0] == (world.ann, 1)
    world.withdraw(world.ann)
    # Terms that do not know of it yet: evidence as before. With them: gone, and gone for good.
    assert sources(lane.document(world.run, world.index, ANSWER))[0] == (world.ann, 1)
    gone = frozenset({world.ann})
    for each in (lane, world.lane()):
        document = each.document(world.run, world.index, ANSWER, withdrawn=gone)
        assert sources(document) == [(world.ben, 0)]
    assert b"Nobody" not in (world.folder() / "words.json").read_bytes()
    assert sources(lane.document(world.run, world.index, ANSWER)) == [(world.ben, 0)]


def test_withdrawn_text_leaves_even_when_nothing_can_be_read(world: World) -> None:
    lane = world.lane()
    lane.document(world.run, world.index, ANSWER)
    world.api.down = True
    gone = frozenset({world.ann})
    assert lane.document(world.run, world.index, ANSWER, withdrawn=gone) is None
    assert not world.folder().exists()


def test_held_rows_come_back_when_they_are_released(world: World) -> None:
    ids = {"contribution": world.ann, "datanet": world.net}
    held = {**ids, "reason": "dispute", "note": "whose?", "evidence_sha256": None}
    world.api.do(OWNER, "contribution.held", held)
    lane = world.lane()
    assert sources(lane.document(world.run, world.index, ANSWER)) == [(world.ben, 0)]
    world.api.do(OWNER, "contribution.released", {**ids, "note": "Ann's"})
    world.now = REFRESH_S - 1
    assert sources(lane.document(world.run, world.index, ANSWER)) == [(world.ben, 0)]
    world.now = REFRESH_S
    both = [(world.ann, 1), (world.ben, 0)]
    assert sources(lane.document(world.run, world.index, ANSWER)) == both
    before = world.api.requests
    world.now = 3 * REFRESH_S
    assert sources(lane.document(world.run, world.index, ANSWER)) == both
    assert world.api.requests == before  # whole now


def test_what_cannot_be_read_is_none_and_tried_again_later(world: World) -> None:
    lane = world.lane()
    world.api.down = True
    assert lane.document(world.run, world.index, ANSWER) is None
    world.api.down = False
    before = world.api.requests
    world.now = RETRY_S - 1
    assert lane.document(world.run, world.index, ANSWER) is None
    assert world.api.requests == before
    world.now = RETRY_S
    assert sources(lane.document(world.run, world.index, ANSWER)) == [
        (world.ann, 1),
        (world.ben, 0),
    ]


def test_rows_that_are_not_what_their_event_says_are_no_evidence(world: World) -> None:
    name = world.api.rows.get("contributions", (world.ann,))["rows_sha256"]  # type: ignore[index]
    world.api.blobs[name] = world.api.blobs[name].replace(b"heron", b"eagle")
    assert world.lane().document(world.run, world.index, ANSWER) is None
    assert not world.folder().exists()


def test_a_damaged_copy_of_the_attribution_index_is_fetched_again(world: World) -> None:
    lane = world.lane()
    copy = world.cache / "indexes" / world.index / "rows.jsonl"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"{}\n")
    (copy.parent / "manifest.json").write_bytes(world.api.blobs[world.index])
    assert lane.document(world.run, world.index, ANSWER) is None
    world.now = RETRY_S
    assert lane.document(world.run, world.index, ANSWER) is not None
    assert sha256_hex((copy.parent / "manifest.json").read_bytes()) == world.index
