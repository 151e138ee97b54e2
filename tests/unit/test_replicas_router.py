"""The router over real replicas: real gRPC, real engines, in one process.

What matters: an answer that breaks off goes on elsewhere, token for token; adapters stay at home;
nobody's fault (a slow reader, a full queue, a stranger, a stop) becomes somebody else's.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from structlog.testing import capture_logs
from transformers import LlamaForCausalLM

from ledger.errors import (
    Backpressure,
    ComputeError,
    Conflict,
    InvalidEvent,
    LedgerError,
    NotFound,
    TooLarge,
)
from ledger.ports import ChatDelta, ChatRequest
from tests.unit.openlora_world import SavedAdapter, byte_tokenizer, save_adapter, tiny_llama
from tests.unit.replica_world import World, chat, run, story, text_of, until
from workers.replicas import answering, protocol, registry
from workers.replicas import replica as replicas
from workers.replicas.protocol import Failed, Hello, Piece
from workers.replicas.registry import Registration
from workers.replicas.routing import order
from workers.replicas.server import Session
from workers.serving import ServingRouter

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama(window=400)


@pytest.fixture(scope="module")
def saved(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, folder, f"a{n}", rank=2, seed=n) for n in range(3)]


@pytest.fixture
def world(tmp_path: Path, base: LlamaForCausalLM, saved: list[SavedAdapter]) -> Iterator[World]:
    world = World(tmp_path, base, saved)
    yield world
    world.stop()


def test_answers_come_whole_with_counts_and_chances(world: World) -> None:
    world.start("a")

    async def work() -> None:
        messages = [{"role": "user", "content": "Tell me."}]
        counted = await world.router.count_tokens(messages)
        deltas = await world.ask(chat("a0", logprobs=2))
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        last = deltas[-1]
        assert last.finish_reason in ("stop", "length")
        assert last.prompt_tokens == counted
        counts = [d.completion_tokens for d in deltas]
        assert counts == sorted(counts)
        assert counts[0] > 0
        chances = [c for d in deltas for c in d.logprobs]
        assert len(chances) == last.completion_tokens
        assert all(len(c.top) == 2 and c.top[0][2] >= c.top[1][2] for c in chances)
        ended = last.finish_reason == "stop"
        raw = b"".join(c.raw for c in (chances[:-1] if ended else chances))
        assert raw.decode("utf-8", "replace")[:8] == text_of(deltas)[:8]
        assert chances[0].logprob == max(t[2] for t in chances[0].top), "greedy took the likeliest"

        plain = await world.ask(chat(prompt="user: Tell me.\nassistant: ", messages=()))
        assert text_of(plain) == text_of(await world.ask(chat())), "the template laid out by hand"
        assert await world.router.count_tokens([], "abc") == 3

    run(world, work())


def test_designed_errors_arrive_as_themselves(world: World) -> None:
    world.start("a")

    async def work() -> None:
        with pytest.raises(NotFound) as unknown:
            await world.ask(chat("nobody"))
        assert unknown.value.detail["code"] == "model_not_found"
        for bad in (chat(max_tokens=0), chat(temperature=9), chat(prompt="", messages=())):
            with pytest.raises(InvalidEvent):
                await world.ask(bad)
        with pytest.raises(InvalidEvent) as long:
            await world.ask(chat(text="word " * 200))
        assert long.value.detail["code"] == "context_length_exceeded"
        with pytest.raises(TooLarge, match="MAX_MESSAGE_BYTES"):
            await world.ask(chat(text="x" * protocol.MAX_MESSAGE_BYTES))
        twice = story()
        stream = world.router.stream(twice)
        await anext(stream)
        with pytest.raises(Conflict):
            await world.ask(twice)
        await stream.aclose()
        assert text_of(await world.ask(chat())), "and it goes on serving"

    run(world, work())


async def cut_after(world: World, request: ChatRequest, cut: Any) -> list[ChatDelta]:
    """The answer to `request`, with `cut()` done once after its first pieces."""
    deltas: list[ChatDelta] = []
    done = False
    async with contextlib.aclosing(world.router.stream(request)) as stream:
        async for delta in stream:
            deltas.append(delta)
            if not done and delta.completion_tokens >= 5:
                assert delta.finish_reason is None, "it was over before it could be cut"
                done = True
                cut()
    return deltas


def assert_same(one: list[ChatDelta], other: list[ChatDelta]) -> None:
    assert text_of(one) == text_of(other)
    for a, b in ((one[-1], other[-1]),):
        assert (a.finish_reason, a.prompt_tokens, a.completion_tokens) == (
            b.finish_reason,
            b.prompt_tokens,
            b.completion_tokens,
        )
    chances = [[c.raw for d in deltas for c in d.logprobs] for deltas in (one, other)]
    assert chances[0] == chances[1], "no token is doubled or lost"


def test_an_answer_goes_on_on_another_replica(world: World) -> None:
    """Killed in mid-stream: the caller gets what it would have got, once."""
    world.start("a")
    request = story(adapter="a1", logprobs=0, stop=["never said"])
    expected = run(world, world.ask(request))
    assert expected[-1].completion_tokens > 50

    world.start("b")
    home = order("a1", ["a", "b"])[0]
    other = "b" if home == "a" else "a"

    async def work() -> None:
        await world.router.stats()
        await until(lambda: len(world.router._fleet_now().ready()) == 2)
        before = world.steps(other)
        deltas = await cut_after(world, request, lambda: world.kill(home))
        assert_same(deltas, expected)
        assert world.router.counts["resumed"] == 1
        assert 0 < world.steps(other) - before < expected[-1].completion_tokens, "only the rest"

    run(world, work())


def test_an_answer_that_may_not_go_on_says_so(world: World) -> None:
    """Its adapter was retired after it began: the replica that should continue it refuses."""
    world.start("a")

    def retire() -> None:
        world.kill("a")
        world.start("a")
        world.adapters["a"]._saved.clear()

    async def work() -> None:
        with pytest.raises(ComputeError, match="cannot be continued: no adapter a1"):
            await cut_after(world, story(adapter="a1"), retire)
        with pytest.raises(NotFound):
            await world.ask(chat("a1"))

    run(world, work())


def test_an_answer_goes_on_when_its_replica_is_started_again(world: World) -> None:
    world.start("a")
    request = story(seed=12, logprobs=0)
    expected = run(world, world.ask(request))

    def restart() -> None:
        first = world.replicas["a"].registration
        world.kill("a")
        assert registry.registered(world.home)["a"] == first, "a killed one leaves its file"
        world.start("a")

    async def work() -> None:
        deltas = await cut_after(world, request, restart)
        assert_same(deltas, expected)

    run(world, work())


def test_where_nobody_goes_on_the_error_is_retryable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start("a")
    monkeypatch.setattr(answering, "RESUME_WITHIN_S", 0.5)

    async def work() -> None:
        with pytest.raises(ComputeError, match="no replica was ready in time"):
            await cut_after(world, story(), lambda: world.kill("a"))
        limited = story(timeout_s=0.3)
        deltas = [d async for d in world.router.stream(limited)]
        assert deltas[-1].finish_reason == "deadline", "the caller's own limit is no error"
        assert world.router.counts["failed"] == 1

    run(world, work())


def test_a_failing_engine_is_retried_but_not_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start("a")
    request = story(seed=13)
    expected = run(world, world.ask(request))
    engine: Any = world.engines["a"].engine
    model, calls = engine.model.forward, [0]

    def failing(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] in fails:
            raise RuntimeError("a mistake of the model")
        return model(*given, **named)

    monkeypatch.setattr(engine.model, "forward", failing)
    with capture_logs():  # tracebacks take a second each to lay out
        fails: Any = {20}
        deltas = run(world, world.ask(request))
        assert text_of(deltas) == text_of(expected)
        assert world.router.counts["resumed"] == 1
        fails = range(10**6)
        with pytest.raises(ComputeError, match="MAX_RESUMES"):
            run(world, world.ask(request))


def test_adapters_live_at_home_and_the_base_everywhere(world: World) -> None:
    for name in ("a", "b"):
        world.start(name)

    async def work() -> None:
        await world.router.stats()
        await until(lambda: len(world.router._fleet_now().ready()) == 2)
        names = [f"a{n}" for n in range(3)]
        await asyncio.gather(*[world.ask(chat(adapter)) for adapter in names * 3])
        for adapter in names:
            homes = [r for r in ("a", "b") if adapter in world.adapters[r].loaded]
            assert homes == order(adapter, ["a", "b"])[:1]
        await asyncio.gather(*[world.ask(chat()) for _ in range(6)])
        found = await world.router.stats()
        assert [r["name"] for r in found["replicas"]] == ["a", "b"]
        assert {r["state"] for r in found["replicas"]} == {"ready"}
        finished = [r["stats"]["finished"] for r in found["replicas"]]
        assert sum(finished) == 15
        assert min(finished) >= 3, "base requests were shared"

        crowd = [chat("a0", text=f"Number {n}.") for n in range(24)]
        await asyncio.gather(*map(world.ask, crowd))
        assert all("a0" in a.loaded for a in world.adapters.values()), "a crowd spills over"
        assert world.router.counts["away_from_home"] > 0

    run(world, work())


def test_a_full_replica_passes_on_and_full_replicas_say_when_to_retry(world: World) -> None:
    for name in ("a", "b"):
        world.start(name, max_rows=1, max_queue=1)

    async def work() -> None:
        await world.router.stats()
        await until(lambda: len(world.router._fleet_now().ready()) == 2)
        asked = [world.ask(story(payer=f"p{n}", max_tokens=60)) for n in range(10)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        answered = [f for f in found if isinstance(f, list)]
        refused = [f for f in found if isinstance(f, Backpressure)]
        assert len(answered) + len(refused) == 10, found
        assert len(answered) >= 4, "a row and a place in the queue of each"
        assert refused, "and no more than those"
        assert all(r.retry_after_s >= 1 for r in refused)

    run(world, work())


def test_who_leaves_or_cancels_frees_the_row(world: World) -> None:
    world.start("a")
    engine = world.engines["a"].engine

    async def work() -> None:
        stream = world.router.stream(story())
        await anext(stream)
        await stream.aclose()
        await until(lambda: not engine.has_work())

        request = story()

        async def cancel() -> None:
            await world.router.cancel(request.request_id)

        tasks: list[asyncio.Task[None]] = []
        deltas = await cut_after(
            world, request, lambda: tasks.append(asyncio.create_task(cancel()))
        )
        assert deltas[-1].finish_reason == "cancelled"
        assert deltas[-1].completion_tokens < 300
        late = [d async for d in world.router.stream(story(timeout_s=0.15))]
        assert late[-1].finish_reason == "deadline"

        await asyncio.gather(*[anext(world.router.stream(story(seed=n))) for n in range(3)])
        await world.router.aclose()
        await until(lambda: not engine.has_work())  # the session's end cancels all its requests

    run(world, work())


def test_a_reader_who_does_not_come_loses_only_his_own_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start("a")
    monkeypatch.setattr(protocol, "MAX_UNREAD_TOKENS", 40)

    async def work() -> None:
        lazy = world.router.stream(story())
        await anext(lazy)
        await until(lambda: not world.engines["a"].engine.has_work())
        with pytest.raises(ComputeError, match="MAX_UNREAD_TOKENS"):
            async for _ in lazy:
                pass
        assert text_of(await world.ask(chat()))

    run(world, work())


def test_a_client_that_does_not_read_is_cut_off(world: World) -> None:
    """The replica's side: a session whose connection takes no more bytes."""
    replica = world.start("a")
    backend, engine = replica._backend, world.engines["a"].engine
    sent: list[Any] = []

    async def work() -> None:
        gate = asyncio.Event()

        async def write(message: Any) -> None:
            if len(sent) >= 2:
                await gate.wait()
            sent.append(message)

        async def messages() -> Any:
            for n in range(3):
                wire = protocol.Submit(number=n, request=story(seed=n)).to_wire()
                yield protocol.unpack(protocol.pack({"submit": wire}))
            await asyncio.sleep(60)

        session = Session(backend, replica.hello(), number=99, max_pending=60)
        tasks = [
            asyncio.create_task(session.send(write)),
            asyncio.create_task(session.receive(messages())),
        ]
        await until(lambda: engine.counters.finished == 3)
        assert not engine.has_work(), "its rows are free"
        gate.set()
        await until(lambda: len(_ends(sent)) == 3)
        assert {type(end) for end in _ends(sent).values()} == {Failed}
        assert all("MAX_PENDING" in end.error.message for end in _ends(sent).values())
        session.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def in_its_loop() -> None:
        assert replica._loop is not None
        future = asyncio.run_coroutine_threadsafe(work(), replica._loop)
        await asyncio.wait_for(asyncio.wrap_future(future), 30)

    run(world, in_its_loop())


