"""Looks at serving engines that answer, hang, die and come back; and what is told of them."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ledger.api import serving_watch
from ledger.api.serving_metrics import ServingCollector
from ledger.api.serving_totals import Totals, quantile
from ledger.api.serving_view import figures, message
from ledger.api.serving_watch import ServingWatch
from ledger.console.serving import serving_headers, serving_page
from ledger.errors import Backpressure, ComputeError
from workers.openlora.meter import Meter

STORE = {
    "registered": 9, "in_slots": 3, "slots": 4, "in_host": 6, "host_bytes": 2**20, "slot_hits": 5,
    "host_hits": 2, "disk_loads": 1, "slot_evictions": 1, "host_evictions": 0,
}  # fmt: skip


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Engines:
    """`ServingEngine.stats()` of replicas, each with a meter that counts for real."""

    def __init__(self, time: Time, *names: str) -> None:
        self.time = time
        self.meters = {name: Meter(time) for name in names}
        self.states = dict.fromkeys(names, "ready")
        self.error: Exception | None = None
        self.delay_s = 0.0

    async def stats(self) -> Mapping[str, Any]:
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return {
            "replicas": [
                {
                    "name": name, "state": self.states[name], "address": "127.0.0.1:1",
                    "stats": self._stats(meter) if self.states[name] != "down" else {},
                }
                for name, meter in self.meters.items()
            ],
            "router": {"resumed": 2, "note": "not a number"},
        }  # fmt: skip

    def _stats(self, meter: Meter) -> dict[str, Any]:
        row = {"rows": 3, "max_rows": 4, "queued": 1, "adapters": STORE}
        travelled: dict[str, Any] = json.loads(json.dumps({**row, "metrics": meter.snapshot()}))
        return travelled

    def work(self, name: str, tokens: int = 10, adapter: str = "a1") -> None:
        meter = self.meters[name]
        meter.started(0.02)
        meter.tokens(self.time.now, [0.04] * (tokens - 1), [0.3])
        meter.decode([adapter, None], form="row", seconds=0.03)
        meter.finished(
            adapter, "stop", prompt_tokens=4, completion_tokens=tokens, ttft_s=0.3, total_s=1.0
        )


def watching(engines: Engines) -> ServingWatch:
    names = {"a1": 'acme/<b>"desk"'}
    return ServingWatch(
        engine=lambda: engines,  # type: ignore[arg-type, return-value]
        name_of=names.get,
        message=message,
        clock=engines.time,
    )


def look(watch: ServingWatch, engines: Engines, seconds: float = 1.0) -> None:
    engines.time.now += seconds
    asyncio.run(watch.look())


def scraped(watch: ServingWatch) -> dict[tuple[str, ...], float]:
    """Samples by name, replica and other labels, through Prometheus' own parser."""
    registry = CollectorRegistry()
    registry.register(ServingCollector(watch))
    text = generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            order = sorted(sample.labels, key=lambda label: (label != "replica", label))
            name = sample.name.removeprefix("tributary_serving_")
            found[name, *(sample.labels[label] for label in order)] = sample.value
    return found


@pytest.fixture
def engines() -> Engines:
    return Engines(Time(), "r0", "r1")


def test_a_scrape_tells_every_replicas_own_counts(engines: Engines) -> None:
    watch = watching(engines)
    engines.work("r0")
    engines.work("r1", tokens=7, adapter="a2")
    look(watch, engines)
    found = scraped(watch)
    assert found["up", "r0"] == found["up", "r1"] == 1
    assert found["replica_state", "r0", "ready"] == 1
    assert found["replica_state", "r0", "down"] == 0
    assert found["generation_tokens_total", "r0"] == 10
    assert found["generation_tokens_total", "r1"] == 7
    assert found["num_requests_running", "r0"] == 3
    assert found["num_requests_waiting", "r0"] == 1
    assert found["requests_finished_total", "r0", "stop"] == 1
    assert found["adapter_lookups_total", "r0", "slots"] == 5
    assert found["adapters", "r1", "registered"] == 9
    assert found["lora_form_steps_total", "r0", "row"] == 1
    assert found["adapter_generation_tokens_total", "r0", "a1", 'acme/<b>"desk"'] == 10
    assert found["adapter_time_to_first_token_seconds_sum", "r1", "a2", "a2"] == 0.3
    assert found["router", "resumed"] == 2
    name = "time_to_first_token_seconds"
    assert found[f"{name}_bucket", "r0", "0.25"] == 0
    assert found[f"{name}_bucket", "r0", "0.5"] == 1
    assert found[f"{name}_bucket", "r0", "+Inf"] == found[f"{name}_count", "r0"] == 1
    assert found[f"{name}_sum", "r0"] == 0.3
    assert found["inter_token_latency_seconds_bucket", "r0", "0.04"] == 9


