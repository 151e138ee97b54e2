"""The API's parts that need no server: holds, problem documents, limits, how a stream ends."""

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Annotated, Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from ledger import errors
from ledger.api import problems, raw
from ledger.api.answers import flow as flow_module
from ledger.api.answers.answer import CANCELLED, Answer, Terms, merged
from ledger.api.answers.bodies import ChatBody, CompletionBody, parse
from ledger.api.answers.delivery import AnswerStream
from ledger.api.answers.flow import Flow
from ledger.api.app import create_app
from ledger.api.auth import RateLimit
from ledger.api.routes.events import READ_SPAN, describe_all
from ledger.api.services import Reservations, Services
from ledger.config import load_settings
from ledger.ports import ChatDelta, ChatRequest
from tests.actors import ANN
from tests.fakes import MemoryEntryLog

# --- holds -------------------------------------------------------------------------------------


def test_a_hold_counts_what_others_hold() -> None:
    held = Reservations()
    held.hold("ann", 60, lambda: 100)
    with pytest.raises(errors.PaymentRequired, match="60 wei are held"):
        held.hold("ann", 41, lambda: 100)
    held.hold("ann", 40, lambda: 100)
    held.hold("ben", 100, lambda: 100)
    held.release("ann", 60)
    assert held.held_wei("ann") == 40
    held.release("ann", 40)
    assert (held.held_wei("ann"), held.held_wei("ben")) == (0, 100)


def test_the_balance_is_read_after_the_amount_is_held() -> None:
    """An answer that is charged and released while another one asks must be seen by it, either as
    held or as charged: read first and held later, it would be neither."""
    held, balance = Reservations(), [100]
    held.hold("ann", 100, lambda: balance[0])

    def settle_the_first() -> int:
        balance[0] -= 100
        held.release("ann", 100)
        return balance[0]

    with pytest.raises(errors.PaymentRequired):
        held.hold("ann", 100, settle_the_first)
    assert held.held_wei("ann") == 0


def test_a_balance_that_cannot_be_read_holds_nothing() -> None:
    held = Reservations()

    def fails() -> int:
        raise errors.StorageError("away")

    with pytest.raises(errors.StorageError):
        held.hold("ann", 5, fails)
    assert held.held_wei("ann") == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=40))
def test_holds_never_exceed_the_balance(steps: list[tuple[bool, int]]) -> None:
    held, under_way = Reservations(), list[int]()
    balance = 100

    def prepaid() -> int:
        return balance

    for ask, amount in steps:
        if ask:
            try:
                held.hold("ann", amount, prepaid)
            except errors.PaymentRequired:
                assert sum(under_way) + amount > balance
            else:
                under_way.append(amount)
        elif under_way:
            done = under_way.pop()
            balance -= min(amount, done)  # what it really cost
            held.release("ann", done)
        assert held.held_wei("ann") == sum(under_way) <= balance


# --- problem documents -------------------------------------------------------------------------


def every_error(cls: type[errors.LedgerError] = errors.LedgerError) -> Iterator[Any]:
    yield cls
    for sub in cls.__subclasses__():
        if sub.__module__ == "ledger.errors":
            yield from every_error(sub)


