"""A bundle of every event of a whole life, fetched from a running service, verified from its bytes.

Real PostgreSQL, projections, sequencer, engine and HTTP; only the chain is made up: what its
watcher would record is appended by the operator, and the L1 section comes from a made block.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from ledger import bootstrap
from ledger.aggregates.inferences import chain_event_id
from ledger.chain.payouts import PayoutTree, build_payout_tree
from ledger.domain.canonical import canonical_json
from ledger.domain.events import CATALOGUE
from ledger.errors import Backpressure, Unavailable, VerificationError
from ledger.log import ancestry
from ledger.log.bundle import Bundler
from ledger.log.disclose import disclose
from ledger.verify.bundle import verify_bundle
from ledger.verify.verdict import Verdict
from projections.lineage_index import LineageIndex
from tests.api_world import MODEL, POLICY, LocalEngine, Service, service
from tests.integration.test_api_events import problem
from tests.integration.test_api_money import HELLO, _bind
from tests.unit.lineage_world import ScannedIndex
from tests.unit.made_chain import l1_section

CONTRACT = "0x" + "12" * 20
APPROVED = {"contribution.recorded", "contribution.approved", "datanet.created"}


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    # Rates are for strangers, and these are 200 requests in a second.
    with service(pg_url_module, home, LocalEngine(), requests_per_minute=60_000) as running:
        running.tell(home / "adapters")
        running.deposit("eve", 10**24)
        live(running)
        running.settle()
        yield running


def live(api: Service) -> None:
    """Everything that can happen, in an order in which it may."""
    operator, owner, dev = (api.client(name) for name in ("operator", "owner", "dev"))
    made = api.made
    answer(api, 3)
    for name in ("ann", "dev"):
        made[f"address {name}"] = _bind(api, name)
    member = {"member": api.actor("mallory"), "role": "worker"}
    operator.append("role.granted", member)
    operator.append("role.revoked", member)
    # Period 1 is given up, period 2 vetoed: both give back what they held.
    cut_off(api, 1)
    operator.append("period.abandoned", {"period": 1, "reason": "a mistake"})
    root = cut_off(api, 2)
    operator.append("payout.proposed", {"period": 2, "root": root, **on_chain()})
    operator.append("payout.vetoed", {"period": 2, **on_chain()})
    operator.append(
        "fee_policy.set",
        {**POLICY, "version": 2, "owner_bps": 2_000, "contributors_bps": 5_500},
    )
    answer(api, 2)
    activate(api, 3)
    claim(api, 3, "ann")
    settle_between_them(api)
    activate(api, 4)
    claim(api, 4, "ann")
    recalled(api)
    refused(api)
    anchored = api.services.tiles.latest()
    assert anchored
    section = l1_section(anchored.size, anchored.root)
    operator.append(
        "checkpoint.anchored",
        {
            "size": anchored.size, "root": anchored.root.hex(), **on_chain(),
            "block_hash": section["block_hash"],
            "l1_sha256": operator.put_blob(canonical_json(section)),
        },
    )  # fmt: skip
    dev.append("adapter.retired", {"adapter": made["adapter"], "reason": "there is a better one"})
    owner.append("datanet.closed", {"datanet": made["datanet"], "reason": "complete"})


def settle_between_them(api: Service) -> None:
    """An answer while ann is held, whose part comes with the release; appeals of two rows."""
    owner, ann, worker = (api.client(name) for name in ("owner", "ann", "worker"))
    ids = {field: api.made["ann"][field] for field in ("contribution", "datanet")}
    evidence = worker.put_blob(b"what the gate saw")
    held = {"reason": "stuffing", "note": "many alike", "evidence_sha256": evidence}
    worker.append("contribution.held", {**ids, **held})
    answer(api, 1)
    owner.append("contribution.released", {**ids, "note": "they are not"})
    for row, what in ((0, "split"), (1, "upheld")):
        ann.append("cluster.appealed", {**ids, "row": row, "reason": "nobody's copy"})
        owner.append(f"cluster.{what}", {**ids, "row": row, "note": "compared"})


def recalled(api: Service) -> None:
    """Ben withdraws, and a second adapter of the run is recalled for it."""
    ids = {field: api.made["ben"][field] for field in ("contribution", "datanet")}
    limits = {
        "max_rows_per_contribution": 100, "max_contributions_per_day": 9, "max_rows_per_day": 500,
    }  # fmt: skip
    policy = {"datanet": ids["datanet"], **limits, "on_withdrawal": "retire"}
    api.client("owner").append("datanet.policy_set", policy)
    api.client("ben").append("contribution.withdrawn", {**ids, "reason": "mine again"})
    adapter = api.publish(api.made["run"], api.made["saved"], "dev/second")
    body = {"adapter": adapter, **ids, "reason": "withdrawn"}
    api.client("worker").append("adapter.recalled", body)


def refused(api: Service) -> None:
    """Contributions that were not taken, runs that came to nothing, an answer that broke off."""
    given = api.client("operator").get(f"/v1/events/{index_of(api, 'inference.recorded')}")["body"]
    whole = {k: v for k, v in given.items() if k not in ("finish_reason", "fee_wei")}
    broken = {**whole, "inference": str(uuid4()), "reason": "crashed"}
    api.client("operator").append("inference.interrupted", broken)
    owner, dev, worker = (api.client(name) for name in ("owner", "dev", "worker"))
    for name, what, who in (("ben", "rejected", "owner"), ("ann", "withdrawn", "ann")):
        rows_sha256 = api.made[name]["rows_sha256"]
        body = {**api.made[name], "contribution": str(uuid4()), "rows_sha256": rows_sha256}
        body.pop("rows")
        api.client(name).append("contribution.recorded", body)
        ids = {"contribution": body["contribution"], "datanet": body["datanet"]}
        api.client(who).append(f"contribution.{what}", {**ids, "reason": "not this one"})
    base = owner.get("/v1/info")["base_model"]
    for end in ("failed", "cancelled"):
        run = str(uuid4())
        asked = {"run": run, "name": end, "datanets": [api.made["datanet"]]}
        base_model = {"base_model": base["digest"], "base_id": base["id"]}
        dev.append("run.requested", {**asked, **base_model, "config": {"seed": 1}})
        if end == "failed":
            worker.append("run.started", {"run": run, "attempt": 1, "submission_id": run})
            worker.append("run.failed", {"run": run, "attempt": 1, "reason": "no memory"})
        else:
            dev.append("run.cancelled", {"run": run, "reason": "never mind"})


def answer(api: Service, count: int) -> None:
    for n in range(count):
        found = api.client("eve").chat(MODEL, HELLO, max_tokens=5 + n)["tributary"]
        api.made.setdefault("inferences", []).append(found["inference"])
        api.attribute(found["inference"])


def on_chain() -> dict[str, Any]:
    tx_hash = f"0x{uuid4().hex * 2}"
    return {"chain_id": 1, "contract": CONTRACT, "tx_hash": tx_hash, "block_number": 1}


def cut_off(api: Service, period: int) -> str:
    """Cut off and close a period; its root."""
    operator = api.client("operator")
    api.settle()
    assert operator.post("/v1/periods")["period"] == period
    size = api.settle()
    tree = build_payout_tree(dict(api.services.queries.cumulative_lines(period)))
    root = "0x" + tree.root.hex()
    closed = {
        "period": period, "log_size": size, "root": root, "total_wei": str(tree.total),
        "accounts": len(tree.amounts),
        "tree_sha256": operator.put_blob(canonical_json(tree.dump())),
    }  # fmt: skip
    operator.append("period.closed", closed)
    api.made[f"tree {period}"] = tree
    return root


def activate(api: Service, period: int) -> None:
    root = cut_off(api, period)
    for what in ("proposed", "activated"):
        body = {"period": period, "root": root, **on_chain()}
        api.client("operator").append(f"payout.{what}", body)
    api.settle()


def claim(api: Service, period: int, name: str) -> None:
    tree: PayoutTree = api.made[f"tree {period}"]
    cumulative_wei = tree.amount(api.made[f"address {name}"])
    before_wei = api.made.get(f"claimed {name}", 0)
    chain = {**on_chain(), "log_index": 0}
    body = {
        "address": api.made[f"address {name}"], "amount_wei": str(cumulative_wei - before_wei),
        "cumulative_wei": str(cumulative_wei), **chain,
    }  # fmt: skip
    id = chain_event_id("claim", chain["chain_id"], chain["tx_hash"], 0)
    api.made[f"claim {period}"] = api.client("operator").append("payout.claimed", body, id=id)
    api.made[f"claimed {name}"] = cumulative_wei


def events(api: Service) -> list[dict[str, Any]]:
    return list(api.client("eve").pages("/v1/events"))


def verified(api: Service, subject: object, **asked: str) -> tuple[Verdict, dict[str, Any]]:
    with api.http() as http:
        found = http.get(f"/v1/bundles/{subject}", params=asked)
        assert found.status_code == 200, found.text
        vkey = http.get("/log/vkey").text.strip()
    verdict = verify_bundle(found.content, trusted_vkey=vkey, require_l1=True)
    return verdict, json.loads(found.content)


def index_of(api: Service, event_type: str, **body: Any) -> int:
    """The newest event of a type with these fields."""
    found = [
        e["index"]
        for e in events(api)
        if e["type"] == event_type and body.items() <= e["body"].items()
    ]
    return int(found[-1])


def types(api: Service, bundle: dict[str, Any]) -> set[str]:
    by_index = {event["index"]: event["type"] for event in events(api)}
    return {by_index[entry["index"]] for entry in bundle["entries"]}


def test_every_event_has_a_bundle_that_verifies(api: Service) -> None:
    told = events(api)
    assert {event["type"] for event in told} == CATALOGUE.keys(), "a life leaves nothing out"
    for event in told:
        verdict, bundle = verified(api, event["index"])
        assert verdict.facts["subject"] == event["event"] == bundle["subject"]
        assert verdict.facts["subject_index"] == event["index"]
        statuses = [step.status for step in verdict.steps]
        claims = event["type"] == "payout.claimed"
        assert statuses == ["ok"] * 6 + (["skipped", "ok"] if claims else [])
        assert max(verdict.facts["entries"]) < verdict.facts["size"]


@pytest.mark.parametrize(
    ("event_type", "rests_on"),
    [
        ("role.revoked", {"ledger.opened"}),
        ("identity.evm_bound", {"identity.registered"}),
        ("contribution.rejected", {"contribution.recorded", "datanet.created"}),
        ("contribution.withdrawn", {"contribution.recorded", "datanet.created"}),
        ("contribution.held", APPROVED),
        ("cluster.split", APPROVED),
        ("datanet.policy_set", {"datanet.created"}),
        ("run.failed", {"run.requested", "datanet.created"}),
        ("deposit.recorded", {"identity.registered"}),
        ("datanet.closed", {"datanet.created"}),
        ("payout.activated", {"payout.proposed", "period.closed", "period.cutoff"}),
        ("payout.vetoed", {"payout.proposed", "period.closed", "period.cutoff"}),
        ("period.abandoned", {"period.closed", "period.cutoff"}),
        (
            "adapter.recalled",
            {"adapter.published", "run.completed", "run.requested", "contribution.recorded",
             "contribution.approved", "datanet.created"},
        ),
        (
            "adapter.retired",
            {"adapter.published", "run.completed", "run.requested", "contribution.recorded",
             "contribution.approved", "datanet.created"},
        ),
        (
            "fee.charged",
            {"inference.recorded", "attribution.recorded", "fee_policy.set", "ledger.opened",
             "adapter.published", "run.completed", "run.requested", "contribution.recorded",
             "contribution.approved", "datanet.created"},
        ),
    ],
)  # fmt: skip
def test_what_a_bundle_gathers(api: Service, event_type: str, rests_on: set[str]) -> None:
    _, bundle = verified(api, index_of(api, event_type))
    assert types(api, bundle) == rests_on | {event_type}


def test_a_claim_is_explained_to_the_last_wei(api: Service) -> None:
    for period in (3, 4):
        verdict, bundle = verified(api, api.made[f"claim {period}"])
        (line,) = verdict.facts["payouts"]
        tree: PayoutTree = api.made[f"tree {period}"]
        assert line["period"] == period
        assert int(line["cumulative_wei"]) == tree.amount(api.made["address ann"]) > 0
        assert line["accounted_wei"] == line["cumulative_wei"]
        assert line["events"] == {3: 5, 4: 6}[period], "an attribution each"
        assert line["owners"] == [api.actor("ann")]
        assert any("to the last wei" in said for said in verdict.proven)
        assert {"period.abandoned", "payout.vetoed"} <= types(api, bundle), "what gave back"
        assert any("as the fee policy" in said for said in verdict.proven)


def test_every_line_of_every_period_is_explained(api: Service) -> None:
    for period in (1, 2, 3, 4):
        closed = index_of(api, "period.closed", period=period)
        tree: PayoutTree = api.made[f"tree {period}"]
        assert len(tree.amounts) == 2
        for account, amount_wei in tree.amounts.items():
            verdict, _ = verified(api, closed, account=account)
            (line,) = verdict.facts["payouts"]
            assert int(line["cumulative_wei"]) == int(line["accounted_wei"]) == amount_wei > 0
            alone, bundle = verified(api, closed, account=account, earnings="false")
            (line,) = alone.facts["payouts"]
            assert (int(line["cumulative_wei"]), line["accounted_wei"]) == (amount_wei, "0")
            assert not types(api, bundle) & {"inference.recorded", "fee.charged"}
            assert any("not accounted for here" in said for said in alone.trusted)


def test_lines_that_are_not_there(api: Service) -> None:
    closed = index_of(api, "period.closed", period=3)
    with api.http() as http:
        nobody = http.get(f"/v1/bundles/{closed}?account=0x{'ee' * 20}")
        problem(nobody, 404, "not-found")
        problem(http.get(f"/v1/bundles/{closed}?account=nobody"), 400, "invalid-event")
        problem(http.get(f"/v1/bundles/0?account=0x{'ee' * 20}"), 400, "invalid-event")
        problem(http.get(f"/v1/bundles/{closed}?account={'x' * 65}"), 422, "invalid-request")
        problem(http.get(f"/v1/bundles/{closed}?earnings=perhaps"), 422, "invalid-request")


def test_too_much_says_what_to_ask_instead(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ancestry, "MAX_ENTRIES", 8)
    index = api.made["claim 4"]
    with api.http() as http:
        detail = problem(http.get(f"/v1/bundles/{index}"), 413, "too-large")["detail"]
    assert "MAX_ENTRIES = 8" in detail
    assert "earnings=false" in detail
    verified(api, index, earnings="false")


def test_a_row_of_a_real_bundle(api: Service) -> None:
    """The contributor fetches their own rows, and shows one of them to anybody."""
    ann = api.client("ann")
    with api.http() as http:
        data = http.get(f"/v1/bundles/{api.made['adapter']}").content
    own = api.made["ann"]["rows"]
    shown = disclose(data, own, [1])
    verdict = verify_bundle(shown, require_l1=True)
    assert verdict.facts["disclosed"][0]["adapters"] == [api.made["adapter"]]
    assert any(f"prompt “{own[1].prompt}”" in said for said in verdict.proven)
    assert own[0].salt.encode() not in shown
    with pytest.raises(VerificationError):
        verify_bundle(shown.replace(own[1].salt.encode(), own[0].salt.encode()))
    assert ann.get_blob(api.made["ann"]["rows_sha256"])


def test_the_index_finds_what_a_scan_of_the_log_finds(api: Service) -> None:
    index = LineageIndex(api.services.queries._pool)
    scan = ScannedIndex(api.services.entries)
    wanted = {
        thing
        for entry in scan.entries()
        for thing in (*ancestry._needs(entry), *ancestry._companions(entry))
    }
    wanted |= {("run.completed", "run", str(uuid4())), ("period.closed", "period", "99")}
    found = scan.firsts(wanted)
    assert index.firsts(wanted) == found
    assert {event_type for event_type, _, _ in found} > {"fee_policy.set", "fee.charged"}
    assert index.firsts(set()) == {}
    assert index.position() == api.settle()
    for name in ("ann", "dev"):
        address = api.made[f"address {name}"]
        assert index.bindings(address) == scan.bindings(address) != []
    assert index.bindings("0x" + "ee" * 20) == []
    for period in (1, 2, 3, 4):
        cutoff = index_of(api, "period.cutoff", period=period)
        assert index.settlements(cutoff) == scan.settlements(cutoff)
        for owners in ({api.actor("ann")}, {api.actor("dev"), api.actor("ben")}, set[str]()):
            assert index.earnings(owners, cutoff, 99) == scan.earnings(owners, cutoff, 99)
            assert index.earnings(owners, cutoff, 2) == scan.earnings(owners, cutoff, 2)
    address, owed_wei = api.made["address ann"], api.made["tree 3"].amount(api.made["address ann"])
    claim = api.made["claim 3"]
    assert index.claimed_period(address, owed_wei, claim) == 3
    assert index.claimed_period(address, owed_wei + 1, claim) is None
    assert index.claimed_period(address, owed_wei, 5) is None, "not active yet"


def test_too_many_at_once_are_asked_to_come_again(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each may hold 64 MiB and more."""
    monkeypatch.setattr(bootstrap, "BUNDLE_WAIT_S", 0.01)
    busy, go_on = threading.Barrier(bootstrap.BUNDLES_AT_ONCE + 1), threading.Event()
    honest = Bundler.bundle

    def slow(self: Bundler, subject: int, **asked: Any) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            busy.wait(10)
            assert go_on.wait(10)
        return honest(self, subject, **asked)

    monkeypatch.setattr(Bundler, "bundle", slow)
    with ThreadPoolExecutor(bootstrap.BUNDLES_AT_ONCE) as pool:
        under_way = [pool.submit(api.services.bundle, 0) for _ in range(bootstrap.BUNDLES_AT_ONCE)]
        busy.wait(10)
        with pytest.raises(Backpressure):
            api.services.bundle(0)
        go_on.set()
        assert all(verify_bundle(done.result()) for done in under_way)
    verify_bundle(api.services.bundle(0))


