"""Every read helper on a real PostgreSQL, against a ledger whose every answer is known."""

from collections.abc import Iterator
from typing import Any, LiteralString

import pytest
from psycopg_pool import ConnectionPool

from ledger.errors import StorageError, TooLarge
from ledger.store.rows import PgRowStore
from projections import queries as queries_module
from projections import run_inputs
from projections.queries import Queries
from projections.registry import TABLES
from projections.run_inputs import KeptInputs, RunInputs
from projections.runner import Runner
from tests.projections_world import (
    HASH,
    LOG,
    OPERATOR,
    WORKER,
    ListLog,
    World,
    actor,
    address,
)

ANN, BEN, DEV, EVE = (actor(n) for n in range(10, 14))
REQUEST = {"name": "a run", "base_model": HASH, "base_id": "base", "config": {"seed": 1}}


class Story:
    """One answer's whole life and what a test wants to name of it."""

    def __init__(self) -> None:
        world = self.world = World()
        world.open()
        world.add("identity.registered", ANN, name="Ann")
        world.bind(ANN, address(1))
        self.datanet = world.datanet(DEV)
        self.ann = world.contribute(ANN, self.datanet)
        self.ben = world.contribute(BEN, self.datanet)
        self.approved = [world.decide(DEV, self.datanet, c) for c in (self.ann, self.ben)]
        self.run = world.request_run(DEV, self.datanet)
        self.waiting_run = world.request_run(DEV, self.datanet)
        self.late = world.contribute(BEN, self.datanet)
        world.decide(DEV, self.datanet, self.late)
        world.decide(BEN, self.datanet, self.ben, "withdrawn")
        world.complete_run(self.run)
        self.old = world.publish(DEV, self.run, "dev/model")
        self.adapter = world.publish(DEV, self.run, "dev/model")
        world.deposit(EVE, 10_000)
        self.inference = world.infer(EVE, self.adapter, 1_000)
        self.charged = world.charge(EVE, self.adapter, self.inference, DEV, 1_000)
        shares = {ANN: 600_000, BEN: 300_000}
        self.attributed = world.attribute(self.adapter, self.run, self.inference, shares, 100_000)
        self.pending = world.infer(EVE, self.adapter, 500)
        world.cutoff(1)
        world.close(1)
        world.propose(1)
        world.activate(1)
        world.claim(address(1), 100)
        world.claim(address(1), 900, 1_000)
        self.anchored = world.anchor(10)