@pytest.mark.parametrize("cls", every_error())
def test_every_error_has_its_document(cls: type[errors.LedgerError]) -> None:
    error = cls("what was wrong; do this", field="body.x", odd=object())
    found = problems.problem_document(error)
    assert found["status"] == cls.status
    assert found["type"] == f"/problems/{error.slug}"
    assert found["title"] == cls.title
    assert found["detail"] == "what was wrong; do this"
    assert found["extra"]["field"] == "body.x"
    json.dumps(found)
    told = problems.openai_error(found)
    assert (told["message"], told["param"]) == ("what was wrong; do this", "body.x")
    assert told["type"].endswith("_error") or told["type"] == "insufficient_quota"
    assert told.keys() == {"message", "type", "param", "code"}
    assert problems.openai_error(problems.problem_document(cls("x", code="own")))["code"] == "own"


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (errors.Backpressure("full", retry_after_s=7), {"retry-after": "7"}),
        (errors.ComputeError("away"), {"retry-after": "2"}),
        (errors.Conflict("running", retry_after_s=1), {"retry-after": "1"}),
        (errors.Conflict("another body", retry=False), {"x-should-retry": "false"}),
        (errors.PaymentRequired("no money"), {}),
    ],
)
def test_openai_clients_are_told_whether_to_try_again(
    app: FastAPI, error: errors.LedgerError, headers: dict[str, str]
) -> None:
    @app.get("/v1/chat/odd")
    def odd() -> None:
        raise error

    found = ask(app, "GET", "/v1/chat/odd").headers
    told = {name: found[name] for name in ("retry-after", "x-should-retry") if name in found}
    assert told == headers
    assert len(found["x-request-id"]) == 32


def test_an_unforeseen_error_says_nothing_of_itself() -> None:
    found = problems.problem_document(RuntimeError("s3cret"))
    assert found["status"] == 500
    assert "s3cret" not in json.dumps(found)
    assert problems.problem_document(HTTPException(418))["title"] == "I'm a Teapot"


# --- a small app: what the middle of FastAPI would do to our errors -----------------------------


@pytest.fixture
def app() -> FastAPI:
    class Box(Services):
        def __init__(self) -> None:
            self.settings = load_settings(max_body_bytes=3_000)
            self.info = {"version": "0"}

    return create_app(Box())


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.request(method, path, **options)

    return anyio.run(send)


def test_a_message_with_a_lone_surrogate_can_be_sent(app: FastAPI) -> None:
    @app.get("/odd")
    async def odd() -> None:
        raise errors.Conflict("\ud800", value="\udfff")

    found = ask(app, "GET", "/odd")
    assert found.status_code == 409
    assert found.json()["detail"] == "\ud800"


@pytest.mark.parametrize(("length", "status"), [("3001", 413), ("9" * 40, 413), ("0", 200)])
def test_a_length_that_is_too_long_is_refused_unread(
    app: FastAPI, length: str, status: int
) -> None:
    @app.post("/bytes")
    async def take(data: raw.BlobBytes) -> int:
        return len(data)

    found = ask(app, "POST", "/bytes", headers={"content-length": length}, content=b"")
    assert found.status_code == status


def test_the_smaller_limit_counts(app: FastAPI) -> None:
    @app.post("/login")
    async def login(data: raw.LoginBytes) -> int:
        return len(data)

    @app.post("/batch")
    async def batch(data: Annotated[bytes, Depends(raw.batch_bytes)]) -> int:
        return len(data)

    assert "MAX_LOGIN_BYTES" in ask(app, "POST", "/login", content=b"x" * 2_049).text
    assert ask(app, "POST", "/login", content=b"x" * 2_048).json() == 2_048
    assert "TRIBUTARY_MAX_BODY_BYTES" in ask(app, "POST", "/batch", content=b"x" * 3_001).text


def test_who_hangs_up_while_sending_is_no_mistake_of_ours(
    app: FastAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    @app.post("/bytes")
    async def take(data: raw.BlobBytes) -> int:
        return len(data)

    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/bytes", "raw_path": b"/bytes",
        "query_string": b"", "headers": [], "asgi": {"spec_version": "2.3"}, "root_path": "",
    }  # fmt: skip
    anyio.run(app, scope, receive, send)
    assert sent[0]["status"] == 499
    assert "unforeseen" not in capsys.readouterr().out


# --- rate limit, reading, chat -----------------------------------------------------------------


def test_the_window_has_room_for_so_many_and_says_when_again() -> None:
    limit = RateLimit(5)
    limit.hit("ann", cost=4)
    limit.hit("ann")
    with pytest.raises(errors.Backpressure) as caught:
        limit.hit("ann")
    assert 1 <= caught.value.retry_after_s <= 60
    limit.hit("ben", cost=5)


