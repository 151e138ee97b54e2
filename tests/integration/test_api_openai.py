"""The OpenAI-compatible endpoint, asked by OpenAI's own client, unchanged; and what it costs."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from psycopg_pool import ConnectionPool

from ledger.api.answers import recording
from ledger.api.auth import RateLimit
from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.fees import FeePolicy
from ledger.domain.ids import sha256_hex
from ledger.store.blobs import FsspecBlobStore
from tests.api_world import INPUT_WEI, MODEL, OUTPUT_WEI, POLICY, LocalEngine, Service, service

HELLO: Any = [{"role": "user", "content": "hello there"}]
RICH = 10**12


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        running.tell(home / "adapters")
        running.deposit("eve", RICH)
        yield running


@pytest.fixture(autouse=True)
def nothing_left_behind(api: Service) -> Iterator[None]:
    """Whatever a test did: no money stays held, no answer goes on unread."""
    yield
    api.engine.pace_s, api.engine.timeout_s, api.engine.break_after = 0.0, None, None
    until(lambda: not api.engine.busy)
    for name in ("eve", "ben", "ann"):
        until(lambda name=name: api.services.reservations.held_wei(api.actor(name)) == 0)  # type: ignore[misc]


def until(true: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def client(api: Service, who: str = "eve", **options: Any) -> OpenAI:
    token = options.pop("token", None) or api.token(who)
    return OpenAI(base_url=f"{api.url}/v1", api_key=token, max_retries=0, **options)


def inference(api: Service, index: int) -> dict[str, Any]:
    """The two events of one answer, held against each other and against the rules; the first."""
    recorded, charged = (api.client("eve").get(f"/v1/events/{n}") for n in (index, index + 1))
    assert (recorded["type"], charged["type"]) == ("inference.recorded", "fee.charged")
    body, charge = recorded["body"], charged["body"]
    fee = body["prompt_tokens"] * INPUT_WEI + body["completion_tokens"] * OUTPUT_WEI
    assert body["fee_wei"] == charge["amount_wei"] == str(fee)
    assert charge["inference"] == body["inference"]
    parts = ("protocol_wei", "owner_wei", "operator_wei", "contributors_wei")
    assert sum(int(charge[part]) for part in parts) == fee
    policy = FeePolicy(version=charge["policy_version"], **POLICY)
    assert {f"{part}_wei": str(wei) for part, wei in policy.split(fee).items()} == {
        part: charge[part] for part in parts
    }
    return dict(body)


# --- answers -----------------------------------------------------------------------------------


def test_an_answer_as_openai_clients_read_it(api: Service) -> None:
    before = api.size
    answer = client(api).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
    receipt: Any = answer.model_extra["tributary"]  # type: ignore[index]
    assert api.size == before + 2
    assert receipt["index"] == before
    body = inference(api, before)
    assert receipt["fee_wei"] == body["fee_wei"]
    assert (body["prompt_tokens"], body["completion_tokens"], body["max_tokens"]) == (
        answer.usage.prompt_tokens, 9, 9,
    )  # fmt: skip
    assert body["consumer"] == api.actor("eve")
    assert body["adapter"] == api.made["adapter"]
    assert body["finish_reason"] == "length"
    assert (body["temperature_ppm"], body["top_p_ppm"]) == (0, 1_000_000)


def test_a_stream_brings_the_same_answer_in_pieces(api: Service) -> None:
    whole = client(api).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9)
    before = api.size
    stream = client(api).chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert inference(api, before)["completion_tokens"] == 9
    receipt: Any = chunks[-2].model_extra["tributary"]  # type: ignore[index]
    assert receipt["index"] == before
    without = client(api).chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, stream=True
    )
    assert all(chunk.choices for chunk in without)


def test_events_are_framed_for_curl(api: Service) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "stream": True}
    with (
        api.http("eve") as http,
        http.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-inference-id"]
        raw = "".join(response.iter_text())
    events = raw.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    for event in events:
        assert event.startswith("data: {")
        assert "\n" not in event
        chunk = json.loads(event.removeprefix("data: "))
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == f"chatcmpl-{response.headers['x-inference-id']}"


def test_stop_strings_cut_the_answer_and_are_not_part_of_it(api: Service) -> None:
    ask = client(api).chat.completions.create
    text = ask(model=MODEL, messages=HELLO, max_tokens=16).choices[0].message.content or ""
    stop = text[4:7]
    expected = text[: text.index(stop)]
    for given in (stop, ["never there", stop]):
        choice = ask(model=MODEL, messages=HELLO, max_tokens=16, stop=given).choices[0]
        assert choice.message.content == expected
        assert choice.finish_reason == "stop"
    stream = ask(model=MODEL, messages=HELLO, max_tokens=16, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == expected


def test_the_same_seed_gives_the_same_answer(api: Service) -> None:
    def ask(seed: int | None) -> str:
        answer = client(api).chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=24, temperature=1.5, seed=seed
        )
        body = inference(api, api.size - 2)
        assert body["temperature_ppm"] == 1_500_000
        if seed is not None:
            assert body["seed"] == seed
        return answer.choices[0].message.content or ""

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in (1, 2, 3, None)}) > 1


def test_text_parts_and_the_newer_role_name_mean_the_same(api: Service) -> None:
    ask = client(api).chat.completions.create
    plain: Any = [{"role": "system", "content": "be brief"}, *HELLO]
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "be "},
                                          {"type": "text", "text": "brief"}]},
        *HELLO,
    ]  # fmt: skip
    answers = [ask(model=MODEL, messages=m, max_tokens=6) for m in (plain, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


def test_models_are_listed_and_found_by_name_and_by_id(api: Service) -> None:
    mine = client(api)
    assert MODEL in [model.id for model in mine.models.list()]
    by_name, by_id = mine.models.retrieve(MODEL), mine.models.retrieve(api.made["adapter"])
    assert by_name == by_id
    assert by_name.owned_by == api.actor("dev")
    extra: Any = by_name.model_extra
    assert extra["input_wei_per_token"] == str(INPUT_WEI)
    with pytest.raises(openai.NotFoundError):
        mine.models.retrieve("no/such")


# --- what is kept of an answer ------------------------------------------------------------------


def test_commitments_match_the_transcript_which_only_its_payer_reads(api: Service) -> None:
    index = api.size
    answer = client(api).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5)
    body = inference(api, index)
    api.settle()
    path = f"/v1/inferences/{body['inference']}/transcript"
    blob = f"/v1/blobs/{body['transcript_sha256']}"
    with api.http("eve") as http:
        transcript = http.get(path).json()
        assert parse_canonical(http.get(blob).content) == transcript
    assert transcript["messages"] == HELLO
    assert transcript["output"] == answer.choices[0].message.content
    prompt = {"messages": transcript["messages"], "salt": transcript["prompt_salt"]}
    output = {"output": transcript["output"], "salt": transcript["output_salt"]}
    assert body["prompt_commitment"] == sha256_hex(canonical_json(prompt))
    assert body["output_commitment"] == sha256_hex(canonical_json(output))
    for who in ("mallory", "dev"):
        with api.http(who) as http:
            assert http.get(path).status_code == 403
            assert http.get(blob).status_code == 403
    with api.http() as http:
        assert http.get(path).status_code == 401
        assert http.get(blob).status_code == 404
        public = http.get(f"/v1/events/{index}").text
    assert "hello there" not in public
    assert transcript["output"] not in public


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
        ({"messages": HELLO * 65}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1e-9}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**60}, "seed"),
        ({"n": 2}, "n:"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 1_000}, "stop"),
        ({"messages": [{"role": "user", "content": "word " * 2_000}]}, "token"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_says_what_is_wrong(
    api: Service, change: dict[str, Any], word: str, stream: bool
) -> None:
    before = api.size
    request: Any = {"model": MODEL, "messages": HELLO, "stream": stream, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client(api).chat.completions.create(**request)
    assert word in caught.value.body["message"]  # type: ignore[index]
    assert caught.value.response.headers["content-type"] == "application/problem+json"
    assert api.size == before


def test_errors_are_what_openai_clients_expect(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = api.size
    request: Any = {"model": MODEL, "messages": HELLO}
    with pytest.raises(openai.AuthenticationError):
        client(api, token="trib_wrong").chat.completions.create(**request)
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        client(api).chat.completions.create(**{**request, "model": "no/such"})
    with pytest.raises(openai.NotFoundError):
        client(api).chat.completions.create(**{**request, "model": "../../etc/passwd"})
    with pytest.raises(openai.NotFoundError):
        client(api).embeddings.create(model=MODEL, input="x")
    monkeypatch.setattr(api.services, "rate_limit", RateLimit(1))
    client(api).models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        client(api).chat.completions.create(**request)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert api.size == before


def test_a_retired_adapter_is_refused(api: Service) -> None:
    adapter = api.publish(api.made["run"], api.made["saved"], "dev/old")
    ask = client(api).chat.completions.create
    assert ask(model=adapter, messages=HELLO, max_tokens=1).model == "dev/old"
    api.client("dev").append("adapter.retired", {"adapter": adapter, "reason": ""})
    before = api.settle()
    with pytest.raises(openai.PermissionDeniedError, match="retired"):
        ask(model=adapter, messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        ask(model="dev/old", messages=HELLO)
    assert "dev/old" not in [model.id for model in client(api).models.list()]
    assert api.size == before


def test_without_an_engine_nothing_is_charged(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.services, "serving", None)
    before = api.size
    with pytest.raises(openai.InternalServerError, match="tributary up") as caught:
        client(api).chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.status_code == 503
    assert api.size == before


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_costs_nothing_and_tells_nothing(api: Service, stream: bool) -> None:
    before = api.size
    api.engine.break_after = 4
    with pytest.raises(openai.APIError) as caught:
        list(
            client(api).chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=50, stream=stream  # type: ignore[call-overload]
            )
        )  # fmt: skip
    assert "secret" not in str(caught.value)
    assert "server made a mistake" in caught.value.message
    # Of the stream something had left, so the ledger says what became of it.
    assert api.size == before + stream
    if stream:
        broken = api.client("eve").get(f"/v1/events/{before}")
        assert broken["type"] == "inference.interrupted"
        assert broken["body"]["reason"] == "failed"
        assert broken["event"] == broken["body"]["inference"]
        assert 0 < broken["body"]["completion_tokens"] < 50


def test_an_answer_that_the_engine_cuts_short_is_recorded_as_cancelled(api: Service) -> None:
    """`deadline` is an ending of the engine; the catalogue and OpenAI know others."""
    api.engine.pace_s, api.engine.timeout_s = 0.0005, 0.1
    before = api.size
    answer = client(api).chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].finish_reason == "length"
    body = inference(api, before)
    assert body["finish_reason"] == "cancelled"
    assert answer.usage
    assert 0 < body["completion_tokens"] == answer.usage.completion_tokens < body["max_tokens"]


# --- money -------------------------------------------------------------------------------------


def test_an_empty_account_is_told_what_to_do(api: Service) -> None:
    before = api.size
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client(api, "ann").chat.completions.create(
                model=MODEL, messages=HELLO, stream=stream  # type: ignore[call-overload]
            )  # fmt: skip
        assert caught.value.status_code == 402
        assert "deposit OPEN" in caught.value.message
        assert "prepaid balance is 0 wei" in caught.value.message
        assert caught.value.code == caught.value.type == "insufficient_quota"
    assert api.size == before


def test_an_answer_is_held_at_its_highest_price(api: Service) -> None:
    """One wei less than the highest possible fee is refused, the exact amount serves."""
    prompt_tokens = client(api).chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1
    ).usage.prompt_tokens  # type: ignore[union-attr]  # fmt: skip
    highest = prompt_tokens * INPUT_WEI + 40 * OUTPUT_WEI
    api.deposit("ann", highest - 1)
    ask = client(api, "ann").chat.completions.create
    with pytest.raises(openai.APIStatusError, match="402"):
        ask(model=MODEL, messages=HELLO, max_tokens=40)
    api.deposit("ann", 1)
    ask(model=MODEL, messages=HELLO, max_tokens=40)
    fee = int(inference(api, api.size - 2)["fee_wei"])
    api.settle()
    assert api.client("ann").get(f"/v1/accounts/{api.actor('ann')}/balances")["prepaid"] == str(
        highest - fee
    )


def test_parallel_requests_cannot_overdraw(api: Service) -> None:
    """Money for a few answers, many asked at once: what is delivered is paid, nothing beyond."""
    prompt_tokens, max_tokens = 8, 30
    highest = prompt_tokens * INPUT_WEI + max_tokens * OUTPUT_WEI
    api.deposit("ben", 3 * highest)
    api.engine.pace_s = 0.002
    before = api.settle()

    def ask(_: int) -> int:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": max_tokens, "stream": True}
        with api.http("ben") as http:
            found = http.post("/v1/chat/completions", json=body)
        assert found.status_code in (200, 402), found.text
        # Refused before the first token, or delivered and paid: nothing between.
        assert found.status_code == 402 or found.text.endswith("data: [DONE]\n\n"), found.text
        return found.status_code

    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(ask, range(24)))
    answered = statuses.count(200)
    assert 1 <= answered <= 3
    assert api.size == before + 2 * answered
    api.settle()
    paid = sum(int(inference(api, before + 2 * n)["fee_wei"]) for n in range(answered))
    with api.http() as http:
        left = int(http.get(f"/v1/accounts/{api.actor('ben')}/balances").json()["prepaid"])
    assert left == 3 * highest - paid >= 0


def test_answers_of_one_account_that_end_together_are_stored_at_the_first_attempt(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their fees are one event stream: decided in their callers' threads, they would collide."""
    count, attempts = 32, []
    barrier = threading.Barrier(count)
    store = api.services.ledger.ask

    def counted(events: Any) -> Any:
        attempts.append(len(events))
        return store(events)

    monkeypatch.setattr(api.services.ledger, "ask", counted)
    before = api.size
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
    client = httpx.Client(
        base_url=api.url,
        headers={"authorization": f"Bearer {api.token('eve')}"},
        limits=httpx.Limits(max_connections=count),
        timeout=30,
    )

    def ask(_: int) -> int:
        barrier.wait(20)
        return client.post("/v1/chat/completions", json=body).status_code

    with client, ThreadPoolExecutor(count) as pool:
        assert list(pool.map(ask, range(count))) == [200] * count
    assert api.size == before + 2 * count
    assert attempts == [2] * count


