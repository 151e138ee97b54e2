"""The attribution loop with a scripted engine: what it records, repeats and never records."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import derived_id, sha256_hex
from ledger.errors import ComputeError, Inconsistent, LedgerError, Unavailable
from tests.actors import ANN, BEN, Actor
from tests.workers_api import WorkersApi, write_key
from workers.attribute import (
    MAX_PAUSE_S,
    RETRY_S,
    TOGETHER,
    Attributed,
    Attributor,
    limit_shares,
)
from workers.link import WorkerClient
from workers.outbox import Outbox

EVIDENCE = canonical_json({"v": 1})


class World:
    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api, self.now = api, 0.0
        self.client = WorkerClient(api.url, write_key(folder))
        self.outbox = Outbox(self.client, folder / "outbox")
        self.calls: list[str] = []
        self.batches: list[int] = []
        self.failures: dict[str, LedgerError] = {}
        self.shares = [(ANN.id, 700_000), (BEN.id, 200_000)]
        self.run = api.facts_run()
        api.do(self.worker(), "run.started", {"run": self.run, "attempt": 1, "submission_id": "x"})
        hashes = ("manifest_sha256", "adapter_sha256", "adapter_config_sha256", "index_sha256")
        body = {
            "run": self.run, "attempt": 1, **dict.fromkeys(hashes, "ab" * 32),
            "index_root": "cd" * 32, "rows_count": 1, "contributions_count": 1, "steps": 1,
            "loss": "0.5",
        }  # fmt: skip
        api.do(self.worker(), "run.completed", body)
        self.adapter = api.publish(self.run)

    def worker(self) -> Actor:
        return Actor(77)

    def attribute(
        self, inferences: Sequence[Mapping[str, Any]]
    ) -> Sequence[Attributed | LedgerError]:
        self.batches.append(len(inferences))
        return [self.one(inference) for inference in inferences]

    def one(self, inference: Mapping[str, Any]) -> Attributed | LedgerError:
        self.calls.append(inference["inference"])
        failure = self.failures.get(inference["inference"])
        if isinstance(failure, Unavailable):
            raise failure  # the engine is gone, and all that it was asked with it
        if failure is not None:
            return failure
        return Attributed(
            run=self.run,
            method="ekfac-lora/v1",
            index_sha256="ab" * 32,
            shares=self.shares,
            unattributed_ppm=100_000,
            evidence=EVIDENCE,
        )

    def loop(self) -> Attributor:
        return Attributor(self.client, self.outbox, self.attribute, clock=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with WorkersApi() as api:
        yield World(api, tmp_path)


def test_records_each_inference_once(world: World) -> None:
    names = [world.api.infer(world.adapter, "q", f"a{n}") for n in range(3)]
    loop = world.loop()
    assert loop.step() == 3
    assert loop.step() == 0
    assert world.loop().step() == 0, "a new life of the loop"
    events = world.api.events("attribution.recorded")
    assert [e["event"] for e in events] == [str(derived_id("attribution", n)) for n in names]
    assert events[0]["evidence_sha256"] == sha256_hex(EVIDENCE)
    assert world.api.blobs[sha256_hex(EVIDENCE)] == EVIDENCE, "stored before it is named"
    assert sum(s["ppm"] for s in events[0]["shares"]) + events[0]["unattributed_ppm"] == 1_000_000


def test_an_answer_lost_on_the_way_is_not_a_second_event(world: World) -> None:
    world.api.infer(world.adapter, "q", "a")
    loop = world.loop()
    assert world.client.put_blob(EVIDENCE)  # signed in, so that the event is the second POST
    world.api.lose_answers = 1
    with pytest.raises(Unavailable):
        loop.step()
    for _ in range(3):
        world.now += MAX_PAUSE_S
        loop.step()
    assert len(world.api.events("attribution.recorded")) == 1


def test_failures_wait_and_do_not_hold_up_the_others(world: World) -> None:
    bad = world.api.infer(world.adapter, "q", "bad")
    good = world.api.infer(world.adapter, "q", "good")
    world.failures[bad] = Inconsistent("the index blob is damaged")
    loop = world.loop()
    assert loop.step() == 1
    assert [e["inference"] for e in world.api.events("attribution.recorded")] == [good]
    loop.step()
    assert world.calls.count(bad) == 1, "waits RETRY_S"
    world.now += RETRY_S
    loop.step()
    assert world.calls.count(bad) == 2
    del world.failures[bad]
    world.now += 2 * RETRY_S
    assert loop.step() == 1
    assert len(world.api.events("attribution.recorded")) == 2


def test_an_inference_that_kills_the_engine_goes_last(world: World) -> None:
    bad = world.api.infer(world.adapter, "q", "bad")
    good = world.api.infer(world.adapter, "q", "good")
    world.failures[bad] = ComputeError("the worker process died")
    loop = world.loop()
    for _ in range(2):  # both at once, then each alone
        with pytest.raises(Unavailable):
            loop.step()
    assert loop.step() == 1
    assert world.batches == [2, 1, 1]
    assert [e["inference"] for e in world.api.events("attribution.recorded")] == [good]


def test_answers_of_one_adapter_go_together(world: World) -> None:
    other = world.api.publish(world.run)
    for n in range(TOGETHER + 3):
        world.api.infer(other if n == 1 else world.adapter, "q", f"a{n}")
    assert world.loop().step() == TOGETHER + 3
    assert sorted(world.batches) == [1, 2, TOGETHER]


def test_what_all_of_a_batch_lack_makes_all_wait(world: World) -> None:
    names = [world.api.infer(world.adapter, "q", f"a{n}") for n in range(2)]

    def attribute(_: Sequence[Mapping[str, Any]]) -> Sequence[Attributed | LedgerError]:
        raise Inconsistent("the index is damaged")

    loop = Attributor(world.client, world.outbox, attribute, clock=lambda: world.now)
    assert loop.step() == 0
    assert world.api.events("attribution.recorded") == []
    loop._attribute = world.attribute
    assert loop.step() == 0, "both wait RETRY_S"
    world.now += RETRY_S
    assert loop.step() == len(names)


def test_more_contributors_than_an_event_holds() -> None:
    shares = [(f"{n:03}", 1_000 + n) for n in range(500)]
    nobodys = 1_000_000 - sum(ppm for _, ppm in shares)
    kept, unattributed = limit_shares(shares, nobodys)
    assert len(kept) == 400
    assert min(ppm for _, ppm in kept) == 1_100
    assert sum(ppm for _, ppm in kept) + unattributed == 1_000_000
    ties = [("b", 10), ("a", 10), ("c", 10)]
    assert limit_shares(ties, 0, limit=2) == ([("a", 10), ("b", 10)], 10)