@given(st.sets(st.integers(0, 3 * READ_SPAN - 1)))
def test_entries_are_read_in_spans(wanted: set[int]) -> None:
    indexes = sorted(wanted)
    box: Any = type("Box", (), {"entries": LOG_OF_MANY})
    assert [found["index"] for found in describe_all(box, indexes)] == indexes


def _log_of_many() -> MemoryEntryLog:
    log, raw = MemoryEntryLog(), ANN.sign("identity.registered", {"name": "ann"})
    for _ in range(3 * READ_SPAN):
        log.append(raw)
    return log


LOG_OF_MANY = _log_of_many()


@pytest.mark.parametrize(
    ("reason", "recorded", "told"),
    [
        ("stop", "stop", "stop"),
        ("length", "length", "length"),
        ("deadline", CANCELLED, "length"),
        ("cancelled", CANCELLED, "length"),
        ("error", CANCELLED, "length"),
    ],
)
def test_endings_of_an_engine_become_endings_of_the_catalogue(
    reason: str, recorded: str, told: str
) -> None:
    answer = under_way()
    answer.take(ChatDelta(text="a", completion_tokens=1))
    answer.take(ChatDelta(text="b", completion_tokens=4, prompt_tokens=3, finish_reason=reason))
    assert (answer.text, answer.completion_tokens, answer.fee_wei) == ("ab", 4, 3 * 2 + 4 * 5)
    assert (answer.finish_reason, answer.openai_finish_reason) == (recorded, told)
    assert answer.ended_as == reason


def under_way() -> Answer:
    terms = Terms(
        adapter="a", model="m/m", owner="o", adapter_sha256="ab" * 32, input_wei_per_token=2,
        output_wei_per_token=5,
    )  # fmt: skip
    return Answer(
        inference="i", consumer="c", terms=terms, created=0, prompt_tokens=3,
        request=ChatRequest(request_id="i", adapter="a", messages=[], max_tokens=9),
    )  # fmt: skip


def test_pieces_that_arrived_together_are_one() -> None:
    pieces = [
        ChatDelta(text="a", completion_tokens=1, prompt_tokens=3),
        ChatDelta(text="", completion_tokens=2),
        ChatDelta(text="c", completion_tokens=3, finish_reason="stop"),
    ]
    both, one = under_way(), under_way()
    for piece in pieces:
        both.take(piece)
    one.take(merged(pieces))
    assert one == both
    assert merged(pieces[:1]) is pieces[0]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b"[" * 100_000, b'{"a":' * 100_000, b'{"seed":' + b"9" * 5_000 + b"}",
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"a\\u0000b","messages":[{"role":"user","content":"x"}]}',
        b'{"model":"m","temperature":NaN,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"m","temperature":1e999,"messages":[{"role":"user","content":"x"}]}',
        b"\xff\xfe",
    ],
    ids=range(11),
)  # fmt: skip
def test_a_chat_body_is_parsed_or_refused(body: bytes) -> None:
    for kind in (ChatBody, CompletionBody):
        with pytest.raises(errors.InvalidEvent):
            parse(body, kind)


def chat_body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "x"}]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {}, "store": True, "service_tier": "auto", "unheard_of": 1},
        {"tools": [], "tool_choice": "none", "logit_bias": {}, "presence_penalty": 0.0, "n": None},
        {"response_format": {"type": "text"}, "frequency_penalty": None, "seed": None},
        {"temperature": None, "top_p": None, "stream": None, "stop": None, "stream_options": None},
    ],
)
def test_what_does_not_touch_the_answer_is_ignored(fields: dict[str, Any]) -> None:
    assert parse(chat_body(**fields), ChatBody) == parse(chat_body(), ChatBody)


