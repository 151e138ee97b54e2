"""Holds before training: recorded once, left out, and never again after a release."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import parse_canonical
from ledger.errors import InvalidEvent, StorageError, Unavailable
from tests.actors import ANN, BEN, EVE, OWNER, Actor
from tests.gates_world import Attacks, contribution
from tests.workers_api import FACTS, WORKER, WorkersApi, write_key
from workers import screen as gates
from workers.attribution.index import IndexedRow
from workers.link import WorkerClient, WorkerSpec
from workers.runs import execute, fetch_rows
from workers.screen import screened

ATTACKS = Attacks(contribution("facts", 0, [pair for pairs in FACTS.values() for pair in pairs]))


class World:
    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api = api
        self.client = WorkerClient(api.url, write_key(folder))
        self.net = api.datanet()
        self.good = [api.contribute(self.net, pairs, who) for who, pairs in FACTS.items()]
        self.junk = self.contribute(ATTACKS.mash(), BEN)

    def contribute(self, pairs: list[tuple[str, str]], who: Actor) -> str:
        return self.api.contribute(self.net, pairs, who)

    def run(self) -> str:
        return self.api.request_run([self.net])

    def kept(self, run: str) -> set[str]:
        """The contributions that a run trains on."""
        rows = list(fetch_rows(self.client, run))
        return {row.contribution for row in screened(self.client, run, rows)}

    def holds(self) -> list[dict[str, Any]]:
        return self.api.events("contribution.held")

    def release(self, name: str) -> None:
        body = {"contribution": name, "datanet": self.net, "note": "it is a cipher, and meant"}
        self.api.do(OWNER, "contribution.released", body)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with WorkersApi() as api:
        yield World(api, tmp_path)


def test_a_flagged_contribution_is_held_and_left_out(world: World) -> None:
    run = world.run()
    rows = list(fetch_rows(world.client, run))
    kept = screened(world.client, run, rows)
    assert kept == [row for row in rows if row.contribution in world.good]
    assert all(isinstance(row, IndexedRow) for row in kept)
    (hold,) = world.holds()
    assert hold["contribution"] == world.junk
    assert hold["reason"] == "junk"
    assert hold["note"] == "20 of 20 rows without content (gibberish 20)"
    evidence = parse_canonical(world.api.blobs[hold["evidence_sha256"]])
    assert evidence == {
        "format": gates.REPORT_FORMAT, "contribution": world.junk, "reason": "junk",
        "score_ppm": 1_000_000, "threshold_ppm": 200_000, "rows": list(range(20)), "count": 20,
        "of": 20, "kinds": {"gibberish": 20}, "sources": [],
    }  # fmt: skip


def test_a_run_trains_on_what_is_left(world: World, tmp_path: Path) -> None:
    """The real training and index of a small run, in this process."""
    spec = WorkerSpec(api=world.api.url, key_file=tmp_path / "worker.key", home=tmp_path / "home")
    run = world.api.run(world.api.request_run([world.net], epochs=1))
    outcome = execute(spec, run, world.client)
    assert (outcome.contributions_count, outcome.rows_count) == (3, 9)
    trained = world.api.blobs[outcome.manifest_sha256]
    assert world.junk.encode() not in trained
    assert all(name.encode() in trained for name in world.good)
    assert [hold["contribution"] for hold in world.holds()] == [world.junk]


def test_a_run_of_flagged_rows_alone_has_no_rows(world: World, tmp_path: Path) -> None:
    spec = WorkerSpec(api=world.api.url, key_file=tmp_path / "worker.key", home=tmp_path / "home")
    net = world.api.datanet()
    world.api.contribute(net, ATTACKS.letters(), ANN)
    run = world.api.run(world.api.request_run([net]))
    with pytest.raises(InvalidEvent, match="neither withdrawn nor held"):
        execute(spec, run, world.client)


def test_the_next_run_asks_for_nothing_more(world: World) -> None:
    world.kept(world.run())
    assert world.kept(world.run()) == set(world.good)
    assert len(world.holds()) == 1


def test_good_rows_cost_no_event_and_no_question(world: World) -> None:
    other = world.api.facts()
    run = world.api.request_run([other])
    rows = list(fetch_rows(world.client, run))
    before = world.api.requests
    assert screened(world.client, run, rows) == rows
    assert world.api.requests == before
    assert world.holds() == []


def test_what_was_released_is_not_held_again_for_the_same_reason(world: World) -> None:
    world.kept(world.run())
    world.release(world.junk)
    assert world.kept(world.run()) == {*world.good, world.junk}
    assert len(world.holds()) == 1


def test_a_lost_answer_holds_nothing_twice(world: World) -> None:
    """The event is recorded, the worker does not learn of it; the next attempt reads the rows as
    the first did, as if the listing were behind."""
    run = world.run()
    rows = list(fetch_rows(world.client, run))
    world.client.login("worker")
    sending = world.client.append_raw

    def cut(raw: bytes, **options: Any) -> dict[str, Any]:
        world.api.lose_answers = 1
        return sending(raw, **options)

    world.client.append_raw = cut  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        screened(world.client, run, rows)
    world.client.append_raw = sending  # type: ignore[method-assign]
    assert len(world.holds()) == 1
    assert {row.contribution for row in screened(world.client, run, rows)} == set(world.good)
    assert len(world.holds()) == 1


def test_a_repeated_hold_asks_whether_it_is_in_force(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing is behind: it still shows what is held."""
    run = world.run()
    rows = list(fetch_rows(world.client, run))
    screened(world.client, run, rows)
    monkeypatch.setattr(world.api, "_contributions", _stale(world.api, world.net))
    assert {row.contribution for row in screened(world.client, run, rows)} == set(world.good)
    world.release(world.junk)
    kept = {row.contribution for row in screened(world.client, run, rows)}
    assert kept == {*world.good, world.junk}
    assert len(world.holds()) == 1


