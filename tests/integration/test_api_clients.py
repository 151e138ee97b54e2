"""What OpenAI's own client and curl get from the two answer routes: log probabilities,
completions, receipts, attribution, and refusals that name the field."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from ledger.api.raw import MAX_CHAT_BYTES
from ledger.domain.canonical import canonical_json
from ledger.errors import Backpressure, ComputeError, NotFound
from ledger.ports import ChatDelta, ChatRequest
from ledger.verify.note import parse_vkey
from ledger.verify.receipt import verify_receipt
from tests.api_world import LOG, MODEL, LocalEngine, Service, service

PROMPT = "The list of"
HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def api(pg_url_module: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("api")
    with service(pg_url_module, home, LocalEngine()) as running:
        running.tell(home / "adapters")
        running.deposit("eve", 10**12)
        yield running


@pytest.fixture
def client(api: Service) -> OpenAI:
    return OpenAI(base_url=f"{api.url}/v1", api_key=api.token("eve"), max_retries=0, timeout=30)


def told(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["tributary"]
    return found


def test_a_prompt_is_continued_whole_and_in_pieces(api: Service, client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=7, logprobs=2)
    [choice] = whole.choices
    assert whole.object == "text_completion"
    assert whole.id.startswith("cmpl-")
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 7
    chances: Any = choice.logprobs
    assert "".join(chances.tokens) == choice.text
    assert chances.text_offset[0] == 0
    assert all(p <= 0 for p in chances.token_logprobs)
    for token, chance, top in zip(
        chances.tokens, chances.token_logprobs, chances.top_logprobs, strict=True
    ):
        assert len(top) >= 2
        assert top[token] == pytest.approx(chance)
        assert chance == pytest.approx(max(top.values())), "greedy takes the likeliest"
    pieces = list(
        client.completions.create(model=MODEL, prompt=[PROMPT], max_tokens=7, stream=True)
    )
    assert "".join(c.choices[0].text for c in pieces if c.choices) == choice.text
    assert pieces[-1].choices[0].finish_reason == "length"
    asked = api.engine.asked[-1]
    assert (asked.prompt, asked.messages) == (PROMPT, ())
    assert asked.payer == api.actor("eve")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client: OpenAI, stream: bool) -> None:
    request: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 6}
    answer: Any = client.chat.completions.create(
        **request, logprobs=True, top_logprobs=3, stream=stream
    )
    if stream:
        choices = [c.choices[0] for c in answer if c.choices]
        text = "".join(c.delta.content or "" for c in choices)
        content = [t for c in choices if c.logprobs for t in c.logprobs.content]
    else:
        text = answer.choices[0].message.content
        content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert "".join(t.token for t in content) == text
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(max(t.logprob for t in token.top_logprobs))
    plain = client.chat.completions.create(**request)
    assert plain.choices[0].logprobs is None
    assert plain.choices[0].message.content == text


def test_top_k_of_one_is_greedy_at_any_temperature(client: OpenAI) -> None:
    def ask(**more: Any) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_completion_tokens=8, **more
        )
        return str(answer.choices[0].message.content)

    assert ask(temperature=2.0, seed=3, extra_body={"top_k": 1}) == ask()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 10}),
        ("presence_penalty", 0.5),
        ("n", 2),
        ("top_logprobs", 2),
    ],
)
def test_what_would_change_a_chat_is_refused_by_name(
    api: Service, client: OpenAI, field: str, value: Any
) -> None:
    before = api.size
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, **{field: value})
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"
    assert api.size == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("echo", True), ("suffix", "end"), ("best_of", 3), ("prompt", ["a", "b"]), ("prompt", [1, 2])],
)
def test_what_would_change_a_completion_is_refused_by_name(
    client: OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x", field: value})
    assert caught.value.param == field


def test_what_changes_nothing_is_ignored(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, user="u", presence_penalty=0, tools=[],
        response_format={"type": "text"}, metadata={"a": "b"}, n=1,
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"


def test_a_model_says_what_it_rests_on(api: Service, client: OpenAI) -> None:
    found: Any = client.models.retrieve(MODEL)
    base = api.services.info["base_model"]
    assert (found.id, found.root, found.parent) == (MODEL, api.made["adapter"], base["id"])
    assert found.permission[0]["allow_sampling"] is True
    assert [m.id for m in client.models.list()] == [MODEL]
    ours = api.client("eve")  # how a replica learns what it is to keep
    assert ours.model(MODEL)["adapter"] == ours.model(api.made["adapter"])["adapter"] == found.root
    with pytest.raises(NotFound):
        ours.model("a ?b#c/%2e")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_the_receipt_has_the_answer_s_id(api: Service, client: OpenAI, stream: bool) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=3, stream=stream  # type: ignore[call-overload]
    )  # fmt: skip
    id = raw.headers["x-receipt-id"]
    parsed: Any = raw.parse()
    receipt = told(list(parsed)[-1] if stream else parsed)
    event = api.client("eve").get(f"/v1/events/{receipt['index']}")
    assert event["body"]["inference"] == receipt["inference"] == id
    assert api.services.entries.index_of(id) == receipt["index"], "the event has the same id"
    key = parse_vkey(api.services.vkey)
    for found in (receipt["receipt"], api.client("eve").get(f"/v1/receipts/{id}")):
        promise = verify_receipt(canonical_json(found), key).promise
        assert promise.first_index <= receipt["index"]
        assert promise.log == LOG


def test_a_prompt_that_is_too_long_says_so_as_openai_does(api: Service, client: OpenAI) -> None:
    before = api.size
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 2_000)
    assert caught.value.code == "context_length_exceeded"
    assert api.size == before


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b"null", 400),
        (b" " * (MAX_CHAT_BYTES + 1), 413),
    ],
)
def test_what_is_no_request_is_refused_in_openai_s_shape(
    api: Service, path: str, content: bytes, status: int
) -> None:
    with api.http("eve") as http:
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_the_client_retries_what_may_pass_and_not_what_costs_money(
    api: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the requests arrive; the pauses are those of Retry-After."""
    real, refusals, calls = api.engine.stream, [1, 1], []

    def stream(request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        calls.append(request)
        return refused() if refusals and refusals.pop() else real(request)

    async def refused() -> AsyncGenerator[ChatDelta]:
        raise Backpressure("512 wait", retry_after_s=1, code="queue_full")
        yield ChatDelta()

    monkeypatch.setattr(api.engine, "stream", stream)
    eve = OpenAI(base_url=f"{api.url}/v1", api_key=api.token("eve"), max_retries=2, timeout=30)
    before, began = api.size, time.monotonic()
    eve.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert len(calls) == 3
    assert time.monotonic() - began >= 2.0
    assert api.size == before + 2, "one answer, one fee"
    poor = OpenAI(base_url=f"{api.url}/v1", api_key=api.token("ann"), max_retries=2, timeout=30)
    with pytest.raises(openai.APIStatusError) as caught:
        poor.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
    assert caught.value.status_code == 402
    assert len(calls) == 3


def test_who_was_paid_comes_with_the_answer_where_it_is_known(api: Service, client: OpenAI) -> None:
    request: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
    first = client.chat.completions.create(**request)
    link = told(first)["attribution"]
    assert link == f"/v1/inferences/{told(first)['inference']}"

    def attribute() -> None:
        size = api.size
        for _ in range(500):
            if api.size >= size + 2:
                break
            stopped.wait(0.01)
        newest = api.client("eve").get(f"/v1/events/{api.settle() - 2}")
        api.attribute(newest["body"]["inference"])

    stopped = threading.Event()
    worker = threading.Thread(target=attribute, daemon=True)
    worker.start()
    waited = client.chat.completions.with_raw_response.create(
        **request, extra_headers={"prefer": "wait=8"}
    )
    worker.join(20)
    assert waited.headers["preference-applied"] == "wait=8"
    found = told(waited.parse())["attribution"]
    assert {s["contributor"]: s["ppm"] for s in found["shares"]} == {
        api.actor("ann"): 600_000, api.actor("ben"): 300_000,
    }  # fmt: skip
    assert all(int(s["wei"]) > 0 for s in found["shares"])


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [
        (Backpressure("512 wait", retry_after_s=7, code="queue_full"), openai.RateLimitError,
         "queue_full"),
        (Backpressure("yours wait", retry_after_s=7, code="payer_queue_full"),
         openai.RateLimitError, "payer_queue_full"),
        (ComputeError("no memory", code="out_of_memory"), openai.InternalServerError,
         "out_of_memory"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_s_refusal_is_what_clients_retry(
    api: Service, client: OpenAI, monkeypatch: pytest.MonkeyPatch,
    error: Exception, raised: type[openai.APIStatusError], code: str, stream: bool,
) -> None:  # fmt: skip
    async def refuse(request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        raise error
        yield ChatDelta()

    monkeypatch.setattr(api.engine, "stream", refuse)
    before = api.size
    with pytest.raises(raised) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert caught.value.code == code
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert api.size == before
    assert api.services.reservations.held_wei(api.actor("eve")) == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_prints_pieces_as_they_come(api: Service) -> None:
    request = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "stream": True}
    shown = subprocess.run(
        ["curl", "-sN", "-D", "-", "-H", f"Authorization: Bearer {api.token('eve')}",
         "-H", "Content-Type: application/json", "-d", json.dumps(request),
         f"{api.url}/v1/chat/completions"],
        capture_output=True, timeout=30, check=True,
    ).stdout.decode()  # fmt: skip
    head, _, events = shown.partition("\r\n\r\n")
    assert "x-receipt-id: " in head.lower()
    lines = [line for line in events.splitlines() if line]
    assert len(lines) > 4
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
