"""Appending over HTTP: what is accepted stands in the log, what is refused leaves no trace."""

import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger.api.app import THREADS
from ledger.api.auth import RateLimit
from ledger.api.routes import events
from ledger.client import now_us
from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import MAX_ENVELOPE_BYTES, leaf_hash, sign_event
from ledger.domain.ids import sha256_hex
from ledger.domain.login import sign_login
from ledger.domain.rows import DataRow, encode_rows, rows_root
from ledger.errors import Conflict, Forbidden, LedgerError, TooLarge
from tests.api_world import LOG, LocalEngine, Service, key_of, service, serving_http

PROBLEM = "application/problem+json"
FIELDS = {"type", "title", "status", "detail", "extra"}
OTHER = SigningKey(b"x" * 32)


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        yield running


def problem(response: httpx.Response, status: int, slug: str | None = None) -> dict[str, Any]:
    """The problem document of a response, held against RFC 9457 and our own fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    found: dict[str, Any] = response.json()
    assert found.keys() - {"error"} == FIELDS
    assert found["status"] == status
    assert found["type"].startswith("/problems/")
    assert found["title"]
    assert found["detail"]
    if slug:
        assert found["type"] == f"/problems/{slug}"
    return found


def net(**changes: Any) -> dict[str, Any]:
    body = {
        "datanet": str(uuid4()), "name": "n", "description": "", "licence": "CC0-1.0",
        "reviewers": [],
    }  # fmt: skip
    return {**body, **changes}


def signed(
    body: dict[str, Any] | None = None,
    *,
    who: str = "owner",
    type: str = "datanet.created",
    log: str = LOG,
    at: int | None = None,
) -> bytes:
    return sign_event(
        key_of(who), type=type, log=log, body=body or net(), id=uuid4(), at=at or now_us()
    )


def altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A valid envelope, changed after signing and canonical again."""
    value = json.loads(signed())
    change(value)
    return canonical_json(value)


def resigned(**fields: Any) -> bytes:
    """An envelope whose fields may be anything, with a signature that does verify."""
    import base64

    value = {**json.loads(signed()), **fields}
    value.pop("sig")
    message = b"tributary/event/v1\n" + canonical_json(value)
    sig = base64.b64encode(key_of("owner").sign(message).signature).decode()
    return canonical_json({**value, "sig": sig})


def nested(depth: int) -> bytes:
    return signed().replace(b'"reviewers":[]', b'"reviewers":' + b"[" * depth + b"]" * depth)


