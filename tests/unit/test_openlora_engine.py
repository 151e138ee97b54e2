"""The engine's tokens are peft's, its streams are whole, its rows and queue are bounded."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ledger.errors import Backpressure, ComputeError, Conflict, InvalidEvent, NotFound
from tests.unit.openlora_world import (
    EOS,
    SavedAdapter,
    byte_tokenizer,
    engine_for,
    gather,
    load,
    oracle,
    prompt_of,
    request,
    run,
    save_adapter,
    tiny_llama,
)
from workers.openlora import working
from workers.openlora.errors import PromptTooLong, UnknownAdapter
from workers.openlora.forward import Forward

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(
    base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    qv = ("q_proj", "v_proj")
    return [
        save_adapter(base, folder, "a0", rank=2, seed=10),
        save_adapter(base, folder, "a1", rank=8, seed=11),
        save_adapter(base, folder, "a2", rank=4, seed=12, targets=qv),
        save_adapter(base, folder, "a3", rank=16, seed=13, use_rslora=True),
        save_adapter(base, folder, "a4", rank=3, seed=14, targets=("down_proj",), lora_alpha=5),
        save_adapter(base, folder, "a5", rank=8, seed=15),
    ]


def by_name(adapters: list[SavedAdapter], name: str | None) -> SavedAdapter | None:
    return next((a for a in adapters if a.name == name), None)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_tokens_are_peft_s_in_any_mix(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], seed: int
) -> None:
    """Ranks, targets, lengths and base rows mixed; more requests than rows, so rows move."""
    rng = random.Random(seed)
    engine = engine_for(base, max_rows=5, prefill_chunk=7, prefill_tokens=20, slots=6)
    load(engine, *adapters)
    names = [None, *(a.name for a in adapters)]
    requests = [
        request(
            f"r{i}",
            rng.choice(names),
            prompt_of(rng.randint(1, 30), seed=i + 100 * seed),
            max_tokens=rng.randint(1, 14),
        )
        for i in range(16)
    ]
    answers = run(engine, requests)
    for r in requests:
        expected = oracle(base, by_name(adapters, r.adapter_id), r.prompt_ids, r.max_tokens)
        assert answers[r.request_id].tokens == expected, (r.request_id, r.adapter_id)
    used = {r.adapter_id for r in requests}
    assert len(used) >= 5


def test_adapters_do_change_the_answer(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    """Or the test above would prove nothing."""
    prompt = prompt_of(10)
    outs = [tuple(oracle(base, a, prompt, 10)) for a in [None, *adapters]]
    assert len(set(outs)) == len(outs)


@pytest.mark.parametrize("name", ["a1", None])
def test_one_shared_adapter_takes_the_dense_form(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], name: str | None
) -> None:
    engine = engine_for(base)
    load(engine, *adapters)
    prompts = [prompt_of(5 + i, seed=3) for i in range(8)]
    for i, p in enumerate(prompts):
        engine.submit(request(f"r{i}", name, p))
    first = engine.step()
    assert engine.stats()["lora_form"] == ("dense" if name else "none")
    answers = run(engine)
    for i, p in enumerate(prompts):
        head = [t for d in first if d.request_id == f"r{i}" for t in d.token_ids]
        assert head + answers[f"r{i}"].tokens == oracle(base, by_name(adapters, name), p, 12)


@pytest.mark.parametrize("form", ["row", "dense"])
def test_either_form_serves_distinct_adapters(
    base: LlamaForCausalLM,
    adapters: list[SavedAdapter],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cost rule decides about speed only."""
    monkeypatch.setattr(working, "dense_is_cheaper", lambda **_: form == "dense")
    engine = engine_for(base)
    load(engine, *adapters)
    names = [None, *(a.name for a in adapters)]
    requests = [request(f"{n}", n, prompt_of(5 + i)) for i, n in enumerate(names)]
    for r in requests:
        engine.submit(r)
    first = gather(engine.step())
    assert engine.stats()["lora_form"] == form
    rest = run(engine)
    for r in requests:
        expected = oracle(base, by_name(adapters, r.adapter_id), r.prompt_ids, 12)
        assert first[r.request_id].tokens + rest[r.request_id].tokens == expected


