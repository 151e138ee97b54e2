"""The path that a GPU takes, through the whole engine on a CPU: adapters read from their slots by
number, decode in fixed shapes through static buffers, a plain call where CUDA would replay a graph.
Tokens are peft's, and those of the path that a CPU takes.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ledger.errors import ComputeError, ConfigError
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
from workers.openlora import forms, graphs
from workers.openlora.adapter import AdapterWeights, TargetShape
from workers.openlora.attention import NAME, grouped_attention, use_grouped_attention
from workers.openlora.engine import Engine
from workers.openlora.forms import SLOT_GATHER, WORKING_SET, plan
from workers.openlora.gather import GroupedSlots, group_targets
from workers.openlora.graphs import DecodeInputs, DecodeRunner, DirectRecorder, Shape, bucket

torch.set_num_threads(1)
STATIC: dict[str, Any] = {"lora_form": SLOT_GATHER, "static_decode": True}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(
    base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> list[SavedAdapter]:
    """The first has q and v alone: slots of the other targets come later."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base, folder, "a0", rank=4, seed=20, targets=("q_proj", "v_proj")),
        save_adapter(base, folder, "a1", rank=8, seed=21),
        save_adapter(base, folder, "a2", rank=2, seed=22),
        save_adapter(base, folder, "a3", rank=16, seed=23, use_rslora=True),
        save_adapter(base, folder, "a4", rank=3, seed=24, targets=("down_proj", "k_proj")),
    ]


def mixed(adapters: list[SavedAdapter], count: int, seed: int) -> list[Any]:
    rng = random.Random(seed)
    names = [None, *(a.name for a in adapters)]
    return [
        request(
            f"r{i}",
            names[i % len(names)],
            prompt_of(rng.randint(1, 30), seed=i + 100 * seed),
            max_tokens=rng.randint(2, 14),
        )
        for i in range(count)
    ]


