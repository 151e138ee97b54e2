"""Counts of serving: bounded, growing only, and those of a real engine's own work."""

import json
import threading
from pathlib import Path

import pytest

from ledger.errors import LedgerError
from tests.unit.openlora_world import byte_tokenizer, save_adapter, tiny_llama
from workers.openlora.engine import Engine, EngineConfig, GenerationRequest
from workers.openlora.meter import (
    BASE,
    MAX_ADAPTERS,
    MAX_REASONS,
    MAX_SWAPS,
    OTHER,
    PERIOD_S,
    RATE_WINDOW_S,
    Histogram,
    Meter,
)


class Time:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def done(meter: Meter, adapter: str | None, times: int = 1, tokens: int = 2) -> None:
    for _ in range(times):
        meter.finished(
            adapter, "stop", prompt_tokens=3, completion_tokens=tokens, ttft_s=0.5, total_s=1.0
        )


def test_a_value_on_a_bound_counts_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    histogram.observe(9.0, times=3)
    assert histogram.snapshot() == {"bounds": [1.0, 2.0], "counts": [2, 2, 4], "sum": 34.5}


def test_tokens_per_second_are_those_of_the_last_whole_seconds(time: Time) -> None:
    meter = Meter(time)
    assert meter.snapshot()["tokens_per_s"] == 0
    for _ in range(4):  # the first four seconds: not diluted by seconds that never were
        meter.tokens(time.now, [0.1] * 30, [0.2])
        time.now += 1
    assert meter.snapshot()["tokens_per_s"] == 31
    time.now += RATE_WINDOW_S - 2
    assert meter.snapshot()["tokens_per_s"] == 2 * 31 / RATE_WINDOW_S
    time.now += RATE_WINDOW_S
    assert meter.snapshot()["tokens_per_s"] == 0
    assert meter.snapshot()["tokens"] == 4 * 31


def test_ten_thousand_adapters_make_a_bounded_table(time: Time) -> None:
    meter = Meter(time)
    for i in range(10_000):
        done(meter, f"a{i}")
    adapters = meter.snapshot()["adapters"]
    assert len(adapters) == MAX_ADAPTERS + 1
    assert adapters[OTHER]["requests"] == 10_000 - MAX_ADAPTERS
    assert sum(counts["completion_tokens"] for counts in adapters.values()) == 20_000


def test_a_busy_adapter_takes_the_place_of_a_quiet_one_and_no_count_falls(time: Time) -> None:
    meter = Meter(time)
    for i in range(MAX_ADAPTERS):
        done(meter, f"quiet{i}")
    for i in range(2 * MAX_SWAPS):
        done(meter, f"busy{i}", times=3)
    before = meter.snapshot()["adapters"]
    assert not any(name.startswith("busy") for name in before)
    time.now += PERIOD_S
    done(meter, "quiet63")
    after = meter.snapshot()["adapters"]
    assert sum(name.startswith("busy") for name in after) == MAX_SWAPS
    assert len(after) == MAX_ADAPTERS + 1
    assert after[OTHER] == before[OTHER]
    time.now += PERIOD_S  # nobody asks for them any more: once more than twice is needed
    done(meter, "quiet63")
    assert meter.snapshot()["adapters"].keys() == after.keys()


def test_reasons_are_bounded(time: Time) -> None:
    meter = Meter(time)
    for i in range(100):
        meter.refused(f"why-{i}")
    refused = meter.snapshot()["refused"]
    assert len(refused) == MAX_REASONS + 1
    assert sum(refused.values()) == 100


def test_threads_lose_no_count() -> None:
    meter = Meter()

    def work() -> None:
        for _ in range(2_000):
            meter.refused("full")
            meter.tokens(1.0, [0.01], [])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = meter.snapshot()
    assert found["refused"] == {"full": 8_000}
    assert found["tokens"] == sum(found["histograms"]["inter_token_s"]["counts"]) == 8_000


# --- a real engine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    base = tiny_llama()
    engine = Engine(base, byte_tokenizer(), EngineConfig(max_rows=3, slots=2, max_queue=4))
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(2):
        saved = save_adapter(tiny_llama(), folder, f"a{i}", seed=i)
        engine.load_adapter(saved.name, Path(saved.path), saved.sha256)
    return engine


def ask(engine: Engine, name: str, adapter: str | None, tokens: int = 5) -> None:
    engine.submit(
        GenerationRequest(
            request_id=name, adapter_id=adapter, prompt_ids=(1, 2, 3, 4), max_tokens=tokens,
            ignore_eos=True,
        )
    )  # fmt: skip


def test_an_engines_own_work_is_what_is_counted(engine: Engine) -> None:
    for name, adapter in (("p", "a0"), ("q", "a1"), ("r", None), ("s", "a0")):
        ask(engine, name, adapter)
    for name, adapter in (("full", "a0"), ("unknown", "a9")):
        with pytest.raises(LedgerError):
            ask(engine, name, adapter)
    engine.cancel("q")
    while engine.has_work():
        engine.step()
    stats = engine.stats()
    found = stats["metrics"]
    json.dumps(stats)
    histograms = found["histograms"]
    assert found["tokens"] == 15 == stats["completion_tokens"]
    assert found["prefill_tokens"] == 12 == stats["prompt_tokens"]
    assert found["finished"] == {"length": 3, "cancelled": 1}
    assert sum(found["refused"].values()) == 2
    assert found["decode_steps"] == stats["decode_steps"] == sum(found["forms"].values())
    assert found["decode_rows"] == 12  # the first token of each comes with its prompt
    assert found["base_rows"] == 4
    assert sum(histograms["ttft_s"]["counts"]) == 3
    assert sum(histograms["inter_token_s"]["counts"]) == 12
    assert sum(histograms["batch_rows"]["counts"]) == found["decode_steps"]
    assert histograms["batch_adapters"]["sum"] < histograms["batch_rows"]["sum"]
    assert sum(histograms["queue_s"]["counts"]) == 3
    assert found["adapters"]["a0"]["completion_tokens"] == 10
    assert found["adapters"][BASE]["requests"] == 1
    assert 0 < found["adapters"]["a0"]["ttft_s"] < 60
    assert 0 < histograms["decode_step_s"]["sum"] < 60


def test_an_answer_that_goes_on_here_counts_what_was_made_here(engine: Engine) -> None:
    before = engine.stats()["metrics"]
    engine.submit(
        GenerationRequest(
            request_id="resumed", adapter_id="a1", prompt_ids=(1, 2, 3, 4), max_tokens=6,
            ignore_eos=True, resume_ids=(7, 8),
        )
    )  # fmt: skip
    while engine.has_work():
        engine.step()
    after = engine.stats()["metrics"]
    assert after["tokens"] - before["tokens"] == 4
    mine = [m["adapters"].get("a1", {}).get("completion_tokens", 0) for m in (before, after)]
    assert mine[1] - mine[0] == 4
