"""What the assembler gathers, and what it refuses to."""

import json
from pathlib import Path
from uuid import UUID

import pytest

from ledger.errors import InvalidEvent, NotFound, StorageError, TooLarge, Unavailable
from ledger.log import ancestry
from ledger.log import bundle as room
from ledger.verify.bundle import verify_bundle
from tests.unit.lineage_world import ADDRESSES, ScannedIndex, World, name, on_chain, settled


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.add("stranger", "identity.registered", {"name": "unrelated"})
    world.tell()
    world.add("stranger", "identity.registered", {"name": "unrelated"})
    world.checkpoint()
    return world


@pytest.fixture
def paid(tmp_path: Path) -> World:
    """The story, with two periods and two claims, everything in a checkpoint."""
    world = World(tmp_path).tell()
    settled(world, keep_trees=True)
    world.checkpoint()
    return world


def indexes(data: bytes) -> list[int]:
    return [entry["index"] for entry in json.loads(data)["entries"]]


def labels(world: World, data: bytes) -> set[str]:
    by_index = {world.index_of(label): label for label in world.ids}
    return {by_index[n] for n in indexes(data)}


def test_only_what_the_subject_rests_on(world: World) -> None:
    labels = ["stranger", *list(world.ids)[1:]]
    everything = list(range(1, 12))
    assert indexes(world.bundle("inference.recorded")) == everything
    assert indexes(world.bundle("recorded ann")) == [
        labels.index("datanet.created"),
        labels.index("recorded ann"),
        labels.index("approved ann"),
    ]
    assert indexes(world.bundle("adapter.published")) == everything[:8]
    assert json.loads(world.bundle("recorded ann"))["blobs"] == {}
    verify_bundle(world.bundle("recorded ann"))


def test_what_is_stored_but_not_signed_for_stays_out(tmp_path: Path) -> None:
    world = World(tmp_path).tell({"attribution.recorded": None})
    world.checkpoint()
    complete = World(tmp_path / "b")
    complete.tell()
    world.log.append(complete.log.entries(10, 11)[0][16:], event_id=UUID(int=7))
    assert indexes(world.bundle()) == list(range(10))
    with pytest.raises(NotFound, match="not in a signed checkpoint yet"):
        world.bundler().bundle(10)


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    with pytest.raises(NotFound, match="not in a signed checkpoint yet"):
        world.bundle()
    for index in (-1, 10**9):
        with pytest.raises(NotFound):
            world.bundler().bundle(index)


@pytest.mark.parametrize(
    ("module", "limit", "value"),
    [
        (room, "MAX_BUNDLE_BYTES", 5_000),
        (ancestry, "MAX_BUNDLE_BYTES", 100),
        (ancestry, "MAX_ENTRIES", 5),
        (ancestry, "MAX_RUNS", 0),
        (ancestry, "MAX_BLOBS", 0),
    ],
)
def test_limits_say_what_to_ask_instead(
    world: World, monkeypatch: pytest.MonkeyPatch, module: object, limit: str, value: int
) -> None:
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(TooLarge, match=f"{limit} = {value}.*one by one"):
        world.bundle()


def test_a_store_that_lost_things(world: World, tmp_path: Path) -> None:
    incomplete = World(tmp_path / "b").tell({"recorded ben": None})
    incomplete.checkpoint()
    with pytest.raises(StorageError, match=r"no contribution\.recorded"):
        incomplete.bundle()
    world.blobs.blobs.clear()
    with pytest.raises(NotFound):
        world.bundle()


