"""Policies, holds, appeals and recalls: each rule once kept and once broken."""

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import pytest

from ledger.aggregates.datanets import MAX_OPEN_APPEALS, Contribution, Datanet
from ledger.aggregates.runs import Adapter, Run
from ledger.domain.datanets import DAY_US, MAX_HOLD_US, DatanetPolicy
from ledger.errors import Conflict, Forbidden, InvalidEvent, NotFound, TooLarge
from tests.actors import ANN, BEN, DEV, EVE, NOW, OPERATOR, OWNER, Actor, H, MemoryLedger
from tests.unit.test_aggregates import contribution, datanet

LIMITS = {
    "max_rows_per_contribution": 3, "max_contributions_per_day": 2, "max_rows_per_day": 5,
}  # fmt: skip
WORKER = Actor(70)


@pytest.fixture
def world() -> MemoryLedger:
    world = MemoryLedger()
    world.do(OPERATOR, "role.granted", {"member": WORKER.id, "role": "worker"})
    return world


def set_policy(world: MemoryLedger, net: str, actor: Actor = OWNER, **changes: Any) -> None:
    body = {"datanet": net, **LIMITS, "on_withdrawal": "keep", **changes}
    world.do(actor, "datanet.policy_set", body)


def ids(net: str, name: str) -> dict[str, str]:
    return {"contribution": name, "datanet": net}


def hold(world: MemoryLedger, of: Mapping[str, str], actor: Actor = WORKER, at: int = NOW) -> None:
    body = {**of, "reason": "junk", "note": "", "evidence_sha256": None}
    world.append(actor.sign("contribution.held", body, at=at))


def release(world: MemoryLedger, of: Mapping[str, str], actor: Actor, at: int = NOW) -> None:
    world.append(actor.sign("contribution.released", {**of, "note": ""}, at=at))


# --- policy -----------------------------------------------------------------------------------


def test_a_datanet_without_a_policy_has_the_defaults(world: MemoryLedger) -> None:
    policy = world.ledger.need(Datanet, datanet(world)).policy
    assert policy == DatanetPolicy()
    assert (policy.max_rows_per_contribution, policy.on_withdrawal) == (100_000, "keep")


def test_the_newest_policy_counts_also_of_a_closed_datanet(world: MemoryLedger) -> None:
    net = datanet(world, reviewers=[BEN.id])
    set_policy(world, net)
    with pytest.raises(TooLarge, match=r"max_rows_per_contribution = 3 rows at a time, not 4"):
        contribution(world, net, rows_count=4)
    contribution(world, net, rows_count=3)
    set_policy(world, net, max_rows_per_contribution=4)
    contribution(world, net, rows_count=4)
    with pytest.raises(Forbidden, match="only the owner"):
        set_policy(world, net, actor=BEN)
    world.do(OWNER, "datanet.closed", {"datanet": net, "reason": ""})
    set_policy(world, net, on_withdrawal="retire")
    state = world.ledger.need(Datanet, net)
    assert (state.status, state.policy.on_withdrawal) == ("closed", "retire")
    with pytest.raises(NotFound, match="datanet"):
        set_policy(world, str(uuid4()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_rows_per_contribution", 0),
        ("max_rows_per_contribution", 100_001),
        ("max_contributions_per_day", 0),
        ("max_rows_per_day", "5"),
        ("on_withdrawal", "delete"),
    ],
)
def test_a_policy_has_its_form(world: MemoryLedger, field: str, value: Any) -> None:
    net = datanet(world)
    with pytest.raises(InvalidEvent, match=field):
        set_policy(world, net, **{field: value})


# --- holds ------------------------------------------------------------------------------------


def test_who_holds_and_who_releases(world: MemoryLedger) -> None:
    net = datanet(world, reviewers=[BEN.id])
    of = ids(net, contribution(world, net))
    for stranger in (EVE, ANN):
        with pytest.raises(Forbidden):
            hold(world, of, actor=stranger)
    for holder in (WORKER, OWNER, BEN):
        hold(world, of, actor=holder)
        with pytest.raises(Conflict, match="held already"):
            hold(world, of, actor=OWNER)
        for stranger in (EVE, WORKER):
            with pytest.raises(Forbidden, match="reviewers"):
                release(world, of, stranger)
        with pytest.raises(Forbidden, match="30 days") as caught:
            release(world, of, ANN, at=NOW + 1)
        assert caught.value.detail == {"from_us": NOW + MAX_HOLD_US}
        release(world, of, BEN)
        with pytest.raises(Conflict, match="not held"):
            release(world, of, BEN)