def test_a_working_set_of_twice_the_slots_is_still_right(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, slots=3, host_bytes=1)  # and host memory holds one at a time
    load(engine, *adapters)
    prompts = {a.name: prompt_of(9, seed=5) for a in adapters}
    for turn in range(3):
        answers = run(
            engine, [request(f"{n}/{turn}", n, p, max_tokens=6) for n, p in prompts.items()]
        )
        for a in adapters:
            assert answers[f"{a.name}/{turn}"].tokens == oracle(base, a, prompts[a.name], 6)
    tiers = engine.stats()["adapters"]
    assert tiers["slot_evictions"] >= 9
    assert tiers["host_evictions"] > 0
    assert tiers["in_slots"] == 3


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, prefill_chunk=8)
    load(engine, *adapters)
    short, long = prompt_of(4), prompt_of(60)
    engine.submit(request("short", "a0", short, max_tokens=20))
    engine.step()
    engine.submit(request("long", "a1", long, max_tokens=5))
    between = [d for _ in range(6) for d in engine.step()]
    assert {d.request_id for d in between} == {"short"}, "the long prompt needs 8 steps"
    answers = run(engine)
    assert answers["long"].tokens == oracle(base, adapters[1], long, 5)


def test_sampling_repeats_with_the_seed_whatever_else_is_in_the_batch(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base)
    load(engine, *adapters)
    one = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 42, "max_tokens": 16}
    alone = run(engine, [request("x", "a1", prompt_of(8), **one)])["x"]
    crowd = [
        request(f"o{i}", f"a{i % 6}", prompt_of(3 + i), temperature=1.0, seed=i) for i in range(6)
    ]
    crowded = run(engine, [*crowd, request("x", "a1", prompt_of(8), **one)])["x"]
    assert crowded.tokens == alone.tokens
    assert crowded.finish.seed == 42
    other = run(engine, [request("x", "a1", prompt_of(8), **one | {"seed": 43})])["x"]
    assert other.tokens != alone.tokens
    drawn = run(engine, [request("x", "a1", prompt_of(8), **one | {"seed": None})])["x"]
    again = run(engine, [request("x", "a1", prompt_of(8), **one | {"seed": drawn.finish.seed})])[
        "x"
    ]
    assert again.tokens == drawn.tokens, "a drawn seed is reported and repeats"


def test_the_end_token_stops_and_is_counted(base: LlamaForCausalLM) -> None:
    engine = engine_for(base)
    prompt = prompt_of(5)
    # Raise the end token's logit over all others from the third token on, by its output row.
    tokens = oracle(base, None, prompt, 6)
    model: Any = engine.model
    weight = model.lm_head.weight
    swapped = tokens[3]
    assert swapped not in tokens[:3]
    with torch.no_grad():
        weight[[EOS, swapped]] = weight[[swapped, EOS]]
    answer = run(engine, [request("r", None, prompt, max_tokens=6)])["r"]
    assert answer.tokens == [*tokens[:3], EOS]
    assert answer.finish.reason == "stop"
    assert answer.finish.completion_tokens == 4
    assert "<eos>" not in answer.text


def test_streamed_text_is_the_whole_text(base: LlamaForCausalLM) -> None:
    """Random bytes: broken and whole multi-byte characters come in every cut."""
    engine = engine_for(base)
    tokenizer = byte_tokenizer()
    requests = [
        request(f"r{i}", None, prompt_of(6, seed=i), temperature=1.5, seed=i, max_tokens=60)
        for i in range(8)
    ]
    for answer in run(engine, requests).values():
        whole = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.text in (whole, whole.rstrip("�"))


def test_cancel_frees_the_row_at_the_next_step(base: LlamaForCausalLM) -> None:
    engine = engine_for(base, max_rows=1)
    engine.submit(request("first", None, prompt_of(4), max_tokens=100))
    engine.submit(request("second", None, prompt_of(5), max_tokens=3))
    engine.step()
    assert engine.cancel("first")
    answers = run(engine)
    assert answers["first"].finish.reason == "cancelled"
    assert answers["second"].tokens == oracle(base, None, prompt_of(5), 3)
    assert not engine.cancel("first"), "it is gone"
    assert engine.stats()["rows"] == 0