def test_bundles_at_the_same_time(api: Service) -> None:
    """Nothing is shared between two requests: no lock, no index in memory."""
    subjects = [api.made["adapter"], *api.made["inferences"], api.made["claim 4"]] * 3
    with ThreadPoolExecutor(6) as pool, api.http() as http:

        def fetch(subject: object) -> bytes:
            return bytes(http.get(f"/v1/bundles/{subject}").raise_for_status().content)

        found = list(pool.map(fetch, subjects))
    for at, data in enumerate(found):
        assert data == found[at % (len(subjects) // 3)]
        verify_bundle(data)


def test_before_the_projections_are_there(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may be asked for as soon as its event is in a checkpoint; what the projections do
    not know yet is not left out in silence."""
    build = api.services.bundle
    monkeypatch.setattr(LineageIndex, "position", lambda self: 3)
    monkeypatch.setattr(LineageIndex, "firsts", lambda self, wanted: {})
    verify_bundle(build(0))
    with pytest.raises(Unavailable, match="not projected yet"):
        build(api.made["claim 4"])
    with pytest.raises(Unavailable, match="retry in a second"):
        build(index_of(api, "inference.recorded"))
    with api.http() as http:
        problem(http.get(f"/v1/bundles/{api.made['claim 4']}"), 503, "unavailable")