@pytest.mark.parametrize(
    ("fields", "at_fault"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_k": -2}, "top_k"),
        ({"n": 2}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"min_p": 0.1}, "min_p"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(
    fields: dict[str, Any], at_fault: str
) -> None:
    with pytest.raises(errors.InvalidEvent) as caught:
        parse(chat_body(**fields), ChatBody)
    assert str(caught.value.detail["field"]).startswith(at_fault)
    assert caught.value.message.startswith(at_fault)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (["a", "b"], "one request for each"),
        ([1, 2], "as text"),
        ([[1, 2]], "as text"),
        ([], "as text"),
        (7, "string"),
        (None, "string"),
        ("x" * 40_000, "32000"),
    ],
)
def test_a_completion_takes_one_prompt(prompt: Any, why: str) -> None:
    with pytest.raises(errors.InvalidEvent, match=why) as caught:
        parse(json.dumps({"model": "m", "prompt": prompt}).encode(), CompletionBody)
    assert caught.value.detail["field"] == "prompt"


def test_a_prompt_alone_in_its_list_is_that_prompt() -> None:
    one, listed = (
        parse(json.dumps({"model": "m", "prompt": p}).encode(), CompletionBody)
        for p in ("x", ["x"])
    )
    assert one == listed
    assert (one.prompt, one.max_tokens, one.chat) == ("x", 16, False)


# --- how a stream ends -------------------------------------------------------------------------


class Source:
    """An engine whose answer notes how it was left."""

    def __init__(self, pieces: int = 1_000, error: Exception | None = None) -> None:
        self.pieces, self.error, self.left = pieces, error, 0

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        try:
            for n in range(self.pieces):
                yield ChatDelta(text=str(n), completion_tokens=n + 1)
                await anyio.sleep(0.001)
            if self.error:
                raise self.error
        finally:
            self.left += 1


class Seat:
    """What became of an answer."""

    def __init__(self) -> None:
        self.answer, self.intent, self.ended = under_way(), self, list[str]()
        self.kept = ""
        self.said = 0

    def deliver(self, tokens: int, text_json: bytes) -> None:
        self.kept += json.loads(text_json)

    async def finish(self) -> dict[str, Any]:
        self.ended.append(f"finished: {self.answer.finish_reason}")
        return {}

    async def break_off(self, reason: str) -> dict[str, Any]:
        self.ended.append(reason)
        return {"interrupted": reason}

    def delivered(self) -> None:
        self.said += 1

    def leave(self) -> None:
        self.ended.append("left")

    async def never(self) -> dict[str, Any]:
        """As ASGI's `receive` while the client stays."""
        await anyio.sleep_forever()
        raise AssertionError


async def _respond(source: Any, send: Any, receive: Any = anyio.sleep_forever) -> Seat:
    seat: Any = Seat()
    flow = Flow(source, seat.answer.request, receive).start()
    response = AnswerStream(seat, flow, await flow.next(), include_usage=False)
    scope = {"type": "http", "path": "/v1/chat/completions", "asgi": {"spec_version": "2.3"}}
    await response(scope, receive, send)
    assert isinstance(seat, Seat)
    return seat


def test_a_stream_is_closed_when_the_client_hangs_up_while_we_send() -> None:
    source = Source()

    async def main() -> None:
        gone = anyio.Event()

        async def send(message: Any) -> None:
            if b'"3"' in message.get("body", b""):
                gone.set()
                await anyio.sleep_forever()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        seat = await _respond(source, send, receive)
        assert source.left == 1  # now, not when it is collected
        assert seat.ended == ["finished: cancelled", "left"]
        assert "3" in seat.kept

    anyio.run(main)


