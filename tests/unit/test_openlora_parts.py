"""Sampling, text, the cost rule, the working set, chat and the asyncio driver."""

import asyncio
import contextlib
import functools
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ledger.errors import Backpressure, ComputeError, InvalidEvent
from tests.unit.openlora_world import (
    byte_tokenizer,
    engine_for,
    oracle,
    prompt_of,
    request,
    save_adapter,
    tiny_llama,
)
from workers.openlora.adapter import AdapterWeights, TargetShape
from workers.openlora.chat import encode_chat, openai_finish_reason
from workers.openlora.driver import AsyncEngine
from workers.openlora.errors import UnknownAdapter
from workers.openlora.layers import LoraContext, WorkingSet, dense_is_cheaper
from workers.openlora.sampling import (
    LOST,
    Draw,
    _among_all,
    _among_likeliest,
    _sample,
    choose,
    logprobs,
    uniform,
)
from workers.openlora.scheduler import (
    MAX_PASSES,
    MAX_RETRY_AFTER_S,
    UNMEASURED_RETRY_S,
    FairQueue,
    Pace,
)
from workers.openlora.text import TextStream

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()


# --- sampling ---


def draw(**kw: float) -> Draw:
    return Draw(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "step": 0} | kw)  # type: ignore[arg-type]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    n = 4000
    tokens = choose(logits.expand(n, 4), [draw(seed=7, step=i) for i in range(n)])
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / n
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.03)


@pytest.mark.parametrize(
    ("cut", "allowed"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 0}),
        ({"top_p": 0.05}, {2}),
        ({"top_p": 0.5}, {2}),  # 0.5 is reached by the first alone
        ({"top_p": 0.51}, {2, 0}),
        ({"top_k": 3, "top_p": 0.6}, {2, 0}),
        ({"temperature": 0.01}, {2}),
    ],
)
def test_cuts_leave_the_likeliest(cut: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([[0.25, 0.15, 0.5, 0.1]]).log()
    seen = {choose(logits, [draw(seed=s, **cut)])[0] for s in range(300)}
    assert seen == allowed


def test_the_distribution_is_that_of_transformers_processors() -> None:
    """Temperature, top-k and top-p by Hugging Face's own warpers, against many draws of ours."""
    rng = torch.Generator().manual_seed(4)
    logits = torch.randn(1, 12, generator=rng) * 2
    empty = torch.zeros(1, 0, dtype=torch.long)
    n = 3000
    for heat, top_k, top_p in [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 7, 0.6)]:
        scores = TemperatureLogitsWarper(heat)(empty, logits)
        if top_k:
            scores = TopKLogitsWarper(top_k)(empty, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(empty, scores)
        expected = torch.softmax(scores, -1)[0]
        for at in range(2):  # either way of drawing
            wide = logits if at == 0 else torch.cat([logits, torch.full((1, 400), -1e4)], 1)
            draws = [draw(temperature=heat, top_k=top_k, top_p=top_p, step=i) for i in range(n)]
            tokens = torch.tensor(choose(wide.expand(n, -1), draws))
            shares = torch.bincount(tokens, minlength=12) / n
            assert set(tokens.unique().tolist()) <= set(expected.nonzero()[:, 0].tolist())
            assert torch.allclose(shares, expected, atol=0.035), (heat, top_k, top_p)


@given(st.integers(0, 2**31), st.sampled_from(["flat", "peaked", "tied", "half"]))
@settings(max_examples=40, deadline=None)
def test_the_likeliest_decide_as_the_whole_vocabulary_would(seed: int, kind: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 700, generator=rng)
    if kind != "flat":
        logits *= 6
    if kind == "tied":
        logits = logits.round()
    if kind == "half":
        logits = logits.bfloat16()
    draws = [
        draw(
            seed=seed,
            step=i,
            temperature=(0.2, 0.7, 1.0, 2.0)[i % 4],
            top_k=(0, 3, 256, 300)[i // 4],
            top_p=(1.0, 0.5, 0.99)[i % 3],
        )
        for i in range(16)
    ]
    assert _sample(logits, draws).tolist() == _among_all(logits, draws).tolist()


def test_most_draws_need_no_sort() -> None:
    logits = torch.randn(32, 32_000, generator=torch.Generator().manual_seed(1)) * 4
    draws = [draw(step=i, temperature=0.8, top_p=0.95) for i in range(32)]
    assert (_among_likeliest(logits, draws) != LOST).sum() >= 24


def test_rows_without_numbers_are_lost_alone() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 2.0], [nan, 1.0], [inf, 1.0], [-inf, -inf], [-inf, 0.0]])
    assert choose(logits, [draw(temperature=0)] * 5) == [1, LOST, LOST, LOST, 1]
    assert choose(logits, [draw()] * 5)[1:] == [LOST, LOST, LOST, 1]