def _ends(sent: list[Any]) -> dict[int, Any]:
    pieces = [Piece.from_wire(p) for m in sent for p in m.get("pieces", ())]
    return {p.number: p.end for p in pieces if p.end is not None}


def test_strangers_and_impostors_get_nothing(world: World, tmp_path: Path) -> None:
    replica = world.start("a")
    address = replica.registration.address

    async def code_of(secret: str) -> grpc.StatusCode | None:
        async with grpc.aio.insecure_channel(address, protocol.CLIENT_OPTIONS) as channel:
            call = channel.unary_unary(protocol.path(protocol.HEALTH))
            metadata = protocol.credentials(secret) if secret else None
            try:
                found = await call(protocol.pack({}), metadata=metadata, timeout=5)
            except grpc.aio.AioRpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            hello = Hello.from_wire(protocol.unpack(found)["ok"])
            assert hello.instance == replica.registration.instance
            return None

    async def work() -> None:
        right = registry.secret(world.home)
        assert await code_of(right) is None
        for wrong in ("", "0" * 64, right[:-1]):
            assert await code_of(wrong) == grpc.StatusCode.UNAUTHENTICATED

        # Another home whose file names this replica: its secret is another one.
        stranger = ServingRouter(tmp_path / "other")
        registry.write(tmp_path / "other", replica.registration)
        deltas = [d async for d in stranger.stream(chat(timeout_s=0.5))]
        assert [(d.text, d.finish_reason) for d in deltas] == [("", "deadline")]
        (member,) = stranger._fleet_now().members.values()
        assert "UNAUTHENTICATED" in member.session.why
        await stranger.aclose()

    run(world, work())


