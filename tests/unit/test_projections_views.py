"""Catalogue, usage and lineage; what a fold does with text that PostgreSQL cannot hold; shapes."""

import json
from pathlib import Path

import pytest

from ledger.domain.events import CATALOGUE
from projections.memory import MemoryRows
from projections.registry import PROJECTIONS, TABLES, digest_of, fold, read_entry
from tests.projections_world import (
    HASH,
    LOG,
    OPERATOR,
    WORKER,
    Folding,
    World,
    actor,
    random_history,
)

ANN, BEN, DEV, EVE = actor(10), actor(11), actor(12), actor(13)


@pytest.fixture
def world() -> World:
    world = World()
    world.open()
    return world


@pytest.fixture
def folding(world: World) -> Folding:
    return Folding(world)


def test_opening_gives_every_role(folding: Folding) -> None:
    roles = {key for key, _ in folding.catch_up().scan("roles")}
    assert roles == {
        (OPERATOR, "governance"), (OPERATOR, "operator"), (OPERATOR, "worker"),
        (WORKER, "worker"),
    }  # fmt: skip
    ledger = folding.rows.get("ledgers", (LOG,))
    assert ledger is not None
    assert (ledger["opened_by"], ledger["index"]) == (OPERATOR, 0)


def test_a_revoked_role_is_gone(world: World, folding: Folding) -> None:
    world.add("role.revoked", OPERATOR, member=WORKER, role="worker")
    assert folding.catch_up().get("roles", (WORKER, "worker")) is None


def test_identity_keeps_name_and_address(world: World, folding: Folding) -> None:
    world.add("identity.registered", ANN, name="Ann")
    world.bind(ANN, "0x" + "AB" * 20)
    identity = folding.catch_up().get("identities", (ANN,))
    assert identity is not None
    assert (identity["name"], identity["evm_address"]) == ("Ann", "0x" + "ab" * 20)