def test_tokens_are_peft_s_and_the_working_set_s_while_adapters_come_and_go(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    """Ranks, targets and base rows mixed; five adapters in three slots; rows move and end."""
    sizes = {"max_rows": 5, "prefill_chunk": 7, "prefill_tokens": 20, "slots": 3, "max_rank": 16}
    requests = mixed(adapters, 18, seed=1)
    static, plain = engine_for(base, **sizes, **STATIC), engine_for(base, **sizes)
    for engine in (static, plain):
        load(engine, *adapters)
    new = static.stats()["decoder"]["replayed"]  # an engine may check itself before it serves
    answers, others = run(static, requests), run(plain, requests)
    for r in requests:
        source = next((a for a in adapters if a.name == r.adapter_id), None)
        expected = oracle(base, source, r.prompt_ids, r.max_tokens)
        assert answers[r.request_id].tokens == expected, (r.request_id, r.adapter_id)
        assert others[r.request_id].tokens == expected
    stats = static.stats()
    assert stats["adapters"]["slot_evictions"] > 5
    assert stats["lora_form"] in ("gather", "none")
    assert stats["decoder"]["kernels"] == "torch"
    assert stats["decoder"]["replayed"] - new == stats["decode_steps"]
    assert stats["decode_steps"] > stats["decoder"]["recorded"]
    assert plain.stats()["decoder"] == {}


def test_gather_without_fixed_shapes_gives_the_same(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=6, lora_form=SLOT_GATHER)
    load(engine, *adapters)
    requests = mixed(adapters, 6, seed=2)
    answers = run(engine, requests)
    for r in requests:
        source = next((a for a in adapters if a.name == r.adapter_id), None)
        assert answers[r.request_id].tokens == oracle(base, source, r.prompt_ids, r.max_tokens)


def test_sampled_answers_are_the_working_set_s_too(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    requests = [
        request(f"s{a.name}", a.name, prompt_of(9, seed=4), temperature=0.9, top_p=0.9, seed=7)
        for a in adapters
    ]
    engines = [engine_for(base, **STATIC), engine_for(base)]
    for engine in engines:
        load(engine, *adapters)
    one, other = (run(engine, requests) for engine in engines)
    assert {n: a.tokens for n, a in one.items()} == {n: a.tokens for n, a in other.items()}


def warm(engine: Engine, names: list[str | None], turn: str) -> None:
    """Answers of one length over prompts of one length: rows start and end together."""
    run(
        engine,
        [
            request(f"{turn}{i}", n, prompt_of(5, seed=i), ignore_eos=True)
            for i, n in enumerate(names)
        ],
    )


def test_another_adapter_in_the_batch_needs_no_new_recording(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=4, slots=2, **STATIC)
    load(engine, *adapters)
    warm(engine, ["a1", "a3", None], "first")
    before = engine.stats()
    warm(engine, ["a2", "a1", None], "second")  # a2 took a slot: read from disk, written over
    warm(engine, ["a3", None, "a2"], "third")
    after = engine.stats()
    assert after["adapters"]["slot_evictions"] > before["adapters"]["slot_evictions"]
    assert after["decoder"]["recorded"] == before["decoder"]["recorded"]
    assert after["decoder"]["invalidated"] == before["decoder"]["invalidated"]
    assert after["decoder"]["replayed"] > before["decoder"]["replayed"]


def test_slots_of_new_targets_void_what_was_recorded(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=4, **STATIC)
    load(engine, *adapters)
    warm(engine, ["a0", None], "first")
    before = engine.stats()["decoder"]["invalidated"]
    warm(engine, ["a0", None], "again")
    assert engine.stats()["decoder"]["invalidated"] == before
    warm(engine, ["a1", "a0"], "second")
    assert engine.stats()["decoder"]["invalidated"] == before + 1


def test_a_machine_that_cannot_record_serves_all_the_same(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(DirectRecorder):
        calls = 0

        def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            Broken.calls += 1
            function()  # a capture that fails has run the step before
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("workers.openlora.forward.recorder_for", lambda device: Broken())
    engine = engine_for(base, **STATIC)
    load(engine, *adapters)
    prompt, new = prompt_of(12), engine.stats()["decoder"]["eager"]
    answers = run(engine, [request("r", "a1", prompt)])
    assert answers["r"].tokens == oracle(base, adapters[1], prompt, 12)
    stats = engine.stats()["decoder"]
    assert (Broken.calls, stats["recorded"], stats["replayed"]) == (1, 0, 0)
    assert stats["eager"] - new == engine.stats()["decode_steps"]


# --- buffers, buckets, recordings ---


def test_buckets_are_few_and_near() -> None:
    sizes = [bucket(n, 64) for n in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, start=1))
    assert [bucket(n, 5) for n in (3, 5)] == [3, 5]
    assert [graphs.length_bucket(n, 300) for n in (1, 64, 65, 200, 257)] == [64, 64, 96, 256, 300]
    assert graphs.length_bucket(3, 20) == 20


def test_inputs_are_padded_and_stay_where_they_are() -> None:
    inputs = DecodeInputs(8, 99, torch.device("cpu"))
    inputs.load([5, 6, 7], [1, 2, 3], [4, -1, 0], 4)
    ids, positions, writes, slots = inputs.view(4)
    assert ids.tolist() == [5, 6, 7, 0]
    assert positions.tolist() == [1, 2, 3, 0]
    assert writes.tolist() == [1, 2, 3, 99], "padding writes where nobody reads"
    assert slots.tolist() == [4, -1, 0, -1]
    assert all(t.is_contiguous() for t in (ids, slots))
    inputs.load([9], [8], [7], 2)
    assert (ids.tolist()[:2], slots.tolist()[:2]) == ([9, 0], [7, -1])


def test_recordings_are_kept_by_shape_and_by_where_their_memory_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Shape] = []

    class Counting(DirectRecorder):
        resets = 0

        def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            function()
            return function

        def reset(self) -> None:
            Counting.resets += 1

    def step(shape: Shape) -> Tensor:
        made.append(shape)
        return torch.zeros(shape.rows, 2)

    monkeypatch.setattr(graphs, "MAX_RECORDINGS", 2)
    runner = DecodeRunner(step, Counting(), max_rows=8, max_len=256)
    shapes = [runner.shape(rows=n, length=10, lora=True) for n in (1, 2, 5)]
    assert [s.rows for s in shapes] == [1, 2, 6]
    for s in (shapes[0], shapes[1], shapes[0], shapes[2]):  # the second gives way to the third
        assert runner.run(s, memory="here").shape[0] == s.rows
    assert (runner.stats.recorded, runner.stats.replayed, Counting.resets) == (3, 4, 0)
    runner.run(shapes[1], memory="here")
    assert runner.stats.recorded == 4
    runner.run(shapes[1], memory="there")
    assert (runner.stats.invalidated, runner.stats.recorded, Counting.resets) == (1, 5, 1)


def test_no_memory_to_record_with_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(DirectRecorder):
        tries = 0

        def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            Full.tries += 1
            if Full.tries == 1:
                raise torch.OutOfMemoryError("no")
            return function

    monkeypatch.setattr(graphs, "PAUSE_STEPS", 3)
    runner = DecodeRunner(lambda s: torch.zeros(s.rows, 2), Full(), max_rows=8, max_len=64)
    shape = runner.shape(rows=2, length=3, lora=False)
    for _ in range(6):
        assert runner.run(shape, memory=0).shape == (2, 2)
    assert (Full.tries, runner.stats.eager, runner.stats.replayed) == (2, 4, 2)


# --- slots ---

SHAPES = {
    name: TargetShape(in_features=6, out_features=4)
    for name in ("m.q_proj", "m.k_proj", "m.v_proj", "m.o_proj")
} | {"n.q_proj": TargetShape(in_features=6, out_features=4)}


def weights(rank: int, *names: str, seed: int = 0) -> AdapterWeights:
    make = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        rank=rank,
        a={n: torch.randn(rank, 6, generator=make) for n in names},
        b={n: torch.randn(rank, 4, generator=make) for n in names},
    )