def test_a_waiting_request_can_be_cancelled(base: LlamaForCausalLM) -> None:
    engine = engine_for(base, max_rows=1)
    engine.submit(request("first", None, prompt_of(4), max_tokens=4))
    engine.submit(request("second", None, prompt_of(5)))
    engine.cancel("second")
    answers = run(engine)
    assert answers["second"].finish.reason == "cancelled"
    assert answers["second"].tokens == []
    assert len(answers["first"].tokens) == 4


def test_the_queue_is_bounded_and_says_when_to_come_back(base: LlamaForCausalLM) -> None:
    engine = engine_for(base, max_rows=1, max_queue=3)
    for i in range(3):
        engine.submit(request(f"r{i}", None, prompt_of(3)))
    with pytest.raises(Backpressure) as refused:
        engine.submit(request("r3", None, prompt_of(3)))
    assert refused.value.retry_after_s >= 1
    assert refused.value.detail["code"] == "queue_full"
    assert set(run(engine)) == {"r0", "r1", "r2"}
    assert set(run(engine, [request("r3", None, prompt_of(3))])) == {"r3"}


def test_a_refused_request_holds_no_adapter(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=1, max_queue=1)
    load(engine, adapters[0])
    engine.submit(request("r0", "a0", prompt_of(3)))
    with pytest.raises(Backpressure):
        engine.submit(request("r1", "a0", prompt_of(3)))
    with pytest.raises(Conflict):
        engine.submit(request("r0", "a0", prompt_of(3)))
    run(engine)
    engine.retire("a0")
    tiers = engine.stats()["adapters"]
    assert (tiers["in_slots"], tiers["in_host"]) == (0, 0), "retired and nobody holds it"