def test_a_file_of_a_dead_instance_is_not_believed(world: World) -> None:
    """Its port answers, but another process has it now."""
    replica = world.start("a")
    real = replica.registration
    stale = Registration(**{**vars(real), "instance": "of before"})
    registry.write(world.home, stale)

    async def work() -> None:
        task = asyncio.create_task(world.ask(chat()))
        await asyncio.sleep(0.4)
        assert not task.done()
        (member,) = world.router._fleet_now().members.values()
        assert "of before" in member.session.why
        registry.write(world.home, real)
        assert text_of(await task)

    run(world, work())


def test_a_registration_that_was_erased_comes_back_but_not_while_draining(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "REFRESH_S", 0.05)
    replica = world.start("a")
    registry.remove(world.home, "a")

    async def work() -> None:
        await until(lambda: registry.registered(world.home) == {"a": replica.registration})
        assert text_of(await world.ask(chat()))
        replica.drain()
        registry.remove(world.home, "a")
        await asyncio.sleep(0.2)
        assert registry.registered(world.home) == {}

    run(world, work())


def test_a_replica_that_speaks_otherwise_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another version in a rolling change: one odd message must not lose it for good."""
    world.start("a")
    right, odd = Hello.from_wire, iter([{}, {"name": 1}])

    def told(value: Any) -> Hello:
        return right(next(odd, value))

    monkeypatch.setattr(Hello, "from_wire", staticmethod(told))

    async def work() -> None:
        assert text_of(await world.ask(chat()))
        assert next(odd, None) is None, "both were told, and outlived"

    run(world, work())


def test_a_router_that_was_closed_ends_its_answers_and_takes_no_more(world: World) -> None:
    world.start("a")

    async def work() -> None:
        closing: list[asyncio.Task[None]] = []
        with pytest.raises(ComputeError, match="stopping"):
            await cut_after(
                world,
                story(),
                lambda: closing.append(asyncio.create_task(world.router.aclose())),
            )
        with pytest.raises(ComputeError, match="stopping"):
            await world.router.stats()

    run(world, work())


def test_a_draining_replica_finishes_and_takes_nothing_new(world: World) -> None:
    world.start("a")

    async def work() -> None:
        request = story(seed=14)
        drained: list[int] = []
        deltas = await cut_after(
            world, request, lambda: drained.append(world.replicas["a"].drain())
        )
        assert drained == [1]
        assert deltas[-1].finish_reason in ("stop", "length"), "it was finished"
        assert world.router.counts["resumed"] == 0
        assert registry.registered(world.home)["a"].state == "draining"
        await until(lambda: world.replicas["a"].drain() == 0)
        assert (await world.router.stats())["replicas"][0]["state"] == "draining"

        waiting = asyncio.create_task(world.ask(chat()))
        await asyncio.sleep(0.3)
        assert not waiting.done(), "it waits for a replica that takes it"
        world.start("b")
        assert text_of(await waiting)
        world.replicas["a"].stop()
        assert set(registry.registered(world.home)) == {"b"}

    run(world, work())


def test_a_damaged_adapter_is_fetched_again_once(
    world: World, saved: list[SavedAdapter], tmp_path: Path
) -> None:
    world.start("a")
    serving, adapters = world.engines["a"], world.adapters["a"]

    async def work() -> None:
        good = text_of(await world.ask(chat("a2")))
        weights = saved[2].path / "adapter_model.safetensors"
        bytes_ = weights.read_bytes()
        entry = serving.engine.store._entries["a2"]
        try:
            weights.write_bytes(bytes_[:-1] + b"\x00")
            serving.retire("a2")  # nothing in memory any more, as after an eviction
            serving.engine.store.register(entry.adapter_id, entry.files, check=False)
            with pytest.raises(LedgerError, match="hashes to") as damaged:
                await world.ask(chat("a2"))
            assert damaged.value.detail["code"] == "corrupt_adapter"
            assert adapters.renewed == ["a2"], "fetched again once, and still damaged"
        finally:
            weights.write_bytes(bytes_)
        assert text_of(await world.ask(chat("a2"))) == good

    run(world, work())


def test_the_client_s_process_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from ledger.config import Settings\n"
        "from ledger.bootstrap import serving_engine\n"
        "from ledger.errors import ComputeError\n"
        "engine = serving_engine(Settings(home=Path(sys.argv[1])))\n"
        "try:\n"
        "    asyncio.run(engine.count_tokens([{'role': 'user', 'content': 'x'}]))\n"
        "except ComputeError as error:\n"
        "    print('none runs' if 'no replica runs' in error.message else error.message)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'torch', 'transformers'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["none runs", "[]"], done.stderr


def test_the_tokenizer_of_the_tests_splits_characters() -> None:
    from workers.replicas.tokens import TokenTexts

    texts = TokenTexts(byte_tokenizer())
    ids = byte_tokenizer()("é!")["input_ids"]
    assert b"".join(texts.of(i)[1] for i in ids) == "é!".encode()
    assert texts.of(ids[0])[0] == "�", "half a character"
    assert texts.of(319) == ("", b""), "beyond the vocabulary"