def test_log_probabilities_are_those_of_log_softmax() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    expected = torch.log_softmax(logits, -1)
    for i, found in enumerate(logprobs(logits, [7, 8, 9], [0, 2, 5])):
        assert found.logprob == pytest.approx(float(expected[i, 7 + i]), abs=1e-6)
        best = expected[i].topk((0, 2, 5)[i])
        assert [t for t, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_the_random_number_is_part_of_the_format() -> None:
    """Recorded answers are re-drawn from their seed: this value may never change."""
    assert uniform(42, 0) == pytest.approx(UNIFORM_42_0, abs=0)
    assert uniform(42, 1) != uniform(42, 0)


UNIFORM_42_0 = 0.22921179221249066


# --- the queue ---


@dataclass(eq=False)
class Wait:
    """A request of a simulated queue; it keeps its row for `cost` steps."""

    payer: str
    turn_key: str
    cost: float = 1.0
    deadline: float = math.inf


def fill(queue: FairQueue[Wait], *items: Wait) -> None:
    for item in items:
        queue.push(item, retry_after_s=lambda n: n)


def simulate(queue: FairQueue[Wait], rows: int, steps: int = 10_000) -> dict[Wait, int]:
    """The step at which each waiting request got a row."""
    running: dict[Wait, int] = {}
    started: dict[Wait, int] = {}
    for step in range(steps):
        running = {w: end for w, end in running.items() if end > step}
        while len(running) < rows:
            w = queue.pop(lambda _: True)
            if w is None:
                break
            started[w], running[w] = step, step + math.ceil(w.cost)
        if not len(queue):
            return started
    raise AssertionError("somebody was never served")


def test_a_flood_over_many_adapters_delays_another_payer_by_a_turn() -> None:
    queue: FairQueue[Wait] = FairQueue(1024)
    flood = [Wait("whale", f"a{i % 100}", cost=10) for i in range(500)]
    fill(queue, *flood)
    served = [queue.pop(lambda _: True) for _ in range(40)]
    single = Wait("minnow", "a7", cost=10)
    fill(queue, single)
    assert queue.pop(lambda _: True) is single
    assert all(w is not None and w.payer == "whale" for w in served)
    assert len(simulate(queue, rows=4)) == 460, "and the flood is served in the end"


def test_turns_are_counted_in_tokens() -> None:
    """Equal demand, unequal requests: both payers get the same number of tokens."""
    queue: FairQueue[Wait] = FairQueue(4096)
    long = [Wait("long", "a", cost=90) for _ in range(60)]
    short = [Wait("short", "b", cost=10) for _ in range(540)]
    fill(queue, *long, *short)
    tokens = {"long": 0.0, "short": 0.0}
    for _ in range(300):
        w = queue.pop(lambda _: True)
        assert w is not None
        tokens[w.payer] += w.cost
        assert abs(tokens["long"] - tokens["short"]) <= 90


def test_what_an_answer_really_took_is_settled() -> None:
    """A payer that asks for much and gets little is not made to pay for it."""
    queue: FairQueue[Wait] = FairQueue(4096)
    fill(queue, *(Wait(p, "a", cost=100) for p in ("wary", "plain") for _ in range(300)))
    turns = Counter[str]()
    for _ in range(200):
        w = queue.pop(lambda _: True)
        assert w is not None
        turns[w.payer] += 1
        queue.settle(w, 25 if w.payer == "wary" else 100)
    assert 3.5 <= turns["wary"] / turns["plain"] <= 4.5


def test_who_comes_back_has_saved_nothing_up() -> None:
    queue: FairQueue[Wait] = FairQueue(4096)
    fill(queue, Wait("idle", "a", cost=5))
    queue.pop(lambda _: True)
    fill(queue, *(Wait("busy", "a", cost=5) for _ in range(400)))
    for _ in range(100):
        queue.pop(lambda _: True)
    fill(queue, *(Wait("idle", "a", cost=5) for _ in range(100)))
    next_20 = [queue.pop(lambda _: True) for _ in range(20)]
    assert [w.payer for w in next_20 if w].count("idle") in (10, 11)


def test_adapters_of_a_payer_take_turns_too() -> None:
    queue: FairQueue[Wait] = FairQueue(64)
    fill(queue, *(Wait("p", "hot", cost=9) for _ in range(20)), Wait("p", "cold", cost=9))
    first = [queue.pop(lambda _: True) for _ in range(2)]
    assert {w.turn_key for w in first if w} == {"hot", "cold"}


def test_a_flood_leaves_a_share_of_the_queue_to_others() -> None:
    queue: FairQueue[Wait] = FairQueue(120)
    for payer, share in [("a", 60), ("b", 40), ("c", 20)]:  # c finds what a and b left
        held = 0
        with contextlib.suppress(Backpressure):
            for _ in range(200):
                fill(queue, Wait(payer, "x"))
                held += 1
        assert held == share
    with pytest.raises(Backpressure) as refused:
        fill(queue, Wait("a", "x"))
    assert refused.value.detail["code"] == "queue_full"
    alone: FairQueue[Wait] = FairQueue(5)
    fill(alone, *(Wait("", "x") for _ in range(5)))  # nobody in particular has it all
    small: FairQueue[Wait] = FairQueue(1)
    fill(small, Wait("a", "x"))
    with pytest.raises(Backpressure):
        fill(small, Wait("b", "x"))


def test_a_payer_over_its_share_hears_when_its_own_turn_comes() -> None:
    queue: FairQueue[Wait] = FairQueue(100)
    fill(queue, *(Wait("small", "x") for _ in range(3)), *(Wait("big", "x") for _ in range(33)))
    with pytest.raises(Backpressure) as refused:
        fill(queue, Wait("big", "x"))
    assert refused.value.detail["code"] == "payer_queue_full"
    assert refused.value.retry_after_s == 36, "everyone waiting now is served before"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_nobody_starves_whatever_cannot_be_placed(data: st.DataObject) -> None:
    """Others may pass one that cannot be placed MAX_PASSES times out of turn, then they wait."""
    queue: FairQueue[Wait] = FairQueue(1000)
    fill(queue, stuck := Wait("p", "cold"))
    passed = 0
    for _ in range(60):
        fill(queue, Wait(data.draw(st.sampled_from("pqr")), data.draw(st.sampled_from("xyz"))))
        got = queue.pop(lambda w: w is not stuck)
        passed += got is not None
    assert passed <= 3 * (MAX_PASSES + 1), "three payers, each in its turn"
    assert queue.pop(lambda w: w is not stuck) is None
    assert queue.pop(lambda _: True) is stuck


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "take", "settle"]),
            st.sampled_from("pqr"),
            st.sampled_from("xyz"),
            st.integers(1, 50),
        ),
        max_size=80,
    )
)
@settings(max_examples=80, deadline=None)
def test_the_queue_loses_and_invents_nobody(script: list[tuple[str, str, str, int]]) -> None:
    queue: FairQueue[Wait] = FairQueue(30)
    waiting: list[Wait] = []
    gone: list[Wait] = []
    for action, payer, key, cost in script:
        if action == "push":
            item = Wait(payer, key, cost=cost, deadline=cost)
            with contextlib.suppress(Backpressure):
                fill(queue, item)
                waiting.append(item)
        elif action == "pop":
            keep = functools.partial(_other_key, key)
            got = queue.pop(keep)
            if got is not None:
                earlier = [w for w in waiting if (w.payer, w.turn_key) == (got.payer, got.turn_key)]
                assert earlier[0] is got, "first in, first out in its line"
                waiting.remove(got)
                gone.append(got)
        elif action == "take":
            late = [w for w in waiting if w.deadline <= cost]
            assert queue.overdue(cost) or not late
            taken = queue.take(functools.partial(_late, cost))
            assert set(map(id, taken)) == set(map(id, late))
            waiting = [w for w in waiting if w not in late]
        elif gone:
            queue.settle(gone[-1], cost)
        assert len(queue) == len(waiting)
        assert queue.payers == len({w.payer for w in waiting})
    while (got := queue.pop(lambda _: True)) is not None:
        waiting.remove(got)
    assert not waiting