def test_datanet_counts_follow_decisions(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    first = world.contribute(ANN, datanet, rows_count=10)
    second = world.contribute(BEN, datanet, rows_count=5)
    world.decide(DEV, datanet, first)
    world.decide(DEV, datanet, second, "rejected")
    row = folding.catch_up().get("datanets", (datanet,))
    assert row is not None
    assert (row["contributions"], row["approved"], row["rows"]) == (2, 1, 10)
    world.decide(ANN, datanet, first, "withdrawn")
    row = folding.catch_up().get("datanets", (datanet,))
    assert row is not None
    assert (row["contributions"], row["approved"], row["rows"]) == (2, 0, 0)
    contribution = folding.rows.get("contributions", (first,))
    assert contribution is not None
    assert (contribution["status"], contribution["contributor"]) == ("withdrawn", ANN)
    world.add("datanet.closed", DEV, datanet=datanet, reason="done")
    row = folding.catch_up().get("datanets", (datanet,))
    assert row is not None
    assert row["status"] == "closed"


def test_a_run_through_its_states(world: World, folding: Folding) -> None:
    run = world.request_run(DEV, world.datanet(DEV))
    row = folding.catch_up().get("runs", (run,))
    assert row is not None
    assert (row["status"], json.loads(row["config"])) == ("requested", {"lr": "0.001", "seed": 1})
    world.complete_run(run)
    row = folding.catch_up().get("runs", (run,))
    assert row is not None
    assert (row["status"], row["attempt"], row["manifest_sha256"]) == ("completed", 1, HASH)
    failed = world.request_run(DEV, world.new_id())
    world.add("run.failed", WORKER, run=failed, attempt=0, reason="no rows")
    cancelled = world.request_run(DEV, world.new_id())
    world.add("run.cancelled", DEV, run=cancelled, reason="changed my mind")
    status = {key[0]: row["status"] for key, row in folding.catch_up().scan("runs")}
    assert status == {run: "completed", failed: "failed", cancelled: "cancelled"}


def test_an_adapter_is_published_and_retired(world: World, folding: Folding) -> None:
    adapter = world.publish(DEV, world.new_id())
    row = folding.catch_up().get("adapters", (adapter,))
    assert row is not None
    assert (row["owner"], row["status"], row["output_wei_per_token"]) == (DEV, "published", 7)
    index = world.add("adapter.retired", DEV, adapter=adapter, reason="old")
    row = folding.catch_up().get("adapters", (adapter,))
    assert row is not None
    assert (row["status"], row["retired_index"]) == ("retired", index)


def test_an_event_about_nothing_is_an_anomaly(world: World, folding: Folding) -> None:
    world.add("run.cancelled", DEV, run=world.new_id(), reason="?")
    assert folding.codes() == ["unknown_subject"]


def test_usage_counts_what_was_charged(world: World, folding: Folding) -> None:
    adapter = world.new_id()
    world.deposit(EVE, 100)
    paid, unpaid = (world.infer(EVE, adapter, 80) for _ in range(2))
    world.charge(EVE, adapter, paid, DEV, 80)
    world.charge(EVE, adapter, unpaid, DEV, 80)
    usage = {"inferences": 2, "prompt_tokens": 22, "completion_tokens": 44, "fees_wei": 80}
    assert folding.catch_up().get("adapter_usage", (adapter,)) == usage
    assert folding.rows.get("consumer_usage", (EVE,)) == usage
    row = folding.rows.get("inferences", (unpaid,))
    assert row is not None
    assert (row["fee_index"], row["attribution_index"]) == (None, None)


def test_an_anchor_is_kept_by_size(world: World, folding: Folding) -> None:
    index = world.anchor(3)
    row = folding.catch_up().get("anchors", (3,))
    assert row is not None
    assert (row["root"], row["index"]) == (HASH, index)


def ancestry(rows: MemoryRows, index: int) -> set[int]:
    found, todo = set(), [index]
    while todo:
        found.add(child := todo.pop())
        todo += [row["parent"] for _, row in rows.scan("lineage", (child,))]
    return found


def test_the_ancestry_of_an_answer_is_complete(world: World, folding: Folding) -> None:
    datanet = world.datanet(DEV)
    kept, refused, gone, late = (world.contribute(who, datanet) for who in (ANN, BEN, BEN, ANN))
    world.decide(DEV, datanet, kept)
    world.decide(DEV, datanet, refused, "rejected")
    world.decide(DEV, datanet, gone)
    world.decide(BEN, datanet, gone, "withdrawn")
    run = world.request_run(DEV, datanet)
    world.decide(DEV, datanet, late)
    world.complete_run(run)
    adapter = world.publish(DEV, run)
    world.deposit(EVE, 100)
    inference = world.infer(EVE, adapter, 100)
    charged = world.charge(EVE, adapter, inference, DEV, 100)
    attributed = world.attribute(adapter, run, inference, {ANN: 1_000_000}, 0)
    rows = folding.catch_up()
    types = {index: row["type"] for (index,), row in rows.scan("edges")}
    found = sorted(types[index] for index in ancestry(rows, attributed))
    assert found == [
        "adapter.published", "attribution.recorded", "contribution.approved",
        "contribution.recorded", "datanet.created", "inference.recorded", "run.completed",
        "run.requested",
    ]  # fmt: skip
    assert "fee_policy.set" in {types[index] for index in ancestry(rows, charged)}


def test_payout_events_rest_on_their_cutoff(world: World, folding: Folding) -> None:
    cutoff = world.cutoff(1)
    world.close(1)
    proposed = world.propose(1)
    assert ancestry(folding.catch_up(), proposed) == {cutoff, proposed}


def test_a_nul_in_a_stored_name_stops_nobody(world: World, folding: Folding) -> None:
    """The gate refuses control characters today; a log from before must still project."""
    world.add("identity.registered", ANN, name="Ann Onymous")
    world.entries[-1] = world.entries[-1].replace(b"Ann Onymous", b"Ann\\u0000Onymous")
    row = folding.catch_up().get("identities", (ANN,))
    assert row is not None
    assert row["name"] == "Ann\ufffdOnymous"


def test_an_abandoned_period_gives_back_what_it_held(world: World, folding: Folding) -> None:
    world.cutoff(1)
    world.add("period.abandoned", OPERATOR, period=1, reason="nobody to pay")
    rows = folding.catch_up()
    assert [row["status"] for _, row in rows.scan("periods")] == ["abandoned"]
    assert folding.codes() == []


def test_an_answer_that_broke_off_is_listed_and_counted_nowhere(
    world: World, folding: Folding
) -> None:
    adapter = world.new_id()
    broken = world.interrupt(EVE, adapter)
    rows = folding.catch_up()
    row = rows.get("inferences", (broken,))
    assert row is not None
    assert (row["finish_reason"], row["fee_wei"], row["fee_index"]) == ("interrupted", 0, None)
    assert rows.get("adapter_usage", (adapter,)) is None
    assert folding.codes() == []


def test_an_unknown_type_is_shown_and_skipped(world: World, folding: Folding) -> None:
    entry = folding.entry(0)
    object.__setattr__(entry.envelope, "type", "future.event")
    fold(folding.rows, entry)
    assert [row["code"] for _, row in folding.rows.scan("anomalies")] == ["unknown_type"]


def test_every_event_type_is_folded_and_no_other() -> None:
    handled = set().union(*(projection.folds for projection in PROJECTIONS))
    assert handled == set(CATALOGUE)
    shown = set().union(*(p.folds for p in PROJECTIONS if p.name != "lineage"))
    assert shown == set(CATALOGUE)


def test_table_names_are_unique() -> None:
    names = [table.name for table in TABLES]
    assert len(set(names)) == len(names)


def test_digest_sees_every_value() -> None:
    rows = MemoryRows(TABLES)
    for data in random_history(3, 150):
        fold(rows, read_entry(data))
    before = digest_of(rows)
    assert before == digest_of(rows)
    for table in TABLES:
        for key, row in list(rows.scan(table.name))[:1]:
            for name, value in row.items():
                rows.put(table.name, key, {**row, name: 1 if value is None else None})
                assert digest_of(rows) != before, (table.name, name)
            rows.put(table.name, key, row)
    assert digest_of(rows) == before


def test_folds_are_pure() -> None:
    """Only `runner`, `queries` and what these keep know threads, clocks, PostgreSQL or logging."""
    folder = Path(__file__).parents[2] / "projections"
    for path in folder.glob("*.py"):
        if path.name in ("runner.py", "queries.py", "run_inputs.py"):
            continue
        text = path.read_text()
        for word in ("psycopg", "import time", "threading", "structlog", "datetime", "random"):
            assert word not in text, (path.name, word)
