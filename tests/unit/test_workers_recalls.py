"""Recalls against a real ledger in memory: what is due, once, and what stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.ids import derived_id
from ledger.errors import Unavailable
from tests.actors import ANN, DEV, EVE, OWNER
from tests.unit.test_workers_dispatch import ScriptedRay
from tests.workers_api import FACTS, WORKER, WorkersApi, write_key
from workers.dispatch import Dispatcher
from workers.link import WorkerClient, WorkerSpec
from workers.outbox import Outbox
from workers.recalls import AGAIN_S, POLL_S, Recalls


class World:
    """A ledger with a datanet of ANN's and EVE's, and lives of a recaller."""

    def __init__(self, api: WorkersApi, folder: Path) -> None:
        self.api, self.now = api, 0.0
        self.spec = WorkerSpec(api=api.url, key_file=write_key(folder), home=folder / "home")
        self.client = WorkerClient(api.url, self.spec.key_file)
        self.outbox = Outbox(self.client, folder / "outbox")
        self.net = api.datanet()
        self.ann, self.eve = (api.contribute(self.net, FACTS[who], who) for who in (ANN, EVE))

    def recalls(self) -> Recalls:
        return Recalls(self.client, self.outbox, clock=lambda: self.now)

    def policy(self, on_withdrawal: str) -> None:
        body = {
            "datanet": self.net, "max_rows_per_contribution": 9, "max_contributions_per_day": 9,
            "max_rows_per_day": 9, "on_withdrawal": on_withdrawal,
        }  # fmt: skip
        self.api.do(OWNER, "datanet.policy_set", body)

    def trained(self, *contributions: str) -> str:
        """An adapter, published, whose manifest names these."""
        run = self.api.request_run([self.net])
        started = {"run": run, "attempt": 1, "submission_id": f"{run}-1"}
        self.api.do(WORKER, "run.started", started)
        rows = [
            {"contribution": one, "row": n, "row_hash": "ab" * 32}
            for one in contributions
            for n in range(3)
        ]
        manifest = {
            "v": 1, "rows": rows, "base_sha256": "ab" * 32, "adapter_sha256": "ab" * 32,
            "config_sha256": "ab" * 32, "steps": 1, "losses": [], "run": run,
        }  # fmt: skip
        hashes = ("adapter_sha256", "adapter_config_sha256", "index_sha256", "index_root")
        done = {
            "run": run, "attempt": 1, **dict.fromkeys(hashes, "ab" * 32), "loss": "1", "steps": 1,
            "manifest_sha256": self.api.put(canonical_json(manifest)), "rows_count": len(rows),
            "contributions_count": len(contributions),
        }  # fmt: skip
        self.api.do(WORKER, "run.completed", done)
        return self.api.publish(run)

    def withdraw(self) -> None:
        ids = {"contribution": self.ann, "datanet": self.net}
        self.api.do(ANN, "contribution.withdrawn", {**ids, "reason": "mine"})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with WorkersApi() as api:
        yield World(api, tmp_path)


def test_what_used_it_is_recalled_once(world: World) -> None:
    used, clean = world.trained(world.ann, world.eve), world.trained(world.eve)
    world.policy("retire")
    recalls = world.recalls()
    assert recalls.step() == 0, "nothing is withdrawn yet"
    world.withdraw()
    assert recalls.step() == 0, "asked again only after a while"
    world.now += POLL_S
    assert recalls.step() == 1
    (event,) = world.api.events("adapter.recalled")
    assert event["event"] == str(derived_id("adapter.recalled", used))
    assert event["contribution"] == world.ann
    assert event["reason"] == "a contribution that it was trained on was withdrawn: mine"
    assert world.api.adapter(used)["status"] == "retired"
    assert world.api.adapter(clean)["status"] == "published"
    world.now += AGAIN_S
    assert recalls.step() == world.recalls().step() == 0


def test_where_the_policy_keeps_them_they_stay(world: World) -> None:
    used = world.trained(world.ann)
    world.policy("keep")
    world.withdraw()
    assert world.recalls().step() == 0
    assert world.api.adapter(used)["status"] == "published"


def test_an_answer_that_is_lost_is_sent_again_by_another_life(world: World) -> None:
    used = world.trained(world.ann)
    world.policy("retire")
    world.withdraw()
    recalls = world.recalls()
    assert world.client.log  # signed in and known: the next answer is the event's
    world.client.login("worker")
    world.api.lose_answers = 1
    with pytest.raises(Unavailable):
        recalls.step()
    assert len(world.outbox.pending()) == 1
    assert [d.body["adapter"] for d in world.outbox.replay()] == [used]
    assert len(world.api.events("adapter.recalled")) == 1


def test_a_refusal_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = world.trained(world.ann), world.trained(world.ann)
    world.policy("retire")
    world.withdraw()
    due = world.api._recalls_due()
    monkeypatch.setattr(world.api, "_recalls_due", lambda: due)  # a listing that is behind
    world.api.do(DEV, "adapter.retired", {"adapter": first, "reason": "by its owner"})
    recalls = world.recalls()
    assert recalls.step() == 1
    assert [e["adapter"] for e in world.api.events("adapter.recalled")] == [second]
    world.now += POLL_S
    assert recalls.step() == 0, "neither is tried again at once"


def test_the_dispatcher_looks_on_its_way(world: World) -> None:
    used = world.trained(world.ann)
    world.policy("retire")
    world.withdraw()
    dispatcher = Dispatcher(
        world.spec, world.client, world.outbox, ScriptedRay(), clock=lambda: world.now
    )
    dispatcher.step()
    assert world.api.adapter(used)["status"] == "retired"