def test_nobody_holds_or_releases_their_own_as_reviewer_or_worker(world: MemoryLedger) -> None:
    net = datanet(world, reviewers=[ANN.id, BEN.id])
    own = ids(net, contribution(world, net, actor=ANN))
    with pytest.raises(Forbidden, match="their own"):
        hold(world, own, actor=ANN)
    hold(world, own, actor=BEN)
    with pytest.raises(Forbidden, match="30 days"):
        release(world, own, ANN)
    world.do(OPERATOR, "role.granted", {"member": EVE.id, "role": "worker"})
    other = ids(net, contribution(world, net, actor=EVE))
    with pytest.raises(Forbidden, match="their own"):
        hold(world, other, actor=EVE)


def test_a_contributor_ends_a_hold_that_lasts_too_long(world: MemoryLedger) -> None:
    net = datanet(world)
    of = ids(net, contribution(world, net))
    hold(world, of)
    world.ledger._clock = lambda: NOW + 31 * DAY_US
    with pytest.raises(Forbidden, match="2023-12-14"):
        release(world, of, ANN, at=NOW + MAX_HOLD_US - 1)
    release(world, of, ANN, at=NOW + MAX_HOLD_US)
    hold(world, of, at=NOW + MAX_HOLD_US + 1)
    with pytest.raises(Forbidden, match="30 days"):
        release(world, of, ANN, at=NOW + MAX_HOLD_US + 2)
    assert world.ledger.need(Contribution, of["contribution"]).held_at == NOW + MAX_HOLD_US + 1


def test_a_hold_is_beside_the_status(world: MemoryLedger) -> None:
    net = datanet(world)
    of = ids(net, contribution(world, net))
    hold(world, of)
    world.do(OWNER, "contribution.approved", {**of, "note": ""})
    world.do(ANN, "contribution.withdrawn", {**of, "reason": ""})
    release(world, of, OWNER)
    with pytest.raises(Conflict, match="is withdrawn"):
        hold(world, of)
    refused = ids(net, contribution(world, net))
    world.do(OWNER, "contribution.rejected", {**refused, "reason": ""})
    with pytest.raises(Conflict, match="is rejected"):
        hold(world, refused)
    with pytest.raises(Conflict, match="belongs to datanet"):
        hold(world, ids(datanet(world), refused["contribution"]))
    with pytest.raises(NotFound):
        hold(world, ids(net, str(uuid4())))


# --- appeals ----------------------------------------------------------------------------------


def appeal(world: MemoryLedger, of: Mapping[str, str], row: int, actor: Actor = ANN) -> None:
    world.do(actor, "cluster.appealed", {**of, "row": row, "reason": "mine"})


def judge(
    world: MemoryLedger, what: str, of: Mapping[str, str], row: int, actor: Actor = OWNER
) -> None:
    world.do(actor, f"cluster.{what}", {**of, "row": row, "note": ""})


def test_an_appeal_is_decided_by_another(world: MemoryLedger) -> None:
    net = datanet(world, reviewers=[ANN.id, BEN.id])
    of = ids(net, contribution(world, net))
    with pytest.raises(Conflict, match="no appeal of row 1"):
        judge(world, "split", of, 1)
    with pytest.raises(Forbidden, match="only the contributor"):
        appeal(world, of, 1, actor=BEN)
    with pytest.raises(Conflict, match="rows 0 to 2"):
        appeal(world, of, 3)
    appeal(world, of, 1)
    with pytest.raises(Conflict, match="waits for its decision"):
        appeal(world, of, 1)
    for actor in (ANN, EVE, WORKER):
        with pytest.raises(Forbidden):
            judge(world, "split", of, 1, actor=actor)
    with pytest.raises(Conflict, match="no appeal of row 2"):
        judge(world, "upheld", of, 2)
    judge(world, "upheld", of, 1, actor=BEN)
    with pytest.raises(Conflict, match="no appeal of row 1"):
        judge(world, "split", of, 1)
    appeal(world, of, 1)
    judge(world, "split", of, 1)
    with pytest.raises(Conflict, match="stands for itself already"):
        appeal(world, of, 1)
    state = world.ledger.need(Contribution, of["contribution"])
    assert not state.appeals
    assert state.splits == frozenset({1})
    assert state.status == "recorded"