REFUSED: dict[str, tuple[Callable[[], bytes], int, str, str]] = {
    "empty": (lambda: b"", 400, "invalid-event", "not JSON"),
    "no JSON": (lambda: b"\xff\x00{", 400, "invalid-event", "not JSON"),
    "no object": (lambda: b"[1,2]", 400, "invalid-event", "exactly the fields"),
    "spaces": (
        lambda: json.dumps(json.loads(signed())).encode(), 400, "invalid-event", "not canonical",
    ),
    "line feed": (lambda: signed() + b"\n", 400, "invalid-event", "not canonical"),
    "repeated key": (
        lambda: signed().replace(b'"name":"n"', b'"name":"m","name":"n"'),
        400, "invalid-event", "not canonical",
    ),
    "float": (
        lambda: signed().replace(b'"v":1', b'"v":1.0'), 400, "invalid-event", "float",
    ),
    "wide integer": (
        lambda: signed().replace(b'"v":1', b'"v":' + b"9" * 6_000), 400, "invalid-event", "2^53",
    ),
    "lone surrogate": (
        lambda: signed().replace(b'"name":"n"', b'"name":"\\ud800"'),
        400, "invalid-event", "surrogate",
    ),
    "deep": (lambda: nested(40), 400, "invalid-event", "MAX_DEPTH"),
    "very deep": (lambda: nested(30_000), 400, "invalid-event", "MAX_DEPTH"),
    "altered body": (
        lambda: altered(lambda e: e["body"].update(name="m")), 400, "invalid-event", "signature",
    ),
    "altered time": (
        lambda: altered(lambda e: e.update(at=e["at"] - 1)), 400, "invalid-event", "signature",
    ),
    "another actor": (
        lambda: altered(lambda e: e.update(actor="ed25519:" + bytes(OTHER.verify_key).hex())),
        400, "invalid-event", "signature",
    ),
    "short signature": (
        lambda: altered(lambda e: e.update(sig="AAAA")), 400, "invalid-event", "64-byte",
    ),
    "another log": (lambda: signed(log="other.example"), 400, "invalid-event", "other.example"),
    "unknown type": (lambda: signed(type="datanet.burnt"), 400, "invalid-event", "burnt"),
    "unknown version": (lambda: resigned(v=2), 400, "invalid-event", "version"),
    "version true": (lambda: resigned(v=True), 400, "invalid-event", "version"),
    "extra envelope field": (lambda: resigned(note=""), 400, "invalid-event", "exactly"),
    "upper-case id": (lambda: resigned(id=str(uuid4()).upper()), 400, "invalid-event", "id"),
    "missing field": (
        lambda: signed({k: v for k, v in net().items() if k != "name"}),
        400, "invalid-event", "missing ['name']",
    ),
    "unknown field": (lambda: signed(net(colour="red")), 400, "invalid-event", "colour"),
    "wrong kind": (lambda: signed(net(reviewers="ann")), 400, "invalid-event", "reviewers"),
    "unknown licence": (lambda: signed(net(licence="WTFPL")), 400, "invalid-event", "licence"),
    "NUL in a name": (lambda: signed(net(name="a\0b")), 400, "invalid-event", "name"),
    "future clock": (
        lambda: signed(at=now_us() + 3_600_000_000), 400, "invalid-event", "future",
    ),
    "negative time": (lambda: resigned(at=-1), 400, "invalid-event", "at must be"),
    "oversize": (
        lambda: b" " * (MAX_ENVELOPE_BYTES + 1), 413, "too-large", "MAX_ENVELOPE_BYTES",
    ),
    "no role": (
        lambda: signed(
            {"member": "ed25519:" + "ab" * 32, "role": "operator"},
            who="mallory", type="role.granted",
        ),
        403, "forbidden", "governance",
    ),
    "registered twice": (
        lambda: signed({"name": "n"}, who="ann", type="identity.registered"),
        409, "conflict", "already recorded",
    ),
    "unknown datanet": (
        lambda: signed(
            {"datanet": str(uuid4()), "reason": ""}, type="datanet.closed"
        ),
        404, "not-found", "not recorded",
    ),
    "no EVM signature": (
        lambda: signed(
            {"address": "0x" + "12" * 20, "signature": "0x12"}, who="ann", type="identity.evm_bound"
        ),
        422, "malformed-proof", "130 hex digits",
    ),
    "another's EVM signature": (
        lambda: signed(
            {"address": "0x" + "12" * 20, "signature": "0x" + "11" * 64 + "1b"},
            who="ann", type="identity.evm_bound",
        ),
        422, "bad-signature", "sign",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_event_says_why_and_leaves_no_trace(api: Service, name: str) -> None:
    make, status, slug, words = REFUSED[name]
    before = api.size
    with api.http() as http:
        found = problem(http.post("/v1/events", content=make()), status, slug)
    assert words in found["detail"]
    assert api.size == before


def test_the_same_bytes_again_get_the_same_answer_and_the_same_id_in_others_is_refused(
    api: Service,
) -> None:
    raw = signed()
    id = UUID(json.loads(raw)["id"])
    owner = key_of("owner")
    other = sign_event(owner, type="datanet.created", log=LOG, body=net(), id=id, at=now_us())
    with api.http() as http:
        first = http.post("/v1/events", content=raw)
        again = http.post("/v1/events", content=raw)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json() == again.json()
        index = first.json()["index"]
        found = problem(http.post("/v1/events", content=other), 409, "conflict")
    assert found["extra"]["index"] == index
    assert api.size == index + 1


def test_a_receipt_says_where_the_event_stands(api: Service) -> None:
    raw = signed()
    with api.http() as http:
        receipt = http.post("/v1/events", content=raw)
        assert receipt.status_code == 201
        found = receipt.json()
        promise = found.pop("receipt")
        assert http.get(f"/v1/events/{found['index']}").json() == found
        assert http.get(f"/v1/events/{found['event']}").json() == found
    [entry] = api.services.entries.entries(found["index"], found["index"] + 1)
    assert entry[16:] == raw
    assert found["leaf_hash"] == leaf_hash(entry).hex()
    assert found["body"] == json.loads(raw)["body"]
    assert promise["leaf_hashes"] == [found["leaf_hash"]]


def test_a_body_is_bounded_while_it_is_read(api: Service) -> None:
    """Without a content-length the limit is seen at the chunk that passes it."""

    def chunks() -> Iterator[bytes]:
        for _ in range(128):
            yield b" " * 2**13

    before = api.size
    with api.http("ann") as http:
        problem(http.post("/v1/events", content=chunks()), 413, "too-large")
        too_much = b" " * (8 * 2**20 + 1)
        assert (
            "MAX_BATCH_BYTES"
            in problem(http.post("/v1/events/batch", content=too_much), 413)["detail"]
        )
    assert api.size == before


def test_a_batch_is_stored_together_or_not_at_all(api: Service) -> None:
    good = [signed() for _ in range(3)]
    before = api.size
    with api.http() as http:
        bad = b"\n".join([*good, signed(net(licence="WTFPL"))])
        problem(http.post("/v1/events/batch", content=bad), 400)
        twice = b"\n".join([good[0], good[0]])
        assert 400 <= http.post("/v1/events/batch", content=twice).status_code < 500
        assert api.size == before
        stored = http.post("/v1/events/batch", content=b"\n".join(good))
        assert stored.json()["indexes"] == [before, before + 1, before + 2]
        many = b"\n".join([good[0]] * 501)
        assert "500" in problem(http.post("/v1/events/batch", content=many), 400)["detail"]
        problem(http.post("/v1/events/batch", content=b"\n\n"), 400)
    assert api.size == before + 3


def test_a_batch_sent_again_is_the_same_batch_or_none(api: Service) -> None:
    raws = [signed() for _ in range(3)]
    with api.http() as http:
        first = http.post("/v1/events/batch", content=b"\n".join(raws))
        again = http.post("/v1/events/batch", content=b"\n".join(raws))
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.json() == first.json()
        before = api.size
        some = http.post("/v1/events/batch", content=b"\n".join([signed(), raws[1], raws[2]]))
        found = problem(some, 409, "conflict")
        assert "number 2, 3" in found["detail"]
        assert found["extra"]["index"] == first.json()["indexes"][1]
        single = http.post("/v1/events", content=raws[2])
        assert (single.status_code, single.json()["index"]) == (200, first.json()["indexes"][2])
    assert api.size == before


def test_without_the_direct_lane_the_routes_do_the_same(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane is a shortcut: what misses it (under a root path, for one) goes through the app."""
    monkeypatch.setattr(events, "DIRECT", [])
    raws = [signed() for _ in range(3)]
    with serving_http(api.services) as url, httpx.Client(base_url=url, timeout=30) as slow:
        first = slow.post("/v1/events", content=raws[0])
        assert first.status_code == 201
        batch = slow.post("/v1/events/batch", content=b"\n".join(raws[1:]))
        assert batch.status_code == 201
        problem(slow.post("/v1/events", content=b"{}"), 400)
        problem(slow.post("/v1/events?wait=soon", content=raws[0]), 422, "invalid-request")
    with api.http() as http:
        again = http.post("/v1/events", content=raws[0])
        assert (again.status_code, again.json()) == (200, first.json())
        again = http.post("/v1/events/batch", content=b"\n".join(raws[1:]))
        assert (again.status_code, again.json()) == (200, batch.json())
        problem(http.post("/v1/events?wait=soon", content=raws[0]), 422, "invalid-request")
        problem(http.post("/v1/events?x=%00", content=raws[0]), 400)


def test_an_answer_comes_in_one_piece(api: Service) -> None:
    """Head and body in one segment: a client is woken once. Errors and empty bodies too."""
    raw = signed()
    place = httpx.URL(api.url)
    with socket.create_connection((place.host, place.port or 80), timeout=10) as connection:
        for body, status in ((raw, b"201"), (raw, b"200"), (b"{}", b"400")):
            head = f"POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            piece = connection.recv(65_536)
            told = re.search(rb"content-length: (\d+)", piece)
            assert piece.startswith(b"HTTP/1.1 " + status)
            assert told
            assert len(piece.partition(b"\r\n\r\n")[2]) == int(told[1])


def test_appends_are_counted(api: Service) -> None:
    def counted(http: httpx.Client, status: str) -> float:
        wanted = f'http_requests_total{{handler="/v1/events",method="POST",status="{status}"}}'
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))

    with api.http() as http:
        before = counted(http, "2xx"), counted(http, "4xx")
        assert http.post("/v1/events", content=signed()).status_code == 201
        problem(http.post("/v1/events", content=b"{}"), 400)
        assert (counted(http, "2xx"), counted(http, "4xx")) == (before[0] + 1, before[1] + 1)


def test_events_are_listed_in_log_order(api: Service) -> None:
    with api.http() as http:
        seen, after = [], -1
        while after is not None:
            found = http.get("/v1/events", params={"after": after, "limit": 7}).json()
            seen += [event["index"] for event in found["items"]]
            after = found["next"]
        assert seen == list(range(api.size))
        for wrong in ("x", "-2", "9" * 30, "1.5"):
            problem(http.get("/v1/events", params={"after": wrong}), 422, "invalid-request")
        problem(http.get(f"/v1/events/{api.size}"), 404)
        problem(http.get(f"/v1/events/{uuid4()}"), 404)
        problem(http.get("/v1/events/nonsense"), 400)


def test_64_threads_append_densely(api: Service) -> None:
    start = api.size
    raws = [[signed(), signed()] for _ in range(64)]

    def send(mine: list[bytes]) -> list[tuple[bytes, dict[str, Any]]]:
        with api.http() as http:
            return [(raw, http.post("/v1/events", content=raw).json()) for raw in mine]

    with ThreadPoolExecutor(64) as pool:
        sent = [one for found in pool.map(send, raws) for one in found]
    receipts = {found["index"]: (raw, found) for raw, found in sent}
    assert sorted(receipts) == list(range(start, start + 128))
    entries = api.services.entries.entries(start, start + 128)
    for offset, entry in enumerate(entries):
        raw, found = receipts[start + offset]
        assert entry[16:] == raw
        assert found["leaf_hash"] == leaf_hash(entry).hex()
        assert found["leaf_hash"] == sha256_hex(b"\0" + entry)


# --- whatever is sent: never a 500, nothing stored ---------------------------------------------

JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec=None), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    body=st.one_of(
        st.binary(max_size=200),
        JSON_LIKE.map(lambda v: json.dumps(v).encode()),
        st.builds(
            lambda field, value: json.dumps(
                {**json.loads(signed()), field: value}, sort_keys=True, separators=(",", ":")
            ).encode(),
            st.sampled_from(["v", "type", "id", "log", "at", "actor", "body", "sig"]),
            JSON_LIKE,
        ),
        st.builds(
            lambda at, byte: (raw := signed())[: at % len(raw)] + byte + raw[at % len(raw) + 1 :],
            st.integers(0, 10_000),
            st.binary(min_size=1, max_size=1).filter(lambda b: b not in b"n"),
        ),
    )
)
def test_no_bytes_make_the_append_fail(api: Service, body: bytes) -> None:
    before = api.size
    found = _shared(api).post("/v1/events", content=body)
    if found.status_code == 201:  # the byte that was put in was the one that stood there
        return
    assert found.status_code < 500, (body, found.text)
    problem(found, found.status_code)
    assert api.size == before


@FUZZ
@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream",
             "stream_options", "n", "tools"]
        ),
        JSON_LIKE,
        max_size=3,
    ),
)  # fmt: skip
def test_no_bytes_make_the_chat_fail(api: Service, fields: dict[str, Any]) -> None:
    body = {"model": "no/such", "messages": [{"role": "user", "content": "x"}], **fields}
    found = _shared(api).post(
        "/v1/chat/completions",
        content=json.dumps(body).encode("utf-8", "surrogatepass"),
        headers={"authorization": f"Bearer {api.token('mallory')}"},
    )
    assert 400 <= found.status_code < 500, (body, found.text)
    assert "message" in found.json()["error"]


HARD = (
    "%00", "..", "%2e%2e%2f%2e%2e", "a" * 3_000, "9" * 400, "-1", "%ff%fe", "%F0%9F%92%A5", "'",
    "%22%0d%0aset-cookie:x", "%5c", "%7B%7D", "%D9%A1" * 32, "urn:uuid:" + str(uuid4()), "1e9",
)  # fmt: skip
PARAMETER = re.compile(r"\{[^}]+\}")


def test_no_path_makes_a_read_fail(api: Service) -> None:
    schema = _shared(api).get("/openapi.json").json()
    paths = [path for path, methods in schema["paths"].items() if "get" in methods]
    paths.remove("/serving/events")  # it never ends; test_serving_watch reads it
    assert len(paths) > 25
    values = itertools.cycle(HARD)
    urls = [
        PARAMETER.sub(next(values), path) for path in paths if "{" in path for _ in range(4)
    ] + [
        f"{PARAMETER.sub('1', path)}?{'&'.join(f'{q}={next(values)}' for q in QUERIES)}"
        for path in paths
        for _ in range(2)
    ]
    for url in urls:
        found = _shared(api).get(url)
        assert found.status_code < 500, (url, found.text)
        if found.is_error:
            problem(found, found.status_code)


QUERIES = ("after", "limit", "status", "datanet", "adapter", "old", "new")

_clients: dict[str, httpx.Client] = {}


def _shared(api: Service) -> httpx.Client:
    """One connection for many examples."""
    return _clients.setdefault(api.url, httpx.Client(base_url=api.url, timeout=30))


def test_huge_headers_break_nothing(api: Service) -> None:
    for headers in ({"x-large": "x" * 200_000}, {"authorization": "Bearer " + "x" * 60_000}):
        assert _shared(api).get("/v1/totals", headers=headers).status_code < 500
    assert _shared(api).get("/livez").status_code == 200


# --- what is not there, what is not allowed, what went wrong ------------------------------------


def test_unknown_paths_and_methods_are_problems_too(api: Service) -> None:
    with api.http() as http:
        problem(http.get("/v1/nothing"), 404, "not-found")
        found = http.put("/v1/events", content=b"")
        problem(found, 405, "method-not-allowed")
        assert "POST" in found.headers["allow"]
        problem(http.get("/v1/contributions?limit=0"), 422, "invalid-request")
        problem(http.get("/v1/periods/x"), 422, "invalid-request")


def test_an_unforeseen_error_keeps_its_text_to_itself(
    api: Service, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> int:
        raise RuntimeError("postgresql://someone:s3cret@host")

    monkeypatch.setattr(api.services, "projected", broken)
    with api.http("ann") as http:
        found = problem(http.get("/v1/info"), 500, "internal")
    assert "s3cret" not in json.dumps(found)
    logged = "".join(capfd.readouterr())
    assert "unforeseen" in logged
    assert "/v1/info" in logged
    assert api.token("ann") not in logged


def test_docs_describe_what_to_send(api: Service) -> None:
    with api.http() as http:
        assert "swagger" in http.get("/docs").text.lower()
        paths = http.get("/openapi.json").json()["paths"]
    envelope = paths["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(envelope["required"]) == set(json.loads(signed()))
    login = paths["/v1/credentials"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    raw = sign_login(key_of("ann"), log=LOG, at=now_us())
    assert set(login["required"]) == set(json.loads(raw))
    chat = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert {"model", "messages", "stream"} <= set(chat["schema"]["properties"])
    assert "application/octet-stream" in paths["/v1/blobs"]["post"]["requestBody"]["content"]
    problems = paths["/v1/events"]["post"]["responses"]["4XX"]["content"]
    assert set(problems[PROBLEM]["schema"]["required"]) == FIELDS


def test_metrics_count_and_tell_no_secret(api: Service) -> None:
    with api.http("ann") as http:
        http.get("/v1/totals")
        text = http.get("/metrics").text
    assert 'handler="/v1/totals"' in text
    assert api.token("ann") not in text
    assert bytes(key_of("operator")).hex() not in text


# --- signing in --------------------------------------------------------------------------------


def test_a_login_request_serves_once(api: Service) -> None:
    raw = sign_login(key_of("eve"), log=LOG, at=now_us(), label="laptop")
    with api.http() as http:
        given = http.post("/v1/credentials", content=raw)
        assert given.status_code == 201
        assert given.json()["actor"] == api.actor("eve")
        problem(http.post("/v1/credentials", content=raw), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("make", "status"),
    [
        (lambda: sign_login(key_of("eve"), log=LOG, at=now_us() - 3_600_000_000), 401),
        (lambda: sign_login(key_of("eve"), log=LOG, at=now_us() + 3_600_000_000), 401),
        (lambda: sign_login(key_of("eve"), log="other.example", at=now_us()), 401),
        (lambda: sign_login(key_of("eve"), log=LOG, at=now_us()).replace(b'""', b'"a"'), 401),
        (lambda: sign_login(key_of("eve"), log=LOG, at=now_us(), label="a\0b"), 400),
        (lambda: sign_login(key_of("eve"), log=LOG, at=now_us(), label="a" * 81), 400),
        (lambda: signed(), 400),
        (lambda: b"{}", 400),
        (lambda: b"x" * 2_049, 413),
    ],
    ids=["old", "future", "other log", "altered", "NUL", "long label", "an event", "empty", "long"],
)
def test_a_wrong_login_request_gives_no_token(
    api: Service, make: Callable[[], bytes], status: int
) -> None:
    with api.http() as http:
        found = problem(http.post("/v1/credentials", content=make()), status)
    assert "trib_" not in json.dumps(found)


def test_a_login_is_no_event_and_an_event_no_login(api: Service) -> None:
    before = api.size
    with api.http() as http:
        raw = sign_login(key_of("eve"), log=LOG, at=now_us())
        problem(http.post("/v1/events", content=raw), 400)
    assert api.size == before


def test_a_revoked_token_and_a_wrong_scheme_are_refused(api: Service) -> None:
    with api.http() as http:
        raw = sign_login(key_of("eve"), log=LOG, at=now_us())
        token = http.post("/v1/credentials", content=raw).json()["token"]
        for scheme in ("Basic", "Token", ""):
            found = http.get("/v1/totals", headers={"authorization": f"{scheme} {token}".strip()})
            problem(found, 401, "unauthenticated")
            assert found.headers["www-authenticate"] == "Bearer"
        mine = {"authorization": f"bearer  {token}"}
        assert http.get("/v1/totals", headers=mine).status_code == 200
        assert http.delete("/v1/credentials", headers=mine).status_code == 204
        problem(http.get("/v1/totals", headers=mine), 401, "unauthenticated")
        problem(http.delete("/v1/credentials"), 401, "unauthenticated")


def test_who_asks_too_often_is_told_when_to_come_back(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.services, "rate_limit", RateLimit(3))
    with api.http("ann") as ann, api.http("ben") as ben, api.http() as nobody:
        assert [ann.get("/v1/totals").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = ann.get("/v1/totals")
        found = problem(refused, 429, "backpressure")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert found["extra"]["retry_after_s"] == int(refused.headers["retry-after"])
        assert ben.get("/v1/totals").status_code == 200, "each caller has a window of their own"
        assert [nobody.get("/v1/totals").status_code for _ in range(4)] == [200, 200, 200, 429]
        before = api.size
        problem(ann.post("/v1/events", content=signed()), 429)
        assert api.size == before
        assert nobody.get("/livez").status_code == 200


def test_no_credential_reaches_a_log(api: Service, capfd: pytest.CaptureFixture[str]) -> None:
    with api.http() as http:
        raw = sign_login(key_of("eve"), log=LOG, at=now_us())
        token = http.post("/v1/credentials", content=raw).json()["token"]
        for path in ("/v1/totals", "/v1/nothing", "/v1/events/x", "/log/checkpoint"):
            http.get(path, headers={"authorization": f"Bearer {token}"})
            http.get(path, headers={"authorization": f"Basic {token}"})
        http.post("/v1/blobs", headers={"authorization": f"Bearer {token}"}, content=b"x")
    assert token not in "".join(capfd.readouterr())


# --- blobs -------------------------------------------------------------------------------------


def test_rows_are_for_those_who_work_with_them(api: Service) -> None:
    datanet = net()
    api.client("owner").append("datanet.created", datanet)
    made = api.contribute("ann", datanet["datanet"])
    api.settle()
    sha256 = made["rows_sha256"]
    for who in ("ann", "owner", "worker", "operator"):
        with api.http(who) as http:
            found = http.get(f"/v1/blobs/{sha256}")
        assert found.content == encode_rows(made["rows"]), who
        assert "private" in found.headers["cache-control"]
    for who in ("ben", "mallory"):
        with api.http(who) as http:
            problem(http.get(f"/v1/blobs/{sha256}"), 403, "forbidden")
    with api.http() as http:
        problem(http.get(f"/v1/blobs/{sha256}"), 404, "not-found")


def test_a_copied_commitment_does_not_open_the_rows(api: Service) -> None:
    """The hashes of ann's rows are public in her event. Naming them in a contribution of one's own
    must not make one their reader."""
    datanet, mine = net(), net()
    api.client("owner").append("datanet.created", datanet)
    made = api.contribute("ann", datanet["datanet"])
    copied = {k: v for k, v in made.items() if k != "rows"}
    mallory = api.client("mallory")
    mallory.append("datanet.created", mine)
    with pytest.raises(LedgerError):
        mallory.append(
            "contribution.recorded",
            {**copied, "contribution": str(uuid4()), "datanet": mine["datanet"]},
        )
    api.settle()
    with api.http("mallory") as http:
        problem(http.get(f"/v1/blobs/{made['rows_sha256']}"), 403, "forbidden")


def test_uploads_need_a_credential_and_have_a_limit(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api.http() as nobody:
        problem(nobody.post("/v1/blobs", content=b"x"), 401, "unauthenticated")
    data = os.urandom(2_000)
    with api.http("ann") as http:
        stored = http.post("/v1/blobs", content=data)
        assert stored.status_code == 201
        assert stored.json() == {"sha256": sha256_hex(data), "size": 2_000}
        assert http.get(f"/v1/blobs/{sha256_hex(data)}").content == data
        problem(http.get(f"/v1/blobs/{'0' * 64}"), 404, "not-found")
        for wrong in ("0" * 63, "G" * 64, sha256_hex(data).upper()):
            problem(http.get(f"/v1/blobs/{wrong}"), 400, "invalid-event")
        smaller = api.services.settings.model_copy(update={"max_body_bytes": 1_024})
        monkeypatch.setattr(api.services, "settings", smaller)
        before = os.urandom(1_025)
        with pytest.raises(TooLarge, match="TRIBUTARY_MAX_BODY_BYTES"):
            api.client("ann").put_blob(before)
        assert not api.services.blobs.has(sha256_hex(before))


def test_a_contribution_must_match_its_rows(api: Service) -> None:
    datanet = net()
    api.client("owner").append("datanet.created", datanet)
    rows = [DataRow(prompt="p", completion="c", salt="ab" * 16)]
    ann = api.client("ann")
    body = {
        "contribution": str(uuid4()), "datanet": datanet["datanet"], "licence": "CC0-1.0",
        "rows_root": rows_root(rows).hex(), "rows_count": 1, "title": "t",
        "rows_sha256": ann.put_blob(encode_rows(rows)),
    }  # fmt: skip
    wrong: list[dict[str, Any]] = [
        {"rows_root": "ab" * 32},
        {"rows_count": 2},
        {"rows_sha256": "ab" * 32},
        {"rows_sha256": ann.put_blob(b"no rows")},
        {"rows_sha256": ann.put_blob(b"[" * 100_000)},
        {"rows_sha256": ann.put_blob(b'{"rows":[{"completion":"c","prompt":"p","salt":1}]}')},
    ]
    before = api.size
    for change in wrong:
        with pytest.raises(LedgerError) as caught:
            ann.append("contribution.recorded", {**body, **change})
        assert caught.value.status in (400, 404), change
    assert api.size == before
    assert ann.append("contribution.recorded", body) == before
    with pytest.raises(Conflict):
        ann.append("contribution.recorded", body)
    ids = {"contribution": body["contribution"], "datanet": body["datanet"]}
    with pytest.raises(Forbidden):
        api.client("mallory").append("contribution.approved", {**ids, "note": ""})


def test_alive_answers_while_every_thread_waits(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def waits() -> int:
        release.wait(20)
        return 0

    monkeypatch.setattr(api.services, "projected", waits)
    limits = httpx.Limits(max_connections=200)
    many = httpx.Client(base_url=api.url, limits=limits, timeout=30)
    with many, ThreadPoolExecutor(THREADS + 10) as pool:
        stuck = [pool.submit(many.get, "/v1/info") for _ in range(THREADS + 10)]
        time.sleep(0.3)
        started = time.monotonic()
        assert _shared(api).get("/livez").status_code == 200
        assert time.monotonic() - started < 2
        release.set()
        assert {one.result().status_code for one in stuck} == {200}
