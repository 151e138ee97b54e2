"""The API's parts that need no server: holds, problem documents, limits, how a stream ends."""

import json
from collections.abc import AsyncGenerator, Iterator
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
from ledger.api.app import create_app
from ledger.api.auth import RateLimit
from ledger.api.routes.events import READ_SPAN, describe_all
from ledger.api.routes.openai import CANCELLED, Answer, ChatBody, _Events, _parse
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
    assert problems.openai_error(found) == {
        "message": "what was wrong; do this", "type": error.slug, "code": error.slug,
        "param": "body.x",
    }  # fmt: skip


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
    answer = Answer(
        inference="i", consumer="c", created=0, prompt_tokens=3, held_wei=0,
        adapter={"input_wei_per_token": "2", "output_wei_per_token": "5"},
        request=ChatRequest(request_id="i", adapter="a", messages=[], max_tokens=9),
    )  # fmt: skip
    answer.take(ChatDelta(text="a", completion_tokens=1))
    answer.take(ChatDelta(text="b", completion_tokens=4, prompt_tokens=3, finish_reason=reason))
    assert (answer.text, answer.completion_tokens, answer.fee_wei) == ("ab", 4, 3 * 2 + 4 * 5)
    assert (answer.finish_reason, answer.openai_finish_reason) == (recorded, told)


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
    with pytest.raises(errors.InvalidEvent):
        _parse(body)


def test_unknown_fields_of_a_chat_are_ignored() -> None:
    value = {"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "u"}
    assert isinstance(_parse(json.dumps(value).encode()), ChatBody)


# --- how a stream ends -------------------------------------------------------------------------


class Source:
    """An answer that notes how it was left."""

    def __init__(self, pieces: int = 1_000, error: Exception | None = None) -> None:
        self.pieces, self.error, self.left = pieces, error, 0

    async def events(self) -> AsyncGenerator[str, None]:
        try:
            for n in range(self.pieces):
                yield f"data: {n}\n\n"
                await anyio.sleep(0)
            if self.error:
                raise self.error
        finally:
            self.left += 1


async def _respond(source: Source, send: Any, receive: Any = anyio.sleep_forever) -> None:
    rest = source.events()
    response = _Events(await anext(rest), rest, headers={"x-inference-id": "i"})
    scope = {"type": "http", "path": "/v1/chat/completions", "asgi": {"spec_version": "2.3"}}
    await response(scope, receive, send)


def test_a_stream_is_closed_when_the_client_hangs_up_while_we_send() -> None:
    """The generator waits at a yield then, where no cancellation reaches it."""
    source = Source()

    async def main() -> None:
        gone = anyio.Event()

        async def send(message: Any) -> None:
            if message.get("body", b"").startswith(b"data: 3"):
                gone.set()
                await anyio.sleep_forever()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        await _respond(source, send, receive)
        assert source.left == 1  # now, not when it is collected

    anyio.run(main)


def test_a_stream_is_closed_when_sending_fails() -> None:
    source = Source()

    async def send(message: Any) -> None:
        raise OSError("broken pipe")

    async def main() -> None:
        with pytest.raises(OSError, match="broken pipe"):
            await _respond(source, send)
        assert source.left == 1

    anyio.run(main)


@pytest.mark.parametrize(
    ("error", "slug", "hidden"),
    [
        (errors.ComputeError("the engine died; retry"), "compute-error", None),
        (RuntimeError("s3cret"), "internal", "s3cret"),
    ],
)
def test_a_failure_in_the_middle_becomes_an_event(
    error: Exception, slug: str, hidden: str | None
) -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    anyio.run(_respond, Source(pieces=2, error=error), send)
    last = json.loads([part for part in sent if part][-1].removeprefix(b"data: "))
    assert last["error"]["code"] == slug
    assert last["type"] == f"/problems/{slug}"
    if hidden:
        assert hidden not in b"".join(sent).decode()
