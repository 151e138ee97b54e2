"""Every answer whose id a client saw is in the ledger once: an API process killed with SIGKILL
while it streams, requests that are repeated, and a ledger that is away when an answer ends."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from openai import OpenAI

from ledger.api.answers import recording, repeats
from ledger.api.answers.journal import SUFFIX
from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import decode_entry
from ledger.errors import Unavailable
from tests.api_world import MODEL, LocalEngine, Service, service

ROOT = Path(__file__).parents[2]
STREAMS = 20
HANG_AT, DIE_AT = 5, 7
LIMIT_S = 40.0


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        running.tell(home / "adapters")
        running.deposit("eve", 10**12)
        yield running


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def body(**more: Any) -> dict[str, Any]:
    hello = [{"role": "user", "content": "hello there"}]
    return {"model": MODEL, "messages": hello, "max_tokens": 6, **more}


def event_of(api: Service, id: str) -> dict[str, Any] | None:
    """Type and body of the event with that id."""
    raw = api.services.entries.entries_of([UUID(id)]).get(UUID(id))
    if raw is None:
        return None
    envelope = decode_entry(raw, verify=False).envelope
    return {"type": envelope.type, **envelope.body}


def of_inference(api: Service, id: str) -> list[str]:
    """Types of all events that name the inference."""
    size = api.size
    found = (
        decode_entry(raw, verify=False).envelope for raw in api.services.entries.entries(0, size)
    )
    return [e.type for e in found if e.body.get("inference") == id]


@contextmanager
def another_process(
    api: Service, url: str, pace_s: float, **more: Any
) -> Iterator[tuple[str, Any]]:
    """Its URL, and the process. `more` is for tests.api_child."""
    saved = api.made["saved"]
    told = {
        "url": url, "home": str(api.home), "adapter": api.made["adapter"], "pace_s": pace_s,
        "path": str(saved.path), "sha256": saved.sha256, "config_sha256": saved.config_sha256,
        **more,
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.api_child", json.dumps(told)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        at = child.stdout.readline().strip()
        assert at.startswith("http"), "the other process did not start"
        yield at, child
    finally:
        child.kill()
        child.wait(10)


def written(api: Service) -> bytes:
    """What stands in all journals."""
    files = api.services.answers.journal.folder.glob(f"*{SUFFIX}")
    return b"".join(path.read_bytes() for path in files)


@dataclass(kw_only=True)
class Heard:
    """What one client saw of a stream."""

    id: str | None = None
    text: str = ""
    done: bool = False


def listen(
    url: str, token: str, heard: Heard, request: dict[str, Any], key: str | None = None
) -> None:
    headers = {"authorization": f"Bearer {token}"}
    if key is not None:
        headers["idempotency-key"] = key
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=request, headers=headers, timeout=20
        ) as response:
            heard.id = response.headers.get("x-receipt-id")
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    heard.done = True
                elif line.startswith("data: "):
                    for choice in json.loads(line[6:]).get("choices", ()):
                        heard.text += choice["delta"].get("content") or ""
    except httpx.HTTPError:
        return  # it was killed


def test_a_process_killed_while_it_streams_leaves_one_event_of_every_answer(
    api: Service, pg_url_module: str
) -> None:
    journals = api.services.answers.journal.folder
    held = api.services.reservations.held_wei
    heard = [Heard() for _ in range(STREAMS)]
    with another_process(api, pg_url_module, pace_s=0.03) as (url, child):
        short = Heard()
        listen(url, api.token("eve"), short, body(stream=True, max_tokens=3))
        threads = [
            threading.Thread(
                target=listen,
                args=(url, api.token("eve"), one, body(stream=True, max_tokens=200, seed=n)),
                daemon=True,
            )
            for n, one in enumerate(heard)
        ]
        for thread in threads:
            thread.start()
        until(lambda: all(one.text for one in heard), "not every stream began")
        assert list(journals.glob(f"*{SUFFIX}")), "what is promised is on disk"
        child.kill()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    assert short.done
    assert not any(one.done for one in heard)
    ids = [one.id for one in heard if one.id]
    assert len(set(ids)) == STREAMS, "the id goes out before the first token"
    until(lambda: all(event_of(api, id) for id in ids), "the living process settles the dead one's")
    for one in heard:
        assert one.id is not None
        event = event_of(api, one.id)
        assert event is not None
        assert (event["type"], event["reason"]) == ("inference.interrupted", "crashed")
        assert of_inference(api, one.id) == ["inference.interrupted"], "once, and nobody pays"
        transcript = parse_canonical(api.services.blobs.get(event["transcript_sha256"]))
        assert transcript["output"].startswith(one.text), "what was heard is what is recorded"
    assert short.id is not None
    assert of_inference(api, short.id) == ["inference.recorded", "fee.charged"]
    own = {f.path for f in api.services.answers.journal._files}
    until(lambda: set(journals.glob(f"*{SUFFIX}")) <= own, "a settled journal goes")
    assert held(api.actor("eve")) == 0


def test_a_process_killed_around_the_append_charges_once_or_not_at_all(
    api: Service, pg_url_module: str
) -> None:
    asked = [body(stream=True, max_tokens=n) for n in (HANG_AT, DIE_AT)]
    keys = [uuid4().hex, uuid4().hex]
    before, after = Heard(), Heard()
    with another_process(api, pg_url_module, 0.01, hang_at=HANG_AT, die_at=DIE_AT) as (url, child):
        hanging = threading.Thread(
            target=listen, args=(url, api.token("eve"), before, asked[0], keys[0]), daemon=True
        )
        hanging.start()
        until(lambda: before.text, "the first stream did not begin")
        until(lambda: b'["d",1,%d,' % HANG_AT in written(api), "its last token did not come")
        listen(url, api.token("eve"), after, asked[1], keys[1])
        child.wait(LIMIT_S)  # it killed itself, with the answer stored and its end untold
        hanging.join(LIMIT_S)
        assert not hanging.is_alive()
    assert not before.done
    assert not after.done
    assert before.id is not None
    assert after.id is not None
    until(lambda: event_of(api, str(before.id)), "what was not appended is recorded as broken off")
    assert of_inference(api, after.id) == ["inference.recorded", "fee.charged"]
    event = event_of(api, before.id) or {}
    assert of_inference(api, before.id) == ["inference.interrupted"], "nobody pays for it"
    assert event["completion_tokens"] == HANG_AT, "it was delivered to its last token"

    size = api.size
    with api.http("eve") as http:
        headers = [{"idempotency-key": key} for key in keys]
        again = http.post("/v1/chat/completions", json=asked[1], headers=headers[1])
        assert again.headers["x-receipt-id"] == after.id
        assert again.headers["idempotency-replayed"] == "true"
        assert api.size == size, "no second event, no second fee"
        other = http.post("/v1/chat/completions", json=body(max_tokens=2), headers=headers[0])
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "idempotency_key_reused"
        anew = [http.post("/v1/chat/completions", json=asked[0], headers=headers[0]) for _ in "ab"]
    assert [a.status_code for a in anew] == [200, 200]
    [id] = {a.headers["x-receipt-id"] for a in anew}
    assert id != before.id, "what broke off is made anew"
    assert of_inference(api, id) == ["inference.recorded", "fee.charged"]


def test_requests_that_looked_at_the_same_moment_are_one_answer(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find nothing under their key before either begins."""
    real, together, looks = repeats._recorded, threading.Barrier(2), iter(range(100))

    def look(*arguments: Any) -> Any:
        found = real(*arguments)
        if next(looks) < 2:
            together.wait(10)
        return found

    monkeypatch.setattr(repeats, "_recorded", look)
    key = {"idempotency-key": uuid4().hex}
    answers: list[httpx.Response] = []

    def ask() -> None:
        with api.http("eve") as http:
            answers.append(http.post("/v1/chat/completions", json=body(), headers=key))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [a.status_code for a in answers] == [200, 200]
    [id] = {a.headers["x-receipt-id"] for a in answers}
    assert of_inference(api, id) == ["inference.recorded", "fee.charged"]
    assert len([a for a in api.engine.asked if a.request_id == id]) == 1