def test_open_appeals_are_bounded(world: MemoryLedger) -> None:
    net = datanet(world)
    of = ids(net, contribution(world, net, rows_count=MAX_OPEN_APPEALS + 1))
    for row in range(MAX_OPEN_APPEALS):
        appeal(world, of, row)
    with pytest.raises(Conflict, match="MAX_OPEN_APPEALS"):
        appeal(world, of, MAX_OPEN_APPEALS)
    judge(world, "upheld", of, 0)
    appeal(world, of, MAX_OPEN_APPEALS)


def test_what_was_withdrawn_is_appealed_no_more(world: MemoryLedger) -> None:
    net = datanet(world)
    of = ids(net, contribution(world, net))
    appeal(world, of, 0)
    world.do(ANN, "contribution.withdrawn", {**of, "reason": ""})
    with pytest.raises(Conflict, match="is withdrawn"):
        appeal(world, of, 1)
    judge(world, "split", of, 0)


# --- recalls ----------------------------------------------------------------------------------


def trained(world: MemoryLedger, net: str) -> str:
    """An adapter of a run on the datanet."""
    run, adapter = str(uuid4()), str(uuid4())
    body = {
        "run": run, "name": "r", "datanets": [net], "base_model": H, "base_id": "b", "config": {},
    }  # fmt: skip
    world.do(DEV, "run.requested", body)
    world.do(WORKER, "run.started", {"run": run, "attempt": 1, "submission_id": "s"})
    hashes = (
        "manifest_sha256", "adapter_sha256", "adapter_config_sha256", "index_sha256", "index_root",
    )  # fmt: skip
    counts = {"rows_count": 3, "contributions_count": 1, "steps": 1}
    done = {"run": run, "attempt": 1, "loss": "1", **dict.fromkeys(hashes, H), **counts}
    world.do(WORKER, "run.completed", done)
    published = {
        "adapter": adapter, "run": run, "model": "dev/x", "adapter_sha256": H, "base_model": H,
        "input_wei_per_token": "1", "output_wei_per_token": "1",
    }  # fmt: skip
    world.do(DEV, "adapter.published", published)
    return adapter


def test_a_recall_needs_policy_and_withdrawal(world: MemoryLedger) -> None:
    net, other = datanet(world), datanet(world)
    of, strange = ids(net, contribution(world, net)), ids(other, contribution(world, other))
    adapter = trained(world, net)
    body = {"adapter": adapter, **of, "reason": "withdrawn"}

    def recall(actor: Actor = WORKER, changes: Mapping[str, str] | None = None) -> None:
        world.do(actor, "adapter.recalled", {**body, **(changes or {})})

    with pytest.raises(Conflict, match="is recorded"):
        recall()
    world.do(ANN, "contribution.withdrawn", {**of, "reason": ""})
    with pytest.raises(Conflict, match="on_withdrawal is 'keep'"):
        recall()
    set_policy(world, net, on_withdrawal="retire")
    for actor in (DEV, ANN, EVE):
        with pytest.raises(Forbidden, match="worker or the datanet's owner"):
            recall(actor)
    with pytest.raises(Conflict, match="belongs to datanet"):
        recall(changes={"datanet": other})
    with pytest.raises(Conflict, match="did not ask for"):
        recall(changes=strange)
    with pytest.raises(NotFound):
        recall(changes={"adapter": str(uuid4())})
    recall()
    state = world.ledger.need(Adapter, adapter)
    assert state.status == "retired"
    assert world.ledger.need(Run, state.run).datanets == (net,)
    with pytest.raises(Conflict, match="is retired"):
        recall()


def test_the_datanets_owner_recalls_too(world: MemoryLedger) -> None:
    net = datanet(world)
    set_policy(world, net, on_withdrawal="retire")
    of = ids(net, contribution(world, net))
    adapter = trained(world, net)
    world.do(ANN, "contribution.withdrawn", {**of, "reason": ""})
    world.do(OWNER, "adapter.recalled", {"adapter": adapter, **of, "reason": ""})
    assert world.ledger.need(Adapter, adapter).status == "retired"