def test_who_stays_and_does_not_read_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_module, "GRACE_S", 0.02)
    source = Source(pieces=3)

    async def send(message: Any) -> None:
        if message.get("body"):
            await anyio.sleep_forever()

    async def main() -> Any:
        seat: Any = Seat()
        request = replace(seat.answer.request, timeout_s=0.05)
        flow = Flow(source, request, seat.never).start()  # type: ignore[arg-type]
        response = AnswerStream(seat, flow, await flow.next(), include_usage=False)
        with anyio.fail_after(5):
            await response({"type": "http", "path": "/"}, seat.never, send)
        return seat

    assert anyio.run(main).ended == ["finished: cancelled", "left"]


def test_a_piece_that_cannot_be_written_down_is_not_the_first_of_a_stream() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    class FullDisk(Seat):
        def deliver(self, tokens: int, text_json: bytes) -> None:
            raise errors.StorageError("the disk is full; retry")

    async def main() -> Any:
        seat: Any = FullDisk()
        flow = Flow(Source(pieces=3), seat.answer.request).start()  # type: ignore[arg-type]
        response = AnswerStream(seat, flow, await flow.next(), include_usage=False)
        scope = {
            "type": "http", "path": "/v1/chat/completions", "method": "POST", "headers": [],
            "query_string": b"", "server": ("127.0.0.1", 80), "scheme": "http",
        }  # fmt: skip
        await response(scope, seat.never, send)
        return seat

    assert anyio.run(main).ended == ["failed", "left"]
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [503]
    assert json.loads(sent[-1]["body"])["error"]["code"] == "service_unavailable"


def test_a_stream_is_closed_when_sending_fails() -> None:
    source = Source()

    async def send(message: Any) -> None:
        raise OSError("broken pipe")

    async def main() -> None:
        seat = await _respond(source, send)
        assert source.left == 1
        assert seat.ended == ["finished: cancelled", "left"]

    anyio.run(main)


def test_a_piece_is_in_the_journal_before_it_leaves() -> None:
    async def main() -> None:
        seats: list[Seat] = []
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            told = b"".join(sent).decode().split("\n\n")
            deltas = [json.loads(t[6:])["choices"][0]["delta"] for t in told if "content" in t]
            assert seats[0].kept.startswith("".join(d["content"] for d in deltas))

        seat: Any = Seat()
        seats.append(seat)
        flow = Flow(Source(pieces=5), seat.answer.request).start()  # type: ignore[arg-type]
        response = AnswerStream(seat, flow, await flow.next(), include_usage=False)
        await response({"type": "http", "path": "/"}, seat.never, send)
        assert seat.kept == "01234"

    anyio.run(main)


def test_what_is_cancelled_by_the_server_is_left_to_the_journal() -> None:
    source, seats = Source(), list[Any]()

    async def main() -> None:
        async def send(message: Any) -> None:
            pass

        async def stream() -> None:
            seat: Any = Seat()
            seats.append(seat)
            flow = Flow(source, seat.answer.request).start()  # type: ignore[arg-type]
            response = AnswerStream(seat, flow, await flow.next(), include_usage=False)
            await response({"type": "http", "path": "/"}, seat.never, send)

        with anyio.move_on_after(0.05):
            await stream()
        assert source.left == 1
        assert seats[0].ended == ["left"]

    anyio.run(main)


@pytest.mark.parametrize(
    ("error", "code", "hidden"),
    [
        (errors.ComputeError("the engine died; retry"), "service_unavailable", None),
        (RuntimeError("s3cret"), "internal_error", "s3cret"),
    ],
)
def test_a_failure_in_the_middle_becomes_an_event(
    error: Exception, code: str, hidden: str | None
) -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    seat = anyio.run(_respond, Source(pieces=2, error=error), send)
    last = json.loads([part for part in sent if part][-1].removeprefix(b"data: "))
    assert last["error"]["code"] == code
    assert last["type"].startswith("/problems/")
    assert last["tributary"] == {"interrupted": "failed"}
    assert seat.ended == ["failed", "left"]
    if hidden:
        assert hidden not in b"".join(sent).decode()