def test_a_replica_that_is_down_keeps_its_last_counts(engines: Engines) -> None:
    watch = watching(engines)
    engines.work("r0")
    look(watch, engines)
    engines.states["r0"] = "down"
    look(watch, engines, 5.0)
    found = scraped(watch)
    assert (found["up", "r0"], found["up", "r1"]) == (0, 1)
    assert found["generation_tokens_total", "r0"] == 10
    assert found["sample_age_seconds", "r0"] == 5
    engines.error = ComputeError("no engine")
    look(watch, engines)
    assert scraped(watch)["up", "r1"] == 0
    engines.error = None
    engines.states["r0"] = "ready"
    look(watch, engines)
    assert scraped(watch)["up", "r0"] == 1
    assert [row["cells"][1] for row in figures(watch)["rows"]["replicas"]] == ["ready", "ready"]


def test_an_engine_that_hangs_holds_nobody_up(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_watch, "STATS_TIMEOUT_S", 0.05)
    watch = watching(engines)
    look(watch, engines)
    engines.delay_s = 60.0
    asyncio.run(asyncio.wait_for(watch.look(), 10))
    assert scraped(watch)["up", "r0"] == 0


def test_replicas_that_are_gone_are_forgotten(engines: Engines) -> None:
    watch = watching(engines)
    look(watch, engines)
    del engines.meters["r1"]
    look(watch, engines)
    assert scraped(watch)["up", "r1"] == 0
    look(watch, engines, serving_watch.FORGET_S + 1)
    assert ("up", "r1") not in scraped(watch)


def test_no_engine_is_no_replica(engines: Engines) -> None:
    watch = watching(engines)
    watch.engine = lambda: None
    look(watch, engines)
    assert scraped(watch) == {("viewers",): 0}
    html = serving_page(figures(watch), name="here").decode()
    assert "No engine has answered yet." in html


def test_totals_survive_a_restart_and_never_fall(engines: Engines) -> None:
    watch = watching(engines)
    look(watch, engines)
    engines.work("r0")
    look(watch, engines)
    assert watch.totals.counts["tokens"] == 10
    engines.meters["r0"] = Meter(engines.time)  # its process died
    engines.work("r0", tokens=4)
    look(watch, engines)
    assert watch.totals.counts["tokens"] == 14
    assert sum(watch.totals.histograms["ttft_s"]) == 2
    assert watch.window(1.0).counts["tokens"] == 4
    assert watch.window(60.0).counts["tokens"] == 14
    assert [look.tokens_per_s for look in watch.history] == [0, 10, 4]


def test_quantiles_are_interpolated_and_bounded() -> None:
    assert quantile([1.0, 2.0], [0, 0, 0], 0.5) is None
    assert quantile([], [], 0.5) is None
    assert quantile([1.0, 2.0], [4, 4, 0], 0.25) == 0.5
    assert quantile([1.0, 2.0], [4, 4, 0], 0.75) == 1.5
    assert quantile([1.0, 2.0], [0, 0, 9], 0.5) == 2.0
    assert Totals().quantile("nothing", 0.5) is None


def test_the_page_is_whole_without_a_script_and_escapes_names(engines: Engines) -> None:
    watch = watching(engines)
    look(watch, engines)
    engines.work("r0", tokens=1_234)
    look(watch, engines)
    shown = figures(watch)
    html = serving_page(shown, name="Ledger & Co").decode()
    assert "acme/&lt;b&gt;&#34;desk&#34;" in html
    assert "acme/<b>" not in html
    assert "Ledger &amp; Co" in html
    assert shown["text"]["tokens"] == "1,234"
    assert 'data-text="tokens">1,234<' in html
    assert shown["text"]["ttft_p50"] == "375 ms"  # in the middle of its bucket
    policy = serving_headers()["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert len(shown["points"]["rate"].split()) == 2
    assert shown["width"]["tier_slots"] == 0.0  # hits before the first look are no news


def test_viewers_share_a_message_and_are_bounded(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_watch, "PERIOD_S", 0.05)
    monkeypatch.setattr(serving_watch, "MAX_VIEWERS", 2)
    watch = watching(engines)

    async def view() -> None:
        running = asyncio.create_task(watch.run())
        viewers = [watch.follow() for _ in range(3)]
        assert [await anext(v) for v in viewers[:2]] == [b"retry: 3000\n\n"] * 2
        with pytest.raises(Backpressure):
            await anext(viewers[2])
        first, second = [await anext(v) for v in viewers[:2]]
        assert first.startswith(b"data: {")
        assert first.endswith(b"\n\n")
        assert json.loads(first[6:]).keys() == json.loads(second[6:]).keys()
        for v in viewers[:2]:
            await anext(v)
            await v.aclose()
        assert watch.viewers == 0
        running.cancel()
        await asyncio.wait([running], timeout=5)

    asyncio.run(asyncio.wait_for(view(), 20))


def test_a_quiet_line_is_kept_open(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_watch, "HEARTBEAT_S", 0.05)
    watch = watching(engines)

    async def view() -> None:
        watch._changed = asyncio.Condition()
        viewer = watch.follow()
        await anext(viewer)
        await anext(viewer)
        assert await anext(viewer) == b": still here\n\n"
        await viewer.aclose()

    asyncio.run(asyncio.wait_for(view(), 20))