def test_a_retry_of_openai_s_client_doubles_nothing(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops waiting while the answer is under way, and asks again without a key."""
    monkeypatch.setattr(api.engine, "pace_s", 0.06)
    client = OpenAI(base_url=f"{api.url}/v1", api_key=api.token("eve"), max_retries=8, timeout=1.0)
    size = api.size
    hello: Any = body()["messages"]
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=hello, max_tokens=24
    )
    assert answer.headers["idempotency-replayed"] == "true"
    id = answer.headers["x-receipt-id"]
    assert api.size == size + 2, "one answer, one fee"
    assert of_inference(api, id) == ["inference.recorded", "fee.charged"]
    assert len([a for a in api.engine.asked if a.request_id == id]) == 1


def test_a_key_makes_a_request_safe_to_repeat(api: Service) -> None:
    key = {"idempotency-key": uuid4().hex}
    with api.http("eve") as http:
        first = http.post("/v1/chat/completions", json=body(), headers=key)
        size = api.size
        again = http.post("/v1/chat/completions", json=body(), headers=key)
        streamed = http.post("/v1/chat/completions", json=body(seed=1), headers=key)
    assert first.status_code == again.status_code == 200
    assert again.headers["idempotency-replayed"] == "true"
    assert first.headers["x-receipt-id"] == again.headers["x-receipt-id"]
    assert first.json()["choices"][0]["message"] == again.json()["choices"][0]["message"]
    assert api.size == size, "no second event, no second fee"
    assert streamed.status_code == 409
    assert streamed.json()["error"]["code"] == "idempotency_key_reused"


def test_a_repeat_while_the_first_is_under_way_is_the_same_answer(api: Service) -> None:
    key = {"idempotency-key": uuid4().hex}
    answers: list[httpx.Response] = []

    def ask() -> None:
        with api.http("eve") as http:
            answers.append(http.post("/v1/chat/completions", json=body(), headers=key))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [a.status_code for a in answers] == [200] * 4
    [id] = {a.headers["x-receipt-id"] for a in answers}
    assert of_inference(api, id) == ["inference.recorded", "fee.charged"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_ledger_that_is_away_at_the_end_gets_the_event_later(
    api: Service, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()
    away.set()
    real = recording._append

    def append(*arguments: Any) -> Any:
        if away.is_set():
            raise Unavailable("the database is away")
        return real(*arguments)

    monkeypatch.setattr(recording, "_append", append)
    with api.http("eve") as http:
        answer = http.post("/v1/chat/completions", json=body(stream=stream))
    assert answer.status_code == 200
    id = answer.headers["x-receipt-id"]
    told = (
        json.loads(answer.text.split("data: ")[-2])["tributary"]
        if stream
        else answer.json()["tributary"]
    )
    assert told["index"] is None
    assert id in told["pending"]
    assert event_of(api, id) is None
    assert api.services.reservations.held_wei(api.actor("eve")) > 0, "its fee stays held"
    away.clear()
    until(lambda: event_of(api, id), "what is owed is recorded")
    until(lambda: not api.services.reservations.held_wei(api.actor("eve")), "the hold ends")
    assert of_inference(api, id) == ["inference.recorded", "fee.charged"]
