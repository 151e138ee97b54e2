"""Beginnings that are read once: exact, counted, bounded, and never across adapters."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from ledger.errors import NotFound
from tests.unit.openlora_world import (
    SavedAdapter,
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
from workers.openlora import prefixes

torch.set_num_threads(1)
SYSTEM = prompt_of(40, seed=77)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def adapters(
    base: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> list[SavedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(base, folder, f"a{i}", rank=3 + i, seed=20 + i) for i in range(3)]


@pytest.mark.parametrize(("chunk", "shared"), [(256, 40), (16, 32)])
def test_a_burst_with_one_system_prompt_reads_it_once_per_adapter(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], chunk: int, shared: int
) -> None:
    """For less than MIN_PREFIX more tokens nobody waits another step."""
    engine = engine_for(base, prefill_chunk=chunk)
    load(engine, *adapters)
    one, two = adapters[:2]
    who: list[SavedAdapter | None] = [one, one, two, None, one, None]
    requests = [
        request(f"r{i}", a.name if a else None, SYSTEM + prompt_of(3 + i, seed=i), max_tokens=5)
        for i, a in enumerate(who)
    ]
    answers = run(engine, requests)
    for r, a in zip(requests, who, strict=True):
        assert answers[r.request_id].tokens == oracle(base, a, r.prompt_ids, 5)
    stats = engine.stats()
    assert stats["prefix_hit_tokens"] == 3 * shared
    assert stats["prompt_tokens"] == sum(len(r.prompt_ids) for r in requests) - 3 * shared
    assert sorted(a.finish.reused_tokens for a in answers.values()) == [0, 0, 0] + 3 * [shared]


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(
    base: LlamaForCausalLM, adapters: list[SavedAdapter]
) -> None:
    engine = engine_for(base, prefix_rows=2)
    load(engine, *adapters)
    prompt = SYSTEM
    hits = []
    for turn in range(4):
        before = engine.stats()["prefix_hit_tokens"]
        answer = run(engine, [request(f"t{turn}", "a0", prompt, max_tokens=6)])[f"t{turn}"]
        assert answer.tokens == oracle(base, adapters[0], prompt, 6)
        hits.append(engine.stats()["prefix_hit_tokens"] - before)
        prompt += (*answer.tokens, *prompt_of(4, seed=turn))
    # What was never seen before is not kept; after that, all but the last token of the answer is.
    assert hits == [0, 0, 40 + 10 + 5, 40 + 20 + 5]


def test_another_version_of_an_adapter_shares_nothing_with_the_last(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    engine = engine_for(base)
    load(engine, adapters[0])
    for i in range(3):
        run(engine, [request(f"old{i}", "a0", SYSTEM, max_tokens=3)])
    assert engine.stats()["prefix_hits"] == 1
    engine.submit(request("running", "a0", SYSTEM, max_tokens=20))
    head = engine.step()
    engine.retire("a0")
    new = save_adapter(base, tmp_path, "a0", rank=5, seed=99)
    load(engine, new)
    hits = engine.stats()["prefix_hits"]
    answers = run(engine, [request("new", "a0", SYSTEM, max_tokens=8)])
    assert answers["new"].tokens == oracle(base, new, SYSTEM, 8)
    assert engine.stats()["prefix_hits"] == hits
    first = gather(head)["running"].tokens
    assert first + answers["running"].tokens == oracle(base, adapters[0], SYSTEM, 20)


def test_a_hot_replacement_shares_nothing_with_what_it_replaced(
    base: LlamaForCausalLM, adapters: list[SavedAdapter], tmp_path: Path
) -> None:
    """Running and waiting answers end on the old weights; later ones begin on the new."""
    engine = engine_for(base, max_rows=2)
    old = adapters[0]
    load(engine, old)
    for i in range(3):
        run(engine, [request(f"before{i}", "a0", SYSTEM, max_tokens=2)])
    for i in range(3):  # two rows run, one request waits
        engine.submit(request(f"old{i}", "a0", (*SYSTEM, i), max_tokens=9))
    head = engine.step()
    new = save_adapter(base, tmp_path, "a0", rank=6, seed=123)
    engine.replace_adapter("a0", new.path, new.sha256, config_sha256=new.config_sha256)
    later = [request(f"new{i}", "a0", (*SYSTEM, i), max_tokens=9) for i in range(2)]
    answers = run(engine, later)
    first = gather(head)
    for i in range(3):
        tokens = first[f"old{i}"].tokens if f"old{i}" in first else []
        assert tokens + answers[f"old{i}"].tokens == oracle(base, old, (*SYSTEM, i), 9)
    for i in range(2):
        assert answers[f"new{i}"].tokens == oracle(base, new, (*SYSTEM, i), 9)
    assert answers["old2"].finish.reused_tokens == len(SYSTEM), "from what is kept of the old"
    assert answers["new0"].finish.reused_tokens == 0
    with pytest.raises(NotFound):
        engine.replace_adapter("nobody", new.path, new.sha256)


@pytest.mark.parametrize("seed", range(3))
def test_reuse_changes_no_token(
    base: LlamaForCausalLM,
    adapters: list[SavedAdapter],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that branch from each other anywhere, cancelled and timed as they come."""
    rng = random.Random(seed)
    prompts = [prompt_of(30, seed=seed)]
    for i in range(25):
        trunk = rng.choice(prompts)
        prompts.append(trunk[: rng.randint(10, len(trunk))] + prompt_of(rng.randint(1, 9), seed=i))
    requests = [
        request(
            f"r{i}",
            rng.choice([None, "a0", "a1"]),
            p[:90],
            max_tokens=rng.randint(1, 9),
            temperature=rng.choice([0.0, 0.8]),
            seed=i,
        )
        for i, p in enumerate(prompts)
    ]
    cancelled = set(rng.sample(range(len(requests)), 5))

    def answers() -> tuple[dict[str, list[int]], int]:
        engine = engine_for(
            base, max_rows=4, prefill_chunk=9, prefill_tokens=30, prefix_rows=3, slots=3
        )
        load(engine, *adapters)
        deltas = []
        for i, r in enumerate(requests):
            engine.submit(r)
            deltas += engine.step()
            if i in cancelled:
                engine.cancel(r.request_id)
        done = {name: a.tokens for name, a in run(engine).items()}
        tokens = {name: a.tokens for name, a in gather(deltas).items()}
        both = {n: tokens.get(n, []) + done.get(n, []) for n in tokens.keys() | done.keys()}
        return both, engine.stats()["prefix_hit_tokens"]

    with_reuse, hit_tokens = answers()
    monkeypatch.setattr(prefixes, "MIN_PREFIX", 10**6)
    without, none = answers()
    assert none == 0 < hit_tokens
    whole = [f"r{i}" for i in range(len(requests)) if i not in cancelled]
    assert {n: with_reuse[n] for n in whole} == {n: without[n] for n in whole}


