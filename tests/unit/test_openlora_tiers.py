"""Disk, host memory, slots: bounds, counts, who gives way, what an id means while it changes."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from ledger.errors import Backpressure
from tests.unit.openlora_world import (
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
from workers.openlora import packed, prefetch, slots
from workers.openlora.adapter import AdapterFiles, AdapterWeights, read_adapter
from workers.openlora.errors import CorruptAdapter, UnknownAdapter
from workers.openlora.host import HostTier
from workers.openlora.packed import PackedLinear, pack_linears
from workers.openlora.prefetch import Prefetcher
from workers.openlora.slots import AdapterEntry, AdapterStore

torch.set_num_threads(1)
WAIT_S = 10.0


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def saved(base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("tiers")
    return [save_adapter(base, folder, f"a{i}", rank=4 + 4 * (i == 3), seed=i) for i in range(4)]


def files_of(a: SavedAdapter) -> AdapterFiles:
    return AdapterFiles(path=a.path, weights_sha256=a.sha256, config_sha256=a.config_sha256)


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def tiers(store: AdapterStore) -> dict[str, int]:
    return store.snapshot()


# --- memory ---


def test_an_adapter_is_one_piece_of_its_own_size(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    """Whatever max_rank is: nothing is padded, and a slot on a CPU is no copy."""
    engine = engine_for(base, max_rank=64)
    load(engine, *saved)
    store = engine.store
    at_host = tiers(store)["host_bytes"]
    elements = sum(t.numel() for t in base.state_dict().values() if t.ndim == 2)
    assert at_host == tiers(store)["resident_bytes"] < elements * 4  # of small rank
    entries = [store.acquire(a.name) for a in saved]
    for entry, a in zip(entries, saved, strict=True):
        view = store.place(entry)
        assert view is not None
        assert view.flat is not None
        alone = read_adapter(files_of(a), store._limits)
        assert view.flat.untyped_storage().nbytes() == view.nbytes == alone.nbytes
        assert list(view.a) == list(alone.a) == list(view.b)
        assert all(torch.equal(view.a[n], alone.a[n]) for n in alone.a)
    now = tiers(store)
    assert (now["host_bytes"], now["in_host"], now["in_slots"]) == (0, 0, 4)
    assert now["slot_bytes"] == now["resident_bytes"] == at_host


def test_what_leaves_a_slot_comes_back_from_memory(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    engine = engine_for(base, slots=2)
    load(engine, *saved)
    for turn in range(3):
        run(
            engine, [request(f"{a.name}/{turn}", a.name, prompt_of(3), max_tokens=2) for a in saved]
        )
    now = tiers(engine.store)
    assert now["disk_loads"] == 4, "each was read once, when it was published"
    assert now["slot_evictions"] >= 8
    assert now["in_slots"] + now["in_host"] == 4


class _Held:
    """As much of an entry as the host tier looks at."""

    def __init__(self, requests: int, kept: bool) -> None:
        self.requests, self.kept = requests, kept


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "pop", "shed"]), st.integers(0, 7), st.integers(1, 9)
        ),
        max_size=40,
    )
)
def test_host_memory_is_counted_exactly(steps: list[tuple[str, int, int]]) -> None:
    """Never over the limit, the sum of what is held, and who waits goes after who does not."""
    tier = HostTier(80)
    entries: list[Any] = [_Held(i % 2, kept=i == 7) for i in range(8)]
    model: dict[int, int] = {}
    for what, i, size in steps:
        weights = AdapterWeights(
            rank=size, a={"x": torch.zeros(size, 1)}, b={"x": torch.zeros(size, 1)}
        )
        if what == "put":
            before = {k for k in model if tier.__contains__(entries[k])}
            ok = tier.put(entries[i], weights)
            model[i] = weights.nbytes
            gone = {k for k in before - {i} if entries[k] not in tier}
            assert 7 not in gone, "what is kept never goes"
            if any(entries[k].requests for k in gone):
                left = {k for k in model if k != i and entries[k] in tier}
                assert all(entries[k].requests or entries[k].kept for k in left)
            assert ok == (entries[i] in tier)
        elif what == "get":
            assert (tier.get(entries[i]) is not None) == (entries[i] in tier)
        elif what == "pop":
            tier.pop(entries[i])
        else:
            used = tier.used
            assert tier.shed() == used
        held = [k for k in model if entries[k] in tier]
        assert tier.used == sum(model[k] for k in held) <= tier.limit
        assert len(tier) == len(held)


# --- who gives way ---


def test_a_kept_adapter_is_never_evicted(base: LlamaForCausalLM, saved: list[SavedAdapter]) -> None:
    engine = engine_for(base, slots=2)
    load(engine, *saved)
    store = engine.store
    store.keep("a0")
    for turn in range(3):
        run(
            engine, [request(f"{a.name}/{turn}", a.name, prompt_of(3), max_tokens=2) for a in saved]
        )
    entry = store.acquire("a0")
    assert entry.slot is not None, "three others took turns in the other slot"
    with pytest.raises(Backpressure, match="1 of 2 slots"):
        store.keep("a1")
    store.keep("a0", kept=False)
    store.keep("a1")
    assert tiers(store)["kept"] == 1
    store.retire("a1")
    assert tiers(store)["kept"] == 0
    with pytest.raises(UnknownAdapter):
        store.keep("a1")


def test_a_slot_that_somebody_waits_for_goes_last(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    engine = engine_for(base, slots=2)
    load(engine, *saved)
    store = engine.store
    first, second, third = (store.acquire(f"a{i}") for i in range(3))
    for entry in (first, second):
        assert store.place(entry) is not None
    assert store.place(third) is None, "rows pin both"
    for entry in (first, second):
        store.unpin(entry)
    store.release(second)  # used later than the first, but nobody waits for it
    assert store.place(third) is not None
    assert (first.slot is None, second.slot is None) == (False, True)


# --- an id's meaning ---


def test_running_answers_keep_the_weights_that_were_replaced(
    base: LlamaForCausalLM, saved: list[SavedAdapter], tmp_path: Path
) -> None:
    engine = engine_for(base)
    load(engine, saved[0])
    prompt = prompt_of(6)
    engine.submit(request("old", "a0", prompt))
    engine.submit(request("waits", "a0", prompt))
    first = engine.step()
    engine.store.replace("a0", files_of(saved[1]))
    engine.submit(request("new", "a0", prompt))
    answers = run(engine)
    old, new = oracle(base, saved[0], prompt, 12), oracle(base, saved[1], prompt, 12)
    assert old != new
    began = {d.request_id: [] for d in first}  # type: ignore[var-annotated]
    for d in first:
        began[d.request_id] += d.token_ids
    for name in ("old", "waits"):
        assert began.get(name, []) + answers[name].tokens == old
    assert answers["new"].tokens == new
    assert tiers(engine.store)["in_slots"] == 1, "the old one left with its last answer"
    broken = AdapterFiles(path=saved[2].path, weights_sha256="00" * 32)
    with pytest.raises(CorruptAdapter):
        engine.store.replace("a0", broken)
    with pytest.raises(UnknownAdapter):
        engine.store.replace("nobody", files_of(saved[2]))
    assert run(engine, [request("still", "a0", prompt)])["still"].tokens == new


def test_replacing_carries_the_wish_to_keep_it(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    engine = engine_for(base)
    load(engine, saved[0])
    engine.store.keep("a0")
    engine.store.replace("a0", files_of(saved[1]))
    assert engine.store.acquire("a0").kept
    assert tiers(engine.store)["kept"] == 1


def test_what_is_retired_while_it_is_read_is_not_held(
    base: LlamaForCausalLM, saved: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base)
    store = engine.store
    store.register("a0", files_of(saved[0]), check=False)

    def retire_first(files: Any, limits: Any) -> AdapterWeights:
        store.retire("a0")
        return read_adapter(files, limits)

    monkeypatch.setattr(slots, "read_adapter", retire_first)
    store.warm("a0")
    assert (tiers(store)["in_host"], tiers(store)["host_bytes"], store.ids()) == (0, 0, [])


# --- ahead of its turn ---


def test_a_waiting_request_s_adapter_is_read_ahead(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=1)
    for a in saved:
        engine.load_adapter(a.name, a.path, a.sha256, check=False)
    for a in saved:
        engine.submit(request(a.name, a.name, prompt_of(4)))
    until(lambda: tiers(engine.store)["in_host"] == 3)  # not a step was taken
    answers = run(engine)
    for a in saved:
        assert answers[a.name].tokens == oracle(base, a, prompt_of(4), 12)
    assert tiers(engine.store)["host_hits"] == 3, "all but the first, whose turn was at once"
    assert tiers(engine.store)["disk_loads"] == 4


def test_reading_ahead_pushes_out_nothing_that_is_waited_for(
    base: LlamaForCausalLM, saved: list[SavedAdapter]
) -> None:
    one = read_adapter(files_of(saved[0]), engine_for(base).store._limits).nbytes
    engine = engine_for(base, host_bytes=int(2.9 * one))
    for a in saved:
        engine.load_adapter(a.name, a.path, a.sha256, check=False)
    engine.store.warm("a0")
    entries = [engine.store.acquire(f"a{i}") for i in range(2)]
    until(lambda: tiers(engine.store)["in_host"] == 2)
    engine.store._read_ahead(engine.store.acquire("a2"))
    assert all(e in engine.store._host for e in entries)
    assert tiers(engine.store)["disk_loads"] == 2


def test_the_line_is_bounded_and_its_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "IDLE_S", 0.05)
    go, seen = threading.Event(), []

    def read(item: int) -> None:
        assert go.wait(WAIT_S)
        seen.append(item)
        if item % 2:
            raise CorruptAdapter("a hint that fails is no failure")

    ahead: Prefetcher[int] = Prefetcher(read)
    asked = [ahead.ask(i) for i in range(prefetch.MAX_WAITING + 3)]
    assert asked.count(False) == ahead.dropped == 3
    assert ahead.ask(5), "it is in line already"
    assert len(ahead._threads) == prefetch.THREADS
    go.set()
    until(lambda: not ahead._threads)
    assert sorted(seen) == list(range(prefetch.MAX_WAITING))
    assert ahead.ask(1)
    until(lambda: len(seen) == prefetch.MAX_WAITING + 1)
    ahead.close()
    assert not ahead.ask(2)
    assert not ahead._threads


def test_an_interpreter_that_ends_while_it_reads_ends_well() -> None:
    """A daemon thread that is stopped inside torch would abort the process."""
    program = (
        "import torch, time\n"
        "from workers.openlora.prefetch import Prefetcher\n"
        "ahead = Prefetcher(lambda i: [torch.randn(1 << 16).sum() for _ in range(300)])\n"
        "[ahead.ask(i) for i in range(40)]\n"
        "time.sleep(0.1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- the base's own linears ---


@pytest.mark.skipif(not packed._available(), reason="this build of torch has no oneDNN product")
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_is_the_linear(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 160, bias=bias), torch.nn.Linear(160, 8))
    plain = [m.weight.detach().clone() for m in model if isinstance(m, torch.nn.Linear)]
    x = torch.randn(5, 3, 96)
    with torch.inference_mode():
        expected = model(x)
        assert pack_linears(model, min_elements=96 * 160) == 1
        assert isinstance(model[0], PackedLinear)
        assert torch.equal(model[0].weight, plain[0])
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(model[1], torch.nn.Linear), "too small to gain"
    assert pack_linears(model.double(), min_elements=1) == 0


def test_greedy_tokens_are_peft_s_on_packed_linears(
    base: LlamaForCausalLM, saved: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MIN_ELEMENTS", 1)
    engine = engine_for(base)
    if packed._available():
        assert any(isinstance(m, PackedLinear) for m in engine.model.modules())
    load(engine, *saved)
    names = [None, *(a.name for a in saved)]
    answers = run(engine, [request(f"{n}", n, prompt_of(5 + i)) for i, n in enumerate(names)])
    for i, n in enumerate(names):
        adapter = next((a for a in saved if a.name == n), None)
        assert answers[f"{n}"].tokens == oracle(base, adapter, prompt_of(5 + i), 12)


def test_an_entry_is_itself(saved: list[SavedAdapter]) -> None:
    one, other = (AdapterEntry("a", files_of(saved[0])) for _ in range(2))
    assert one != other
    assert len({one, other}) == 2