@pytest.fixture(scope="module")
def pool(pg_url_module: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(pg_url_module, min_size=1, max_size=3, open=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def story(pool: ConnectionPool) -> Story:
    story = Story()
    Runner(ListLog(story.world.entries), PgRowStore(pool, TABLES)).catch_up()
    return story


@pytest.fixture
def queries(pool: ConnectionPool, story: Story) -> Queries:
    return Queries(pool)


def test_balances_name_every_bucket(queries: Queries) -> None:
    assert queries.balances(ANN) == {
        "prepaid": 0, "accrued": 0, "withheld": 0, "held": 0, "available": 200, "paid": 100,
    }  # fmt: skip
    assert queries.balances("protocol") == {"main": 50}
    assert queries.balances(actor(99))["paid"] == 0
    assert queries.balance(BEN, "accrued") == 150
    totals = queries.totals()
    assert sum(totals.values()) == 0
    assert (totals["world"], totals["paid"], totals["unattributed"]) == (-10_000, 100, 50)


def test_a_statement_is_paged_and_adds_up(queries: Queries, story: Story) -> None:
    lines = queries.statement(ANN)
    parts = [(line["part"], line["bucket"], line["amount_wei"]) for line in lines]
    assert parts == [
        ("contributor", "accrued", 300),
        ("cutoff", "accrued", -300), ("cutoff", "held", 300),
        ("activated", "held", -300), ("activated", "available", 300),
        ("claimed", "available", -100), ("claimed", "paid", 100),
    ]  # fmt: skip
    first = lines[0]
    assert (first["index"], first["inference"]) == (story.attributed, story.inference)
    assert isinstance(first["amount_wei"], int)
    paged, after = [], (-1, -1)
    while page := queries.statement(ANN, limit=2, after=after):
        paged += page
        after = (page[-1]["index"], page[-1]["n"])
    assert paged == lines
    assert queries.statement_newest(ANN, limit=1) == lines[-1:]
    assert sum(line["amount_wei"] for line in queries.postings(story.inference)) == 0
    top = queries.top_contributors()
    assert [(row["owner"], row["earned_wei"], row["name"]) for row in top] == [
        (ANN, 300, "Ann"), (BEN, 150, None),
    ]  # fmt: skip


def test_periods_payouts_and_claims(queries: Queries) -> None:
    period = queries.period(1)
    assert period is not None
    assert (period["status"], period["total_wei"]) == ("activated", 1)
    assert [row["period"] for row in queries.periods()] == [1]
    assert queries.period(2) is None
    assert queries.cumulative_lines(1) == [(address(1).lower(), 300)]
    (line,) = queries.payout_lines(1)
    assert (line["owner"], line["amount_wei"]) == (ANN, 300)
    assert queries.payable() == []
    (payee,) = queries.payees(address(1))
    assert (payee["available_wei"], payee["paid_wei"]) == (200, 100)
    assert len(queries.claims(address(1))) == 2
    (claim,) = queries.unexplained_claims()
    assert claim["amount_wei"] == 900
    assert queries.anomalies() == []


def test_catalogue(queries: Queries, story: Story) -> None:
    opened = queries.ledger()
    assert opened is not None
    assert (opened["log"], opened["opened_by"]) == (LOG, OPERATOR)
    (datanet,) = queries.datanets(status="open")
    assert datanet == queries.datanet(story.datanet)
    assert (datanet["contributions"], datanet["approved"], datanet["reviewers"]) == (3, 2, [])
    assert queries.datanets(status="closed") == []

    def ids(**wanted: object) -> list[str]:
        return [row["contribution"] for row in queries.contributions(**wanted)]  # type: ignore[arg-type]

    assert ids() == [story.ann, story.ben, story.late]
    assert ids(datanet=story.datanet, status="approved") == [story.ann, story.late]
    assert ids(contributor=BEN, limit=1) == [story.ben]
    first = queries.contribution(story.ann)
    assert first is not None
    assert ids(after=first["index"]) == [story.ben, story.late]
    assert queries.contribution("none") is None


def test_runs_and_what_they_may_train_on(queries: Queries, story: Story) -> None:
    (waiting,) = queries.runs(status="requested")
    assert waiting["run"] == story.waiting_run
    assert waiting["config"] == {"lr": "0.001", "seed": 1}
    assert waiting["datanets"] == [story.datanet]
    assert [row["run"] for row in queries.runs()] == [story.waiting_run, story.run]
    run = queries.run(story.run)
    assert run is not None
    assert (run["status"], run["adapter_sha256"]) == ("completed", HASH)
    inputs = queries.run_inputs(story.run)
    assert [row["contribution"] for row in inputs] == [story.ann, story.ben]
    assert [row["approved_index"] for row in inputs] == story.approved


class Counted(Queries):
    """Remembers what it asked."""

    def __init__(self, pool: ConnectionPool) -> None:
        super().__init__(pool)
        self.asked: list[str] = []

    def _all(self, query: LiteralString, *values: object, **named: object) -> list[dict[str, Any]]:
        self.asked.append(query)
        return super()._all(query, *values, **named)


def test_inputs_are_read_once_and_what_became_of_them_every_time(pg_url: str) -> None:
    world = World()
    world.open()
    net, other = world.datanet(DEV), world.datanet(DEV)
    mine, yours, elsewhere = (
        world.contribute(w, n) for w, n in ((ANN, net), (BEN, net), (EVE, other))
    )
    for contribution, datanet in ((mine, net), (yours, net), (elsewhere, other)):
        world.decide(DEV, datanet, contribution)
    run, later = (world.new_id() for _ in range(2))
    with ConnectionPool(pg_url, min_size=1, max_size=1, open=True) as pool:
        queries, runner = Counted(pool), Runner(ListLog(world.entries), PgRowStore(pool, TABLES))

        def terms(which: str) -> dict[str, Any]:
            runner.catch_up()
            found = queries.run_terms(which)
            assert found == Queries(pool).run_terms(which), "as one sees it who kept nothing"
            assert found["log_size"] == len(world.entries)
            return {what: found[what] for what in ("withdrawn", "held", "splits")}

        none: dict[str, Any] = {"withdrawn": [], "held": [], "splits": []}
        assert terms(run) == none, "not projected yet, and not kept as a run of nothing"
        world.add("run.requested", DEV, run=run, **REQUEST, datanets=[net])
        assert terms(run) == none
        queries.asked.clear()
        world.decide(ANN, net, mine, "withdrawn")
        assert terms(run) == none | {"withdrawn": [mine]}
        world.decide(EVE, other, elsewhere, "withdrawn")
        world.hold(DEV, net, yours)
        world.appeal(BEN, net, yours, 3)
        world.judge("split", DEV, net, yours, 3)
        assert terms(run) == {"withdrawn": [mine], "held": [yours], "splits": [[yours, 3]]}
        world.release(DEV, net, yours)
        assert terms(run) == {"withdrawn": [mine], "held": [], "splits": [[yours, 3]]}
        assert len(queries.asked) == 3, "three times one statement: the inputs were kept"
        assert queries.inputs_of(run).contributors == {ANN, BEN}, "whatever became of them later"
        world.add("run.requested", DEV, run=later, **REQUEST, datanets=[net])
        assert terms(later) == none | {"splits": [[yours, 3]]}
        assert queries.inputs_of(later).contributors == {BEN}


def test_kept_inputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_inputs, "MAX_KEPT", 5)

    def inputs(count: int) -> RunInputs:
        rows = (
            {"contribution": f"c{n}", "contributor": "ann", "datanet": "d"} for n in range(count)
        )
        return RunInputs.of(rows)

    kept = KeptInputs()
    for run, count in (("a", 2), ("b", 2), ("a", 2), ("none", 0)):
        kept.keep(run, inputs(count))
    assert kept.get("none") is None
    assert kept.get("a") == inputs(2), "asked for last"
    kept.keep("c", inputs(2))
    assert kept.get("b") is None
    assert [kept.get(run) for run in "ac"] == [inputs(2)] * 2
    kept.keep("large", inputs(9))
    assert [run for run in ("a", "b", "c", "large") if kept.get(run)] == ["large"]


def test_adapters_by_model(queries: Queries, story: Story) -> None:
    assert [row["adapter"] for row in queries.adapters()] == [story.adapter, story.old]
    newest = queries.adapter_by_model("dev/model")
    assert newest is not None
    assert newest["adapter"] == story.adapter
    assert newest["output_wei_per_token"] == 7
    assert queries.adapter_by_model("dev/none") is None
    assert queries.adapters(status="retired") == []
    assert len(queries.adapters(status=None)) == 2
    assert queries.adapters()[0]["inferences"] == 2
    found = queries.adapter(story.old)
    assert found is not None
    assert found["owner"] == DEV


def test_people_roles_policies(queries: Queries) -> None:
    identity = queries.identity(ANN)
    assert identity is not None
    assert (identity["name"], identity["evm_address"]) == ("Ann", address(1).lower())
    assert queries.identities() == [identity]
    assert queries.actor_of_address(address(1)) == ANN
    assert queries.actor_of_address(address(7)) is None
    assert [row["role"] for row in queries.roles(WORKER)] == ["worker"]
    assert len(queries.roles()) == 4
    assert [row["version"] for row in queries.fee_policies()] == [1]
    policy = queries.fee_policy_at(100)
    assert policy is not None
    assert policy["contributors_bps"] == 5_000
    assert queries.fee_policy_at(1) is None


def test_usage(queries: Queries, story: Story) -> None:
    inference = queries.inference(story.inference)
    assert inference is not None
    assert (inference["fee_wei"], inference["attribution_index"]) == (1_000, story.attributed)
    assert inference["attribution"]["shares"] == [
        {"contributor": ANN, "ppm": 600_000}, {"contributor": BEN, "ppm": 300_000},
    ]  # fmt: skip
    (pending,) = queries.pending_attributions()
    assert (pending["inference"], pending["run"]) == (story.pending, story.run)
    newest = queries.inferences(adapter=story.adapter, consumer=EVE)
    assert [row["inference"] for row in newest] == [story.pending, story.inference]
    assert queries.inferences(before=newest[-1]["index"]) == []
    assert queries.inference("none") is None
    usage = queries.adapter_usage(story.adapter)
    assert usage is not None
    assert (usage["inferences"], usage["fees_wei"]) == (2, 1_000)
    consumed = queries.consumer_usage(EVE)
    assert consumed is not None
    assert (consumed["inferences"], consumed["completion_tokens"]) == (2, 44)
    (anchor,) = queries.anchors()
    assert anchor == queries.anchor_covering(9)
    assert queries.anchor_covering(10) is None


def test_lineage(queries: Queries, story: Story) -> None:
    ancestry = queries.lineage_of(story.attributed)
    assert ancestry[-1] == story.attributed
    assert ancestry == sorted(ancestry)
    types = {event["type"] for index in ancestry if (event := queries.event(index))}
    assert types == {
        "adapter.published", "attribution.recorded", "contribution.approved",
        "contribution.recorded", "datanet.created", "inference.recorded", "run.completed",
        "run.requested",
    }  # fmt: skip
    contribution = queries.index_of("contribution", story.ann)
    assert contribution is not None
    assert contribution in ancestry
    assert story.attributed in queries.descendants_of(contribution)
    assert queries.descendants_of(contribution, limit=1) == [contribution]
    assert queries.index_of("run", "none") is None
    edges = queries.lineage_edges(ancestry)
    assert {edge["parent"] for edge in edges} | {story.attributed} == set(ancestry)
    history = [event["type"] for event in queries.history(contribution)]
    assert history == ["contribution.recorded", "contribution.approved"]
    assert [event["index"] for event in queries.events(limit=2)] == [
        story.anchored, story.anchored - 1,
    ]  # fmt: skip
    assert queries.events(before=1)[0]["index"] == 0
    assert queries.event(10**6) is None


def test_who_may_read_a_blob(queries: Queries) -> None:
    assert queries.is_public_blob(HASH)
    assert not queries.is_public_blob("00" * 32)
    assert queries.blob_readers(HASH) == [ANN, BEN, DEV, EVE]
    assert queries.blob_readers("00" * 32) == []
    assert queries.holds_words(HASH)
    assert not queries.holds_words("00" * 32)


def test_a_lineage_beyond_the_limit_is_refused(
    queries: Queries, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries_module, "MAX_LINEAGE", 3)
    with pytest.raises(TooLarge, match="MAX_LINEAGE"):
        queries.lineage_of(story.attributed)


def test_pages_are_bounded(queries: Queries) -> None:
    assert len(queries.events(limit=10**9)) <= queries_module.MAX_PAGE
    assert queries.events(limit=-5) == []


def test_a_database_that_is_gone_is_a_storage_error() -> None:
    url = "postgresql://nobody@127.0.0.1:1/none?connect_timeout=1"
    with (
        ConnectionPool(url, min_size=0, max_size=1, open=True, timeout=0.5) as pool,
        pytest.raises(StorageError, match="DATABASE_URL"),
    ):
        Queries(pool).balances(ANN)
