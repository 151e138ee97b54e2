"""Out of memory: give back, work in smaller parts, refuse one request; never die, never all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from ledger.errors import ComputeError
from tests.unit.openlora_world import (
    Answer,
    SavedAdapter,
    engine_for,
    load,
    oracle,
    prompt_of,
    request,
    run,
    save_adapter,
    tiny_llama,
)
from workers.openlora.adapter import read_adapter
from workers.openlora.engine import Engine
from workers.openlora.forward import Forward
from workers.openlora.memory import CALM_STEPS, Allowance, is_out_of_memory

torch.set_num_threads(1)
STRIDE = 331
"""Sparse for the sake of time; every 37th was seen to pass."""


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(
    base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, folder, f"a{i}", rank=2 + 2 * i, seed=30 + i) for i in range(3)]


class Failing(TorchDispatchMode):
    """Fails the `at`-th operation that needs memory, `times` times; counts them all."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times = at, times
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        if not schema.is_mutable and not any(r.alias_info for r in schema.returns):
            self.count += 1
            if self.at <= self.count < self.at + self.times:
                raise torch.OutOfMemoryError(f"injected at {func}")
        return func(*args, **(kwargs or {}))


def scenario(adapters: list[SavedAdapter]) -> list[Any]:
    """Rows join while others decode, leave before others, and wait in the queue; two sample."""
    names = ["a0", None, "a1", "a2", "a0"]
    sampled = [{}, {}, {"temperature": 0.9, "seed": 3}, {}, {"temperature": 0.7, "top_p": 0.9}]
    return [
        request(
            f"r{i}",
            name,
            prompt_of(3 + 4 * i, seed=8),
            **{"max_tokens": 2 + i % 3, "seed": 1, "logprobs": 1} | kw,
        )
        for i, (name, kw) in enumerate(zip(names, sampled, strict=True))
    ]


def fresh(base: LlamaForCausalLM, adapters: list[SavedAdapter]) -> Engine:
    engine = engine_for(base, max_rows=3, prefill_chunk=8, prefill_tokens=16, prefix_rows=0)
    load(engine, *adapters)
    return engine


def tokens_of(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: a.tokens for name, a in answers.items()}