def test_what_is_kept_is_bounded_and_the_least_used_goes(base: LlamaForCausalLM) -> None:
    engine = engine_for(base, prefix_rows=2, max_rows=2)
    systems = [prompt_of(20, seed=i) for i in range(4)]

    def ask(which: int, name: str) -> int:
        before = engine.stats()["prefix_hit_tokens"]
        prompt = systems[which] + prompt_of(3, seed=sum(name.encode()))
        run(engine, [request(name, None, prompt, max_tokens=2)])
        return int(engine.stats()["prefix_hit_tokens"] - before)

    for which in range(4):
        assert ask(which, f"first{which}") == 0
    assert ask(0, "second") == 0, "kept from now on: it came back"
    assert ask(0, "third") >= 20
    assert ask(1, "fourth") == 0
    assert ask(0, "fifth") >= 20
    assert ask(2, "sixth") == 0, "takes the place of 1, which was not used since"
    assert ask(0, "seventh") >= 20
    assert ask(1, "eighth") == 0
    assert len(engine._prefixes._kept) == 2


def test_the_common_beginning_is_found() -> None:
    rng = random.Random(1)
    for _ in range(500):
        a = tuple(rng.choice((0, 0, 0, 0, 0, 0, 1)) for _ in range(rng.randint(0, 60)))
        b = a[: rng.randint(0, 60)] + tuple(rng.randint(0, 1) for _ in range(rng.randint(0, 9)))
        most = rng.randint(0, 70)
        alike = 0
        while alike < min(len(a), len(b), most) and a[alike] == b[alike]:
            alike += 1
        assert prefixes.common(a, b, most) == (alike if alike >= prefixes.MIN_PREFIX else 0)


def test_after_a_step_that_failed_nothing_kept_is_reused(
    base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have failed in the middle of a copy into what is kept."""
    engine = engine_for(base, prefix_rows=1)
    for i in range(2):
        run(engine, [request(f"r{i}", None, SYSTEM, max_tokens=4)])
    hits = engine.stats()["prefix_hits"]
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("the device is lost")

        patch.setattr(engine._batch.forward, "decode", fail)
        patch.setattr(engine._decoder, "decode", fail)
        failed = run(engine, [request("x", None, SYSTEM, max_tokens=4)])["x"].finish
        assert failed.error is not None
    hits_then = engine.stats()["prefix_hits"]
    assert hits_then == hits + 1  # the sequence was kept until then
    answer = run(engine, [request("y", None, SYSTEM, max_tokens=4)])["y"]
    assert engine.stats()["prefix_hits"] == hits_then
    assert answer.tokens == oracle(base, None, SYSTEM, 4)