def _other_key(key: str, w: Wait) -> bool:
    return w.turn_key != key


def _late(now: float, w: Wait) -> bool:
    return w.deadline <= now


def test_retry_after_is_the_measured_pace() -> None:
    pace = Pace()
    assert pace.wait_s(10, busy_s=3.0) == UNMEASURED_RETRY_S
    for i in range(1, 201):
        pace.ended(i * 0.5)
    assert pace.wait_s(10, busy_s=100.0) == 5
    assert pace.wait_s(1, busy_s=100.0) == 1
    assert pace.wait_s(10_000, busy_s=100.0) == MAX_RETRY_AFTER_S
    assert pace.wait_s(10, busy_s=132.0) == 10, "an engine that stalls has a slower pace"


# --- text ---


def stream_of(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for i in byte_ids(data):
        pieces.append(stream.push(i))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


def byte_ids(data: bytes) -> list[int]:
    """Token ids of raw bytes, through the alphabet of byte-level BPE."""
    table = {
        bytes([b]): TOKENIZER.convert_tokens_to_ids(c) for b, c in zip(_BYTES, _CHARS, strict=True)
    }
    return [table[bytes([b])] for b in data]


def _alphabet() -> Iterator[tuple[int, str]]:
    """GPT-2's bytes-to-unicode table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = itertools.count(256)
    for b in range(256):
        yield b, chr(b if b in printable else next(spare))


_BYTES = [b for b, _ in _alphabet()]
_CHARS = [c for _, c in _alphabet()]


@given(st.text(max_size=40).filter(lambda s: "�" not in s))
@settings(max_examples=150, deadline=None)
def test_characters_arrive_whole(text: str) -> None:
    pieces, stream = stream_of(text.encode())
    assert "".join(pieces) == text == stream.text
    assert all("�" not in piece for piece in pieces)


def test_a_half_character_at_the_end_is_dropped() -> None:
    pieces, _ = stream_of("naïve 🌊".encode()[:-1])
    assert "".join(pieces) == "naïve "


def test_rubbish_is_shown_as_rubbish_in_the_end() -> None:
    pieces, _ = stream_of(b"ok" + b"\xff" * 12 + b"ok")
    assert "".join(pieces).startswith("ok�")
    assert "".join(pieces).endswith("ok")


@given(st.text(alphabet="abé ", max_size=30), st.lists(st.text("abé ", min_size=1), max_size=3))
@settings(max_examples=200, deadline=None)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(
    text: str, stops: list[str]
) -> None:
    pieces, stream = stream_of(text.encode(), tuple(stops))
    # The stop that is complete first wins; of those complete at once, the one that began first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)


# --- layers ---


def test_the_cost_rule() -> None:
    shared = dense_is_cheaper(rows=32, tokens=1, rank=8, dense_rank=8)
    distinct = dense_is_cheaper(rows=32, tokens=1, rank=8, dense_rank=256)
    assert shared
    assert not distinct
    assert not dense_is_cheaper(rows=4, tokens=64, rank=8, dense_rank=32), "long prompts: rows"


@pytest.mark.parametrize("seed", range(6))
def test_both_forms_equal_the_definition(seed: int) -> None:
    """Rows filled, moved, swapped and emptied at random, then y + (x A^T) B for each row alone."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "m.p": TargetShape(in_features=6, out_features=5),
        "m.q": TargetShape(in_features=6, out_features=7),
    }
    like = torch.empty(0, dtype=torch.float64)
    working = WorkingSet(shapes, 6, LoraContext(), like=like)
    held: list[AdapterWeights | None] = [None] * 6

    def adapter(rank: int, names: list[str]) -> AdapterWeights:
        def random(n: int) -> torch.Tensor:
            return torch.randn(rank, n, generator=rng, dtype=torch.float64)

        return AdapterWeights(
            rank=rank,
            a={n: random(shapes[n].in_features) for n in names},
            b={n: random(shapes[n].out_features) for n in names},
        )

    pool = [adapter(1, ["m.p"]), adapter(3, ["m.p", "m.q"]), adapter(2, ["m.q"])]
    for _ in range(40):
        one, other, what, which = torch.randint(0, 6, (4,), generator=rng).tolist()
        if what < 3:
            held[one] = pool[which] if which < 3 else None
            working.fill(one, held[one] and id(held[one]), held[one])
        elif what == 3:
            held[one], held[other] = held[other], held[one]
            working.swap(one, other)
        elif one != other:
            held[other] = held[one]
            working.move(one, other)
        lo, hi = sorted([one, other])
        hi += 1
        working.bind(lo, hi, 2)
        for name, shape in shapes.items():
            x = torch.randn(hi - lo, 2, shape.in_features, generator=rng, dtype=torch.float64)
            y = torch.randn(hi - lo, 2, shape.out_features, generator=rng, dtype=torch.float64)
            expected = y.clone()
            for i, w in enumerate(held[lo:hi]):
                if w is not None and name in w.a:
                    expected[i] += x[i] @ w.a[name].T @ w.b[name]
            leaders: dict[object, int] = {
                id(w): lo + i for i, w in enumerate(held[lo:hi]) if w is not None
            }
            forms: list[Mapping[str, Any]] = [working._row(lo, hi)]
            forms += [working._dense(lo, hi, leaders), working.context.deltas]
            for form in forms:
                delta = form.get(name)
                got = y.clone() if delta is None else delta.add_to(y.clone(), x)
                torch.testing.assert_close(got, expected)