def grouped() -> GroupedSlots:
    return GroupedSlots(SHAPES, count=3, max_rank=5, like=torch.empty(0))


def test_targets_of_one_input_are_grouped() -> None:
    assert group_targets(SHAPES) == [
        ("m.q_proj", "m.k_proj", "m.v_proj"),
        ("m.o_proj",),
        ("n.q_proj",),
    ]


def test_slots_keep_what_they_hold_when_targets_are_added() -> None:
    slots = grouped()
    first, second = weights(2, "m.v_proj", "m.o_proj"), weights(5, "m.q_proj", "m.v_proj", seed=1)
    slots.write(1, first)
    assert slots.generation == 1
    slots.write(0, second)
    assert slots.generation == 2
    for slot, held in ((1, first), (0, second)):
        view = slots.read(slot)
        assert all(torch.equal(view.a[n], held.a[n]) for n in held.a)
        assert all(torch.equal(view.b[n], held.b[n]) for n in held.b)
    together = slots.groups[0]
    assert together.members == ["m.v_proj", "m.q_proj"]
    assert together.ranks.tolist() == [[5, 2, 0], [5, 0, 0]]
    slots.write(1, weights(1, "m.q_proj"))  # a slot's next adapter has other targets
    assert slots.generation == 2
    assert together.ranks.tolist() == [[5, 0, 0], [5, 1, 0]]


def test_no_memory_for_new_targets_refuses_one_adapter_and_keeps_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = grouped()
    held = weights(2, "m.q_proj")
    slots.write(0, held)

    def full(*size: int) -> Tensor:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(slots, "_grow", lambda names: full())
        with pytest.raises(ComputeError, match="no device memory"):
            slots.write(1, weights(2, "m.q_proj", "m.k_proj"))
    assert torch.equal(slots.read(0).a["m.q_proj"], held.a["m.q_proj"])
    slots.write(1, weights(2, "m.q_proj", "m.k_proj"))
    assert slots.groups[0].members == ["m.q_proj", "m.k_proj"]


# --- attention and choice ---


def test_grouped_attention_is_transformers_own(base: LlamaForCausalLM) -> None:
    model = copy.deepcopy(base)
    module: Any = model.model.layers[0].self_attn
    make = torch.Generator().manual_seed(1)
    key, value = (torch.randn(3, 2, 9, 16, generator=make) for _ in range(2))
    for tokens in (1, 4):
        query = torch.randn(3, 4, tokens, 16, generator=make)
        mask = torch.zeros(3, 1, tokens, 9)
        mask[1, :, :, 5:] = -torch.inf
        got = grouped_attention(module, query, key, value, mask, scaling=0.2)[0]
        repeated = [t.repeat_interleave(2, dim=1) for t in (key, value)]
        want = torch.softmax(query @ repeated[0].transpose(2, 3) * 0.2 + mask, -1) @ repeated[1]
        torch.testing.assert_close(got, want.transpose(1, 2))
    assert use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
    assert not use_grouped_attention(model)


def test_the_device_chooses_and_the_config_overrides() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert (plan(None, None, cpu).form, plan(None, None, cpu).static_decode) == (WORKING_SET, False)
    assert (plan(None, None, cuda).form, plan(None, None, cuda).static_decode) == (
        SLOT_GATHER,
        True,
    )
    assert not plan(None, False, cuda).static_decode
    assert not plan(WORKING_SET, None, cuda).static_decode
    assert plan(SLOT_GATHER, True, cpu).static_decode
    with pytest.raises(ConfigError, match="lora_form"):
        plan("dense", None, cpu)
    with pytest.raises(ConfigError, match="static_decode"):
        plan(WORKING_SET, True, cpu)
    assert isinstance(forms.recorder_for(cpu), DirectRecorder)
