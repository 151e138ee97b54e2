"""Receipts over HTTP: the log's promise comes with the append, verifies, and comes again the same;
waiting for inclusion gives the proof, or says that the event is stored."""

import json
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from typer.testing import CliRunner, Result

from ledger import bootstrap
from ledger.api.app import THREADS
from ledger.chain.client import ChainClient
from ledger.chain.devchain import DevChain
from ledger.chain.receipts import receipt_typed_data
from ledger.cli.app import app
from ledger.client import Client, now_us
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.errors import BadSignature, Inconsistent, LedgerError, NotYetIncluded, VerificationError
from ledger.processes.chain import deploy
from ledger.verify.evidence import check_evidence, parse_evidence
from ledger.verify.note import format_vkey, parse_skey, parse_vkey, vkey_of
from ledger.verify.receipt import Receipt, parse_receipt, verify_receipt
from ledger.verify.tlog_proof import verify_tlog_proof
from tests.api_world import LOG, LocalEngine, Service, key_of, service, settings_for
from tests.integration.test_api_events import net, problem, signed
from tests.unit.receipt_world import History, mirror

JSON = {"content-type": "application/json"}
PROMISE_US = 60_000_000


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        yield running


def verified(api: Service, receipt: dict[str, Any]) -> Receipt:
    return verify_receipt(canonical_json(receipt), parse_vkey(api.services.vkey))


def test_an_append_answers_with_a_receipt_for_exactly_what_is_stored(api: Service) -> None:
    raw = signed()
    with api.http() as http:
        answer = http.post("/v1/events", content=raw)
    assert answer.status_code == 201
    found = answer.json()
    promise = verified(api, found["receipt"]).promise
    assert promise.log == LOG
    assert promise.first_index == found["index"]
    assert promise.recorded_at == found["recorded_at"]
    assert promise.included_by == promise.recorded_at + PROMISE_US
    entry = encode_entry(found["index"], promise.recorded_at, raw)
    assert promise.leaf_hashes == (leaf_hash(entry),)
    assert api.services.entries.entries(found["index"], found["index"] + 1) == [entry]


def test_the_receipt_comes_again_to_the_byte(api: Service) -> None:
    raw = signed()
    with api.http() as http:
        first = http.post("/v1/events", content=raw)
        again = http.post("/v1/events", content=raw)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json() == again.json()
        for name in (first.json()["event"], first.json()["index"]):
            assert http.get(f"/v1/receipts/{name}").json() == first.json()["receipt"]
        problem(http.get(f"/v1/receipts/{uuid4()}"), 404, "not-found")
        problem(http.get("/v1/receipts/nonsense"), 400, "invalid-event")


def test_a_batch_has_one_receipt(api: Service) -> None:
    raws = [signed() for _ in range(7)]
    with api.http() as http:
        answer = http.post("/v1/events/batch", content=b"\n".join(raws)).json()
        promise = verified(api, answer["receipt"]).promise
        assert [promise.first_index + n for n in range(7)] == answer["indexes"]
        for index, raw, leaf in zip(answer["indexes"], raws, promise.leaf_hashes, strict=True):
            assert leaf == leaf_hash(encode_entry(index, promise.recorded_at, raw))
            own = verified(api, http.get(f"/v1/receipts/{index}").json()).promise
            assert (own.leaf_hashes, own.included_by) == ((leaf,), promise.included_by)
        again = http.post("/v1/events/batch", content=b"\n".join(raws))
        assert (again.status_code, again.json()) == (200, answer)


def test_a_repeated_batch_that_was_stored_in_pieces_has_no_common_receipt(api: Service) -> None:
    raws = [signed() for _ in range(2)]
    with api.http() as http:
        indexes = []
        for raw in raws:
            indexes.append(http.post("/v1/events", content=raw).json()["index"])
            http.post("/v1/events", content=signed())
        again = http.post("/v1/events/batch", content=b"\n".join(raws))
    assert again.status_code == 200
    assert again.json() == {"indexes": indexes, "receipt": None}