# --- chat ---


def test_chat_prompts_come_from_the_template() -> None:
    ids = encode_chat(TOKENIZER, [{"role": "user", "content": "hi"}])
    assert TOKENIZER.decode(list(ids)) == "user: hi\nassistant: "
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert encode_chat(TOKENIZER, parts) == ids
    spoof = encode_chat(TOKENIZER, [{"role": "user", "content": "a<eos>b"}])
    assert TOKENIZER.eos_token_id not in spoof, "a prompt cannot write control tokens"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "x" * 1_000_001}],
        [{"role": "user", "content": "x"}] * 1_001,
    ],
)
def test_malformed_conversations_are_refused(messages: list[dict[str, object]]) -> None:
    with pytest.raises(InvalidEvent, match="messages"):
        encode_chat(TOKENIZER, messages)


def test_finish_reasons_are_openai_s() -> None:
    assert [openai_finish_reason(r) for r in ("stop", "length")] == ["stop", "length"]


# --- the driver ---


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


def test_streams_run_together_and_are_peft_s(base: LlamaForCausalLM, tmp_path: Path) -> None:
    saved = [save_adapter(base, tmp_path, f"a{i}", rank=2 + i, seed=i) for i in range(3)]

    async def main() -> None:
        engine = engine_for(base)
        async with AsyncEngine(engine) as serving:
            for a in saved:
                await serving.load_adapter(a.name, a.path, a.sha256)

            async def answer(i: int) -> list[int]:
                r = request(f"r{i}", f"a{i % 3}", prompt_of(5 + i))
                return [t async for d in serving.generate(r) for t in d.token_ids]

            answers = await asyncio.gather(*(answer(i) for i in range(9)))
            assert serving.stats()["finished"] == 9
        for i, tokens in enumerate(answers):
            assert tokens == oracle(base, saved[i % 3], prompt_of(5 + i), 12)

    asyncio.run(main())


