"""Policies, holds and appeals as rows; which contributions a run may use while one is held."""

import pytest

from tests.projections_world import HASH, Folding, World, actor

ANN, BEN, DEV = actor(10), actor(11), actor(12)


@pytest.fixture
def world() -> World:
    world = World()
    world.open()
    return world


@pytest.fixture
def folding(world: World) -> Folding:
    return Folding(world)


def inputs_of(world: World, folding: Folding, datanet: str) -> list[int]:
    """Approvals that a run requested now rests on."""
    world.request_run(DEV, datanet)
    index = len(world.entries) - 1
    rows = folding.catch_up()
    return [row["parent"] for _, row in rows.scan("lineage", (index,)) if row["field"] == "inputs"]


def test_the_newest_policy_is_shown(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    world.set_policy(DEV, datanet)
    index = world.set_policy(DEV, datanet, "retire")
    assert folding.catch_up().get("datanet_policies", (datanet,)) == {
        "max_rows_per_contribution": 10, "max_contributions_per_day": 3, "max_rows_per_day": 25,
        "on_withdrawal": "retire", "index": index, "at": folding.entry(index).recorded_at,
    }  # fmt: skip


def test_a_hold_and_its_end(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    contribution = world.contribute(ANN, datanet)
    index = world.hold(BEN, datanet, contribution)
    hold = folding.catch_up().get("holds", (contribution,))
    assert hold is not None
    assert (hold["active"], hold["held_by"], hold["held_index"]) == (True, BEN, index)
    assert (hold["contributor"], hold["reason"], hold["evidence_sha256"]) == (ANN, "junk", HASH)
    ended = world.release(DEV, datanet, contribution)
    hold = folding.catch_up().get("holds", (contribution,))
    assert hold is not None
    assert (hold["active"], hold["released_by"], hold["released_index"]) == (False, DEV, ended)
    world.hold(BEN, datanet, contribution, "dispute")
    hold = folding.catch_up().get("holds", (contribution,))
    assert hold is not None
    assert (hold["active"], hold["reason"], hold["released_index"]) == (True, "dispute", None)


def test_what_is_held_is_no_input_of_runs(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    first, second = (world.contribute(who, datanet) for who in (ANN, BEN))
    approved = [world.decide(DEV, datanet, one) for one in (first, second)]
    assert inputs_of(world, folding, datanet) == approved
    world.hold(DEV, datanet, first)
    assert inputs_of(world, folding, datanet) == approved[1:]
    world.release(DEV, datanet, first)
    assert inputs_of(world, folding, datanet) == approved
    world.hold(DEV, datanet, first)
    world.decide(ANN, datanet, first, "withdrawn")
    world.release(DEV, datanet, first)
    assert inputs_of(world, folding, datanet) == approved[1:]


def test_approved_while_held_is_an_input_once_released(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    contribution = world.contribute(ANN, datanet)
    world.hold(DEV, datanet, contribution)
    approved = world.decide(DEV, datanet, contribution)
    assert inputs_of(world, folding, datanet) == []
    world.release(DEV, datanet, contribution)
    assert inputs_of(world, folding, datanet) == [approved]
    other = world.contribute(ANN, datanet)
    world.hold(DEV, datanet, other)
    world.release(DEV, datanet, other)
    assert inputs_of(world, folding, datanet) == [approved], "nobody approved the other one"


def test_an_appeal_and_its_decisions(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    contribution = world.contribute(ANN, datanet)
    index = world.appeal(ANN, datanet, contribution, 3)
    appeal = folding.catch_up().get("appeals", (contribution, 3))
    assert appeal is not None
    assert (appeal["status"], appeal["appealed_index"], appeal["decided_by"]) == (
        "open",
        index,
        None,
    )
    decided = world.judge("upheld", DEV, datanet, contribution, 3)
    appeal = folding.catch_up().get("appeals", (contribution, 3))
    assert appeal is not None
    assert (appeal["status"], appeal["decided_index"], appeal["note"]) == (
        "upheld", decided, "looked at",
    )  # fmt: skip
    world.appeal(ANN, datanet, contribution, 3)
    world.judge("split", DEV, datanet, contribution, 3)
    appeal = folding.catch_up().get("appeals", (contribution, 3))
    assert appeal is not None
    assert appeal["status"] == "split"
    world.judge("split", DEV, datanet, contribution, 4)
    assert folding.codes() == ["unknown_subject"]


def test_a_recalled_adapter_is_retired_with_its_reason(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    contribution = world.contribute(ANN, datanet)
    adapter = world.publish(DEV, world.request_run(DEV, datanet))
    body = {"adapter": adapter, "contribution": contribution, "datanet": datanet}
    index = world.add("adapter.recalled", DEV, **body, reason="withdrawn by its contributor")
    row = folding.catch_up().get("adapters", (adapter,))
    assert row is not None
    assert (row["status"], row["retired_index"], row["reason"]) == (
        "retired", index, "withdrawn by its contributor",
    )  # fmt: skip