def test_somebody_elses_hold_is_respected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run()
    rows = list(fetch_rows(world.client, run))
    body = {
        "contribution": world.junk, "datanet": world.net, "reason": "dispute", "note": "whose?",
        "evidence_sha256": None,
    }  # fmt: skip
    world.api.do(OWNER, "contribution.held", body)
    assert {row.contribution for row in screened(world.client, run, rows)} == set(world.good)
    monkeypatch.setattr(world.api, "_contributions", _stale(world.api, world.net))
    assert {row.contribution for row in screened(world.client, run, rows)} == set(world.good)
    assert [hold["reason"] for hold in world.holds()] == ["dispute"]


def test_a_worker_does_not_judge_its_own_contribution(world: World) -> None:
    world.api.do(WORKER, "identity.registered", {"name": "worker"})
    mine = world.contribute(ATTACKS.letters(), WORKER)
    assert world.kept(world.run()) == {*world.good, mine}


def test_a_copy_and_a_patchwork_of_others_rows(world: World) -> None:
    copy = world.contribute([pair for pairs in FACTS.values() for pair in pairs][:6], EVE)
    letter = world.contribute([(f"about {n}", ATTACKS.own(40)) for n in range(6)], ANN)
    assert world.kept(world.run()) == {*world.good, letter}
    assert {(hold["contribution"], hold["reason"]) for hold in world.holds()} == {
        (world.junk, "junk"),
        (copy, "duplicate"),
    }


def test_nothing_is_trained_while_the_ledger_is_away(world: World) -> None:
    run = world.run()
    rows = list(fetch_rows(world.client, run))
    world.api.down = True
    with pytest.raises(StorageError):
        screened(world.client, run, rows)


def _stale(api: WorkersApi, net: str) -> Any:
    """A listing that has not heard of holds."""
    listed = [
        {"contribution": key[0], **row}
        for key, row in api.rows.scan("contributions")
        if row["datanet"] == net
    ]
    return lambda datanets, query: {"items": listed, "next": None}