def test_a_fee_policy_set_meanwhile_applies(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the policy and the append, governance sets the next one."""
    current = recording.policy_of(api.services)
    stale = iter([current])
    real = recording.policy_of
    monkeypatch.setattr(recording, "policy_of", lambda box: next(stale, None) or real(box))
    following = current.version + 1
    api.client("operator").append("fee_policy.set", {"version": following, **POLICY})
    before = api.size
    client(api).chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    inference(api, before)
    charged = api.client("eve").get(f"/v1/events/{before + 1}")
    assert charged["body"]["policy_version"] == following


# --- the event loop ----------------------------------------------------------------------------


def test_nothing_waits_for_database_or_files_on_the_event_loop(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []

    def guard(cls: type, name: str) -> None:
        real = getattr(cls, name)

        def guarded(*arguments: Any, **named: Any) -> Any:
            # The service's loop has a thread of its own; the tests' thread may have a browser's.
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                if threading.current_thread() is not threading.main_thread():
                    waited.append(f"{cls.__name__}.{name}")
            calls.add(name)
            return real(*arguments, **named)

        monkeypatch.setattr(cls, name, guarded)

    calls: set[str] = set()
    guard(ConnectionPool, "getconn")
    guard(FsspecBlobStore, "put")
    guard(FsspecBlobStore, "get")
    api.engine.pace_s = 0.002
    for stream in (False, True):
        request = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "stream": stream}
        with api.http("eve") as http:
            assert http.post("/v1/chat/completions", json=request).status_code == 200
    with pytest.raises(openai.APIStatusError, match="402"):
        client(api, "mallory").chat.completions.create(model=MODEL, messages=HELLO)
    test_who_leaves_mid_stream_pays_for_what_was_produced(api, 3)
    with api.http("eve") as http:
        for path in ("/v1/serving", "/v1/info", "/readyz", "/v1/models", "/log/checkpoint"):
            assert http.get(path).status_code == 200
    assert calls == {"getconn", "put", "get"}
    assert waited == []


# --- the client goes away ----------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 12])
def test_who_leaves_mid_stream_pays_for_what_was_produced(api: Service, lines: int) -> None:
    api.engine.pace_s = 0.01
    before = api.size
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "stream": True}
    seen = ""
    with (
        api.http("eve") as http,
        http.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        for count, line in enumerate(response.iter_lines()):
            if line.startswith("data: "):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                seen += delta.get("content") or ""
            if count >= lines:
                break
    until(lambda: api.size > before)
    time.sleep(0.3)
    assert api.size == before + 2, "recorded once"
    found = inference(api, before)
    assert found["finish_reason"] == "cancelled"
    assert 0 < found["completion_tokens"] < 150
    api.settle()
    with api.http("eve") as http:
        kept = http.get(f"/v1/inferences/{found['inference']}/transcript").json()["output"]
    assert kept.startswith(seen)


def test_who_leaves_before_the_first_token_pays_nothing(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.engine.pace_s = 0.01
    held, settled = list[str](), list[str]()
    box = api.services.reservations
    hold, release = box.hold, box.release

    def spy_hold(account: str, *terms: Any) -> None:
        hold(account, *terms)
        held.append(account)

    def spy_release(account: str, amount_wei: int) -> None:
        release(account, amount_wei)
        settled.append(account)

    monkeypatch.setattr(box, "hold", spy_hold)
    monkeypatch.setattr(box, "release", spy_release)
    before = api.size
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "stream": True}

    def leave() -> list[str]:
        with pytest.raises(httpx.ReadTimeout), api.http("eve") as http:
            http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=1e-4))
        time.sleep(0.2)
        return held

    until(leave)  # where we are gone before our body is read, nothing is even held
    until(lambda: settled == held and not api.services.answers.running)
    assert set(held) == {api.actor("eve")}
    assert box.held_wei(api.actor("eve")) == 0
    for index in range(before, api.size, 2):
        # A token was quicker than the news that we had left.
        assert inference(api, index)["finish_reason"] == "cancelled"


def test_many_who_leave_hold_nothing(api: Service) -> None:
    api.engine.pace_s = 0.005
    before = api.size
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "stream": True}

    def leave(n: int) -> None:
        with (
            api.http("eve") as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            for count, _ in enumerate(response.iter_lines()):
                if count >= n:
                    return

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(leave, range(12)))
    until(lambda: api.size == before + 24)
    for n in range(12):
        assert inference(api, before + 2 * n)["finish_reason"] == "cancelled"