def test_a_submission_that_breaks_holds_no_adapter(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it breaks by a mistake of ours, in text that is read again."""
    engine = engine_for(base)
    load(engine, adapters[0])

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "_replay", broken)
    with pytest.raises(ZeroDivisionError):
        engine.submit(request("r", adapters[0].name, (1, 2)))
    assert not engine.has_work()
    engine.retire(adapters[0].name)
    assert engine.store.snapshot()["in_host"] == 0, "retired and nobody holds it"


def test_adapters_take_turns(base: LlamaForCausalLM, adapters: list[SavedAdapter]) -> None:
    engine = engine_for(base, max_rows=1)
    load(engine, *adapters)
    for i in range(6):
        engine.submit(request(f"flood{i}", "a0", prompt_of(3), max_tokens=1))
    engine.submit(request("late", "a1", prompt_of(3), max_tokens=1))
    order = list(run(engine))
    assert order.index("late") <= 1


def test_a_payer_s_flood_delays_another_by_a_turn(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, max_rows=2)
    load(engine, *adapters)
    flood = [
        request(f"w{i}", f"a{i % 6}", prompt_of(3), max_tokens=5, payer="whale") for i in range(30)
    ]
    for r in flood:
        engine.submit(r)
    for _ in range(8):
        engine.step()
    engine.submit(request("minnow", "a0", prompt_of(3), max_tokens=5, payer="minnow"))
    steps = 0
    while not any(d.request_id == "minnow" and d.token_ids for d in engine.step()):
        steps += 1
    assert steps <= 5, "when the first of the rows that run is over it is next"
    assert len(run(engine)) >= 20


def test_a_request_for_a_full_set_of_slots_is_not_starved(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    """One slot, held by a stream of requests for one adapter; another one waits for it."""
    engine = engine_for(base, max_rows=2, slots=1)
    load(engine, *adapters)
    engine.submit(request("hog0", "a0", prompt_of(3), max_tokens=4))
    engine.submit(request("other", "a1", prompt_of(3), max_tokens=2))
    for i in range(1, 60):
        engine.submit(request(f"hog{i}", "a0", prompt_of(3), max_tokens=4 + i % 2))
        if any(d.request_id == "other" and d.finish for d in engine.step()):
            break
    else:
        pytest.fail("starved")
    run(engine)


def test_a_deadline_ends_waiting_and_running_requests(base: LlamaForCausalLM) -> None:
    now = [0.0]
    engine = engine_for(base, max_rows=1)
    engine._clock = lambda: now[0]
    engine.submit(request("running", None, prompt_of(3), max_tokens=100, timeout_s=5))
    engine.submit(request("waiting", None, prompt_of(3), timeout_s=2))
    engine.step()
    now[0] = 3.0
    assert [d.finish.reason for d in engine.step() if d.finish] == ["deadline"]
    now[0] = 6.0
    [last] = [d for d in engine.step() if d.finish]
    assert last.finish is not None
    assert (last.request_id, last.finish.reason) == ("running", "deadline")
    assert not engine.has_work()


def test_an_answer_ends_in_the_step_that_passes_its_deadline(
    base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    engine = engine_for(base)
    engine._clock = lambda: now[0]
    forward = Forward.__call__

    def slow(*a: Any) -> torch.Tensor:
        now[0] += 3.0
        return forward(*a)

    monkeypatch.setattr(Forward, "__call__", slow)
    engine.submit(request("r", None, prompt_of(3), max_tokens=100, timeout_s=5))
    first, last = engine.step()
    assert first.finish is None
    assert last.finish is not None
    assert last.finish.reason == "deadline", "the step ends at 6 s, and says so"
    assert last.finish.completion_tokens == 2


def test_retire_lets_the_running_answer_finish(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    engine = engine_for(base, slots=1)
    load(engine, adapters[0])
    engine.submit(request("r", "a0", prompt_of(6), max_tokens=10))
    first = engine.step()
    engine.retire("a0")
    with pytest.raises(UnknownAdapter):
        engine.submit(request("new", "a0", prompt_of(6)))
    # The id is free at once, and the new adapter under it is another one.
    other = save_adapter(base, tmp_path, "a0", rank=8, seed=99)
    load(engine, other)
    engine.submit(request("new", "a0", prompt_of(6), max_tokens=10))
    answers = run(engine)
    head = [t for d in first for t in d.token_ids]
    assert head + answers["r"].tokens == oracle(base, adapters[0], prompt_of(6), 10)
    assert answers["new"].tokens == oracle(base, other, prompt_of(6), 10)


def test_stop_strings_cut_across_tokens(base: LlamaForCausalLM) -> None:
    engine = engine_for(base)
    free = run(engine, [request("r", None, prompt_of(6), max_tokens=40)])["r"].text
    stop = free[5:8]
    assert free.find(stop) == 5, "choose another prompt: the stop must be new there"
    cut = run(engine, [request("r", None, prompt_of(6), max_tokens=40, stop=(stop, "never"))])["r"]
    assert cut.text == free[:5]
    assert cut.finish.reason == "stop"


def test_logprobs_are_the_model_s_own(base: LlamaForCausalLM) -> None:
    engine = engine_for(base)
    prompt = prompt_of(7)
    answer = run(engine, [request("r", None, prompt, max_tokens=2, logprobs=3)])["r"]
    with torch.inference_mode():
        logits = base(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = torch.log_softmax(logits, -1)
    [first] = answer.deltas[0].logprobs
    assert first.logprob == pytest.approx(float(expected[first.token_id]), abs=1e-4)
    assert [i for i, _ in first.top] == expected.topk(3).indices.tolist()


def test_the_window_is_a_limit_with_a_name(base: LlamaForCausalLM) -> None:
    engine = engine_for(base, max_len=32)
    with pytest.raises(PromptTooLong) as refused:
        engine.submit(request("r", None, prompt_of(32)))
    assert refused.value.detail["code"] == "context_length_exceeded"
    answer = run(engine, [request("r", None, prompt_of(31), max_tokens=10)])["r"]
    assert answer.finish.reason == "length"
    assert answer.tokens == oracle(base, None, prompt_of(31), 1)
    full = run(engine, [request("r", None, prompt_of(20), max_tokens=100)])["r"]
    assert full.tokens == oracle(base, None, prompt_of(20), 12), "up to the last position"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**53},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"logprobs": 21},
        {"timeout_s": 0.0},
    ],
)
def test_parameters_out_of_range_are_refused(
    base: LlamaForCausalLM, wrong: dict[str, object]
) -> None:
    engine = engine_for(base)
    with pytest.raises(InvalidEvent):
        engine.submit(request("r", None, prompt_of(3), **wrong))
    assert not engine.has_work()


@pytest.mark.parametrize("prompt", [(), (-1,), (320,)])
def test_prompts_that_are_none_are_refused(base: LlamaForCausalLM, prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidEvent):
        engine_for(base).submit(request("r", None, prompt))


def test_an_unknown_adapter_is_not_found(base: LlamaForCausalLM) -> None:
    with pytest.raises(NotFound) as refused:
        engine_for(base).submit(request("r", "../../etc", prompt_of(3)))
    assert refused.value.detail["code"] == "model_not_found"


def test_a_step_that_fails_ends_its_requests_and_no_later_one(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(base, max_rows=2)
    load(engine, *adapters)
    for i in range(4):
        engine.submit(request(f"r{i}", f"a{i}", prompt_of(4)))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "__call__", lambda *a: 1 / 0)
        ended = engine.step()
    assert {d.request_id for d in ended} == {"r0", "r1", "r2", "r3"}
    assert all(isinstance(d.finish.error, ComputeError) for d in ended if d.finish)
    answers = run(engine, [request("r0", "a0", prompt_of(4)), request("b", None, prompt_of(4))])
    assert answers["r0"].tokens == oracle(base, adapters[0], prompt_of(4), 12)
    assert answers["b"].tokens == oracle(base, None, prompt_of(4), 12)


def test_an_adapter_that_breaks_on_disk_ends_only_its_own_request(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    engine = engine_for(base, slots=1, host_bytes=1)
    bad = save_adapter(base, tmp_path, "bad", seed=3)
    load(engine, bad, adapters[0])  # loading a0 pushes bad out of host memory
    weights = bad.path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    answers = run(
        engine, [request("x", "bad", prompt_of(4)), request("y", "a0", prompt_of(4), max_tokens=5)]
    )
    assert answers["x"].finish.reason == "error"
    assert answers["x"].finish.error.detail["code"] == "corrupt_adapter"
    assert answers["y"].tokens == oracle(base, adapters[0], prompt_of(4), 5)


@pytest.mark.parametrize("heat", [0.0, 1.2])
def test_an_answer_resumes_exactly_at_any_token(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], heat: float
) -> None:
    """Another engine goes on from any cut: same tokens, text, log probabilities, seed and stop."""
    first, second = engine_for(base), engine_for(base, prefill_chunk=4)
    load(first, *adapters)
    load(second, *adapters)
    kw: dict[str, Any] = {"temperature": heat, "seed": 9, "logprobs": 2, "max_tokens": 14}
    free = run(first, [request("r", "a1", prompt_of(6), **kw)])["r"]
    stop = free.text[len(free.text) // 2 :][:2] or "never"
    for stops in ((), (stop,)):
        whole = run(first, [request("r", "a1", prompt_of(6), stop=stops, **kw)])["r"]
        cuts = range(1, len(whole.tokens) + 1)
        resumed = [
            request(
                f"cut{cut}",
                "a1",
                prompt_of(6),
                stop=stops,
                resume_ids=tuple(whole.tokens[:cut]),
                **kw,
            )
            for cut in cuts
        ]
        answers = run(second, [*resumed, request("crowd", "a5", prompt_of(9))])
        for cut in cuts:
            rest = answers[f"cut{cut}"]
            assert rest.tokens == whole.tokens[cut:]
            assert rest.text == "".join(d.text for d in whole.deltas[cut:])
            told = [lp for d in whole.deltas[cut:] for lp in d.logprobs]
            again = [lp for d in rest.deltas for lp in d.logprobs]
            assert [lp.token_id for lp in again] == [lp.token_id for lp in told]
            assert [lp.logprob for lp in again] == pytest.approx(
                [lp.logprob for lp in told], abs=1e-4
            )
            for what in ("reason", "prompt_tokens", "completion_tokens", "seed"):
                assert getattr(rest.finish, what) == getattr(whole.finish, what), (cut, what)


def test_resuming_with_a_temperature_needs_the_seed(base: LlamaForCausalLM) -> None:
    engine = engine_for(base)
    with pytest.raises(InvalidEvent, match="seed"):
        engine.submit(request("r", None, prompt_of(3), temperature=1.0, resume_ids=(1,)))
    with pytest.raises(InvalidEvent, match="resume_ids"):
        engine.submit(request("r", None, prompt_of(3), max_tokens=2, resume_ids=(1, 2, 3)))
    assert not engine.has_work()