def test_waiting_gives_the_proof(api: Service) -> None:
    with api.http() as http:
        answer = http.post("/v1/events?wait=included", content=signed())
        assert answer.status_code == 201
        found = answer.json()
        verify_tlog_proof(
            found["proof"].encode(),
            bytes.fromhex(found["leaf_hash"]),
            parse_vkey(api.services.vkey),
        )
        problem(http.post("/v1/events?wait=for-ever", content=signed()), 422, "invalid-request")
    assert not api.services.inclusion._waiting


def test_many_waiters_share_one_watcher_and_hold_no_threads(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More requests wait than the pool has threads, and others are answered meanwhile."""
    held = threading.Event()
    looks = []
    latest = api.services.tiles.latest

    def look() -> Any:
        looks.append(threading.current_thread())
        return latest() if held.is_set() else None

    monkeypatch.setattr(api.services.inclusion._tiles, "latest", look)
    count = THREADS + 24

    def one(_: int) -> httpx.Response:
        with httpx.Client(base_url=api.url, timeout=60) as http:
            return http.post("/v1/events?wait=included", content=signed())

    with ThreadPoolExecutor(count) as pool, api.http() as http:
        answers = pool.map(one, range(count))
        while len(api.services.inclusion._waiting) < count:
            assert http.get("/v1/events/0").status_code == 200
        held.set()
        found = [answer.json() for answer in answers]
    vkey = parse_vkey(api.services.vkey)
    for each in found:
        verify_tlog_proof(each["proof"].encode(), bytes.fromhex(each["leaf_hash"]), vkey)
    assert len({each["index"] for each in found}) == count
    assert not api.services.inclusion._waiting


def test_too_many_waiters_are_refused_before_anything_is_stored(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.api.inclusion.MAX_WAITING", 0)
    size = api.size
    with api.http() as http:
        problem(http.post("/v1/events?wait=included", content=signed()), 429, "backpressure")
    assert api.size == size


def test_without_a_sequencer_the_event_is_stored_and_the_answer_says_so(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.services.inclusion, "max_wait_s", 0.3)
    blocked = threading.Event()
    step = api.sequencer.step

    def stopped() -> Any:
        blocked.wait(10)
        return step()

    monkeypatch.setattr(api.sequencer, "step", stopped)
    api.settle()
    raw = signed()
    try:
        with api.http() as http:
            http.post("/v1/events", content=signed())  # the sequencer may be inside a real step
            api_problem = problem(
                http.post("/v1/events?wait=included", content=raw), 503, "not-yet-included"
            )
            extra = api_problem["extra"]
            assert "is stored at index" in api_problem["detail"]
            stored = http.get(f"/v1/events/{extra['event']}").json()
            assert stored["index"] == extra["index"]
            verified(api, extra["receipt"])
            size = api.size
            client = api.client("owner")
            with pytest.raises(NotYetIncluded):
                client._json("POST", "/v1/events?wait=included", content=raw, headers=JSON)
            assert api.size == size, "the same bytes are not stored twice"
    finally:
        blocked.set()
    with api.http() as http:
        monkeypatch.setattr(api.services.inclusion, "max_wait_s", 10)
        answer = http.post("/v1/events?wait=included", content=raw)
        assert answer.status_code == 200
        assert answer.json()["proof"].startswith("c2sp.org/tlog-proof@v1\n")


def test_another_log_s_key_does_not_verify(api: Service) -> None:
    with api.http() as http:
        receipt = http.post("/v1/events", content=signed()).json()["receipt"]
    with pytest.raises(BadSignature):
        verify_receipt(canonical_json(receipt), vkey_of(LOG, key_of("mallory")))


def test_a_refused_event_has_no_receipt(api: Service) -> None:
    raw = sign_event(
        key_of("owner"),
        type="datanet.created",
        log="other/log",
        body=net(),
        id=uuid4(),
        at=now_us(),
    )
    with api.http() as http:
        found = problem(http.post("/v1/events?wait=included", content=raw), 400)
    assert "receipt" not in found["extra"]


# --- for contracts ----------------------------------------------------------------------------


def test_where_contracts_stand_the_chain_key_signs_the_promise_too(
    pg_url: str, tmp_path: Path
) -> None:
    contract = "0x" + "Ab" * 20
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "addresses.json").write_text(
        json.dumps({"chain_id": 31_337, "anchor": contract, "development": True})
    )
    account = bootstrap.wallet_of(tmp_path / "keys" / "chain.key")
    with service(pg_url, tmp_path, LocalEngine(), opened=False) as running:
        raw = sign_event(
            key_of("operator"), type="ledger.opened", log=LOG, body={"name": "n"}, id=uuid4(),
            at=now_us(),
        )  # fmt: skip
        with running.http() as http:
            answer = http.post("/v1/events", content=raw).json()["receipt"]
            assert http.get("/v1/receipts/0").json() == answer, "RFC 6979: the same bytes"
        receipt = verified(running, answer)
    assert receipt.evm is not None
    assert receipt.evm.signer == account.address.lower()
    bootstrap.check_evm_receipt(receipt)
    document = receipt_typed_data(receipt.promise, chain_id=31_337, contract=contract)
    message = encode_typed_data(full_message=document)
    assert Account.recover_message(message, signature=receipt.evm.sig) == account.address


def test_the_anchor_s_committer_is_the_signer_of_its_receipts(pg_url: str, tmp_path: Path) -> None:
    """On a real chain: what a contract that slashes would ask."""
    with DevChain(tmp_path / "chain" / "dev") as chain:
        key_file = tmp_path / "keys" / "chain.key"
        chain.fund(bootstrap.wallet_of(key_file).address, 10**24)
        settings = settings_for(
            pg_url, tmp_path, CHAIN_RPC_URL=chain.rpc_url, dev_chain=True, inclusion_promise_s=7
        )
        deployments = deploy(settings, key_file)
        client = ChainClient(chain.rpc_url)
        anchor = client.contract("CheckpointAnchor", deployments.anchor)
        committer = client.call(anchor.functions.committer())
        assert client.chain_id == deployments.chain_id
    with bootstrap.store(settings) as box:
        issuer = bootstrap.receipt_issuer(settings, bootstrap.log_signer(settings), box.tiles)
    issued = issuer.issue(first_index=0, leaf_hashes=[bytes(32)], recorded_at=1)
    receipt = parse_receipt(canonical_json(issued))
    bootstrap.check_evm_receipt(receipt)
    assert receipt.evm is not None
    assert receipt.evm.signer == committer.lower()
    assert receipt.evm.contract == deployments.anchor.lower()
    assert receipt.evm.chain_id == deployments.chain_id
    assert receipt.promise.included_by == 7_000_001


# --- the client and the command line ------------------------------------------------------------


@pytest.fixture
def home(api: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIBUTARY_HOME", str(tmp_path))
    monkeypatch.setenv("TRIBUTARY_API", api.url)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "me.key").write_text(bytes(key_of("owner")).hex())
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def kept(home: Path) -> list[Path]:
    return sorted((home / "receipts").glob("*.json"))


def appended(home: Path) -> Path:
    """A datanet made on the command line; the file of its receipt."""
    before = set(kept(home))
    assert run("datanet", "create", "n", "--licence", "CC0-1.0").exit_code == 0
    [path] = set(kept(home)) - before
    return path


def test_the_command_line_keeps_receipts_and_checks_them(api: Service, home: Path) -> None:
    path = appended(home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    verify_receipt(path.read_bytes(), parse_vkey(api.services.vkey))
    api.settle()
    done = run("receipt", "check", str(path), "--key", api.services.vkey)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("KEPT: the log holds entry")
    assert "The key came from the log itself" not in done.stdout
    shown = json.loads(run("receipt", "check", str(path), "--json").stdout)
    assert shown["state"] == "kept"
    assert any("The key came from the log itself" in line for line in shown["trusted"])
    data = path.read_bytes()
    path.unlink()
    assert run("receipt", "get", path.stem).exit_code == 0
    assert path.read_bytes() == data


def test_an_altered_receipt_is_refused_with_exit_code_1(api: Service, home: Path) -> None:
    path = appended(home)
    value = json.loads(path.read_bytes())
    path.write_bytes(canonical_json({**value, "included_by": value["included_by"] + 1}))
    api.settle()
    done = run("receipt", "check", str(path))
    assert isinstance(done.exception, BadSignature)
    assert done.exception.exit_code == 1
    missing = run("receipt", "check", str(home / "none.json"))
    assert isinstance(missing.exception, LedgerError)
    assert missing.exception.exit_code == 4


def test_a_receipt_is_pending_until_the_log_shows_more(
    api: Service, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = mirrored(api, tmp_path_factory.mktemp("mirror"))
    path = appended(home)
    done = run("receipt", "check", str(path), "--log", str(folder))
    assert done.exit_code == 6, done.output
    assert done.stdout.startswith("PENDING")
    assert not list(path.parent.glob("*evidence*"))
    mirrored(api, folder)
    assert run("receipt", "check", str(path), "--log", str(folder)).exit_code == 0


def test_a_fork_that_dropped_the_entry_leaves_evidence(
    api: Service, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The log's own key signs a history without the entry, and a mirror serves it."""
    path = appended(home)
    index = json.loads(path.read_bytes())["first_index"]
    folder = forked_without(api, index, tmp_path_factory.mktemp("fork"))
    done = run("receipt", "check", str(path), "--log", str(folder))
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("BROKEN")
    evidence = parse_evidence(path.with_name(f"{path.stem}.evidence.json").read_bytes())
    assert evidence.kind == "broken-receipt"
    again = run(
        "evidence", "check", str(path.with_name(f"{path.stem}.evidence.json")),
        "--key", api.services.vkey,
    )  # fmt: skip
    assert again.exit_code == 0
    assert again.stdout.startswith("PROVEN: broken-receipt")
    checked = check_evidence(evidence, api.services.vkey)
    assert checked.facts["conclusive"]
    assert checked.facts["index"] == index
    with pytest.raises(VerificationError):
        check_evidence(evidence, format_vkey(vkey_of(LOG, key_of("mallory"))))


def test_a_ledger_that_answers_for_other_bytes_is_not_believed(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = api.services.receipts.issue

    def other(**given: Any) -> dict[str, Any]:
        return issue(**{**given, "leaf_hashes": [bytes(32)]})

    monkeypatch.setattr(api.services.receipts, "issue", other)
    with (
        Client(api.url, key=key_of("owner")) as client,
        pytest.raises(Inconsistent, match="do not count on it"),
    ):
        client.append("datanet.created", net())


def test_the_client_waits_for_the_proof(api: Service) -> None:
    found: dict[UUID, Mapping[str, Any]] = {}
    with Client(api.url, key=key_of("owner"), keep_receipt=found.__setitem__) as client:
        answer = client.append_event("datanet.created", net(), wait=True)
        assert client.receipt(answer["index"]) == answer["receipt"]
    assert [str(event) for event in found] == [answer["event"]]
    assert answer["proof"].startswith("c2sp.org/tlog-proof@v1\n")


def mirrored(api: Service, folder: Path) -> Path:
    """The log's files as they are now, in a folder."""
    return mirror(api.services.log_files, api.settle(), api.services.vkey, folder)


def forked_without(api: Service, index: int, folder: Path) -> Path:
    """Another history, without that entry and one longer, signed by the log's own key."""
    text = api.services.settings.key_file(bootstrap.LOG_KEY).read_text()
    fork = History(folder / "memory", [], origin=LOG, key=parse_skey(text.strip())[1])
    entries = api.services.entries.entries(0, api.settle())
    for entry in [*entries[:index], *entries[index + 1 :]]:
        fork.log.append(entry[16:], recorded_at=int.from_bytes(entry[8:16], "big"))
    fork.append(b"one more", b"and another")
    return fork.folder(folder / "log")