def test_a_reader_that_leaves_cancels(base: LlamaForCausalLM) -> None:
    async def main() -> None:
        engine = engine_for(base, max_rows=1)
        async with AsyncEngine(engine) as serving:
            async with aclosing(
                serving.generate(request("long", None, prompt_of(4), max_tokens=120))
            ) as stream:
                async for _ in stream:
                    break
            after = [d async for d in serving.generate(request("next", None, prompt_of(4)))]
            assert after[-1].finish is not None
            assert after[-1].finish.completion_tokens == 12
            cancelled = serving.generate(request("x", None, prompt_of(4), max_tokens=120))
            got = [await anext(cancelled)]
            assert serving.cancel("x")
            got += [d async for d in cancelled]
            assert got[-1].finish is not None
            assert got[-1].finish.reason == "cancelled"

    asyncio.run(main())


def test_refusals_reach_the_caller(base: LlamaForCausalLM) -> None:
    async def main() -> None:
        engine = engine_for(base, max_rows=1, max_queue=1)
        serving = AsyncEngine(engine)  # not started: nothing leaves the queue
        first = asyncio.ensure_future(anext(serving.generate(request("a", None, prompt_of(3)))))
        await asyncio.sleep(0.01)
        with pytest.raises(Backpressure):
            await anext(serving.generate(request("b", None, prompt_of(3))))
        with pytest.raises(UnknownAdapter):
            await anext(serving.generate(request("c", "nobody", prompt_of(3))))
        serving.stop()
        with pytest.raises(ComputeError):
            await first
        with pytest.raises(ComputeError):
            await anext(serving.generate(request("d", None, prompt_of(3))))

    asyncio.run(main())