def test_projections_that_are_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not projected yet may not be missing: the caller is asked to come again."""
    monkeypatch.setattr(ScannedIndex, "position", lambda self: 3)
    monkeypatch.setattr(ScannedIndex, "firsts", lambda self, wanted: {})
    assert len(indexes(world.bundle("datanet.created"))) == 1, "it rests on nothing"
    with pytest.raises(Unavailable, match=r"at 3 of 13\); retry") as caught:
        world.bundle()
    assert not isinstance(caught.value, StorageError)


def test_few_queries_however_wide_the_graph(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for cls, method in ((type(world.log), "pick"), (ScannedIndex, "firsts")):
        honest = getattr(cls, method)

        def counted(
            self: object, wanted: object, *, _f: object = honest, _m: str = method
        ) -> object:
            calls.append(_m)
            return _f(self, wanted)  # type: ignore[operator]

        monkeypatch.setattr(cls, method, counted)
    world.bundle()
    levels = calls.count("firsts")
    assert levels <= 7, "inference, adapter, run, manifest, contributions, datanet"
    assert calls.count("pick") <= levels + 1


# --- payouts ---

STORY = {
    "datanet.created", "recorded ann", "approved ann", "recorded ben", "approved ben",
    "run.requested", "run.completed", "adapter.published", "inference.recorded", "fee.charged",
    "attribution.recorded",
}  # fmt: skip


def test_a_claim_brings_all_that_was_earned_for_it(paid: World) -> None:
    first = paid.bundle("payout.claimed 1")
    period = {"period.cutoff 1", "period.closed 1", "payout.proposed 1", "payout.activated 1"}
    assert labels(paid, first) == STORY | period | {"payout.claimed 1", "bound ann"}
    (line,) = json.loads(first)["payouts"]
    assert (line["period"], line["account"]) == (1, ADDRESSES["ann"])
    assert line["cumulative_wei"] == "48"
    assert [s.status for s in verify_bundle(first).steps][6:] == ["skipped", "ok"]
    second = labels(paid, paid.bundle("payout.claimed 2"))
    assert second > STORY | {"period.cutoff 1", "period.closed 2", "inference.recorded again"}
    assert "payout.claimed 1" not in second


@pytest.mark.parametrize("subject", ["period.closed 1", "payout.activated 1", "period.cutoff 1"])
def test_a_line_of_a_period(paid: World, subject: str) -> None:
    dev = ADDRESSES["dev"]
    data = paid.bundle(subject, account="0x" + dev[2:].upper())
    assert [p["account"] for p in json.loads(data)["payouts"]] == [dev]
    assert labels(paid, data) >= STORY | {"bound dev", "period.closed 1", "payout.activated 1"}
    assert "bound ann" not in labels(paid, data)
    verify_bundle(data)
    alone = paid.bundle(subject, account=dev, earnings=False)
    assert not labels(paid, alone) & STORY
    assert json.loads(alone)["payouts"] == json.loads(data)["payouts"]
    verify_bundle(alone)


def test_a_period_without_an_account_is_version_1(paid: World) -> None:
    value = json.loads(paid.bundle("period.closed 1"))
    assert value["format"] == "tributary/lineage-bundle/v1"
    assert labels(paid, paid.bundle("payout.activated 2")) == {
        "period.cutoff 2", "period.closed 2", "payout.proposed 2", "payout.activated 2",
    }  # fmt: skip


def test_lines_that_are_not_there(paid: World) -> None:
    nobody = "0x" + "ee" * 20
    with pytest.raises(NotFound, match="nothing so far"):
        paid.bundle("period.closed 1", account=nobody)
    with pytest.raises(InvalidEvent, match="this claim is of"):
        paid.bundle("payout.claimed 1", account=nobody)
    with pytest.raises(InvalidEvent, match="must be an EVM address"):
        paid.bundle("period.closed 1", account="me")
    with pytest.raises(InvalidEvent, match=r"not inference\.recorded"):
        paid.bundle("inference.recorded", account=ADDRESSES["ann"])
    paid.add("operator", "period.cutoff", {"period": 3})
    paid.checkpoint()
    with pytest.raises(NotFound, match="period 3 is not closed yet"):
        paid.bundle("period.cutoff", account=ADDRESSES["ann"])


def test_a_claim_that_no_period_explains(paid: World) -> None:
    claim = {
        "address": ADDRESSES["ann"], "amount_wei": "1", "cumulative_wei": "89",
        **on_chain("a third claim"), "log_index": 0,
    }  # fmt: skip
    paid.add("operator", "payout.claimed", claim, label="unexplained")
    paid.checkpoint()
    data = paid.bundle("unexplained")
    assert labels(paid, data) == {"unexplained", "bound ann"}
    assert verify_bundle(data).facts["subject_index"] == paid.index_of("unexplained")


def test_a_claim_waits_for_the_projections(paid: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScannedIndex, "position", lambda self: 3)
    with pytest.raises(Unavailable, match="not projected yet"):
        paid.bundle("payout.claimed 1")


def test_too_many_earnings(paid: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ancestry, "MAX_ENTRIES", 10)
    with pytest.raises(TooLarge, match="earnings=false"):
        paid.bundle("payout.claimed 2")
    verify_bundle(paid.bundle("payout.claimed 2", earnings=False))


def test_every_event_can_be_the_subject(paid: World) -> None:
    for label in paid.ids:
        verdict = verify_bundle(paid.bundle(label), trusted_vkey=paid.vkey)
        assert verdict.facts["subject"] == str(paid.ids[label])


def test_unknown_things_have_no_index(world: World) -> None:
    index = ScannedIndex(world.log)
    known = ("run.completed", "run", name("run"))
    assert index.firsts({known, ("run.completed", "run", name("no run"))}) == {known: 7}