def test_a_failed_allocation_anywhere_changes_no_answer(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    """One failure at an operation of a whole run, here at some of the thousand there are."""
    requests = scenario(adapters)
    engine = fresh(base, adapters)
    expected = tokens_of(run(engine, requests))
    with Failing(at=0) as counting:
        run(engine, requests)
    assert counting.count > 1_000
    for at in range(1, counting.count, STRIDE):
        with Failing(at) as failing:
            answers = run(engine, requests)
        assert failing.count >= at
        assert tokens_of(answers) == expected, at
        assert all(a.finish.error is None for a in answers.values()), at
    assert engine.stats()["sheds"] >= 1_000 // STRIDE


def test_failures_that_last_refuse_one_and_spare_the_others(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    """Ten failures in a row, anywhere: who is answered is answered rightly, the others are told."""
    requests = scenario(adapters)
    expected = tokens_of(run(fresh(base, adapters), requests))
    refused = 0
    for at in (1, 666):
        engine = fresh(base, adapters)
        with Failing(at, times=10):
            answers = run(engine, requests)
        assert answers.keys() == expected.keys()
        for name, a in answers.items():
            if a.finish.error is None:
                assert a.tokens == expected[name], (at, name)
            else:
                refused += 1
                assert a.finish.error.detail["code"] == "out_of_memory"
                assert a.tokens == expected[name][: len(a.tokens)]
        assert any(a.finish.error is None for a in answers.values()), at
        assert tokens_of(run(engine, requests)) == expected, "and the engine goes on"
    assert refused > 0


@contextmanager
def memory_for(
    fits: Callable[[int, int, int], bool], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A device on which a forward of (rows, tokens, length) `fits` or does not."""
    forward = Forward.__call__

    def limited(self: Forward, lo: int, hi: int, ids: Any, positions: Any, *rest: Any) -> Any:
        if not fits(hi - lo, ids.shape[1], int(positions.max()) + 1):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return forward(self, lo, hi, ids, positions, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", limited)
        yield


def test_less_is_done_at_once_when_all_does_not_fit(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base)
    load(engine, *adapters)
    requests = [
        request(f"r{i}", f"a{i % 3}", prompt_of(20 + i, seed=4), max_tokens=30) for i in range(6)
    ]
    expected = {
        r.request_id: oracle(base, adapters[i % 3], r.prompt_ids, 30)
        for i, r in enumerate(requests)
    }
    with memory_for(lambda rows, tokens, _: rows * tokens <= 4, monkeypatch):
        answers = run(engine, requests)
    assert tokens_of(answers) == expected
    stats = engine.stats()
    assert stats["prefill_tokens_allowed"] == 4
    assert stats["decode_rows_allowed"] <= 4
    run(engine, [request("more", None, prompt_of(3), max_tokens=CALM_STEPS, ignore_eos=True)])
    assert engine.stats()["decode_rows_allowed"] == 8, "memory is back, and is used again"


def test_only_the_request_that_does_not_fit_alone_is_refused(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base)
    load(engine, *adapters)
    small = [request(f"s{i}", f"a{i}", prompt_of(5 + i), max_tokens=10) for i in range(3)]
    long_prompt = request("prompt", "a0", prompt_of(50), max_tokens=5)
    long_answer = request("answer", "a1", prompt_of(6), max_tokens=60)
    with memory_for(lambda _, __, length: length <= 40, monkeypatch):
        answers = run(engine, [long_prompt, small[0], long_answer, *small[1:]])
    for i, r in enumerate(small):
        assert answers[r.request_id].tokens == oracle(base, adapters[i], r.prompt_ids, 10)
    for name in ("prompt", "answer"):
        assert isinstance(answers[name].finish.error, ComputeError)
        assert answers[name].finish.error.detail["code"] == "out_of_memory"
    whole = oracle(base, adapters[1], long_answer.prompt_ids, 60)
    assert answers["answer"].tokens == whole[:35], "what it got was right"


def test_an_adapter_that_does_not_fit_is_refused_alone(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base, host_bytes=1)
    load(engine, *adapters)

    def read(files: Any, limits: Any) -> Any:
        if files.path == adapters[1].path:
            raise MemoryError
        return read_adapter(files, limits)

    monkeypatch.setattr("workers.openlora.slots.read_adapter", read)
    answers = run(engine, [request(f"r{i}", f"a{i}", prompt_of(4)) for i in range(3)])
    assert answers["r1"].finish.error.detail["code"] == "out_of_memory"
    for i in (0, 2):
        assert answers[f"r{i}"].tokens == oracle(base, adapters[i], prompt_of(4), 12)
    engine.retire("a1")
    with pytest.raises(ComputeError, match="memory"):
        load(engine, adapters[1])
    monkeypatch.undo()
    load(engine, adapters[1])


def test_host_memory_is_given_back_and_read_again(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, slots=1)
    load(engine, *adapters)
    held = engine.stats()["adapters"]["host_bytes"]
    assert held > 0
    assert engine._shed() == held
    assert engine.stats()["adapters"]["in_host"] == 0
    for i, a in enumerate(adapters):
        answers = run(engine, [request("r", a.name, prompt_of(4 + i))])
        assert answers["r"].tokens == oracle(base, a, prompt_of(4 + i), 12)


def test_an_answer_that_is_no_number_ends_alone(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base)
    load(engine, *adapters)
    engine.submit(request("bad", "a1", prompt_of(5)))
    engine.step()
    entry = engine.store.acquire("a1")
    assert entry.slot is not None
    engine.store.release(entry)
    with torch.no_grad():  # an adapter may overflow on one prompt and not on others
        for half in engine.store._slots.read(entry.slot).b.values():
            half.fill_(3e38)
    answers = run(
        engine, [request("worse", "a1", prompt_of(6)), request("good", "a0", prompt_of(5))]
    )
    assert answers["worse"].finish.error.detail["code"] == "not_finite"
    assert answers["good"].tokens == oracle(base, adapters[0], prompt_of(5), 12)


def test_how_running_out_of_memory_is_told_from_our_own_mistakes() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value), refused.value
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ComputeError("the serving engine stopped"))


def test_an_allowance_halves_and_comes_back() -> None:
    allowance = Allowance(10)
    assert [allowance.halve() for _ in range(4)] == [True, True, True, False]
    assert allowance.now == 1
    for _ in range(4 * CALM_STEPS):
        allowance.worked()
    assert allowance.now == 10
