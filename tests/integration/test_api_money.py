"""Statements, periods and claims over HTTP, from a paid answer to a proof for the distributor."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from ledger import bootstrap
from ledger.chain.client import create_key, load_key
from ledger.chain.payouts import build_payout_tree, verify_payout
from ledger.domain.canonical import canonical_json
from ledger.errors import Conflict, Forbidden, NotFound
from tests.api_world import LOG, MODEL, LocalEngine, Service, service
from tests.integration.test_api_events import problem

HELLO = [{"role": "user", "content": "hello there"}]
DEPOSIT = 10**24  # beyond 2^53: as a JSON number it would lose its last digits


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        running.tell(home / "adapters")
        running.deposit("eve", DEPOSIT)
        yield running


@pytest.fixture(scope="module")
def paid(api: Service) -> int:
    """Three answers, attributed; the wei they cost."""
    fees = 0
    for n in range(3):
        answer = api.client("eve").chat(MODEL, HELLO, max_tokens=5 + n)
        fees += int(answer["tributary"]["fee_wei"])
        api.attribute(answer["tributary"]["inference"])
    return fees


def balances(api: Service, name: str) -> dict[str, str]:
    found: dict[str, str] = api.client("eve").get(f"/v1/accounts/{api.actor(name)}/balances")
    assert all(isinstance(wei, str) for wei in found.values())
    return found


def test_a_period_needs_somebody_to_pay(api: Service, paid: int) -> None:
    """Ann and ben have accrued, but nobody has bound an address yet."""
    before = api.size
    with pytest.raises(Conflict, match="bound EVM address"):
        api.client("operator").post("/v1/periods")
    for who in ("ann", "worker", "mallory"):
        with pytest.raises(Forbidden):
            api.client(who).post("/v1/periods")
    with api.http() as http:
        problem(http.post("/v1/periods"), 401, "unauthenticated")
    assert api.size == before


def test_balances_are_exact_and_sum_to_zero(api: Service, paid: int) -> None:
    assert balances(api, "eve")["prepaid"] == str(DEPOSIT - paid)
    with api.http() as http:
        totals = http.get("/v1/totals").json()
        assert sum(int(wei) for wei in totals.values()) == 0
        earned = {row["name"]: int(row["earned_wei"]) for row in _items(http, "/v1/contributors")}
    assert set(earned) == {"ann", "ben"}
    assert earned["ann"] > earned["ben"] > 0
    assert balances(api, "ann")["accrued"] == str(earned["ann"])


def _items(http: Any, path: str, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get(path, params=params).json()["items"]
    return found


@pytest.mark.parametrize("limit", [1, 2, 3, 500])
def test_a_statement_is_the_same_however_it_is_paged(api: Service, paid: int, limit: int) -> None:
    path = f"/v1/accounts/{api.actor('eve')}/statement"
    with api.http() as http:
        lines, after = [], None
        while True:
            page = http.get(
                path, params={"limit": limit} | ({"after": after} if after else {})
            ).json()
            assert len(page["items"]) <= limit
            lines += page["items"]
            after = page["next"]
            if after is None:
                break
        assert [line["type"] for line in lines] == ["deposit.recorded"] + 3 * ["fee.charged"]
        balance = 0
        for line in lines:
            balance += int(line["amount_wei"])
            assert line["balance_wei"] == str(balance)
        assert balance == DEPOSIT - paid
        for wrong in ("1", "1.", "x.1", "1.1.1", "-1.0", "9" * 30 + ".1", "1.0%00"):
            assert http.get(f"{path}?after={wrong}").status_code in (400, 422)
        problem(http.get(f"{path}?limit=1001"), 422, "invalid-request")
    assert list(api.client("eve").pages(path)) == lines


def test_an_inference_shows_whom_it_paid(api: Service, paid: int) -> None:
    with api.http() as http:
        [newest, *_] = _items(http, "/v1/inferences", consumer=api.actor("eve"))
        found = http.get(f"/v1/inferences/{newest['inference']}").json()
        assert http.get("/v1/inferences?attribution=pending").json()["items"] == []
        problem(http.get("/v1/inferences?attribution=x"), 422, "invalid-request")
        problem(http.get(f"/v1/inferences/{uuid4()}"), 404, "not-found")
    assert {share["contributor"] for share in found["attribution"]["shares"]} == {
        api.actor("ann"), api.actor("ben"),
    }  # fmt: skip
    assert sum(int(posting["amount_wei"]) for posting in found["postings"]) == 0


def test_a_period_from_cut_off_to_claim(api: Service, paid: int) -> None:
    addresses = {name: _bind(api, name) for name in ("ann", "ben")}
    operator = api.client("operator")
    owed = {addresses[name]: int(balances(api, name)["accrued"]) for name in addresses}
    cut = operator.post("/v1/periods")
    assert cut == {"period": 1, "index": api.size - 1}
    with pytest.raises(Conflict):
        operator.post("/v1/periods")
    size = api.settle()
    claim = f"/v1/periods/1/claims/{addresses['ann']}"
    with api.http() as http:
        assert "not closed" in problem(http.get(claim), 404)["detail"]
    tree = build_payout_tree(owed)
    closed = {
        "period": 1, "log_size": size, "root": "0x" + tree.root.hex(),
        "total_wei": str(tree.total), "accounts": 2,
        "tree_sha256": operator.put_blob(canonical_json(tree.dump())),
    }  # fmt: skip
    operator.append("period.closed", closed)
    api.settle()
    for name, address in addresses.items():
        found = operator.get(f"/v1/periods/1/claims/{address}")
        assert found["root"] == closed["root"]
        assert found["cumulative_wei"] == str(owed[address])
        proof = [bytes.fromhex(node.removeprefix("0x")) for node in found["proof"]]
        assert verify_payout(tree.root, address, owed[address], proof)
        assert not verify_payout(tree.root, address, owed[address] + 1, proof)
        shouted = "0x" + address[2:].upper()
        assert operator.get(f"/v1/periods/1/claims/{shouted}") == found
        assert balances(api, name)["accrued"] == "0"
    with pytest.raises(NotFound):
        operator.get(f"/v1/periods/1/claims/0x{'ee' * 20}")
    with api.http() as http:
        problem(http.get("/v1/periods/1/claims/nobody"), 400, "invalid-event")
        problem(http.get(f"/v1/periods/2/claims/{addresses['ann']}"), 404, "not-found")
        period = http.get("/v1/periods/1").json()
        assert http.get(f"/v1/blobs/{closed['tree_sha256']}").status_code == 200, "trees are public"
    assert {line["address"]: int(line["amount_wei"]) for line in period["lines"]} == owed
    assert [p["period"] for p in operator.get("/v1/periods")["items"]] == [1]


def _bind(api: Service, name: str) -> str:
    path = api.home / f"{name}.wallet"
    create_key(path)
    wallet, client = load_key(path), api.client(name)
    signature = bootstrap.sign_binding(wallet, actor=client.actor, log=LOG)
    body = {"address": str(wallet.address), "signature": signature}
    client.append("identity.evm_bound", body)
    api.settle()
    return str(wallet.address).lower()