def test_a_disk_that_hangs_does_not_outlast_the_deadline(
    base: LlamaForCausalLM, tmp_path: Path
) -> None:
    saved = save_adapter(base, tmp_path, "a0")

    async def main() -> None:
        async with AsyncEngine(engine_for(base)) as serving:
            await serving.load_adapter(saved.name, saved.path, saved.sha256)
            release = threading.Event()
            serving.engine.warm = lambda _: release.wait(10)  # type: ignore[assignment,method-assign]
            began = time.monotonic()
            slow = request("r", "a0", prompt_of(4), max_tokens=100, timeout_s=0.05)
            [last] = [d async for d in serving.generate(slow)]
            assert last.finish is not None
            assert last.finish.reason == "deadline"
            assert time.monotonic() - began < 5
            release.set()

    asyncio.run(main())


def test_publishing_does_not_disturb_a_running_answer(
    base: LlamaForCausalLM, tmp_path: Path
) -> None:
    saved = [save_adapter(base, tmp_path, f"a{i}", rank=3, seed=i) for i in range(4)]

    async def main() -> None:
        async with AsyncEngine(engine_for(base, slots=2)) as serving:
            await serving.load_adapter(saved[0].name, saved[0].path, saved[0].sha256)
            tokens: list[int] = []
            n = 0
            async for d in serving.generate(request("r", "a0", prompt_of(4), max_tokens=40)):
                tokens += d.token_ids
                n += 1
                if n in (3, 6, 9):
                    a = saved[n // 3]
                    await serving.load_adapter(a.name, a.path, a.sha256)
                    serving.retire(a.name)
            assert tokens == oracle(base, saved[0], prompt_of(4), 40)

    asyncio.run(main())
