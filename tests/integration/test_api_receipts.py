"""Receipts over HTTP: the log's promise comes with the append, verifies, and comes again the same;
waiting for inclusion gives the proof, or says that the event is stored."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from ledger.api.app import THREADS
from ledger.client import now_us
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.errors import BadSignature, NotYetIncluded
from ledger.verify.note import parse_vkey
from ledger.verify.receipt import Receipt, verify_receipt
from ledger.verify.tlog_proof import verify_tlog_proof
from tests.api_world import LOG, LocalEngine, Service, key_of, service
from tests.integration.test_api_events import net, problem, signed

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
    from ledger.verify.note import vkey_of

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
